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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from ..errors import OutputError
from . import layout as L
from . import metadata as meta
from . import records
from .reader import read_at

Parts = Sequence[Sequence[Any]]  # per tensor of a record: (codes, scales, biases), buffers or None
TensorPlan = tuple[str, str, L.Encoding, tuple[int, ...]]  # name, role, encoding, shape

_DRAFT = b"squizd draft\r\n\x1a\n"


@dataclass
class Plan:
    """All that a file will hold, before any value is known."""

    metadata: dict[str, Any]
    residents: list[TensorPlan]
    bundle: dict[str, bytes] = field(default_factory=dict)
    layouts: list[L.Layout] = field(default_factory=list)
    moe_layers: list[L.MoeLayer] = field(default_factory=list)
    expert_layouts: list[list[int]] = field(default_factory=list)  # [position in moe_layers][expert] -> layout
    record_alignment: int = L.DEFAULT_RECORD_ALIGNMENT
    codec: int = L.RAW
    appendices: dict[bytes, bytes] = field(default_factory=dict)
    fingerprint: bytes = b""  # what else a resumed run must agree on: source and arguments


def choose_alignment(raw_sizes: Iterable[int], limit: float = 0.01) -> int:
    """The largest power of two up to 16 KiB whose padding costs at most `limit` of the expert bytes."""
    sizes, alignment = list(raw_sizes), L.DEFAULT_RECORD_ALIGNMENT
    while alignment > L.PART_ALIGNMENT:
        if sum(L.align(size, alignment) - size for size in sizes) <= limit * sum(sizes):
            break
        alignment //= 2
    return alignment


class _Names:
    """STRS: every distinct name once."""

    def __init__(self) -> None:
        self.data, self.at = bytearray(), dict[str, int]()

    def put(self, entry: Any, name: str) -> None:
        raw = name.encode("utf-8")
        if name not in self.at:
            self.at[name] = len(self.data)
            self.data += raw
        entry["name_offset"], entry["name_length"] = self.at[name], len(raw)


def _fill_tensor(e: Any, t: L.Tensor, names: _Names) -> None:
    names.put(e, t.name)
    e["role"], e["mode"], e["dtype"] = L.ROLE_IDS[t.role], L.MODE_IDS[t.encoding.mode], L.DTYPE_IDS[t.encoding.dtype]
    e["bits"], e["group_size"], e["ndim"] = t.encoding.bits, t.encoding.group_size, len(t.shape)
    e["shape"] = t.shape + (0,) * (L.MAX_DIMENSIONS - len(t.shape))
    for part in ("codes", "scales", "biases"):
        e[f"{part}_offset"], e[f"{part}_size"] = getattr(t, part)


class Writer:
    """Writes the records of a plan in order: residents, then experts by (layer, expert).

    A context manager: on an exception the partial file stays for the next run. `done` of `total`
    records (`done_bytes` of `total_bytes`, decoded) are there; after a resume `done` starts above 0.
    """

    def __init__(self, path: str | os.PathLike[str], plan: Plan) -> None:
        self.path, self.plan = os.fspath(path), plan
        self.partial = self.path + ".partial"
        self._lay_out()
        self.done, self.done_bytes = 0, 0
        self.total = len(self._tensors)
        self.total_bytes = sum(size for _, size in self._tensors)
        self._fd = -1
        try:
            self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._lock()
            self._resume()
            os.ftruncate(self._fd, self._end)  # whatever lies beyond is half a record
            self._check_space()
        except OSError as error:
            self._close()
            raise self._trouble(error) from error
        except BaseException:
            self._close()
            raise

    def write(self, parts: Parts) -> None:
        """Write the next record; `parts` per tensor are codes, scales and biases as contiguous buffers."""
        tensors, raw_size = self._tensors[self.done]
        raw = bytearray(raw_size)
        for tensor, buffers in zip(tensors, parts, strict=True):
            for (_, offset, size), data in zip(tensor.parts, [b for b in buffers if b is not None], strict=True):
                view = memoryview(data).cast("B")
                if len(view) != size:
                    raise ValueError(f"{tensor.name}: {len(view)} bytes where {size} belong")
                raw[offset : offset + size] = view
        stored = raw if self.plan.codec == L.RAW else records.encode(raw)
        try:
            self._append(stored, raw_size)
        except OSError as error:
            raise self._trouble(error) from error

    def finish(self, metadata: dict[str, Any] | None = None) -> None:
        """Complete the file and give it its name. `metadata` may replace the plan's at equal length."""
        if self.done != self.total:
            raise ValueError(f"{self.done} of {self.total} records written")
        if metadata is not None:
            encoded = meta.encode(metadata)
            if len(encoded) != len(self._head_parts[L.META]):
                raise ValueError("final metadata differs in length from the plan's")
            self._head_parts[L.META] = encoded
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

    # -- the plan as bytes ---------------------------------------------------------------------------

    def _lay_out(self) -> None:
        plan, names = self.plan, _Names()
        self._tens = np.zeros(len(plan.residents), L.RESIDENT)
        self._tensors: list[tuple[tuple[L.Tensor, ...], int]] = []
        for e, (name, role, encoding, shape) in zip(self._tens, plan.residents, strict=True):
            tensor, size = L.place(name, role, encoding, shape)
            _fill_tensor(e["tensor"], tensor, names)
            self._tensors.append(((tensor,), size))
        self._file = np.zeros(len(plan.bundle), L.EMBEDDED)
        for e, name in zip(self._file, sorted(plan.bundle), strict=True):
            names.put(e, name)
        pairs = [(x.layer, i) for x in plan.moe_layers for i in range(x.expert_count)]
        flat_layouts = [layout for layer in plan.expert_layouts for layout in layer]
        self._expi = np.zeros(len(pairs), L.EXPERT)
        if pairs:
            self._expi["layer"], self._expi["expert"] = np.array(pairs).T
        self._tensors += [(plan.layouts[i].tensors, plan.layouts[i].raw_size) for i in flat_layouts]
        self._layout_ids = [0] * len(plan.residents) + flat_layouts
        head = {L.META: meta.encode(plan.metadata), L.STRS: b""}
        if plan.bundle:
            head[L.FILE] = bytes(self._file)
        head[L.TENS] = bytes(self._tens)
        if pairs:
            head[L.LAYT], head[L.MOEL] = self._layt(names), self._moel(names)
            head[L.EXPI] = bytes(self._expi)
        head[L.STRS] = bytes(names.data)
        self._head_parts: dict[bytes, bytes] = head
        data = ([L.BNDL] if plan.bundle else []) + [L.RESD] + ([L.SHRD] if pairs else [])
        self._count = len(head) + len(data) + len(plan.appendices)
        self._spans, end = dict[bytes, tuple[int, int]](), L.HEADER_SIZE + self._count * L.DIRECTORY_ENTRY_SIZE
        for kind, content in head.items():
            start = L.align(end, L.PART_ALIGNMENT)
            self._spans[kind], end = (start, len(content)), start + len(content)
        self._head_size = end

    def _layt(self, names: _Names) -> bytes:
        layouts = self.plan.layouts
        head = np.zeros(1, L.LAYOUT_HEAD)
        entries = np.zeros(len(layouts), L.LAYOUT)
        tensors = np.zeros(sum(len(x.tensors) for x in layouts), L.TENSOR)
        head["layout_count"], head["tensor_count"] = len(layouts), len(tensors)
        first = 0
        for e, layout in zip(entries, layouts, strict=True):
            e["first_tensor"], e["tensor_count"], e["raw_size"] = first, len(layout.tensors), layout.raw_size
            for i, tensor in enumerate(layout.tensors):
                _fill_tensor(tensors[first + i], tensor, names)
            first += len(layout.tensors)
        return bytes(head) + bytes(entries) + bytes(tensors)

    def _moel(self, names: _Names) -> bytes:
        entries = np.zeros(len(self.plan.moe_layers), L.MOE_LAYER)
        for e, layer in zip(entries, self.plan.moe_layers, strict=True):
            e["layer"], e["expert_count"] = layer.layer, layer.expert_count
            names.put(e, layer.path)
        return bytes(entries)

    def _check_space(self) -> None:
        """A disk that cannot hold the file is an error before the work, not after it."""
        if self.plan.codec != L.RAW:
            return
        end = self._end
        for i in range(self.done, self.total):
            alignment = L.PART_ALIGNMENT if i < len(self.plan.residents) else self.plan.record_alignment
            end = L.align(end, alignment) + self._tensors[i][1]
        disk = os.fstatvfs(self._fd)
        free = disk.f_bavail * disk.f_frsize
        if end - self._end > free:
            need = f"{end:,} bytes are needed, {end - self._end:,} of them still to write, {free:,} are free"
            raise OutputError(
                f"cannot write {self.path}: no space left on device ({need})",
                hint="free some space, or choose another disk with -o",
            )

    # -- the partial file ------------------------------------------------------------------------------

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(f"{self.partial} is being written by another process") from error

    def _mark(self) -> bytes:
        digest = hashlib.sha256(self.plan.fingerprint)
        for kind in sorted(self._head_parts):
            digest.update(kind + hashlib.sha256(self._head_parts[kind]).digest())
        digest.update(repr((self.plan.codec, self.plan.record_alignment, sorted(self.plan.appendices))).encode())
        return (_DRAFT + digest.digest()).ljust(L.HEADER_SIZE, b"\0")

    def _resume(self) -> None:
        """Keep the leading records of an earlier run with the same plan; start afresh otherwise."""
        self._end = self._head_size
        mark = self._mark()
        if read_at(self._fd, 0, L.HEADER_SIZE) != mark:
            os.ftruncate(self._fd, 0)
            self._pwrite(mark, 0)
            self._write_bundle()
            return
        self._write_bundle()
        for kind, entries in ((L.TENS, self._tens), (L.EXPI, self._expi)):
            if not len(entries):
                continue
            start, size = self._spans[kind]
            found = np.frombuffer(read_at(self._fd, start, size).ljust(size, b"\0"), entries.dtype)
            for i, e in enumerate(found):
                r = e["record"]
                stored = int(r["stored_size"])
                if int(r["offset"]) != self._start() or not 0 < stored <= self._tensors[self.done][1] + (1 << 20):
                    return
                data = read_at(self._fd, int(r["offset"]), stored)
                if len(data) < stored or xxhash.xxh64_intdigest(data) != int(r["digest"]):
                    return
                entries[i]["record"] = r
                self._advance(int(r["offset"]) + stored)

    def _start(self) -> int:
        """Where the next record starts."""
        first_expert = len(self.plan.residents)
        return L.align(self._end, L.PART_ALIGNMENT if self.done < first_expert else self.plan.record_alignment)

    def _advance(self, end: int) -> None:
        self._end = end
        self.done_bytes += self._tensors[self.done][1]
        self.done += 1

    def _append(self, stored: bytes | bytearray, raw_size: int) -> None:
        start, first_expert = self._start(), len(self.plan.residents)
        self._pwrite(stored, start)
        entries, kind, i = (self._tens, L.TENS, self.done)
        if self.done >= first_expert:
            entries, kind, i = self._expi, L.EXPI, self.done - first_expert
        digest = xxhash.xxh64_intdigest(stored)
        entries[i]["record"] = (start, len(stored), raw_size, self.plan.codec, self._layout_ids[self.done], b"", digest)
        self._pwrite(bytes(entries[i : i + 1]), self._spans[kind][0] + i * entries.dtype.itemsize)
        self._advance(start + len(stored))

    def _write_bundle(self) -> None:
        for e, name in zip(self._file, sorted(self.plan.bundle), strict=True):
            raw = self.plan.bundle[name]
            stored = raw if self.plan.codec == L.RAW else records.encode(raw)
            start = L.align(self._end, L.PART_ALIGNMENT)
            self._pwrite(stored, start)
            e["record"] = (start, len(stored), len(raw), self.plan.codec, 0, b"", xxhash.xxh64_intdigest(stored))
            self._end = start + len(stored)

    def _write_head(self) -> None:
        plan, head = self.plan, self._head_parts
        head[L.TENS] = bytes(self._tens)
        if plan.bundle:
            head[L.FILE] = bytes(self._file)
        if len(self._expi):
            head[L.EXPI] = bytes(self._expi)
        if len(self._expi):
            self._end = L.align(self._end, plan.record_alignment)
        self._data_spans()
        for kind, content in plan.appendices.items():
            start = L.align(self._end, L.PART_ALIGNMENT)
            self._pwrite(content, start)
            self._spans[kind], self._end = (start, len(content)), start + len(content)
        os.ftruncate(self._fd, self._end)
        directory = np.zeros(self._count, L.SECTION)
        for e, (kind, (offset, size)) in zip(directory, self._spans.items(), strict=True):
            e["type"], e["offset"], e["stored_size"], e["raw_size"] = kind, offset, size, size
            e["flags"] = 0 if kind in plan.appendices else L.SECTION_CRITICAL
            if kind in head or kind in plan.appendices:
                e["digest"] = xxhash.xxh64_intdigest(head[kind] if kind in head else plan.appendices[kind])
        for kind, content in head.items():
            self._pwrite(content, self._spans[kind][0])
        self._pwrite(bytes(directory), L.HEADER_SIZE)
        os.fsync(self._fd)
        self._pwrite(self._header(bytes(directory)), 0)

    def _data_spans(self) -> None:
        """BNDL, RESD and SHRD follow from where their records came to lie."""

        def span(r: Any, end: int | None = None) -> tuple[int, int]:
            start = int(r["offset"][0])
            return start, (end or int(r["offset"][-1] + r["stored_size"][-1])) - start

        if self.plan.bundle:
            self._spans[L.BNDL] = span(self._file["record"])
        self._spans[L.RESD] = span(self._tens["record"])
        if len(self._expi):
            self._spans[L.SHRD] = span(self._expi["record"], self._end)

    def _header(self, directory: bytes) -> bytes:
        flags = 0
        for tensors, _ in self._tensors:
            for tensor in tensors:
                flags |= tensor.encoding.content_flag()
        for kind in self.plan.appendices:
            flags |= L.SECTION_FLAGS.get(kind, 0)
        h = np.zeros(1, L.HEADER)
        h["magic"], h["major"], h["minor"], h["header_size"] = L.MAGIC, L.MAJOR, L.MINOR, L.HEADER_SIZE
        h["file_size"], h["directory_offset"], h["directory_count"] = self._end, L.HEADER_SIZE, self._count
        h["directory_entry_size"], h["directory_digest"] = L.DIRECTORY_ENTRY_SIZE, xxhash.xxh64_intdigest(directory)
        h["content_flags"], h["record_alignment"], h["head_size"] = flags, self.plan.record_alignment, self._head_size
        h["header_digest"] = xxhash.xxh64_intdigest(bytes(h)[:248])
        return bytes(h)

    def _pwrite(self, data: bytes | bytearray, offset: int) -> None:
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
