"""One file per rule that a file can break, each made from a valid file by one change; `more` has further ones.

A change is made before digests are computed wherever that is possible, so that the fault itself is what a
reader finds.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import valid, zstd
from .build import Appendix, Coded, Draft, Spec, lay_out, raw_record, seal
from .tensors import affine
from .valid import lines, metadata, text

SpecChange = Callable[[Spec], Any]
DraftChange = Callable[[Draft], Any]
BytesChange = Callable[[bytes], bytes]


@dataclass
class Fault:
    """A change to the valid file `base`; `deep` if only the payload shows it, `coded` if only a decoded frame does."""

    base: str
    change: str
    spec: SpecChange | None = None
    draft: DraftChange | None = None
    data: BytesChange | None = None
    deep: bool = False
    coded: bool = False

    def make(self) -> bytes:
        """The bytes of the invalid file."""
        spec = valid.MAKERS[self.base]()
        if self.spec:
            self.spec(spec)
        draft = lay_out(spec)
        if self.draft:
            self.draft(draft)
        data = seal(draft)
        return self.data(data) if self.data else data


FAULTS: dict[str, Fault] = {}


def header(code: str, field: str, value: Any, base: str = "least") -> None:
    """A fault in one field of the header."""
    FAULTS[code] = Fault(base, f"header: {field} is {value!r}", draft=lambda d: d.header.update({field: value}))


def section(code: str, kind: str, field: str, value: Any, base: str = "least") -> None:
    """A fault in one field of a directory entry."""
    FAULTS[code] = Fault(
        base, f"directory entry of {kind}: {field} is {value!r}", draft=lambda d: d.section(kind).update({field: value})
    )


def entry(code: str, kind: str, place: int, field: str, value: Any, base: str = "toy") -> None:
    """A fault in one field of an index entry, or of its record ("record.field"); a callable gets the old value."""

    def change(d: Draft) -> None:
        row = d.head[kind] if kind != "LAYT" else d.head["LAYT"]["tensors"]
        target = row[place]
        *outer, name = field.split(".")
        for step in outer:
            target = target[step]
        target[name] = value(target[name]) if callable(value) else value

    shown = "changed" if callable(value) else f"{value!r}"
    FAULTS[code] = Fault(base, f"{kind} entry {place}: {field} is {shown}", draft=change)


def spec(code: str, base: str, change: str, function: SpecChange, deep: bool = False) -> None:
    """A fault in what the file holds."""
    FAULTS[code] = Fault(base, change, spec=function, deep=deep)


def data(code: str, base: str, change: str, function: BytesChange, deep: bool = False) -> None:
    """A fault that comes after the digests."""
    FAULTS[code] = Fault(base, change, data=function, deep=deep)


def patch(at: int, value: bytes) -> BytesChange:
    """Overwrite bytes."""
    return lambda b: b[:at] + value + b[at + len(value) :]


# -- signature and header --------------------------------------------------------------------------------

data("file-empty", "least", "no byte", lambda b: b"")
header("bad-magic", "magic", b"GGUF\r\n\x1a\n")
data("file-short", "least", "cut after 255 bytes", lambda b: b[:255])
data("text-mode-damage", "least", "0D 0A became 0A everywhere", lambda b: b.replace(b"\r\n", b"\n"))
header("version-zero", "major", 0)
header("version-byte-swapped", "major", 256)
header("version-future", "major", 2)
header("header-digest", "header_digest", 1)
header("header-size", "header_size", 255)
header("unknown-required-feature", "required_features", 1)
data("file-truncated", "least", "the last byte is missing", lambda b: b[:-1])
data("trailing-bytes", "least", "one byte more", lambda b: b + b"\0")
header("directory-offset", "directory_offset", 320)
header("section-count", "directory_count", 65)
header("directory-entry-size", "directory_entry_size", 128)
header("record-alignment", "record_alignment", 96)
header("head-limit", "head_size", (1 << 24) + 1)
header("directory-range", "head_size", 320)
header("header-reserved", "reserved", b"\0" * 167 + b"\1")
header("directory-digest", "directory_digest", 1)
header("content-flags", "content_flags", 1 << 2 | 1 << 1, "toy")

# -- directory -------------------------------------------------------------------------------------------

section("section-type", "xtra", "type", b"x-ra", "unknown")
section("section-flags", "xtra", "flags", 2, "unknown")
section("section-critical-flag", "PROF", "flags", 1, "unknown")
section("section-unknown-critical", "xtra", "flags", 1, "unknown")
spec("section-empty", "unknown", "section xtra has no byte", lambda s: _set(s.appendices[0], content=b""))
section("section-codec", "xtra", "codec", 2, "unknown")
FAULTS["section-limit"] = Fault(
    "least", "META claims 2^21 + 1 bytes",
    draft=lambda d: d.section("META").update(stored_size=(1 << 21) + 1, raw_size=(1 << 21) + 1),
)  # fmt: skip
section("section-size", "TENS", "raw_size", 1)
section("section-ratio", "A1b2", "raw_size", 64 * 21 + 1, "unknown")
section("section-reserved", "META", "reserved1", b"\0" * 15 + b"\1")
section("data-section-digest", "RESD", "digest", 1)
spec("section-duplicate", "unknown", "xtra twice", lambda s: s.appendices.append(Appendix("xtra", b"more")))
FAULTS["section-missing"] = Fault(
    "dense", "RESD is called resd and ancillary",
    draft=lambda d: d.section("RESD").update(type=b"resd", flags=0, digest=None),
)  # fmt: skip
FAULTS["section-incomplete-set"] = Fault(
    "toy", "SHRD is called shrd and ancillary",
    draft=lambda d: d.section("SHRD").update(type=b"shrd", flags=0, digest=None),
)  # fmt: skip
FAULTS["section-order"] = Fault(
    "least", "META and STRS have each other's type",
    draft=lambda d: (d.section("META").update(type=b"?"), d.section("STRS").update(type=b"META"),
                     d.directory[0].update(type=b"STRS")),
)  # fmt: skip
section("section-wraps", "RESD", "offset", (1 << 64) - 1)
section("section-over-header", "META", "offset", 256)
FAULTS["section-overlap"] = Fault(
    "least", "STRS starts where META does",
    draft=lambda d: d.section("STRS").update(offset=d.section("META")["offset"]),
)  # fmt: skip
FAULTS["section-unaligned"] = Fault(
    "least", "STRS starts 8 bytes later", draft=lambda d: d.section("STRS").update(offset=d.head_at["STRS"] + 8)
)


def _longer(d: Draft, size: int = 64) -> None:
    d.size += size
    d.header["file_size"] += size


FAULTS["section-gap"] = Fault("least", "64 zero bytes at the end, inside file_size", draft=_longer)
FAULTS["section-range"] = Fault(
    "toy", "SHRD is 64 bytes longer than the file",
    draft=lambda d: d.section("SHRD").update(
        stored_size=d.section("SHRD")["stored_size"] + 64, raw_size=d.section("SHRD")["raw_size"] + 64
    ),
)  # fmt: skip
FAULTS["head-size"] = Fault(
    "least", "head_size is one less", draft=lambda d: d.header.update(head_size=d.header["head_size"] - 1)
)


def _pad(d: Draft) -> None:
    """A byte between META and STRS."""
    d.data[d.head_at["STRS"] - 1] = b"\1"


FAULTS["padding-nonzero"] = Fault("least", "the last byte before STRS is 01", draft=_pad)
section("section-digest", "TENS", "digest", 1)

# -- metadata --------------------------------------------------------------------------------------------


def meta(code: str, change: str, content: bytes) -> None:
    """A fault in META."""
    spec(code, "least", f"metadata: {change}", lambda s: _set(s, metadata=content))


def _set(target: Any, **members: Any) -> None:
    for name, value in members.items():
        setattr(target, name, value)


_LEAST = text(metadata())
_OPEN = _LEAST[:-1]  # without the closing brace
meta("json-utf8", "a byte FF in a string", _OPEN + b',"x":"\xff"}')
_COUNTED = _OPEN + b',"x":'
_REST = (1 << 17) - sum(map(_COUNTED.count, (b",", b"{")))  # commas and brackets that are left to the limit
meta("json-tokens", "2^17 + 1 commas and brackets, nearly all of them commas", _COUNTED + b"[" + b"," * _REST + b"]}")
meta("json-depth", "33 levels", _OPEN + b',"x":' + b"[" * 32 + b"]" * 32 + b"}")
meta("json-syntax", "a comma after the last member", _OPEN + b",}")
meta("json-number", "2^53", _OPEN + b',"x":9007199254740992}')
meta("json-duplicate-key", "model twice, once escaped", _OPEN + b',"mod\\u0065l":{}}')
meta("json-string", "half of a surrogate pair", _OPEN + b',"x":"\\ud800"}')
meta("metadata-type", "model_type is a number", text(metadata(model={"config": {"model_type": 5}})))
_SIBLING = {"name": "b.squizd", "size": 1, "file_id": "0" * 64}
_SET = {"index": 0, "count": 2}
meta("sibling-name", "a path", text(metadata(set=_SET, siblings=[_SIBLING | {"name": "../b.squizd"}])))
meta("metadata-set", "two members, no siblings", text(metadata(set=_SET)))

# -- indexes ---------------------------------------------------------------------------------------------

spec("index-size", "toy", "MOEL has 8 bytes more", lambda s: s.extra.update(MOEL=bytes(8)))
spec("index-count", "least", "257 embedded files", lambda s: s.files.extend((f"f{i}", b"x", None) for i in range(257)))
FAULTS["layout-range"] = Fault(
    "toy", "the layout starts at tensor 1", draft=lambda d: d.head["LAYT"]["layouts"][0].update(first_tensor=1)
)
spec("layout-empty", "toy", "a second layout without tensors", lambda s: s.layouts.append([]))
spec("name-length", "dense", "a name of 513 bytes", lambda s: _set(s.residents[-1][0], name="x" * 513))
entry("name-range", "MOEL", 1, "name_offset", 1 << 31)
FAULTS["name-place"] = Fault(
    "toy", "the last name starts at the last byte of the one before",
    draft=lambda d: d.head["MOEL"][1].update(
        name_offset=d.head["MOEL"][1]["name_offset"] - 1, name_length=d.head["MOEL"][1]["name_length"] + 1
    ),
)  # fmt: skip
spec("name-utf8", "toy", "a name with a byte FF", lambda s: _set(s.residents[1][0], name="a\udcff"))
spec("name-control", "toy", "a name with a line feed", lambda s: _set(s.residents[1][0], name="a\nb"))
spec("file-name", "toy", "../tokenizer.json", lambda s: _set(s, files=[("../tokenizer.json", b"{}", None)]))
entry("tensor-role", "TENS", 1, "role", 5, "small")
entry("tensor-mode", "TENS", 1, "mode", 5, "small")
entry("tensor-dtype", "TENS", 1, "dtype", 12, "small")
entry("tensor-encoding", "TENS", 0, "bits", 7)
entry("tensor-dims", "TENS", 9, "ndim", 5, "dense")
entry("tensor-unused-dim", "TENS", 1, "shape3", 1, "small")
entry("tensor-zero-dim", "TENS", 1, "shape0", 0, "small")
entry("tensor-overflow", "TENS", 1, "shape0", (1 << 48) + 1, "small")
entry("row-not-divisible", "TENS", 0, "shape1", 33)
entry("part-size", "TENS", 0, "scales_size", 4)
entry("part-range", "TENS", 0, "scales_offset", (1 << 64) - 64)
entry("part-offset", "TENS", 0, "biases_offset", 64)
spec("name-duplicate", "toy", "two tensors of one name", lambda s: _set(s.residents[1][0], name=s.residents[0][0].name))
entry("record-offset", "TENS", 1, "record.offset", lambda old: old + 64, "small")
entry("record-codec", "TENS", 1, "record.codec", 2, "small")
FAULTS["record-limit"] = Fault(
    "toy", "the last expert's record claims 2^36 + 1 bytes",
    draft=lambda d: d.head["EXPI"][7]["record"].update(stored_size=(1 << 36) + 1, raw_size=(1 << 36) + 1),
)  # fmt: skip
FAULTS["record-empty"] = Fault(
    "toy", "a record of no bytes", draft=lambda d: d.head["TENS"][1]["record"].update(stored_size=0, raw_size=0)
)
entry("record-size", "EXPI", 7, "record.raw_size", lambda old: old + 1)
entry("record-ratio", "TENS", 0, "record.raw_size", 1 << 30, "framed")
entry("record-layout", "EXPI", 7, "record.layout", 1)
entry("index-reserved", "EXPI", 7, "record.reserved", 1 << 31)
entry("record-raw-size", "TENS", 0, "record.raw_size", lambda old: old + 1, "framed")


def _wider(d: Draft) -> None:
    _longer(d)
    resd = d.section("RESD")
    resd.update(stored_size=resd["stored_size"] + 64, raw_size=resd["raw_size"] + 64)


FAULTS["record-range"] = Fault("dense", "64 zero bytes at the end of RESD", draft=_wider)


def _reverse(s: Spec) -> None:
    for some in [*s.layouts, *(e.tensors for _, _, experts in s.layers for e in experts)]:
        some.reverse()


spec("layout-order", "toy", "down before up before gate", _reverse)
FAULTS["layout-raw-size"] = Fault(
    "toy", "the layout is 64 bytes longer", draft=lambda d: d.head["LAYT"]["layouts"][0].update(raw_size=576)
)
spec("moe-layer-unsorted", "toy", "layer 1 before layer 0", lambda s: s.layers.reverse())
spec("moe-layer-experts", "toy", "a layer of no experts", lambda s: s.layers.append((2, "model.layers.2", [])))
spec(
    "name-inside-experts", "toy", "a resident below a module of experts",
    lambda s: _set(s.residents[1][0], name="model.layers.0.mlp.switch_mlp.scale"),
)  # fmt: skip
spec("name-fill", "toy", "STRS has a byte more", lambda s: s.extra.update(STRS=b"x"))

# -- experts ---------------------------------------------------------------------------------------------

entry("expert-layer", "EXPI", 7, "layer", 2)
entry("expert-range", "EXPI", 7, "expert", 4)
entry("expert-duplicate", "EXPI", 7, "expert", 2)
FAULTS["expert-unsorted"] = Fault(
    "toy", "experts 0 and 1 of layer 0 change places",
    draft=lambda d: (d.head["EXPI"][0].update(expert=1), d.head["EXPI"][1].update(expert=0)),
)  # fmt: skip
entry("expert-missing", "MOEL", 1, "expert_count", 5)

# -- payload ---------------------------------------------------------------------------------------------

data("record-digest", "toy", "the lowest bit of the last byte is flipped", lambda b: b[:-1] + bytes([b[-1] ^ 1]), True)

_PLAIN = raw_record([valid.MAKERS["framed"]().residents[0][0]])  # 160 bytes
_BLOCKS, _SUM = zstd.blocks(_PLAIN), zstd.checksum(_PLAIN)


def frame(code: str, change: str, content: bytes) -> None:
    """A fault in the frame of the only record."""
    spec(code, "framed", change, lambda s: s.residents.__setitem__(0, (s.residents[0][0], Coded(content))), True)


_GOOD = zstd.frame(_PLAIN)
frame("zstd-skippable", "a skippable frame before the frame", b"\x50\x2a\x4d\x18\0\0\0\0" + _GOOD)
frame("zstd-magic", "the magic number is 28 B5 2F FC", b"\x28\xb5\x2f\xfc" + _GOOD[4:])
frame("zstd-header", "the reserved bit is set", zstd.header(160, flags=8) + _BLOCKS + _SUM)
frame("zstd-size-absent", "no content size", zstd.header(None, window=0) + _BLOCKS + _SUM)
frame("zstd-size-mismatch", "a content size of 161", zstd.header(161) + _BLOCKS + _SUM)
frame("zstd-dictionary", "a dictionary id", zstd.header(160, flags=1)[:5] + b"\1\xa0" + _BLOCKS + _SUM)
frame("zstd-checksum-missing", "no checksum", zstd.header(160, has_checksum=False) + _BLOCKS)
frame("zstd-window", "a window of 9 MiB", zstd.header(160, window=13 << 3 | 1, width=4) + _BLOCKS + _SUM)
frame(
    "zstd-truncated",
    "the last block says one byte more than there is",
    zstd.header(160) + zstd.block(0, 160, _PLAIN[:150], True),
)
frame("zstd-block", "a block of type 3", zstd.header(160) + zstd.block(3, 160, _PLAIN, True) + _SUM)
frame("zstd-blocks", "64 empty blocks", zstd.header(160) + zstd.block(0, 0, b"", False) * 64 + _BLOCKS + _SUM)
frame("zstd-trailing", "a second frame", _GOOD + _GOOD)
frame("zstd-corrupt", "blocks of 159 bytes", zstd.header(160) + zstd.blocks(_PLAIN[:159]) + zstd.checksum(_PLAIN[:159]))
frame("zstd-checksum", "another checksum", zstd.header(160) + _BLOCKS + b"\0\0\0\0")

_EMBEDDING = 0  # an affine tensor with f32 scales
spec(
    "scale-not-finite", "toy", "a scale is infinite",
    lambda s: _set(s.residents[_EMBEDDING][0], scales=struct.pack("<2f", 1, float("inf"))), True,
)  # fmt: skip
spec(
    "bias-not-finite", "toy", "a bias is not a number",
    lambda s: _set(s.residents[_EMBEDDING][0], biases=struct.pack("<2f", 1, float("nan"))), True,
)  # fmt: skip
spec(
    "e8m0-nan",
    "microscaling-modes",
    "an E8M0 scale is FF",
    lambda s: _set(s.residents[0][0], scales=b"\xff\1\1\1"),
    True,
)
spec(
    "e4m3-nan", "microscaling-modes", "an E4M3 code is FF",
    lambda s: _set(s.residents[1][0], codes=s.residents[1][0].codes[:-1] + b"\xff"), True,
)  # fmt: skip


def _overflow(s: Spec) -> None:
    tensor = affine("model.norm.weight", "norm", 4, 32, "f16", (1, 32))
    tensor.scales, tensor.biases = struct.pack("<e", -4352.0), struct.pack("<e", 256.0)
    s.residents[1] = (tensor, None)


spec("value-overflow", "toy", "15 * 4352 + 256 exceeds 65504, the largest f16", _overflow, True)

# -- appendices ------------------------------------------------------------------------------------------


def appendix(code: str, kind: str, change: str, content: Callable[[Spec], bytes], base: str = "appendices") -> None:
    """A fault in one appendix, stored raw."""

    def function(s: Spec) -> None:
        found = next(a for a in s.appendices if a.type == kind)
        found.content, found.coded = content(s), None

    spec(code, base, f"{kind}: {change}", function, True)


def _profile(code: str, change: str, **members: Any) -> None:
    appendix(code, "PROF", change, lambda s: valid.profile(**members))


def _sparsity(code: str, change: str, **members: Any) -> None:
    appendix(code, "SPRS", change, lambda s: valid.sparsity(s, **members))


def _draft(code: str, change: str, **members: Any) -> None:
    appendix(code, "DRFT", change, lambda s: valid.draft_head([t for t, _ in s.residents[2:]], members))


appendix("appendix-line", "PROF", "the last line does not end", lambda s: valid.profile()[:-1])
appendix(
    "appendix-header", "PROF", "the first line names another appendix", lambda s: lines({"appendix": "x", "version": 1})
)
_profile("profile-type", "a count is 1.5", counts=[60, 40, 1.5, 100])
_profile("profile-layers", "three layers", layers=3)
_profile("profile-count", "a count is negative", counts=[60, 40, -1, 100])
_profile("profile-mass", "gate mass is negative", gate_mass=[-0.5, 20, 0, 1])
_profile("profile-coactivation", "a pair counted oftener than one of its experts", coactivation=[[0, 1, 41]])
_sparsity("sparsity-type", "no predictor", predictor=None)
appendix("sparsity-layers", "SPRS", "a layer is missing", lambda s: b"".join(valid.sparsity(s).splitlines(True)[:2]))
appendix("sparsity-width", "SPRS", "the width is 3", lambda s: valid.sparsity(s).replace(b'"width":2', b'"width":3', 1))
_sparsity("sparsity-clusters", "no cluster", clusters=0)
_sparsity("sparsity-boundaries", "boundaries do not ascend", boundaries=[0, 0, 2])
_sparsity("sparsity-histogram", "a fraction above 1", histogram=[0.25, 1.5])
_sparsity("sparsity-digest", "the digest of other weights", digest="0" * 16)
_draft("draft-type", "no kind", kind=None)
_draft("draft-hidden", "64, the model has 32", hidden=64)
_draft("draft-source-layer", "layer 2 of 2", source_layers=[0, 2])
_draft("draft-tensors", "no tensors", tensors=[])


def _wrong_digest(s: Spec) -> bytes:
    tensors = [{"name": t.name, "digest": "0" * 16} for t, _ in s.residents[2:]]
    return valid.draft_head([], {"tensors": tensors})


appendix("draft-digest", "DRFT", "the digest of other weights", _wrong_digest)
