"""Check a file against every rule of the spec. Needs no MLX.

Structural checks are `parse`, the same that opens a file; `deep` adds the payload (`payload`) and the
appendices (`appendices`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import xxhash

from ..errors import ReadError
from . import appendices
from . import layout as L
from .faults import MAX_FAULTS, Fault
from .frames import FrameError, stream
from .parse import Contents, parse
from .payload import PIECE, FileSource, Found, Progress, Shrunk, check_records
from .reader import open_descriptor, read_at
from .restricted import DocumentError

_DECODED = 1 << 20


@dataclass
class Report:
    """The outcome: the faults found, in the order of the spec's checks; `path` and `deep` as asked for.

    A fault of one stage hides those of later stages, and at most 1,000 faults are kept: `complete` says
    whether every rule was checked.
    """

    path: str
    deep: bool
    errors: list[Fault] = field(default_factory=list)
    complete: bool = True

    @property
    def ok(self) -> bool:
        """Whether the file obeys every rule that was checked."""
        return not self.errors


def validate(path: str | os.PathLike[str], deep: bool = False, progress: Progress | None = None) -> Report:
    """Check `path`; `progress` is called with the bytes of payload just checked.

    Raises ReadError if the file cannot be read at all; broken rules are in the report.
    """
    name = os.fspath(path)
    fd, size = open_descriptor(path)
    try:
        contents, faults = parse(lambda offset, count: read_at(fd, offset, count), size)
        report = Report(name, deep, faults, complete=not faults)
        if deep and not faults:
            _check_payload(fd, contents, report, progress or (lambda _: None))
        return report
    except OSError as error:
        raise ReadError(f"{name}: {error.strerror}") from error
    finally:
        os.close(fd)


def _check_payload(fd: int, contents: Contents, report: Report, progress: Progress) -> None:
    try:
        found = [*_leading_gaps(fd, contents), *check_records(fd, contents, progress)]
        found.sort(key=lambda pair: pair[0])
        faults = [fault for _, fault in found]
        facts = appendices.Facts.of(contents)
        contents.forget()
        faults += _check_appendices(fd, contents, facts)
    except Shrunk:
        report.errors.append(Fault("file-truncated", 32, "the file became shorter while it was read"))
        report.complete = False
        return
    report.errors, report.complete = faults[:MAX_FAULTS], len(faults) < MAX_FAULTS


def _leading_gaps(fd: int, contents: Contents) -> Iterator[Found]:
    """Padding in front of the data sections; that behind records belongs to `payload`."""
    end = contents.head_size
    for s in contents.sections:
        if s.type in L.DATA_SECTIONS:
            yield from ((end, fault) for fault in _gap(fd, end, s))
        if s.type not in L.HEAD_SECTIONS:
            end = s.offset + s.stored_size


def _gap(fd: int, end: int, section: L.Section) -> Iterator[Fault]:
    for at in range(end, section.offset, PIECE):
        if read_at(fd, at, min(PIECE, section.offset - at)).strip(b"\0"):
            yield Fault("padding-nonzero", end, f"padding before section {section.label} is not zero")
            return


def _check_appendices(fd: int, contents: Contents, facts: appendices.Facts) -> Iterator[Fault]:
    end = contents.head_size
    for i, s in enumerate(contents.sections):
        if s.type not in L.CRITICAL_SECTIONS:
            yield from _gap(fd, end, s)
            yield from _check_appendix(fd, s, L.HEADER_SIZE + i * L.DIRECTORY_ENTRY_SIZE, facts)
        end = s.offset + s.stored_size
    if facts.drafts and all(s.type != L.DRFT for s in contents.sections):
        yield Fault("draft-tensors", 0, f"{len(facts.drafts)} tensors of role draft, but no DRFT")


def _check_appendix(fd: int, section: L.Section, at: int, facts: appendices.Facts) -> Iterator[Fault]:
    label, digest = f"section {section.label}", xxhash.xxh64()
    for position in range(0, section.stored_size, PIECE):
        digest.update(_read(fd, section.offset + position, min(PIECE, section.stored_size - position)))
    if digest.intdigest() != section.digest:
        yield Fault("section-digest", at + 40, f"{label} does not match its digest")
        return
    try:
        for _ in _decoded(fd, section):  # the whole frame first: lines mean nothing if it is damaged
            pass
        if section.type in appendices.NAMES:
            appendices.check(section.type, appendices.read_lines(_decoded(fd, section)), facts)
    except (FrameError, DocumentError) as error:
        yield Fault(error.code, section.offset, f"{label}: {error}")


def _decoded(fd: int, section: L.Section) -> Iterator[L.Bytes]:
    """The decoded bytes of an appendix, piece by piece."""
    source = FileSource(lambda at, size: _read(fd, at, size), section.offset, section.stored_size)
    if section.codec == L.ZSTD:
        yield from stream(source, section.raw_size, bytearray(_DECODED))
        return
    for position in range(0, section.stored_size, _DECODED):
        yield source.read(position, _DECODED)


def _read(fd: int, offset: int, size: int) -> bytes:
    data = read_at(fd, offset, size)
    if len(data) < size:
        raise Shrunk
    return data
