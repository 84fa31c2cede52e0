"""Check a file against every rule of the spec. Needs no MLX.

Structural checks are `parse`, the same that opens a file; `deep` adds the payload: digests, zstd
frames, padding, and the values that would decode to nonsense.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import xxhash

from . import layout as L
from . import records
from .faults import Fault
from .parse import Contents, parse
from .reader import open_descriptor, read_at

_CHUNK = 1 << 22
Progress = Callable[[int], None]


@dataclass
class Report:
    """The outcome: every fault found, in file order of the checks."""

    path: str
    deep: bool
    errors: list[Fault] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the file obeys every rule that was checked."""
        return not self.errors


def validate(path: str | os.PathLike[str], deep: bool = False, progress: Progress | None = None) -> Report:
    """Check `path`; `progress` is called with the bytes of payload just checked.

    Raises ReadError if the file cannot be read at all; broken rules are in the report.
    """
    fd, size = open_descriptor(path)
    try:
        contents, faults = parse(lambda offset, count: read_at(fd, offset, count), size)
        report = Report(os.fspath(path), deep, faults)
        if deep and not faults:
            report.errors.extend(_payload(fd, contents, progress or (lambda _: None)))
        return report
    finally:
        os.close(fd)


def _payload(fd: int, contents: Contents, progress: Progress) -> Iterator[Fault]:
    for name, record in contents.files.items():
        yield from _record(fd, record, (), f"embedded file {name}", progress)
    for name, (tensor, record) in contents.residents.items():
        yield from _record(fd, record, (tensor,), name, progress)
    for e in contents.experts:
        r = e["record"]
        record = L.Record(
            int(r["offset"]),
            int(r["stored_size"]),
            int(r["raw_size"]),
            int(r["codec"]),
            int(r["digest"]),
            int(r["layout"]),
        )
        tensors = contents.layouts[record.layout].tensors
        yield from _record(fd, record, tensors, f"layer {int(e['layer'])} expert {int(e['expert'])}", progress)
    for i, s in enumerate(contents.sections):
        if s.type not in L.HEAD_SECTIONS + L.DATA_SECTIONS:
            yield from _appendix(fd, s, L.HEADER_SIZE + i * L.DIRECTORY_ENTRY_SIZE)
    yield from _padding(fd, contents)


def _digest(fd: int, offset: int, size: int) -> int:
    state = xxhash.xxh64()
    for start in range(0, size, _CHUNK):
        state.update(read_at(fd, offset + start, min(_CHUNK, size - start)))
    return state.intdigest()


def _record(fd: int, record: L.Record, tensors: tuple[L.Tensor, ...], what: str, progress: Progress) -> Iterator[Fault]:
    progress(record.stored_size)
    if _digest(fd, record.offset, record.stored_size) != record.digest:
        yield Fault("record-digest", record.offset, f"{what} does not match its digest")
        return
    if record.codec == L.RAW and not tensors:
        return
    raw, fault = records.decode(read_at(fd, record.offset, record.stored_size), record)
    if fault is not None:
        yield fault._replace(message=f"{what}: {fault.message}")
        return
    end = 0
    for tensor in tensors:
        for part, offset, size in tensor.parts:
            if any(raw[end:offset]):
                yield Fault("padding-nonzero", record.offset + end, f"{what}: padding before {tensor.name} {part}")
            end = offset + size
            code = _bad_values(tensor.encoding, part, raw[offset:end])
            if code:
                yield Fault(code, record.offset + offset, f"{what}: {tensor.name} {part}")


def _bad_values(encoding: L.Encoding, part: str, data: memoryview) -> str:
    """The code of the rule that a part's values break, or an empty string."""
    if encoding.mode == "affine" and part != "codes":
        mask, kind = {"f32": (0x7F800000, "<u4"), "f16": (0x7C00, "<u2"), "bf16": (0x7F80, "<u2")}[encoding.dtype]
        bits = np.frombuffer(data, kind) & mask
        return {"scales": "scale-not-finite", "biases": "bias-not-finite"}[part] if (bits == mask).any() else ""
    if encoding.mode in ("mxfp4", "mxfp8") and part == "scales":
        return "e8m0-nan" if (np.frombuffer(data, np.uint8) == 0xFF).any() else ""
    if (encoding.mode, part) in (("nvfp4", "scales"), ("mxfp8", "codes")):
        return "e4m3-nan" if ((np.frombuffer(data, np.uint8) & 0x7F) == 0x7F).any() else ""
    return ""


def _appendix(fd: int, section: L.Section, at: int) -> Iterator[Fault]:
    label = f"section {section.type.decode()}"
    if _digest(fd, section.offset, section.stored_size) != section.digest:
        yield Fault("section-digest", at + 40, f"{label} does not match its digest")
        return
    if section.codec == L.ZSTD:
        record = L.Record(section.offset, section.stored_size, section.raw_size, section.codec, section.digest)
        _, fault = records.decode(read_at(fd, section.offset, section.stored_size), record)
        if fault is not None:
            yield fault._replace(message=f"{label}: {fault.message}")


def _padding(fd: int, contents: Contents) -> Iterator[Fault]:
    """Everything that is no section and no record is zero."""
    spans = [(s.offset, s.stored_size) for s in contents.sections if s.type not in L.DATA_SECTIONS]
    spans += [(r.offset, r.stored_size) for r in contents.files.values()]
    spans += [(r.offset, r.stored_size) for _, r in contents.residents.values()]
    r = contents.experts["record"]
    spans += list(zip(r["offset"].tolist(), r["stored_size"].tolist(), strict=True))
    end = contents.head_size
    for offset, size in sorted(spans):
        if offset > end and any(read_at(fd, end, offset - end)):
            yield Fault("padding-nonzero", end, f"padding at {end} is not zero")
        end = max(end, offset + size)
    if any(read_at(fd, end, contents.file_size - end)):
        yield Fault("padding-nonzero", end, f"padding at {end} is not zero")
