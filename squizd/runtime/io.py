"""Bring one record's bytes from the file to where they are used: verified, converted. No MLX.

A record goes straight into its destinations; only parts that must be widened (floats on CPU; codes of fewer bits than
others of their layer have), and padding, pass through a small buffer of the reading thread. The XXH64 of the stored
bytes is checked on every read, piece by piece while the system reads on. What lies in the destinations after an error
is undefined: the caller must not use it. Where the bytes come from is a `source.Source`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from ..container import records
from ..container.layout import RAW, Record
from ..errors import ReadError
from .source import MOST_BUFFERS, Bytes, Source
from .widening import widen_codes, widen_floats

SCRATCH_BYTES = 4 << 20  # the most that one thread stages at once for raw records
_WRONG_DIGEST = "the bytes do not match their digest"
PIECE_BYTES = 1 << 19  # read at once, then hashed while the processor still has it in its cache


@dataclass(frozen=True)
class Part:
    """One part of a decoded record: where it lies, and how it is widened.

    `widen`: the float type to widen to f32 from ("" = no). `bits`: codes of so many bits become codes of so many.
    """

    offset: int
    size: int
    widen: str = ""
    bits: tuple[int, int] | None = None

    @property
    def ratio(self) -> tuple[int, int]:
        """So many stored bytes, which are not divided, become so many."""
        return (2, 4) if self.widen else self.bits or (1, 1)

    @property
    def target_bytes(self) -> int:
        """Bytes of the part where it is used."""
        return self.widened(self.size)

    def widened(self, size: int) -> int:
        """Bytes that the first `size` become."""
        few, many = self.ratio
        return size // few * many

    @property
    def staged(self) -> bool:
        """Whether it must be widened."""
        return bool(self.widen or self.bits)


class _Scratch(threading.local):
    """A buffer per thread that grows to what was asked for."""

    def __init__(self) -> None:
        self.bytes: Bytes = np.empty(0, np.uint8)

    def get(self, size: int) -> Bytes:
        if self.bytes.size < size:
            self.bytes = np.empty(size, np.uint8)
        return self.bytes


_scratch = _Scratch()


class Scatter:
    """How records of one layout are spread over destinations. Immutable: threads share it."""

    def __init__(self, parts: Sequence[Part], raw_size: int) -> None:
        self.parts = tuple(parts)
        self.raw_size = raw_size
        segments: list[tuple[int, int, int]] = []  # (part or -1 for padding, start in part, bytes), in file order
        end = 0
        for index, part in sorted(enumerate(self.parts), key=lambda numbered: numbered[1].offset):
            if part.offset > end:
                segments.append((-1, 0, part.offset - end))
            block = min(PIECE_BYTES, SCRATCH_BYTES) // part.ratio[0] * part.ratio[0]
            segments += [(index, at, min(block, part.size - at)) for at in range(0, part.size, block)]
            end = part.offset + part.size
        if raw_size > end:
            segments.append((-1, 0, raw_size - end))
        self._steps: list[list[tuple[int, int, int]]] = [[]]  # one read each
        self.scratch_bytes = staged = together = 0
        for index, start, size in segments:
            cost = size if index < 0 or self.parts[index].staged else 0
            full = together + size > PIECE_BYTES or staged + cost > SCRATCH_BYTES
            if (together and full) or len(self._steps[-1]) == MOST_BUFFERS:
                self._steps.append([])
                staged = together = 0
            self._steps[-1].append((index, start, size))
            staged, together = staged + cost, together + size
            self.scratch_bytes = max(self.scratch_bytes, staged)

    def staging_bytes(self, codec: int, raw_size: int) -> int:
        """The most memory that one `read` of such a record needs besides its destinations."""
        return self.scratch_bytes if codec == RAW else 2 * raw_size

    def read(self, source: Source, record: Record, targets: Sequence[Bytes]) -> None:
        """Fill `targets`, one writable array of bytes per part, from `record`.

        Raises ReadError with only the reason as its text: the caller knows whose record it is.
        """
        try:
            if record.codec == RAW:
                self._read_raw(source, record, targets)
            else:
                self._read_encoded(source, record, targets)
        except OSError as error:
            raise ReadError(error.strerror or str(error)) from error

    def _read_encoded(self, source: Source, record: Record, targets: Sequence[Bytes]) -> None:
        buffer = np.empty(record.stored_size, np.uint8)
        got = source.fill([buffer], record.offset)
        if got < record.stored_size:
            raise _cut_short(got, record)
        stored = buffer.data
        if not records.check_digest(stored, record):
            raise ReadError(_WRONG_DIGEST)
        decoded, fault = records.decode(stored, record)
        if fault is not None:
            raise ReadError(f"{fault.message} [{fault.code}]")
        raw = np.frombuffer(decoded, np.uint8)
        for part, target in zip(self.parts, targets, strict=True):
            _place(part, raw[part.offset : part.offset + part.size], target)

    def _read_raw(self, source: Source, record: Record, targets: Sequence[Bytes]) -> None:
        digest, at = xxhash.xxh64(), record.offset
        scratch = _scratch.get(self.scratch_bytes)
        for step in self._steps:
            buffers: list[Bytes] = []
            widened: list[tuple[int, int, Bytes]] = []
            used = wanted = 0
            for index, start, size in step:
                if index < 0 or self.parts[index].staged:
                    buffer = scratch[used : used + size]
                    used += size
                    if index >= 0:
                        widened.append((index, start, buffer))
                else:
                    buffer = targets[index][start : start + size]
                buffers.append(buffer)
                wanted += size
            got = source.fill(buffers, at)
            if got < wanted:
                raise _cut_short(at - record.offset + got, record)
            for buffer in buffers:
                digest.update(buffer)
            for index, start, buffer in widened:
                part = self.parts[index]
                _place(part, buffer, targets[index][part.widened(start) : part.widened(start + buffer.size)])
            at += wanted
        if digest.intdigest() != record.digest:
            raise ReadError(_WRONG_DIGEST)


def _cut_short(have: int, record: Record) -> ReadError:
    return ReadError(f"{have} of {record.stored_size} bytes, the file is cut short")


def _place(part: Part, stored: Bytes, target: Bytes) -> None:
    if part.widen:
        widen_floats(stored, part.widen, target)
    elif part.bits:
        widen_codes(stored, part.bits, target)
    else:
        target[...] = stored
