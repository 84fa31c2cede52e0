"""The spec, its registries and its schema against the code that claims to mirror them, both ways."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import xxhash
from spec_tables import ROOT, SPEC, number, registry, rows, section, table, tables

from squizd.container import appendices, faults, metadata
from squizd.container import layout as L

sys.path.insert(0, str(ROOT / "tools"))
from vectors import valid
from vectors.dump import dump

FIXTURES = ROOT / "fixtures"
WIDTHS = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "4 × u64": 32, "tensor": 96, "record": 40}


# -- byte tables -------------------------------------------------------------------------------------------


def structs() -> dict[str, np.dtype[Any]]:
    return {name: value for name, value in vars(L).items() if isinstance(value, np.dtype)}


def test_every_structure_has_a_byte_table() -> None:
    assert set(tables("struct: ")) == set(structs())


@pytest.mark.parametrize("name", sorted(structs()))
def test_byte_tables(name: str) -> None:
    dtype, found, end = structs()[name], table(f"struct: {name}"), 0
    assert [row[3] for row in found] == list(dtype.names or ())
    for offset, size, kind, field, *_ in found:
        part, at = (dtype.fields or {})[field][:2]
        assert (int(offset), int(size)) == (at, part.itemsize) == (end, WIDTHS.get(kind, part.itemsize)), field
        integer = part.kind == "u" or (part.subdtype is not None and part.subdtype[0].kind == "u")
        assert integer == kind.endswith(("u8", "u16", "u32", "u64")), field
        if part.fields is not None:
            assert part == structs()[kind.upper()]
        end += int(size)
    assert end == dtype.itemsize


def test_header_constants() -> None:
    must = {row[3]: row[5] for row in table("struct: HEADER")}
    assert bytes.fromhex(must["magic"]) == L.MAGIC
    assert (int(must["major"]), int(must["header_size"])) == (L.MAJOR, L.HEADER_SIZE)
    assert (int(must["directory_offset"]), int(must["directory_entry_size"])) == (L.HEADER_SIZE, L.DIRECTORY_ENTRY_SIZE)
    assert must["directory_count"] == f"1 to {L.MAX_SECTIONS}"
    assert must["record_alignment"] == f"a power of two, {L.PART_ALIGNMENT} to 2^24"
    assert L.HEADER.fields is not None
    assert (L.HEADER.fields["header_digest"][1], L.HEADER.fields["reserved"][1]) == (248, 80)


def test_sizes_in_prose() -> None:
    for heading, words in (
        ("8 Embedded files", f"Each entry has {L.EMBEDDED.itemsize} bytes"),
        ("9 Tensors", f"describe a tensor with {L.TENSOR.itemsize} bytes"),
        ("10 Records", f"describe it with {L.RECORD.itemsize} bytes"),
        ("11 Resident tensors", f"{L.RESIDENT.itemsize} bytes each"),
        ("12 Experts", f"modules that hold experts, {L.MOE_LAYER.itemsize} bytes each"),
        ("12 Experts", f"one entry of {L.EXPERT.itemsize} bytes"),
        ("12 Experts", f"8 + {L.LAYOUT.itemsize} L + {L.TENSOR.itemsize} T bytes"),
        ("12 Experts", f"record_alignment of {L.DEFAULT_RECORD_ALIGNMENT}"),
    ):
        assert words in " ".join(section(heading).split()), words


def test_example_digests() -> None:
    text = " ".join(section("1 Conventions").split())
    for data, words in (
        (b"", "of no bytes is"),
        (b"squizd", "the six bytes `squizd`"),
        (bytes(range(256)), "00 to FF"),
    ):
        assert f"{words} 0x{xxhash.xxh64_intdigest(data):016X}" in text


# -- registries ----------------------------------------------------------------------------------------------


def constants(prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): value for name, value in vars(L).items() if name.startswith(prefix)}


def test_content_flags() -> None:
    spec = {name: 1 << int(bit) for bit, name, _ in table("flags")}
    assert spec == constants("FLAG_") == {name: 1 << int(bit) for bit, name, *_ in registry("Content flags")}
    implied = {name: meaning for _, name, meaning in table("flags")}
    for kind, flag in L.SECTION_FLAGS.items():
        name = next(name for name, value in spec.items() if value == flag)
        assert implied[name] == f"there is a section {kind.decode()}"
    for bits, flag in L.AFFINE_FLAGS.items():
        name = next(name for name, value in spec.items() if value == flag)
        assert implied[name] == f"a tensor of TENS or LAYT has mode affine and {bits} bits"


def test_sections() -> None:
    order = (*L.HEAD_SECTIONS, *L.DATA_SECTIONS, *L.APPENDICES)
    kinds = ["head"] * len(L.HEAD_SECTIONS) + ["data"] * len(L.DATA_SECTIONS) + ["ancillary"] * len(L.APPENDICES)
    expected = list(zip((kind.decode() for kind in order), kinds, strict=True))
    spec = table("sections")
    assert [(row[0], row[1]) for row in spec] == expected == [(row[0], row[1]) for row in registry("Sections")]
    assert tuple(row[0].encode() for row in spec if row[2] == "always") == L.REQUIRED_SECTIONS
    assert {row[0].encode() for row in spec if row[2] in ("with EXPI", "with SHRD")} == set(L.MOE_SECTIONS)
    assert {row[0].encode() for row in spec if row[2] in ("with FILE", "with BNDL")} == set(L.FILE_SECTIONS)
    assert L.CRITICAL_SECTIONS == L.HEAD_SECTIONS + L.DATA_SECTIONS


def numbered(name: str, heading: str, values: dict[int, str]) -> None:
    assert {int(row[0]): row[1] for row in table(name)} == values
    assert {int(row[0]): row[1] for row in registry(heading) if row[1]} == values


def test_codecs_dtypes_modes_roles() -> None:
    numbered("codecs", "Codecs", L.CODECS)
    numbered("dtypes", "Dtypes", L.DTYPES)
    numbered("modes", "Modes", L.MODES)
    numbered("roles", "Roles", L.ROLES)
    assert {row[1]: int(row[2]) for row in table("dtypes")} == L.DTYPE_SIZES
    assert tuple(row[1] for row in table("dtypes") if row[3] == "float") == L.FLOATS


def test_modes_have_the_registered_encodings_and_sizes() -> None:
    for _, mode, dtypes, bits, groups, *formulas in table("modes"):
        listed = {(dtype, int(b), int(g)) for dtype in L.DTYPE_SIZES for b in bits.split() for g in groups.split()}
        if dtypes.startswith("a float"):
            listed = {e for e in listed if e[0] in L.FLOATS}
        for dtype in L.DTYPE_SIZES:
            for b in range(17):
                for g in (0, 1, 16, 32, 64, 128, 256):
                    encoding = L.Encoding(mode, dtype, b, g)
                    assert encoding.is_registered() == ((dtype, b, g) in listed), encoding
                    if encoding.is_registered():
                        n = 3 * max(g, 7)
                        numbers = {"n": n, "bits": b, "group_size": g, "dtype_bytes": L.DTYPE_SIZES[dtype]}
                        assert encoding.part_sizes((3, max(g, 7))) == tuple(evaluate(formulas, numbers)), encoding


def evaluate(formulas: list[str], numbers: dict[str, int]) -> Iterator[int]:
    last = 0
    for formula in formulas:
        if formula != "the same":
            expression = formula.replace("bytes of dtype", "dtype_bytes").replace("×", "*").replace("/", "//")
            last = eval(expression, {"__builtins__": {}}, numbers)
        yield last


def test_expert_modules_and_appendices() -> None:
    assert {row[0]: int(row[1]) for row in table("expert modules")} == L.EXPERT_MODULES
    assert {row[0]: int(row[1]) for row in registry("Expert modules")} == L.EXPERT_MODULES
    assert {row[0].encode(): row[1] for row in registry("Appendices")} == appendices.NAMES
    assert {int(row[2]) for row in registry("Appendices")} == {appendices.VERSION}
    for name in appendices.NAMES.values():
        assert f"`{name}` in" in section("17 Appendices")


def test_largest_scales() -> None:
    spec = {row[0]: dict(zip(L.FLOATS, map(int, row[1:]), strict=True)) for row in table("largest e8m0")}
    assert spec == L.LARGEST_E8M0
    for mode, largest in (("mxfp4", 6.0), ("mxfp8", 448.0)):
        for dtype, limit in L.LARGEST.items():
            scale = L.LARGEST_E8M0[mode][dtype]
            assert largest * 2.0 ** (scale - 127) <= limit < largest * 2.0 ** (scale + 1 - 127)


LIMITS = {
    "sections": L.MAX_SECTIONS,
    "bytes of the head": L.MAX_HEAD_SIZE,
    "bytes of META, and of a line of an appendix": L.MAX_JSON_SIZE,
    "commas and opening brackets of a document": L.MAX_JSON_TOKENS,
    "depth of a document": L.MAX_JSON_DEPTH,
    "magnitude of an integer in a document": L.MAX_SAFE_INTEGER,
    "bytes of STRS": L.MAX_NAMES_SIZE,
    "bytes of a name": L.MAX_NAME_LENGTH,
    "characters of a bare name": L.MAX_FILE_NAME_LENGTH,
    "dimensions of a tensor": L.MAX_DIMENSIONS,
    "elements of a tensor": L.MAX_ELEMENTS,
    "entries of TENS": L.MAX_TENSORS,
    "layouts": L.MAX_LAYOUTS,
    "tensors of LAYT": L.MAX_LAYOUT_TENSORS,
    "entries of MOEL": L.MAX_MOE_LAYERS,
    "entries of EXPI": L.MAX_EXPERT_RECORDS,
    "entries of FILE": L.MAX_FILES,
    "bytes of a record or an ancillary section, stored and decoded": L.MAX_RECORD_SIZE,
    "record_alignment": L.MAX_RECORD_ALIGNMENT,
    "window of a zstd frame": L.MAX_ZSTD_WINDOW,
    "raw_size / stored_size with codec zstd": L.MAX_ZSTD_RATIO,
    "size of a zstd block": L.ZSTD_BLOCK_SIZE,
}


def test_limits() -> None:
    assert {row[0]: number(row[1]) for row in table("limits")} == LIMITS
    assert set(constants("MAX_").values()) | {L.ZSTD_BLOCK_SIZE} == set(LIMITS.values())
    for row in table("limits"):
        assert set(row[2].split(", ")) <= set(faults.RULES), row


# -- error codes -----------------------------------------------------------------------------------------------


def test_error_codes_and_their_order() -> None:
    spec = {stage: {code.strip("`"): rule for code, rule in rows} for stage, rows in tables("stage: ").items()}
    assert spec == faults.STAGES
    assert [list(rules) for rules in spec.values()] == [list(rules) for rules in faults.STAGES.values()]
    assert list(spec) == list(faults.STAGES)


def test_every_code_of_the_spec_is_raised_and_the_other_way() -> None:
    code = "".join(p.read_text("utf-8") for p in (ROOT / "squizd" / "container").glob("*.py") if p.name != "faults.py")
    quoted = set(re.findall(r'"([a-z0-9]+(?:-[a-z0-9]+)+)"', code))
    assert set(faults.RULES) - quoted == set()
    assert quoted - set(faults.RULES) - {"utf-8", "latin-1"} == set()


def test_codes_in_prose_exist() -> None:
    prose = re.sub(r"<!-- stage.*?(?=\n## |\n<!-- )", "", SPEC, flags=re.DOTALL)
    mentioned = set(re.findall(r"`([a-z0-9]+(?:-[a-z0-9]+)+)`", prose))
    assert mentioned <= set(faults.RULES)


# -- example and vectors ---------------------------------------------------------------------------------------


def test_worked_example_is_the_vector() -> None:
    data = (FIXTURES / "valid" / "toy.squizd").read_bytes()
    shown = section("26 Worked example").split("```\n")[1]
    assert shown == dump(data)
    covered = 0
    for line in shown.splitlines():
        if line.startswith("        ..."):
            covered += int(line.split()[1])
            continue
        at, raw = int(line[:6], 16), bytes.fromhex(line[8:55])
        assert (at, raw) == (covered, data[at : at + len(raw)])
        covered += len(raw)
    assert covered == len(data)


def test_numbers_of_the_worked_example() -> None:
    data, text = (FIXTURES / "valid" / "toy.squizd").read_bytes(), " ".join(section("26 Worked example").split())
    values = np.load(FIXTURES / "valid" / "toy.npy")
    facts = json.loads((FIXTURES / "valid" / "toy.json").read_text())
    gate = facts["experts"][0]["tensors"][0]["values"]["start"]
    for start in (0, gate):
        assert ", ".join(f"{v:.9g}" for v in values[start : start + 3].tolist()) in text
    for at, dtype in ((0x9C0, "<f4"), (0xA00, "<f4")):
        assert f"`{data[at : at + 4].hex(' ').upper()}` = {np.frombuffer(data, dtype, 1, at)[0]:.9g}" in text
    for at in (0xAC0, 0xB00):
        value = np.frombuffer(b"\0\0" + data[at : at + 2], "<f4")[0]
        assert f"`{data[at : at + 2].hex(' ').upper()}` = {value:.9g}" in text


def test_codes_of_the_ramp() -> None:
    text, file = " ".join(section("14 Decoding").split()), (FIXTURES / "valid" / "ramp.squizd").read_bytes()
    for codes in re.findall(r"`((?:[0-9A-F]{2} ){7,15}[0-9A-F]{2})`", text):
        assert bytes.fromhex(codes) in file
    assert len(re.findall(r"`((?:[0-9A-F]{2} ){7,15}[0-9A-F]{2})`", text)) == 2


def test_vectors_are_listed() -> None:
    listed = {row[0]: row[1] for row in rows(section("Vectors"))}
    assert listed == {name: (make.__doc__ or "").strip() for name, make in valid.MAKERS.items()}
    assert {p.stem for p in (FIXTURES / "valid").glob("*.squizd")} == set(listed)


def test_links() -> None:
    folder = ROOT / "spec"
    for path in folder.glob("*.md"):
        text = path.read_text("utf-8")
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings}
        for target in re.findall(r"\]\(([^)]+)\)", text):
            exists = target[1:] in anchors if target.startswith("#") else (folder / target).exists()
            assert exists, (path.name, target)


# -- metadata schema -------------------------------------------------------------------------------------------

SCHEMA = json.loads((ROOT / "spec" / "metadata.schema.json").read_text("utf-8"))
KINDS: dict[str, Any] = {"object": dict, "array": list, "string": str, "integer": int}


def complies(value: Any, schema: dict[str, Any]) -> bool:
    """The part of JSON Schema that the metadata schema uses; anything else in it is an error."""
    known = {"type", "required", "properties", "items", "pattern", "minimum", "maximum", "maxLength", "$ref"}
    assert set(schema) <= known | {"$schema", "title", "description", "$defs"}, schema
    if "$ref" in schema:
        return complies(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")])
    if not isinstance(value, KINDS[schema["type"]]) or isinstance(value, bool):
        return False
    if isinstance(value, str):
        fits = re.search(schema.get("pattern", "").replace("$", r"\Z"), value) is not None
        return fits and len(value) <= schema.get("maxLength", len(value))
    if isinstance(value, int):
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    if isinstance(value, list):
        return all(complies(item, schema.get("items", {})) for item in value)
    members = schema.get("properties", {})
    return all(name in value for name in schema.get("required", [])) and all(
        complies(item, members[name]) for name, item in value.items() if name in members
    )


def paths(schema: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, bool, dict[str, Any]]]:
    for name, member in schema.get("properties", {}).items():
        yield prefix + name, name in schema.get("required", []), member
        yield from paths(member, f"{prefix}{name}.")


def test_metadata_table_is_the_schema() -> None:
    spec = {row[0]: (row[1] != "", row[2]) for row in table("metadata")}
    names = {"#/$defs/count": "count", "#/$defs/sha256": "SHA-256"}
    found = {}
    for path, required, member in paths(SCHEMA):
        kind = names[member["$ref"]] if "$ref" in member else member["type"]
        found[path] = required, "array of objects" if kind == "array" else kind
    assert spec == found


def test_vectors_comply_with_the_schema() -> None:
    for path in (FIXTURES / "valid").glob("*.json"):
        assert complies(json.loads(path.read_text())["metadata"], SCHEMA), path


FULL: dict[str, Any] = {
    "model": {"config": {"model_type": "m"}},
    "recipe": {"name": "int4", "quantizer": "mse"},
    "provenance": {
        "tool": "t",
        "version": "1",
        "source": {"repo": "a/b", "revision": "c", "files": [{"name": "f", "size": 3, "sha256": "0" * 64}]},
        "calibration": {"sha256": "f" * 64},
    },
    "licence": "MIT",
    "description": "",
    "set": {"index": 0, "count": 2},
    "siblings": [{"name": "b.squizd", "size": 1, "file_id": "a" * 64}],
}


def mutations(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from mutations(item, (*path, key))


@pytest.mark.parametrize("path", list(mutations(FULL)), ids=str)
def test_code_and_schema_agree(path: tuple[Any, ...]) -> None:
    """Every value of a full document is replaced by one of every kind, and removed."""
    replacements: list[Any] = [None, True, -1, 0, 5, 2.5, "", "..", "0" * 64, "G" * 64, "x" * 129, [], [1], {}, "é"]
    for replacement in [*replacements, "remove"]:
        document: Any = copy.deepcopy(FULL)
        if not path:
            document = replacement
        else:
            holder = document
            for step in path[:-1]:
                holder = holder[step]
            if replacement == "remove":
                del holder[path[-1]]
            else:
                holder[path[-1]] = replacement
        code = broken_rule(document)
        assert code in ("", "metadata-type", "metadata-set", "sibling-name")
        fits = code in ("", "metadata-set")  # the schema cannot state the latter
        assert fits == complies(document, SCHEMA), (path, replacement)


def broken_rule(document: Any) -> str:
    """The code that `metadata` gives the document, or an empty string."""
    try:
        metadata.decode(json.dumps(document).encode())
    except metadata.MetadataError as error:
        return error.code
    return ""


def test_full_document_is_valid() -> None:
    assert metadata.decode(metadata.encode(FULL)) == FULL
    assert complies(FULL, SCHEMA)
