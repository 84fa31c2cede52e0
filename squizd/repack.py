"""The same model in another container: raw or zstd records, with or without an appendix.

Quantized values are copied as decoded bytes and never interpreted; `same_payload` proves it by their
digests.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import xxhash

from .container import File, Plan, Writer
from .container import open as open_file
from .container.layout import APPENDICES, CRITICAL_SECTIONS, RAW, ZSTD, Record, Tensor
from .container.writer import check_target, choose_alignment
from .errors import OutputError, RequestError

Progress = Callable[[int, int], None]


def repack(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    codec: str | None = None,
    drop: Sequence[str] = (),
    add: Mapping[str, bytes] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write `source` again as `output`.

    `codec` is "raw" or "zstd" for all records, None to keep what most of them have. `drop` names
    appendices to leave out, `add` maps appendix types to their new (decoded) content. Raises
    RequestError for an appendix that is not there or not known, OutputError if the result cannot be
    written or does not hold the same payload, and what reading the source raises.
    """
    target = os.fspath(output)
    if os.path.exists(target) and os.path.samefile(source, target):
        raise OutputError(f"{target} is the file to repack", hint="write to another name, then rename")
    check_target(target, force)
    with open_file(source) as f:
        if b"SPRS" in {x.type for x in f.sections} - {x.encode() for x in [*drop, *(add or {})]} and codec is not None:
            hint = "--drop SPRS leaves it out"
            raise RequestError(f"{f.path}: its sparsity appendix holds for these stored bytes only", hint=hint)
        plan = _plan(f, codec, _appendices(f, drop, add or {}))
        with Writer(target, plan) as writer:
            for position, (tensors, record, what) in enumerate(_records(f)):
                if not writer.has(position):
                    raw = f.read(record, what)
                    writer.write([[raw[at : at + size] for _, at, size in t.parts] for t in tensors], position)
                if progress is not None:
                    progress(writer.done_bytes, writer.total_bytes)
            writer.finish()
        with open_file(target) as written:
            if not same_payload(f, written):
                raise OutputError(f"{target} does not hold the payload of {f.path}")


def same_payload(a: File, b: File) -> bool:
    """Whether two files hold the same tensors and experts with the same decoded bytes, by XXH64."""
    return all(x == y for x, y in zip(_digests(a), _digests(b), strict=True))


def _digests(f: File) -> Iterator[tuple[str, tuple[Tensor, ...], int]]:
    for tensors, record, what in _records(f):
        yield what, tensors, xxhash.xxh64_intdigest(f.read(record, what))


def _records(f: File) -> Iterator[tuple[tuple[Tensor, ...], Record, str]]:
    """Residents, then experts by (layer, expert): the order of a plan."""
    for name, (tensor, record) in f.residents.items():
        yield (tensor,), record, name
    for layer in f.moe_layers:
        for expert in range(layer.expert_count):
            record = f.expert(layer.layer, expert)
            yield f.layouts[record.layout].tensors, record, f"layer {layer.layer} expert {expert}"


def _appendices(f: File, drop: Sequence[str], add: Mapping[str, bytes]) -> dict[bytes, bytes]:
    """Appendices of the new file by type, decoded; unknown ancillary sections are carried along."""
    kept = {s.type: s for s in f.sections if s.type not in CRITICAL_SECTIONS}
    for name in drop:
        if kept.pop(name.encode(), None) is None:
            have = ", ".join(kind.decode() for kind in kept) or "none"
            raise RequestError(f"{f.path} has no appendix {name}", hint=f"appendices: {have}")
    if "DRFT" in drop and "DRFT" not in add and any(t.role == "draft" for t, _ in f.residents.values()):
        raise RequestError(f"{f.path} holds the tensors of its draft head, which DRFT describes", hint="keep DRFT")
    for name in add:
        if name.encode() not in APPENDICES:
            raise RequestError(f"no appendix type {name}", hint=", ".join(kind.decode() for kind in APPENDICES))
    found = {
        kind: bytes(f.read(Record(s.offset, s.stored_size, s.raw_size, s.codec, s.digest), f"section {kind.decode()}"))
        for kind, s in kept.items()
    }
    return found | {name.encode(): content for name, content in add.items()}


def _plan(f: File, codec: str | None, appendices: dict[bytes, bytes]) -> Plan:
    records = [record for x in f.moe_layers for record in f.experts(x.layer)]
    if codec is None:
        every = [*records, *(record for _, record in f.residents.values())]
        codec = "zstd" if 2 * sum(r.codec == ZSTD for r in every) > len(every) else "raw"
    if codec not in ("raw", "zstd"):
        raise RequestError(f"no codec {codec!r}", hint="raw or zstd")
    ends = [0]
    for layer in f.moe_layers:
        ends.append(ends[-1] + layer.expert_count)
    content = b"".join(kind + hashlib.sha256(data).digest() for kind, data in sorted(appendices.items()))
    return Plan(
        f.metadata,
        [(name, t.role, t.encoding, t.shape) for name, (t, _) in f.residents.items()],
        f.bundle(),
        list(f.layouts),
        list(f.moe_layers),
        [[r.layout for r in records[a:b]] for a, b in pairwise(ends)],
        choose_alignment([r.raw_size for r in records]) if codec == "raw" else f.record_alignment,
        RAW if codec == "raw" else ZSTD,
        appendices,
        hashlib.sha256(f.file_id.encode() + content).digest(),
    )
