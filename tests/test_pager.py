"""Records into slots: bytes against the container's own reader, residency against a brute-force LRU, faults."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import squizd.container as container
from squizd.container import Plan, Writer
from squizd.container.layout import RAW, ZSTD, Encoding, MoeLayer, make_layout
from squizd.errors import ExpertReadError, ReadError, RequestError
from squizd.runtime import io, pager
from squizd.runtime.io import Part, Scatter
from squizd.runtime.pager import Pager, Slots
from squizd.runtime.policy import LRU
from squizd.runtime.source import Mapped, Positioned
from squizd.runtime.widening import widen_floats

EXPERTS = 6
LAYOUT = make_layout(
    [
        ("up_proj.weight", "expert", Encoding("affine", "bf16", 4, 32), (3, 32)),
        ("up_proj.bias", "expert", Encoding("raw", "f16"), (5,)),
        ("down_proj.weight", "expert", Encoding("raw", "f32"), (2, 7)),
    ]
)


def make_file(path: Path, codec: int = RAW) -> Path:
    """One layer (id 3) of six experts, every part random."""
    rng = np.random.default_rng(0)
    plan = Plan(
        metadata={"model": {"config": {"model_type": "none"}}, "recipe": {}, "provenance": {}},
        residents=[("norm.weight", "norm", Encoding("raw", "f32"), (4,))],
        layouts=[LAYOUT],
        moe_layers=[MoeLayer(3, "layers.3.experts", EXPERTS)],
        expert_layouts=[[0] * EXPERTS],
        record_alignment=256,
        codec=codec,
    )
    with Writer(path, plan) as writer:
        writer.write([[bytes(16)]])
        for _ in range(EXPERTS):
            writer.write([[rng.bytes(size) for _, _, size in t.parts] for t in LAYOUT.tensors])
        writer.finish()
    return path


def open_slots(path: Path, count: int) -> tuple[Slots, list[tuple[str, int, int]]]:
    """Slots over `path`, floats of 16 bits widened, and the parts as (dtype to widen, offset, size)."""
    spans = []
    for tensor in LAYOUT.tensors:
        for name, offset, size in tensor.parts:
            half = tensor.encoding.dtype in ("f16", "bf16") and not (name == "codes" and tensor.encoding.mode != "raw")
            spans.append((tensor.encoding.dtype if half else "", offset, size))
    parts = [Part(offset, size, dtype) for dtype, offset, size in spans]
    file = container.open(path)
    banks = [np.zeros((count, part.target_bytes), np.uint8) for part in parts]
    slots = Slots(Pager(file), file.moe_layers[0], banks, {0: Scatter(parts, LAYOUT.raw_size)}, LRU())
    return slots, spans


def expected(slots: Slots, spans: list[tuple[str, int, int]], expert: int) -> list[bytes]:
    """The parts of an expert from the container's reader, widened without the runtime's help."""
    raw, found = bytes(slots.pager.file.read_expert(3, expert)), []
    for dtype, offset, size in spans:
        part = raw[offset : offset + size]
        if dtype == "bf16":
            part = b"".join(b"\0\0" + part[i : i + 2] for i in range(0, size, 2))
        elif dtype == "f16":
            part = np.frombuffer(part, np.float16).astype(np.float32).tobytes()
        found.append(part)
    return found


def assert_slots_hold_what_they_say(slots: Slots, spans: list[tuple[str, int, int]]) -> None:
    assert len(set(slots.slot_of.values())) == len(slots.slot_of) <= slots.count
    for expert, slot in slots.slot_of.items():
        assert [bank[slot].tobytes() for bank in slots.banks] == expected(slots, spans, expert)


@pytest.fixture(params=[RAW, ZSTD], ids=["raw", "zstd"])
def path(request: Any, tmp_path: Path) -> Path:
    return make_file(tmp_path / "m.squizd", request.param)


@given(st.integers(1, 4), st.lists(st.lists(st.integers(0, EXPERTS - 1), min_size=1, unique=True), max_size=12))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_slots_follow_a_brute_force_lru(path: Path, count: int, calls: list[list[int]]) -> None:
    slots, spans = open_slots(path, count)
    recent: list[int] = []  # resident experts, latest use last
    hits = misses = 0
    for call in calls:
        wanted = call[:count]
        slots.acquire(wanted)
        here = [e for e in wanted if e in recent]
        new = [e for e in wanted if e not in recent]
        hits, misses = hits + len(here), misses + len(new)
        recent = ([e for e in recent if e not in wanted] + here + new)[-count:]
        assert sorted(slots.slot_of) == sorted(recent)
        assert list(slots.policy) == recent
    assert_slots_hold_what_they_say(slots, spans)
    stats = slots.pager.stats
    assert (stats.hits, stats.misses) == (hits, misses)
    assert stats.evictions == misses - len(slots.slot_of)
    slots.pager.close()


def test_kept_experts_stay(path: Path) -> None:
    slots, _ = open_slots(path, 3)
    slots.acquire([0, 1, 2])
    slots.acquire([4, 5], keep={0})
    assert set(slots.slot_of) == {0, 4, 5}


def test_threads_give_the_same_bytes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pager, "INLINE_BYTES", 0)
    slots, spans = open_slots(path, EXPERTS)
    slots.acquire(range(EXPERTS))
    assert slots.slot_of == {e: e for e in range(EXPERTS)}  # fully resident layers rely on it
    assert_slots_hold_what_they_say(slots, spans)


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("codec", [RAW, ZSTD])
def test_any_flipped_bit_is_noticed_and_the_rest_stays(
    tmp_path: Path, codec: int, inline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pager, "INLINE_BYTES", 1 << 20 if inline else 0)
    path = make_file(tmp_path / "m.squizd", codec)
    slots, spans = open_slots(path, 4)
    record = slots.pager.file.expert(3, 2)
    rng = np.random.default_rng(1)
    for at in [0, record.stored_size - 1, *rng.integers(0, record.stored_size, 10)]:
        slots.acquire([0, 4])
        flip(path, record.offset + int(at))
        with pytest.raises(ExpertReadError, match="digest") as caught:
            slots.acquire([0, 2, 5])
        error = caught.value
        assert (error.layer, error.expert, error.offset) == (3, 2, record.offset)
        for word in (str(path), "layer 3", "expert 2", f"byte {record.offset}"):
            assert word in str(error)
        assert 2 not in slots.slot_of
        assert {0, 5} <= set(slots.slot_of)
        assert_slots_hold_what_they_say(slots, spans)
        flip(path, record.offset + int(at))
        slots.acquire([0, 2, 5])
        assert_slots_hold_what_they_say(slots, spans)
        slots.acquire([1, 3, 4])  # 2 is read anew next time


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as f:
        f.seek(offset)
        byte = f.read(1)[0]
        f.seek(offset)
        f.write(bytes([byte ^ 0x10]))


def test_a_file_that_shrinks_is_cut_short(path: Path) -> None:
    slots, _ = open_slots(path, 3)
    slots.acquire([0])
    record = slots.pager.file.expert(3, 5)
    os.truncate(path, record.offset + record.stored_size - 1)
    with pytest.raises(ExpertReadError, match=f"{record.stored_size - 1} of {record.stored_size} bytes"):
        slots.acquire([0, 5])
    os.truncate(path, 0)
    with pytest.raises(ExpertReadError, match=" 0 of "):
        slots.acquire([1])
    slots.acquire([0])
    assert set(slots.slot_of) == {0}


def test_a_failing_disk_is_an_expert_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots, spans = open_slots(path, 3)

    def broken(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", broken)
        patched.setattr(os, "pread", broken)
        with pytest.raises(ExpertReadError, match="Input/output error"):
            slots.acquire([1])
    slots.acquire([1])
    assert_slots_hold_what_they_say(slots, spans)


def test_a_read_in_pieces_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """preadv may return early, anywhere."""
    slots, spans = open_slots(make_file(tmp_path / "m.squizd"), EXPERTS)
    whole, sizes = os.preadv, iter(np.random.default_rng(5).integers(1, 60, 10_000))

    def piecewise(fd: int, buffers: Any, offset: int) -> int:
        left, few = int(next(sizes)), []
        for buffer in buffers:
            few.append(memoryview(buffer)[:left])
            left -= len(few[-1])
            if not left:
                break
        return whole(fd, few, offset)

    monkeypatch.setattr(os, "preadv", piecewise)
    slots.acquire(range(EXPERTS))
    assert_slots_hold_what_they_say(slots, spans)


def test_interruption_leaves_no_slot_half_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pager, "INLINE_BYTES", 0)
    slots, spans = open_slots(path, 2)
    slots.acquire([0, 1])
    began, go, late = threading.Event(), threading.Event(), []
    read = Slots._read

    def slow(self: Slots, expert: int, slot: int) -> None:
        began.set()
        go.wait(5)
        read(self, expert, slot)
        late.append(expert)

    def interrupted(self: Any) -> Any:
        began.wait(5)
        threading.Timer(0.05, go.set).start()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Slots, "_read", slow)
        patched.setattr("concurrent.futures.Future.result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            slots.acquire([2, 3])
        assert late  # the reads that had begun were waited for
    assert slots.slot_of == {}
    slots.acquire([4, 0])
    assert_slots_hold_what_they_say(slots, spans)


def test_an_expert_that_is_none_is_refused(path: Path) -> None:
    slots, _ = open_slots(path, 2)
    for lowest, highest in ((-1, 2), (0, EXPERTS)):
        with pytest.raises(RequestError, match=r"layers\.3\.experts: the router chose expert"):
            slots.check(lowest, highest)
    slots.check(0, EXPERTS - 1)


def test_closed_means_closed(path: Path) -> None:
    slots, _ = open_slots(path, 2)
    slots.acquire([0])
    slots.pager.close()
    slots.pager.close()
    slots.acquire([0])
    with pytest.raises(ReadError, match="closed"):
        slots.acquire([1])


@pytest.mark.parametrize("codec", [RAW, ZSTD])
def test_what_must_be_decoded_goes_to_the_reading_threads(
    tmp_path: Path, codec: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three experts at once: too little to read elsewhere, too much to decode here."""
    slots, _ = open_slots(make_file(tmp_path / "m.squizd", codec), 3)
    monkeypatch.setattr(pager, "INLINE_BYTES", 4 * 3 * LAYOUT.raw_size)
    threads: set[int] = set()
    read = slots._read

    def watched(expert: int, slot: int) -> None:
        threads.add(threading.get_ident())
        read(expert, slot)

    monkeypatch.setattr(slots, "_read", watched)
    slots.acquire([0, 1, 2])
    assert (threading.get_ident() in threads) == (codec == RAW)
    slots.pager.close()


PARTS = st.lists(st.tuples(st.integers(0, 70), st.integers(1, 90), st.sampled_from(["", "f16", "bf16"])), max_size=8)


@given(PARTS, st.integers(0, 40), st.integers(4, 64), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_scatter_places_every_part(
    tmp_path: Path, drawn: list[tuple[int, int, str]], tail: int, scratch: int, random: Any
) -> None:
    """Any gaps, any order of parts, any scratch size: the same as slicing the record."""
    parts, end = [], 0
    for gap, size, dtype in drawn:
        size = size * 2 if dtype else size
        parts.append(Part(end + gap, size, dtype))
        end += gap + size
    raw_size = end + tail
    if not raw_size:
        return
    raw = np.frombuffer(random.randbytes(raw_size), np.uint8)
    path = tmp_path / "record"
    path.write_bytes(b"....." + raw.tobytes())
    random.shuffle(parts)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(io, "SCRATCH_BYTES", scratch // 4 * 4)
        patched.setattr(io, "PIECE_BYTES", random.choice([8, 40, 1 << 19]))
        scatter = Scatter(parts, raw_size)
    assert scatter.scratch_bytes <= max([scratch // 4 * 4, tail, *(gap for gap, _, _ in drawn)])
    import xxhash

    from squizd.container.layout import Record

    class Opened:
        path = "record"

        def fileno(self) -> int:
            return fd

    fd = os.open(path, os.O_RDONLY)
    try:
        for make in (Positioned, Mapped):
            targets = [np.full(part.target_bytes, 7, np.uint8) for part in parts]
            source = make(Opened())  # type: ignore[arg-type]
            record = Record(5, raw_size, raw_size, RAW, xxhash.xxh64_intdigest(raw))
            source.announce(record.offset, record.stored_size)
            scatter.read(source, record, targets)
            check_parts(raw, parts, targets)
            with pytest.raises(ReadError, match=f"{raw_size} of {raw_size + 1} bytes, the file is cut short"):
                Scatter([Part(0, raw_size + 1)], raw_size + 1).read(
                    source, replace(record, stored_size=raw_size + 1), [np.zeros(raw_size + 1, np.uint8)]
                )
            source.close()
    finally:
        os.close(fd)


def check_parts(raw: Any, parts: list[Part], targets: list[Any]) -> None:
    """What lies in each target is its part of the record, widened if need be."""
    for part, target in zip(parts, targets, strict=True):
        stored = raw[part.offset : part.offset + part.size]
        if part.widen == "f16":
            np.testing.assert_array_equal(target.view(np.float32), stored.copy().view(np.float16).astype(np.float32))
        elif part.widen == "bf16":
            np.testing.assert_array_equal(target.view(np.uint32) >> 16, stored.copy().view(np.uint16))
            assert not (target.view(np.uint32) & 0xFFFF).any()
        else:
            np.testing.assert_array_equal(target, stored)


def test_widening_is_exact_for_every_bf16_and_f16() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    target = np.zeros(4 << 16, np.uint8)
    widen_floats(every.view(np.uint8), "bf16", target)
    np.testing.assert_array_equal(target.view(np.uint32), every.astype(np.uint32) << 16)
    widen_floats(every.view(np.uint8), "f16", target)
    np.testing.assert_array_equal(target.view(np.float32), every.view(np.float16).astype(np.float32))
