"""Write a file record by record, so that it is either complete under its name or not there at all.

Everything but the digests is known from the plan, so the head has its final size from the start. The
work lies in `NAME.partial`: first 256 bytes of draft mark (no reader takes it for a header), then the
head whose indexes fill up as records are written, then the payload. A second run with the same plan
finds the records whose digests still match and goes on after them; `finish` writes header and
directory, syncs, and renames.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from ..errors import OutputError
from . import layout as L
from . import metadata as meta
from . import records
from .plan import HeadPlan, Plan, TensorPlan, check_plan, choose_alignment
from .reader import read_at

__all__ = ["Parts", "Plan", "TensorPlan", "Writer", "check_target", "choose_alignment"]

Parts = Sequence[Sequence[Any]]  # per tensor of a record: (codes, scales, biases), buffers or None

_DRAFT = b"squizd draft\r\n\x1a\n"


class Writer:
    """Writes the records of a plan: residents, then experts by (layer, expert).

    A context manager: on an exception the partial file stays for the next run. `done` of `total`
    records (`done_bytes` of `total_bytes`, decoded) are there; after a resume `done` starts above 0.
    Raw records have their places from the start and may be written in any order.
    """

    def __init__(self, path: str | os.PathLike[str], plan: Plan) -> None:
        self.path, self.plan = os.fspath(path), plan
        self.partial = self.path + ".partial"
        check_plan(plan, self.path)
        self._head = HeadPlan(plan)
        self.done, self.done_bytes = 0, 0
        self.total = len(self._head.tensors)
        self.total_bytes = sum(size for _, size in self._head.tensors)
        self._there = bytearray(self.total)  # 1 for each record that is
        self._fd = -1
        try:
            self._open_locked()
            self._resume()
            os.ftruncate(self._fd, self._reach())  # whatever lies beyond is half a record
            self._check_space()
        except OSError as error:
            self._close()
            raise self._trouble(error) from error
        except BaseException:
            self._close()
            raise

    def has(self, position: int) -> bool:
        """Whether that record is there."""
        return bool(self._there[position])

    def write(self, parts: Parts, position: int | None = None) -> None:
        """Write a record, the first that is not there or that of `position`.

        `parts` per tensor are codes, scales and biases as contiguous buffers.
        """
        first = self._there.find(0)
        position = first if position is None else position
        if position != first and self.plan.codec != L.RAW:
            raise ValueError("records that are compressed must be written in order")
        tensors, raw_size = self._head.tensors[position]
        raw = bytearray(raw_size)
        for tensor, buffers in zip(tensors, parts, strict=True):
            for (_, offset, size), data in zip(tensor.parts, [b for b in buffers if b is not None], strict=True):
                view = memoryview(data).cast("B")
                if len(view) != size:
                    raise ValueError(f"{tensor.name}: {len(view)} bytes where {size} belong")
                raw[offset : offset + size] = view
        try:
            self._put(position, raw)
        except OSError as error:
            raise self._trouble(error) from error

    def finish(self, metadata: dict[str, Any] | None = None) -> None:
        """Complete the file and give it its name. `metadata` may replace the plan's at equal length."""
        if self.done != self.total:
            raise ValueError(f"{self.done} of {self.total} records written")
        if metadata is not None:
            encoded = meta.encode(metadata)
            if len(encoded) != len(self._head.sections[L.META]):
                raise ValueError("final metadata differs in length from the plan's")
            self._head.sections[L.META] = encoded
        try:
            self._write_head()
            os.fsync(self._fd)
            os.replace(self.partial, self.path)
            _sync_folder(self.path)
        except OSError as error:
            raise self._trouble(error) from error
        self._close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._close()

    def _check_space(self) -> None:
        """A disk that cannot hold the file is an error before the work, not after it."""
        if self.plan.codec != L.RAW:
            return
        to_write = self.total_bytes - self.done_bytes
        disk = os.fstatvfs(self._fd)
        free = disk.f_bavail * disk.f_frsize
        if to_write > free:
            need = f"{self._ends[-1]:,} bytes are needed, {to_write:,} of them still to write, {free:,} are free"
            raise OutputError(
                f"cannot write {self.path}: no space left on device ({need})",
                hint="free some space, or choose another disk with -o",
            )

    # -- the partial file ------------------------------------------------------------------------------

    def _open_locked(self) -> None:
        """Open the partial file and lock it; again, if meanwhile another process finished and renamed it."""
        while True:
            self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OutputError(f"{self.partial} is being written by another process") from error
            try:
                if os.path.samestat(os.fstat(self._fd), os.stat(self.partial)):
                    return
            except FileNotFoundError:
                pass
            self._close()

    def _mark(self) -> bytes:
        digest = hashlib.sha256(self.plan.fingerprint)
        for kind in sorted(self._head.sections):
            digest.update(kind + hashlib.sha256(self._head.sections[kind]).digest())
        digest.update(repr((self.plan.codec, self.plan.record_alignment, sorted(self.plan.appendices))).encode())
        return (_DRAFT + digest.digest()).ljust(L.HEADER_SIZE, b"\0")

    def _resume(self) -> None:
        """Keep the records of an earlier run with the same plan (compressed ones up to the first gap)."""
        self._end = self._head.size
        mark = self._mark()
        same = read_at(self._fd, 0, L.HEADER_SIZE) == mark
        if not same:
            os.ftruncate(self._fd, 0)
            self._pwrite(mark, 0)
        self._write_bundle()
        self._ends = [self._end]  # where raw records end, after the bundle's end
        for i in range(self.total):
            self._ends.append(self._aligned(self._ends[-1], i) + self._head.tensors[i][1])
        if not same:
            return
        position = -1
        for kind, entries in ((L.TENS, self._head.residents), (L.EXPI, self._head.experts)):
            if not len(entries):
                continue
            start, size = self._head.spans[kind]
            found = np.frombuffer(read_at(self._fd, start, size).ljust(size, b"\0"), entries.dtype)
            for i, e in enumerate(found):
                position += 1
                start, stored = self._start(position), int(e["record"]["stored_size"])
                data, wanted = b"", None
                if 0 < stored <= self._head.tensors[position][1]:
                    data = read_at(self._fd, start, stored)
                    wanted = np.array(self._record(position, start, data), L.RECORD)
                if wanted is None or len(data) < stored or wanted.tobytes() != e["record"].tobytes():
                    if self.plan.codec != L.RAW:
                        return
                    continue
                entries[i]["record"] = wanted
                self._advance(position, start + stored)

    def _aligned(self, end: int, position: int) -> int:
        first_expert = len(self.plan.residents)
        return L.align(end, L.PART_ALIGNMENT if position < first_expert else self.plan.record_alignment)

    def _start(self, position: int) -> int:
        """Where a record starts; one that is compressed must be the next."""
        return self._aligned(self._ends[position] if self.plan.codec == L.RAW else self._end, position)

    def _reach(self) -> int:
        """Where the last record ends that is there."""
        if self.plan.codec != L.RAW:
            return self._end
        return self._ends[self._there.rfind(1) + 1]

    def _advance(self, position: int, end: int) -> None:
        self._end = max(self._end, end)
        self._there[position] = 1
        self.done_bytes += self._head.tensors[position][1]
        self.done += 1

    def _record(self, position: int, start: int, stored: L.Bytes) -> tuple[int, int, int, int, int, bytes, int]:
        """The index fields of a record; it is encoded exactly if that makes it smaller."""
        raw_size = self._head.tensors[position][1]
        codec = L.RAW if len(stored) == raw_size else self.plan.codec
        digest = xxhash.xxh64_intdigest(stored)
        return start, len(stored), raw_size, codec, self._head.layout_ids[position], b"", digest

    def _put(self, position: int, raw: bytearray) -> None:
        start, first_expert = self._start(position), len(self.plan.residents)
        parts = [offset for tensor in self._head.tensors[position][0] for _, offset, _ in tensor.parts]
        _, stored = records.encode(raw, self.plan.codec, parts)
        self._pwrite(stored, start)
        entries, kind, i = (self._head.residents, L.TENS, position)
        if position >= first_expert:
            entries, kind, i = self._head.experts, L.EXPI, position - first_expert
        entries[i]["record"] = self._record(position, start, stored)
        self._pwrite(bytes(entries[i : i + 1]), self._head.spans[kind][0] + i * entries.dtype.itemsize)
        self._advance(position, start + len(stored))

    def _write_bundle(self) -> None:
        for e, name in zip(self._head.files, sorted(self.plan.bundle), strict=True):
            raw = self.plan.bundle[name]
            codec, stored = records.encode(raw, self.plan.codec)
            start = L.align(self._end, L.PART_ALIGNMENT)
            self._pwrite(stored, start)
            e["record"] = (start, len(stored), len(raw), codec, 0, b"", xxhash.xxh64_intdigest(stored))
            self._end = start + len(stored)

    def _write_head(self) -> None:
        """Appendices, indexes and directory; the header last, after everything else is on the disk."""
        head = self._head
        if len(head.experts):
            self._end = L.align(self._end, self.plan.record_alignment)
        for kind, content in self.plan.appendices.items():
            codec, stored = records.encode(content, self.plan.codec)
            start = L.align(self._end, L.PART_ALIGNMENT)
            self._pwrite(stored, start)
            head.appendices[kind] = start, len(stored), len(content), codec, xxhash.xxh64_intdigest(stored)
            self._end = start + len(stored)
        os.ftruncate(self._fd, self._end)
        data = head.assemble(self._end)
        head.check(data, self._end, self.path)
        self._pwrite(data[L.HEADER_SIZE :], L.HEADER_SIZE)
        os.fsync(self._fd)
        self._pwrite(data[: L.HEADER_SIZE], 0)

    def _pwrite(self, data: L.Bytes, offset: int) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._fd, view[: 1 << 30], offset)
            view, offset = view[count:], offset + count

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _trouble(self, error: OSError) -> OutputError:
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = f"free some space and run the same command again; it goes on where {self.partial} ends"
        return OutputError(f"cannot write {self.path}: {error.strerror}", hint=hint)


def _sync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_target(target: str, force: bool) -> None:
    """Raises OutputError if `target` cannot be written, or exists without `force`; before any work is done."""
    folder = os.path.dirname(os.path.abspath(target))
    if not os.path.isdir(folder):
        raise OutputError(f"cannot write {target}: no folder {folder}")
    if os.path.isdir(target):
        raise OutputError(f"cannot write {target}: it is a folder")
    if os.path.exists(target) and not force:
        raise OutputError(f"{target} exists", hint="--force replaces it")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {target}: the folder is read-only")
