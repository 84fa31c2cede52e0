"""Writing files and reading them back: the container's public interface."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from squizd.container import Plan, Writer, frames, records, validate
from squizd.container import layout as L
from squizd.container import open as open_file
from squizd.container.appendices import encode_lines
from squizd.container.plan import choose_alignment
from squizd.errors import ExpertReadError, FormatError, OutputError, ReadError, RequestError

METADATA: dict[str, Any] = {"model": {"config": {"model_type": "m"}}, "recipe": {}, "provenance": {}}
INT4 = L.Encoding("affine", "bf16", 4, 32)
F32 = L.Encoding("raw", "f32")


def expert_layout(encoding: L.Encoding = INT4) -> L.Layout:
    return L.make_layout([(f"{m}_proj.weight", "expert", encoding, (8, 32)) for m in ("gate", "up", "down")])


def make_plan(**changes: Any) -> Plan:
    """Two tensors, a file, and 2 + 3 experts of two layouts."""
    members: dict[str, Any] = {
        "residents": [("embed.weight", "embedding", INT4, (4, 32)), ("norm.weight", "norm", F32, (5,))],
        "bundle": {"tokenizer.json": b"{}", "a.txt": b"a" * 100},
        "layouts": [expert_layout(), expert_layout(L.Encoding("mxfp4", "bf16", 4, 32))],
        "moe_layers": [L.MoeLayer(0, "layers.0.experts", 2), L.MoeLayer(5, "layers.5.experts", 3)],
        "expert_layouts": [[0, 1], [1, 1, 0]],
        "record_alignment": 256,
        "fingerprint": b"x",
    }
    return Plan(METADATA, **(members | changes))


def tensors_of(plan: Plan) -> Iterator[tuple[L.Tensor, ...]]:
    for name, role, encoding, shape in plan.residents:
        yield (L.place(name, role, encoding, shape)[0],)
    for layout in (i for some in plan.expert_layouts for i in some):
        yield plan.layouts[layout].tensors


def contents(plan: Plan) -> Iterator[list[list[bytes]]]:
    """Bytes for every record of a plan, the same each time."""
    for i, tensors in enumerate(tensors_of(plan)):
        rng = np.random.default_rng(i)
        yield [[rng.integers(0, 60, size, np.uint8).tobytes() for _, _, size in t.parts] for t in tensors]


def write(path: Path, plan: Plan, stop: int | None = None) -> None:
    with Writer(path, plan) as writer:
        for parts in list(contents(plan))[writer.done : stop]:
            writer.write(parts)
        if stop is None:
            writer.finish()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.squizd"


# -- round trip ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [L.RAW, L.ZSTD])
def test_what_is_written_is_read(path: Path, codec: int) -> None:
    profile = encode_lines([{"appendix": "profile", "version": 9}])
    plan = make_plan(codec=codec, appendices={b"PROF": profile, b"vend": bytes(range(256)) * 4})
    write(path, plan)
    assert validate(path, deep=True).errors == []
    with open_file(path) as f:
        assert f.metadata == METADATA
        assert f.bundle() == plan.bundle
        assert list(f.bundle()) == sorted(plan.bundle)
        assert f.layouts == tuple(plan.layouts)
        assert f.moe_layers == tuple(plan.moe_layers)
        assert [f.residents[name][0].name for name, *_ in plan.residents] == list(f.residents)
        assert f.appendix(b"PROF") == [{"appendix": "profile", "version": 9}]
        assert f.appendix(b"SPRS") == f.appendix(b"vend") == []
        raws = [f.read(record, name) for name, (_, record) in f.residents.items()]
        raws += [f.read_expert(x.layer, i) for x in plan.moe_layers for i in range(x.expert_count)]
        for raw, tensors, parts in zip(raws, tensors_of(plan), contents(plan), strict=True):
            found = [[bytes(raw[at : at + size]) for _, at, size in t.parts] for t in tensors]
            assert found == parts
        head = path.read_bytes()[: f.head_size]
        assert f.file_id == hashlib.sha256(head).hexdigest()
        assert f.size == path.stat().st_size
        assert {f.expert(5, i).offset % 256 for i in range(3)} == {0}


def test_same_plan_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a", make_plan())
    write(tmp_path / "b", make_plan())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("stop", range(8))
@pytest.mark.parametrize("codec", [L.RAW, L.ZSTD])
def test_a_second_run_goes_on(path: Path, tmp_path: Path, stop: int, codec: int) -> None:
    write(tmp_path / "whole", make_plan(codec=codec))
    write(path, make_plan(codec=codec), stop)
    assert not path.exists()
    with Writer(path, make_plan(codec=codec)) as writer:
        assert writer.done == min(stop, writer.total)
    write(path, make_plan(codec=codec))
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()
    assert not Path(f"{path}.partial").exists()


def test_a_draft_is_no_file(path: Path) -> None:
    write(path, make_plan(), 3)
    report = validate(f"{path}.partial")
    assert [e.code for e in report.errors] == ["bad-magic"]


def test_a_damaged_draft_is_written_again(path: Path, tmp_path: Path) -> None:
    write(tmp_path / "whole", make_plan())
    write(path, make_plan(), 4)
    partial = Path(f"{path}.partial")
    data = bytearray(partial.read_bytes())
    data[-100] ^= 1
    partial.write_bytes(data)
    with Writer(path, make_plan()) as writer:
        assert writer.done == 3
    write(path, make_plan())
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()


def test_another_plan_starts_afresh(path: Path) -> None:
    write(path, make_plan(), 4)
    with Writer(path, make_plan(fingerprint=b"y")) as writer:
        assert writer.done == 0


def test_what_does_not_shrink_is_stored_raw() -> None:
    noise = np.random.default_rng(0).bytes(1000)
    assert records.encode(noise, L.ZSTD) == (L.RAW, noise)
    assert records.encode(bytes(100_000), L.ZSTD)[0] == L.RAW  # more than 64 times smaller
    codec, stored = records.encode(bytes(range(250)) * 20, L.ZSTD)
    assert codec == L.ZSTD
    assert frames.decompress(stored, 5000) == bytes(range(250)) * 20


BAD_PLANS: list[tuple[dict[str, Any], str]] = [
    ({"residents": []}, "at least one resident"),
    ({"bundle": {"../x": b"x"}}, "file-name"),
    ({"bundle": {"x": b"", "y": b"y"}}, "record-empty"),
    ({"bundle": {"a": b"x", "A": b"x"}}, "name-duplicate"),
    ({"residents": [("n", "norm", F32, (1,))] * 2}, "name-duplicate"),
    ({"residents": [("n", "expert", F32, (1,))]}, "tensor-role"),
    ({"residents": [("n", "norm", L.Encoding("affine", "bf16", 7, 32), (1, 32))]}, "tensor-encoding"),
    ({"residents": [("a\x1b[2J", "norm", F32, (1,))]}, "name-control"),
    ({"residents": [("layers.0.experts.x", "norm", F32, (1,))]}, "name-inside-experts"),
    ({"record_alignment": 48}, "record-alignment"),
    ({"layouts": [L.make_layout([(f"{m}_proj.x", "expert", F32, (1,)) for m in ("up", "gate")])] * 2}, "layout-order"),
    ({"moe_layers": [L.MoeLayer(5, "a", 2), L.MoeLayer(0, "b", 3)]}, "moe-layer-unsorted"),
    ({"appendices": {b"no!!": b"x"}}, "section-type"),
    ({"appendices": {b"vend": b""}}, "section-empty"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), BAD_PLANS, ids=[reason for _, reason in BAD_PLANS])
def test_a_plan_that_makes_no_valid_file_is_refused_at_once(path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(OutputError, match=reason):
        Writer(path, make_plan(**changes))
    assert list(path.parent.iterdir()) == []


def test_metadata_may_change_at_the_end(path: Path) -> None:
    with Writer(path, make_plan()) as writer:
        for parts in contents(make_plan()):
            writer.write(parts)
        with pytest.raises(ValueError, match="length"):
            writer.finish(METADATA | {"licence": "MIT"})
        changed = {"model": {"config": {"model_type": "n"}}, "recipe": {}, "provenance": {}}
        writer.finish(changed)
    with open_file(path) as f:
        assert f.metadata == changed


# -- reading -----------------------------------------------------------------------------------------------------


def test_unknown_experts_and_tensors(path: Path) -> None:
    write(path, make_plan())
    with open_file(path) as f:
        for layer, expert in ((0, 2), (0, -1), (1, 0), (5, 3), (-1, 0)):
            with pytest.raises(RequestError, match=f"no layer {layer} expert {expert}"):
                f.expert(layer, expert)
        with pytest.raises(RequestError, match="no resident tensor x"):
            f.array("x")
    with pytest.raises(ReadError, match="closed"):
        f.read_expert(0, 0)


def test_a_damaged_expert_is_named(path: Path) -> None:
    write(path, make_plan())
    with open_file(path) as f:
        record = f.expert(5, 1)
    with path.open("r+b") as file:
        file.seek(record.offset + 3)
        file.write(b"\xff")
    with open_file(path) as f:
        with pytest.raises(ExpertReadError, match=f"layer 5 expert 1 at byte {record.offset}") as caught:
            f.read_expert(5, 1)
        assert (caught.value.layer, caught.value.expert, caught.value.offset) == (5, 1, record.offset)
        f.read_expert(5, 0)


def test_a_file_that_shrinks_is_a_read_error(path: Path) -> None:
    write(path, make_plan())
    with open_file(path) as f:
        os.truncate(path, f.expert(5, 2).offset + 10)
        with pytest.raises(ExpertReadError, match="10 of "):
            f.read_expert(5, 2)
        f.read_expert(5, 1)


def test_a_file_that_shrinks_while_it_is_validated(path: Path) -> None:
    layout = L.make_layout([("a.weight", "expert", F32, (1 << 19,))])
    layers = [L.MoeLayer(0, "experts", 6)]
    plan = make_plan(layouts=[layout], moe_layers=layers, expert_layouts=[[0] * 6])
    with Writer(path, plan) as writer:
        for tensors in tensors_of(plan):
            writer.write([[bytes(size) for _, _, size in t.parts] for t in tensors])
        writer.finish()
    report = validate(path, deep=True, progress=lambda _: os.truncate(path, 1 << 20))
    assert [e.code for e in report.errors] == ["file-truncated"]
    assert not report.complete


def test_progress_counts_every_record_once(path: Path) -> None:
    write(path, make_plan())
    seen: list[int] = []
    validate(path, deep=True, progress=seen.append)
    with open_file(path) as f:
        stored = [r.stored_size for r in f.files.values()] + [r.stored_size for _, r in f.residents.values()]
        stored += [f.expert(x.layer, i).stored_size for x in f.moe_layers for i in range(x.expert_count)]
    assert sum(seen) == sum(stored)


@pytest.mark.parametrize("name", ["missing", "folder", "pipe", "a\0b"])
def test_what_is_no_file_is_a_read_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for use in (open_file, validate):
        with pytest.raises(ReadError):
            use(f"{tmp_path}/{name}")


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"", "file-empty"), (b"S", "file-short"), (b"G", "bad-magic"), (b"SQZD", "file-short"), (b"P" * 99, "bad-magic")],
)
def test_other_files(path: Path, data: bytes, code: str) -> None:
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        open_file(path)
    assert caught.value.code == code
    assert [e.code for e in validate(path, deep=True).errors] == [code]


def test_large_records_are_checked_in_pieces(path: Path) -> None:
    """A record longer than a piece, raw and zstd, with one bad scale near its end."""
    encoding = L.Encoding("affine", "f16", 2, 32)
    for codec in (L.RAW, L.ZSTD):
        for bad in (False, True):
            plan = Plan(METADATA, [("w", "dense", encoding, (1 << 14, 1024))], codec=codec)
            codes = np.random.default_rng(0).integers(0, 16, 1 << 22, np.uint8).tobytes()
            scales = np.ones((1 << 14, 32), "<f2")
            if bad:
                scales[-1, -1] = np.inf
            with Writer(path, plan) as writer:
                writer.write([[codes, scales.tobytes(), bytes(scales.nbytes)]])
                writer.finish()
            with open_file(path) as f:
                assert f.residents["w"][1].codec == codec
            assert [e.code for e in validate(path, deep=True).errors] == ["scale-not-finite"] * bad


def test_faults_are_counted_but_not_without_end(path: Path) -> None:
    count = 1500
    plan = make_plan(
        layouts=[L.make_layout([("a", "expert", L.Encoding("mxfp4", "f16", 4, 32), (1, 32))])],
        moe_layers=[L.MoeLayer(0, "experts", count)], expert_layouts=[[0] * count], record_alignment=64,
    )  # fmt: skip
    with Writer(path, plan) as writer:
        for tensors in tensors_of(plan):
            writer.write([[b"\xff" * size for _, _, size in t.parts] for t in tensors])
        writer.finish()
    report = validate(path, deep=True)
    assert (len(report.errors), report.complete) == (1000, False)
    assert {e.code for e in report.errors[1:]} == {"e8m0-nan"}
    assert [e.offset for e in report.errors] == sorted(e.offset for e in report.errors)


# -- pieces --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=3000) | st.integers(1, 4000).map(lambda n: b"ab" * n), st.sampled_from([1, 3, 19]))
def test_zstd_round_trip(data: bytes, level: int) -> None:
    if not data:
        return
    frame = frames.compress(data, level)
    assert frames.decompress(frame, len(data)) == data
    pieces = list(map(bytes, frames.stream(frames.MemorySource(frame), len(data), bytearray(64))))
    assert b"".join(pieces) == data
    assert {len(p) for p in pieces[:-1]} <= {64}


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=3000), st.lists(st.integers(0, 3000), min_size=1, max_size=6))
def test_zstd_round_trip_of_parts(data: bytes, cuts: list[int]) -> None:
    frame = frames.compress(data, parts=sorted({min(cut, len(data)) for cut in cuts}))
    assert frames.decompress(frame, len(data)) == data


def test_each_part_has_an_entropy_code_of_its_own() -> None:
    """Stored sizes come near the sum of the parts' own entropies, which one code for all of them cannot."""
    source = np.random.default_rng(0)
    codes = np.clip(np.round(source.normal(7.5, 3, (2, 20_000))), 0, 15).astype(np.uint8)
    scales = source.normal(100, 2, 5_000).round().astype(np.uint8)
    pieces = [(codes[0] | codes[1] << 4).tobytes(), scales.tobytes()]
    shares = [np.bincount(np.frombuffer(p, np.uint8)) / len(p) for p in pieces]
    entropy = sum(-len(p) * (s[s > 0] * np.log2(s[s > 0])).sum() / 8 for p, s in zip(pieces, shares, strict=True))
    size = len(records.encode(b"".join(pieces), L.ZSTD, [0, len(pieces[0])])[1])
    assert size < 1.015 * entropy
    assert len(frames.compress(b"".join(pieces))) > 1.03 * entropy


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_frames_are_rejected_or_right(data: st.DataObject) -> None:
    """One or two bytes of a frame change: an error, or the same content; both ways of decoding agree."""
    content = b"".join(b"%d squared is %d; " % (i, i * i) for i in range(data.draw(st.integers(1, 60))))
    frame = bytearray(frames.compress(content))
    for _ in range(data.draw(st.integers(1, 2))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    outcomes = []
    for decode in (
        lambda: frames.decompress(bytes(frame), len(content)),
        lambda: b"".join(map(bytes, frames.stream(frames.MemorySource(bytes(frame)), len(content), bytearray(512)))),
    ):
        try:
            outcomes.append(decode())
        except frames.FrameError as error:
            outcomes.append(error.code.encode())
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] == content or outcomes[0].startswith(b"zstd-")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 1 << 20), max_size=20))
def test_alignment_wastes_little(sizes: list[int]) -> None:
    alignment = choose_alignment(sizes)
    assert alignment in {64 << i for i in range(9)}
    padding = sum(L.align(size, alignment) - size for size in sizes)
    assert alignment == 64 or padding <= 0.01 * sum(sizes)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([F32, INT4, L.Encoding("raw", "u8"), L.Encoding("nvfp4", "f16", 4, 16)]), st.integers(1, 9)
        ),
        min_size=1,
        max_size=6,
    )
)
def test_parts_do_not_overlap(tensors: list[tuple[L.Encoding, int]]) -> None:
    layout = L.make_layout([(f"t{i}", "expert", e, (rows, 32)) for i, (e, rows) in enumerate(tensors)])
    end = 0
    for tensor in layout.tensors:
        for _, offset, size in tensor.parts:
            assert offset == L.align(end, 64)
            end = offset + size
    assert layout.raw_size == end


def test_digest_of_a_record(path: Path) -> None:
    write(path, make_plan())
    data = path.read_bytes()
    with open_file(path) as f:
        for r in (f.expert(0, 1), f.residents["norm.weight"][1], f.files["a.txt"]):
            assert xxhash.xxh64_intdigest(data[r.offset : r.offset + r.stored_size]) == r.digest
