"""The vectors of the format: what they decode to, which rule each invalid file breaks, and how they are made."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from squizd.container import File, faults, validate
from squizd.container import layout as L
from squizd.container import open as open_file
from squizd.errors import FormatError, SquizdError

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tools" / "fuzz"))
import flips
import make_fixtures
from vectors import build, valid, zstd

ROOT = Path(__file__).parent.parent
VALID, INVALID = ROOT / "fixtures" / "valid", ROOT / "fixtures" / "invalid"
FACTS: dict[str, dict[str, Any]] = {p.stem: json.loads(p.read_text()) for p in sorted(VALID.glob("*.json"))}
FAULTS: list[dict[str, Any]] = json.loads((INVALID / "index.json").read_text())
DEEP = {*faults.STAGES["payload"], *faults.STAGES["appendices"]}


def same(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> bool:
    """Equal bit for bit, but any NaN is as good as another."""
    if found.dtype.kind == "f":
        found, expected = np.where(np.isnan(found), np.nan, found), np.where(np.isnan(expected), np.nan, expected)
    return found.dtype == expected.dtype and found.tobytes() == expected.tobytes()


def check_tensor(tensor: L.Tensor, values: np.ndarray[Any, Any], facts: dict[str, Any], floats: Any) -> None:
    encoding = tensor.encoding
    assert [tensor.name, tensor.role, encoding.mode, encoding.dtype, encoding.bits, encoding.group_size] == [
        facts[key] for key in ("name", "role", "mode", "dtype", "bits", "group_size")
    ]
    assert tensor.shape == values.shape == tuple(facts["shape"])
    if "integers" in facts:
        expected = np.array(facts["integers"], values.dtype)
    else:
        start = facts["values"]["start"]
        expected = floats[start : start + facts["values"]["count"]]
    assert same(values.ravel(), expected), tensor.name


@pytest.mark.parametrize("name", FACTS)
def test_valid(name: str) -> None:
    path, facts, floats = VALID / f"{name}.squizd", FACTS[name], np.load(VALID / f"{name}.npy")
    for deep in (False, True):
        report = validate(path, deep)
        assert report.ok, report.errors
        assert report.complete
    assert hashlib.sha256(path.read_bytes()).hexdigest() == facts["sha256"]
    with open_file(path) as f:
        assert [f.size, f.file_id, f.record_alignment, f.content_flags, f.metadata] == [
            facts[key] for key in ("size", "file_id", "record_alignment", "content_flags", "metadata")
        ]
        assert {n: hashlib.sha256(b).hexdigest() for n, b in f.bundle().items()} == facts["files"]
        assert list(f.residents) == [t["name"] for t in facts["residents"]]
        for expected in facts["residents"]:
            check_tensor(f.residents[expected["name"]][0], f.array(expected["name"]), expected, floats)
        check_experts(f, facts, floats)
        appendices = [s for s in f.sections if s.type not in L.CRITICAL_SECTIONS]
        assert {s.type.decode(): hashlib.sha256(decoded(f, s)).hexdigest() for s in appendices} == facts["appendices"]


def check_experts(f: File, facts: dict[str, Any], floats: Any) -> None:
    paths = {layer.layer: layer.path for layer in f.moe_layers}
    listed = [(layer.layer, i) for layer in f.moe_layers for i in range(layer.expert_count)]
    assert listed == [(e["layer"], e["expert"]) for e in facts["experts"]]
    for e in facts["experts"]:
        record, arrays = f.expert(e["layer"], e["expert"]), f.expert_arrays(e["layer"], e["expert"])
        assert (paths[e["layer"]], record.raw_size) == (e["path"], e["raw_size"])
        tensors = f.layouts[record.layout].tensors
        assert len(tensors) == len(e["tensors"])
        for tensor, expected in zip(tensors, e["tensors"], strict=True):
            check_tensor(tensor, arrays[tensor.name], expected, floats)


def decoded(f: File, s: L.Section) -> bytes:
    return bytes(f.read(L.Record(s.offset, s.stored_size, s.raw_size, s.codec, s.digest), s.label))


def test_valid_vectors_use_everything() -> None:
    sections: set[bytes] = set()
    codecs: set[int] = set()
    encodings: set[L.Encoding] = set()
    roles: set[str] = set()
    dimensions: set[int] = set()
    for name in FACTS:
        with open_file(VALID / f"{name}.squizd") as f:
            sections |= {s.type for s in f.sections}
            records = [*f.files.values(), *(r for _, r in f.residents.values())]
            records += [f.expert(x.layer, i) for x in f.moe_layers for i in range(x.expert_count)]
            codecs |= {r.codec for r in records}
            tensors = [*(t for t, _ in f.residents.values()), *(t for layout in f.layouts for t in layout.tensors)]
            encodings |= {t.encoding for t in tensors}
            roles |= {t.role for t in tensors}
            dimensions |= {len(t.shape) for t in tensors}
    assert sections >= {*L.CRITICAL_SECTIONS, *L.APPENDICES}
    assert (codecs, roles, dimensions) == ({*L.CODECS}, {*L.ROLES.values()}, {1, 2, 3, 4})
    registered = {L.Encoding("raw", dtype) for dtype in L.DTYPE_SIZES}
    registered |= {L.Encoding("affine", d, b, g) for d in L.FLOATS for b in L.AFFINE_BITS for g in L.AFFINE_GROUPS}
    registered |= {L.Encoding(mode, d, *bits) for mode, bits in L.MICROSCALING.items() for d in L.FLOATS}
    assert encodings == registered


def test_mlx_decodes_the_same() -> None:
    """MLX's own dequantize, given f32 scales, agrees with the expected values bit for bit."""
    mx = pytest.importorskip("mlx.core")
    checked = 0
    for name in ("all-affine", "ramp", "microscaling-modes"):
        floats = np.load(VALID / f"{name}.npy")
        with open_file(VALID / f"{name}.squizd") as f, mx.stream(mx.cpu):
            for facts in FACTS[name]["residents"]:
                tensor, record = f.residents[facts["name"]]
                raw, e = f.read(record, tensor.name), tensor.encoding
                parts = {part: bytes(raw[at : at + size]) for part, at, size in tensor.parts}
                codes = mx.array(np.frombuffer(parts["codes"], "<u4").reshape(tensor.shape[0], -1))
                scales = part_of(mx, tensor, parts["scales"])
                biases = part_of(mx, tensor, parts["biases"]) if "biases" in parts else None
                w = mx.dequantize(codes, scales, biases, e.group_size, e.bits, e.mode, dtype=mx.float32)
                start = facts["values"]["start"]
                expected = floats[start : start + facts["values"]["count"]]
                assert same(np.array(w).ravel(), expected), tensor.name
                checked += 1
    assert checked > 60


def part_of(mx: Any, tensor: L.Tensor, data: bytes) -> Any:
    """Scales or biases as MLX takes them: f32, or bytes in microscaling modes."""
    from squizd.codecs import to_float32

    rows = tensor.shape[0]
    if tensor.encoding.mode == "affine":
        return mx.array(to_float32(data, tensor.encoding.dtype).reshape(rows, -1))
    return mx.array(np.frombuffer(data, np.uint8).reshape(rows, -1))


# -- invalid -------------------------------------------------------------------------------------------------


def test_one_invalid_file_for_each_rule() -> None:
    """CODE.squizd for each, and CODE.MORE.squizd for what else is worth a file."""
    names = [Path(f["file"]).stem for f in FAULTS]
    assert {p.stem for p in INVALID.glob("*.squizd")} == set(names)
    assert [f["code"] for f in FAULTS] == [name.partition(".")[0] for name in names]
    assert {name for name in names if "." not in name} == set(faults.RULES)
    anywhere = {"padding-nonzero", "section-digest", *(code for code in faults.RULES if code.startswith("json-"))}
    assert {f["code"] for f in FAULTS if f["deep"]} - anywhere == DEEP
    assert {f["code"] for f in FAULTS if f["coded"]} >= {"zstd-corrupt", "zstd-checksum"}
    assert sum(".then-" in name or ".and-" in name for name in names) >= 10


@pytest.mark.parametrize("fault", FAULTS, ids=[Path(f["file"]).stem for f in FAULTS])
def test_invalid(fault: dict[str, Any]) -> None:
    path = INVALID / fault["file"]
    shallow, deep = validate(path), validate(path, deep=True)
    assert deep.errors[0].code == fault["code"], deep.errors
    assert shallow.ok == fault["deep"]
    assert {e.code for e in deep.errors} <= set(faults.RULES)
    assert all(e.offset >= 0 and e.message.isprintable() for e in deep.errors)
    if not fault["deep"]:
        assert shallow.errors == deep.errors
        assert not shallow.complete
        with pytest.raises(FormatError, match=f"\\[{fault['code']} at byte "):
            open_file(path)
    else:
        assert len(deep.errors) == 1 or re.search(r"\.(then|and)-", fault["file"])
        read_everything(path)


def read_everything(path: Path) -> None:
    """A reader that meets a bad payload raises SquizdError, and nothing else."""
    with open_file(path) as f:
        for read in (
            f.bundle,
            lambda: [f.read(r, n) for n, (_, r) in f.residents.items()],
            lambda: [f.read_expert(x.layer, i) for x in f.moe_layers for i in range(x.expert_count)],
            lambda: [f.appendix(s.type) for s in f.sections],
        ):
            with contextlib.suppress(SquizdError):
                read()


def test_readers_refuse_what_only_the_payload_shows() -> None:
    refused = {code for code in faults.STAGES["payload"] if code.startswith(("zstd-", "record-"))}
    for code in refused:
        with open_file(INVALID / f"{code}.squizd") as f, pytest.raises(SquizdError, match=code):
            for name, (_, record) in f.residents.items():
                f.read(record, name)
            for layer in f.moe_layers:
                for i in range(layer.expert_count):
                    f.read_expert(layer.layer, i)


def profile_in_a_frame(content: bytes, frame: bytes) -> bytes:
    """The file of all appendices with another profile."""
    spec = valid.MAKERS["appendices"]()
    spec.appendices[0].content, spec.appendices[0].coded = content, build.Coded(frame)
    return build.seal(build.lay_out(spec))


@pytest.mark.parametrize(
    ("content", "frame", "code"),
    [
        (b"{}", zstd.header(2) + zstd.blocks(b"{}") + b"\0\0\0\0", "zstd-checksum"),  # not json-syntax
        (b"{}\n", zstd.frame(b"{}\n") + b"\0", "zstd-trailing"),
        (b"{}\n", zstd.frame(b"{}\n"), "appendix-header"),
    ],
)
def test_a_frame_is_checked_before_its_lines(tmp_path: Path, content: bytes, frame: bytes, code: str) -> None:
    (tmp_path / "x.squizd").write_bytes(profile_in_a_frame(content, frame))
    assert [e.code for e in validate(tmp_path / "x.squizd", deep=True).errors] == [code]


@pytest.mark.parametrize(("digest", "code"), [("0" * 16, "sparsity-digest"), ("A" * 16, "sparsity-type")])
def test_a_digest_is_sixteen_digits_before_it_is_compared(tmp_path: Path, digest: str, code: str) -> None:
    spec = valid.MAKERS["appendices"]()
    spec.appendices[1].content = valid.sparsity(spec, digest=digest)
    (tmp_path / "x.squizd").write_bytes(build.seal(build.lay_out(spec)))
    assert [e.code for e in validate(tmp_path / "x.squizd", deep=True).errors] == [code]


# -- all of them ---------------------------------------------------------------------------------------------


def test_making_them_again_gives_the_same_bytes(tmp_path: Path) -> None:
    make_fixtures.make(tmp_path)
    for folder in ("valid", "invalid"):
        made = {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()}
        assert made == {p.name: p.read_bytes() for p in (ROOT / "fixtures" / folder).iterdir()}


def test_they_are_small() -> None:
    assert sum(p.stat().st_size for folder in (VALID, INVALID) for p in folder.iterdir()) < 2_000_000


def test_making_them_needs_no_squizd() -> None:
    for path in [ROOT / "tools" / "make_fixtures.py", *(ROOT / "tools" / "vectors").glob("*.py")]:
        assert not re.search(r"^\s*(import|from) squizd", path.read_text(), re.MULTILINE), path


@pytest.mark.parametrize("name", FACTS)
def test_every_byte_is_covered(name: str) -> None:
    """Each byte belongs to something with a digest, or to padding, which must be zero."""
    with open_file(VALID / f"{name}.squizd") as f:
        spans = [(0, 256), (256, 64 * len(f.sections))]
        spans += [(s.offset, s.stored_size) for s in f.sections if s.type not in L.DATA_SECTIONS]
        records = [*f.files.values(), *(r for _, r in f.residents.values())]
        records += [f.expert(x.layer, i) for x in f.moe_layers for i in range(x.expert_count)]
        spans += [(r.offset, r.stored_size) for r in records]
    data, end = (VALID / f"{name}.squizd").read_bytes(), 0
    for start, size in sorted(spans):
        assert start >= end
        assert not any(data[end:start])
        end = start + size
    assert not any(data[end:])


@pytest.mark.parametrize("name", FACTS)
def test_bit_flips_are_found(name: str, tmp_path: Path) -> None:
    """A sample; `tools/fuzz/flips.py` flips every bit."""
    data = (VALID / f"{name}.squizd").read_bytes()
    chosen = random.Random(name)
    bits = sorted({chosen.randrange(len(data) * 8) for _ in range(100)})
    assert flips.flip(tmp_path / "flipped.squizd", data, bits) == ([], len(bits))
