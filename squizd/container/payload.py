"""The deep checks of records: digests, zstd frames, padding and values, streamed by two threads.

Neighbouring small records are read in one piece and, where they share a layout, looked at in one go;
large records are read in pieces. Memory is bounded whatever the file claims: two buffers, and for zstd
two windows.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import xxhash

from . import layout as L
from .faults import MAX_FAULTS, Fault
from .frames import FrameError, MemorySource, Source, stream
from .parse import Contents
from .values import Scan

Progress = Callable[[int], None]
Found = tuple[int, Fault]  # where the thing lies that has the fault (the order of the report), and the fault
THREADS = 2
PIECE = 1 << 21  # most bytes read at once
_MOST_ITEMS = 1 << 12  # most records in a batch
_DECODED = 1 << 20  # most bytes decoded at once
_WRONG_DIGEST = "the bytes do not match their digest"


class Shrunk(Exception):
    """The file ends where it did not end before."""


class Item(NamedTuple):
    """One record, the tensors that it holds, and the zero bytes up to `end` that follow it."""

    offset: int
    stored_size: int
    raw_size: int
    codec: int
    digest: int
    tensors: tuple[L.Tensor, ...]
    label: str | tuple[int, int]  # name, or layer and expert
    end: int

    def __str__(self) -> str:
        return self.label if isinstance(self.label, str) else "layer {} expert {}".format(*self.label)


class FileSource(Source):
    """Stored bytes that are read when asked for; what `read` gave is good until the next call."""

    def __init__(self, read: Callable[[int, int], L.Bytes], offset: int, size: int) -> None:
        self._read, self._offset, self.size = read, offset, size

    def read(self, offset: int, size: int) -> L.Bytes:
        """See Source."""
        return self._read(self._offset + offset, max(0, min(size, self.size - offset)))


def check_records(fd: int, contents: Contents, progress: Progress) -> list[Found]:
    """The faults of all records and of the padding behind them, in file order; raises Shrunk, OSError."""
    jobs, found, failures = batches(contents), list[Found](), list[BaseException]()
    lock, turn = threading.Lock(), threading.Lock()

    def work() -> None:
        checker = _Checker(fd, turn)
        try:
            while not failures and len(found) < MAX_FAULTS:
                with lock:
                    job = next(jobs, None)
                if job is None:
                    return
                faults = list(islice(checker.batch(job), MAX_FAULTS))
                with lock:
                    found.extend(faults)
                    progress(sum(item.stored_size for item in job))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(THREADS - 1)]
    try:
        for thread in threads:
            thread.start()
        work()
        for thread in threads:
            thread.join()
    except BaseException as error:  # an interrupt while waiting: the descriptor must outlive the threads
        failures.append(error)
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    found.sort(key=lambda pair: pair[0])
    return found[:MAX_FAULTS]


def batches(contents: Contents) -> Iterator[list[Item]]:
    """All records in file order, in neighbourly groups of at most PIECE bytes, or alone."""
    batch: list[Item] = []
    for item in _items(contents):
        if batch and (item.end - batch[0].offset > PIECE or len(batch) == _MOST_ITEMS):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _items(contents: Contents) -> Iterator[Item]:
    ends = {s.type: s.offset + s.stored_size for s in contents.sections}
    yield from _neighbours([(r, (), f"embedded file {f}") for f, r in contents.files.items()], ends.get(L.BNDL, 0))
    yield from _neighbours([(r, (t,), t.label) for t, r in contents.residents.values()], ends[L.RESD])
    tensors = [layout.tensors for layout in contents.layouts]
    experts, offsets = contents.experts, contents.experts["record"]["offset"]
    after = np.append(offsets[1:], np.uint64(ends.get(L.SHRD, 0)))
    for first in range(0, len(experts), _MOST_ITEMS):
        some = slice(first, first + _MOST_ITEMS)
        for (layer, expert, record), end in zip(experts[some].tolist(), after[some].tolist(), strict=True):
            offset, stored_size, raw_size, codec, layout, _, digest = record
            yield Item(offset, stored_size, raw_size, codec, digest, tensors[layout], (layer, expert), end)


def _neighbours(records: Sequence[tuple[L.Record, tuple[L.Tensor, ...], str]], end: int) -> Iterator[Item]:
    for i, (r, tensors, label) in enumerate(records):
        after = records[i + 1][0].offset if i + 1 < len(records) else end
        yield Item(r.offset, r.stored_size, r.raw_size, r.codec, r.digest, tensors, label, after)


class _Checker:
    """Checks batches with buffers of its own: one for each thread.

    What holds the interpreter's lock, or takes it again every few microseconds, is done by one thread at a
    time (`turn`): fighting over that lock costs more than it gives. Reading and decoding need no turn.
    """

    def __init__(self, fd: int, turn: threading.Lock) -> None:
        self._fd, self._turn = fd, turn
        self._buffer = memoryview(np.empty(PIECE, np.uint8))
        self._decoded = memoryview(np.empty(_DECODED, np.uint8))
        self._scans: dict[int, tuple[tuple[L.Tensor, ...], Scan]] = {}

    def batch(self, items: list[Item]) -> Iterator[Found]:
        """Faults of the records of one batch."""
        start, end = items[0].offset, items[-1].end
        if end - start > PIECE:
            yield from self._large(items[0])
            return
        view = self._read(start, end - start)
        stored = [view[i.offset - start : i.offset - start + i.stored_size] for i in items]
        with self._turn:
            right = [xxhash.xxh64_intdigest(s) == i.digest for s, i in zip(stored, items, strict=True)]
            if all(right) and self._regular(items, view):
                return
        for item, data, intact in zip(items, stored, right, strict=True):
            if intact:
                yield from self._content(item, data)
            else:
                yield self._found(item, "record-digest", 0, _WRONG_DIGEST)
            end_of_record = item.offset + item.stored_size
            if bytes(view[end_of_record - start : item.end - start]).strip(b"\0"):
                yield self._gap(item)

    def _regular(self, items: list[Item], view: memoryview) -> bool:
        """Whether the items are raw, of one layout, and nothing is wrong with any of them."""
        tensors, stride, size = items[0].tensors, items[0].end - items[0].offset, items[0].stored_size
        for i in items:
            if i.codec != L.RAW or i.tensors is not tensors or i.end - i.offset != stride:
                return False
        block = np.frombuffer(view, np.uint8).reshape(len(items), stride)
        if block[:, size:].any():
            return False
        return self._scan(tensors).harmless(block[:, :size])

    def _content(self, item: Item, stored: memoryview) -> Iterator[Found]:
        """Faults of one record in memory whose digest is right."""
        if item.codec != L.RAW:
            yield from self._decoded_content(item, MemorySource(stored))
            return
        scan, block = self._scan(item.tensors), np.frombuffer(stored, np.uint8)[None]
        if scan.harmless(block):
            return
        scan.see(block)
        for code, offset, message in scan.faults():
            yield self._found(item, code, offset, message)

    def _decoded_content(self, item: Item, source: Source) -> Iterator[Found]:
        scan, position = self._scan(item.tensors), 0
        try:
            for decoded in stream(source, item.raw_size, self._decoded):
                scan.see(np.frombuffer(decoded, np.uint8)[None], position)
                position += len(decoded)
        except FrameError as error:
            yield self._found(item, error.code, 0, str(error))
            return
        for code, offset, message in scan.faults():
            yield self._found(item, code, offset, message)

    def _large(self, item: Item) -> Iterator[Found]:
        digest = xxhash.xxh64()
        scan = self._scan(item.tensors)
        for position in range(0, item.stored_size, PIECE):
            view = self._read(item.offset + position, min(PIECE, item.stored_size - position))
            with self._turn:
                digest.update(view)
                if item.codec == L.RAW:
                    scan.see(np.frombuffer(view, np.uint8)[None], position)
        if digest.intdigest() != item.digest:
            yield self._found(item, "record-digest", 0, _WRONG_DIGEST)
        elif item.codec == L.RAW:
            for code, offset, message in scan.faults():
                yield self._found(item, code, offset, message)
        else:
            yield from self._decoded_content(item, FileSource(self._read, item.offset, item.stored_size))
        for position in range(item.offset + item.stored_size, item.end, PIECE):
            if bytes(self._read(position, min(PIECE, item.end - position))).strip(b"\0"):
                yield self._gap(item)
                break

    def _scan(self, tensors: tuple[L.Tensor, ...]) -> Scan:
        """A cleared scan for `tensors`; layouts recur, residents do not."""
        kept = self._scans.get(id(tensors))
        if kept is None or kept[0] is not tensors:
            if len(self._scans) > 64:
                self._scans.clear()
            kept = self._scans[id(tensors)] = tensors, Scan(tensors)
        kept[1].clear()
        return kept[1]

    def _read(self, offset: int, size: int) -> memoryview:
        view, filled = self._buffer[:size], 0
        while filled < size:
            got = os.preadv(self._fd, [view[filled:]], offset + filled)
            if not got:
                raise Shrunk
            filled += got
        return view

    def _found(self, item: Item, code: str, offset: int, message: str) -> Found:
        at = item.offset + (offset if item.codec == L.RAW else 0)
        return item.offset, Fault(code, at, f"{item}: {message}")

    def _gap(self, item: Item) -> Found:
        at = item.offset + item.stored_size
        return at, Fault("padding-nonzero", at, f"padding after {item} is not zero")
