"""Which expert lies in which slot, and how it gets there. No MLX: slots are plain writable bytes.

One `Slots` per MoE layer, one `Pager` for all: it owns the reader threads and the statistics. Slots
are overwritten here without asking who reads them; `switch` calls `acquire` and `start` only when
nothing in flight does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

from ..container.layout import RAW, MoeLayer, Record
from ..container.reader import File
from ..errors import ExpertReadError, ReadError, RequestError
from .io import Part, Scatter
from .policy import Policy, Recall, State
from .source import Bytes, Source, open_source
from .transfer import Transfer

READERS = 4  # threads; on a 2-core VM eight gave no more than four
INLINE_BYTES = 1 << 18  # below this, handing reads to threads costs more than reading
DECODING = 8  # a decoded byte takes as long as so many that are only read
AHEAD_BYTES = 1 << 24  # announced to the system beside what is being read
_ONE_READ = 1 << 17  # bytes that a system brings in at once without being told


@dataclass
class Stats:
    """Counters. An expert counts once per layer call, however many tokens use it."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_read: int = 0  # stored bytes of expert records that the model asked for
    bytes_warmed: int = 0  # the same of those read before it asked
    waves: int = 0  # extra computations because a call needed more experts than slots
    read_seconds: float = 0.0  # the model waited for reads
    resident_bytes: int = 0  # memory of resident tensors and expert slots; not a counter

    @property
    def hit_rate(self) -> float:
        """Share of needed experts that were resident; 1.0 before the first."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 1.0


class Borrower(Protocol):
    """Who may have the slots of all layers, and decides what lies in them until they are given back."""

    def give_back(self) -> None:
        """Bring `Slots` and statistics up to date, and be the pager's borrower no more."""


class Background(Protocol):
    """Whoever reads into slots that the model did not ask for."""

    def stop(self) -> None:
        """Read nothing more; returns when no read is under way."""


class Pager:
    """Reader threads and statistics of one open file."""

    def __init__(self, file: File, readers: int = READERS, source: Source | None = None) -> None:
        self.file = file
        self.source = open_source(file) if source is None else source
        self.stats = Stats()
        self.borrower: Borrower | None = None
        self.warmer: Background | None = None
        self.transfer: Transfer | None = None  # how slots are filled where the host cannot write them fast
        self.shelves: dict[int, Slots] = {}  # by the transfer's handle
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(readers, thread_name_prefix="squizd-read")

    def run(self, reads: Sequence[tuple[Record, Callable[[], None]]]) -> list[BaseException | None]:
        """Do the reads of these records, in this thread or the pool; returns each one's error. None is running any more
        afterwards."""
        if self._pool is None:
            raise ReadError(f"{self.file.path}: the model is closed")
        ahead = _Ahead(self.source, [record for record, _ in reads])
        work = sum(r.stored_size if r.codec == RAW else DECODING * r.raw_size for r, _ in reads)
        if len(reads) == 1 or work <= INLINE_BYTES:
            errors = [_attempt(read, ahead, i) for i, (_, read) in enumerate(reads)]
        else:
            futures: list[Future[BaseException | None]] = [
                self._pool.submit(_attempt, read, ahead, i) for i, (_, read) in enumerate(reads)
            ]
            try:
                errors = [future.result() for future in futures]
            finally:  # Ctrl-C: a slot must not be written once this call is over
                for future in futures:
                    future.cancel()
                wait(futures)
        return errors

    def settle(self) -> None:
        """Wait until all that was read is verified; ExpertReadError for the first damaged record, its slot empty."""
        failed = self.transfer.settle() if self.transfer is not None else []
        errors = [self.shelves[shelf].reject(expert, reason) for shelf, expert, reason in failed]
        if errors:
            raise errors[0]

    def stop_warming(self) -> None:
        """End what reads in the background, if something does."""
        warmer, self.warmer = self.warmer, None
        if warmer is not None:
            warmer.stop()

    def reclaim(self) -> None:
        """Have the slots given back, if they are lent."""
        borrower = self.borrower
        if borrower is not None:
            borrower.give_back()

    @property
    def closed(self) -> bool:
        """Whether nothing can be read any more."""
        return self._pool is None

    def close(self) -> None:
        """Stop the threads and close the file; closing twice is fine. No read outlives `run`, so none is waited for."""
        self.stop_warming()
        self.reclaim()
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False)
            self.source.close()
        if self.transfer is not None:
            self.transfer.close()
        self.file.close()


class Slots:
    """The experts of one layer that are in memory.

    `banks` has one array of bytes [slots, bytes of the part in use] for each part of the layer's
    records; `scatters` says per shard-layout id how a record fills one row of each.
    """

    def __init__(
        self,
        pager: Pager,
        layer: MoeLayer,
        banks: Sequence[Bytes],
        scatters: dict[int, Scatter],
        policy: Policy | None = None,
    ) -> None:
        self.layer, self.pager, self.banks = layer, pager, tuple(banks)
        self.count = len(banks[0])
        self.slot_of: dict[int, int] = {}  # only experts whose bytes are verified, or will be by `Pager.settle`
        self.policy: Policy = Recall(layer.expert_count) if policy is None else policy
        self._free = list(range(self.count))[::-1]
        self.shelf: Any = None  # the native counterpart, where there is one: see `lending`
        self.scatters = scatters
        self.records = pager.file.experts(layer.layer)
        self.shelf_handle: int | None = None
        if pager.transfer is not None and self.readable and not any(p.widen for p in self.layouts[0]):
            self.shelf_handle = pager.transfer.shelf(pager.file.fileno(), self.banks, self.layouts, self.numbered)
            pager.shelves[self.shelf_handle] = self

    @property
    def readable(self) -> bool:
        """Whether native code can read every record: none is encoded."""
        return all(record.codec == RAW for record in self.records)

    @cached_property
    def layouts(self) -> tuple[Sequence[Part], ...]:
        """The parts of each layout, in the order of `banks`, for native code."""
        return tuple(scatter.parts for scatter in self.scatters.values())

    @property
    def numbered(self) -> list[tuple[Record, int]]:
        """Every record, and which of `layouts` it has."""
        numbers = {layout: number for number, layout in enumerate(self.scatters)}
        return [(record, numbers[record.layout]) for record in self.records]

    def check(self, lowest: int, highest: int) -> None:
        """RequestError unless both are experts of this layer."""
        for expert in (lowest, highest):
            if not 0 <= expert < self.layer.expert_count:
                raise RequestError(
                    f"{self.layer.path}: the router chose expert {expert}; there are {self.layer.expert_count}"
                )

    def order(self) -> list[tuple[int, int]]:
        """(expert, slot) of what is resident, next victim first."""
        return [(expert, self.slot_of[expert]) for expert in self.policy]

    def state(self) -> State:
        """What the policy knows besides `order`."""
        assert isinstance(self.policy, Recall)
        return self.policy.state()

    def restore(self, order: Sequence[tuple[int, int]], state: State) -> None:
        """Take over what somebody else did to the slots under the same policy: the inverse of `order` and `state`."""
        assert isinstance(self.policy, Recall)
        self.slot_of = dict(order)
        self.policy.restore(self.slot_of, state)
        taken = set(self.slot_of.values())
        self._free = [slot for slot in range(self.count)[::-1] if slot not in taken]

    def touch(self, experts: Sequence[int]) -> None:
        """Count distinct resident experts as hits and as used now."""
        for expert in experts:
            self.policy.use(expert)
        self.pager.stats.hits += len(experts)

    def acquire(self, experts: Sequence[int], keep: Collection[int] = (), verified: bool = True) -> None:
        """Make distinct valid `experts`, at most `count` with `keep`, resident: `slot_of` has them all afterwards.

        Evicts neither them nor `keep`. If not `verified`, the caller must call `Pager.settle` before it lets anybody
        see what was computed from them. Raises ExpertReadError for the first that cannot be read; what
        was read beside it stays, its own slot is empty, and the next call may try again.
        """
        slot_of, stats = self.slot_of, self.pager.stats
        hits = [e for e in experts if e in slot_of]
        self.touch(hits)
        missing = [e for e in experts if e not in slot_of]
        if not missing:
            return
        began = time.perf_counter()
        for expert in self._bring(missing, {*hits, *keep}):
            stats.misses += 1
            stats.bytes_read += self.records[expert].stored_size
        if verified:
            self.pager.settle()
        stats.read_seconds += time.perf_counter() - began

    def fill(self, experts: Sequence[int]) -> None:
        """Read those of distinct `experts` that are not resident into empty slots, as far as there are any.

        Counts neither as hits nor as misses. Raises as `acquire` does.
        """
        missing = [e for e in experts if e not in self.slot_of][: len(self._free)]
        for expert in self._bring(missing, ()):
            self.pager.stats.bytes_warmed += self.records[expert].stored_size
        self.pager.settle()

    def _bring(self, missing: Sequence[int], kept: Collection[int]) -> Iterator[int]:
        """Read `missing` experts into slots, yielding those that were read; then raises the first error."""
        slot_of = self.slot_of
        taken: list[tuple[int, int]] = []
        done: set[int] = set()
        try:
            for expert in missing:
                taken.append((expert, self._take(kept)))
            errors = self._read_all(taken)
            for (expert, slot), error in zip(taken, errors, strict=True):
                if error is None:
                    slot_of[expert] = slot
                    self.policy.use(expert)
                    done.add(expert)
                    yield expert
            for error in errors:
                if error is not None:
                    raise error
        finally:
            self._free += [slot for expert, slot in taken if expert not in done]

    def _take(self, keep: Collection[int]) -> int:
        """A slot to overwrite: an empty one, or that of the policy's victim."""
        if self._free:
            return self._free.pop()
        victim = self.policy.evict(keep)
        self.pager.stats.evictions += 1
        return self.slot_of.pop(victim)

    def reject(self, expert: int, reason: str) -> ExpertReadError:
        """What was read of `expert` is no good: its slot is empty again. Returns the error that says so."""
        slot = self.slot_of.pop(expert, None)
        if slot is not None:
            self.policy.evict(set(self.slot_of))
            self._free.append(slot)
        return self._error(expert, reason)

    def _read_all(self, taken: Sequence[tuple[int, int]]) -> Sequence[BaseException | None]:
        transfer = self.pager.transfer
        if transfer is not None and self.shelf_handle is not None:
            if self.pager.closed:
                raise ReadError(f"{self.pager.file.path}: the model is closed")
            reasons = transfer.fetch(self.shelf_handle, taken)
            return [self._error(e, why) if why else None for (e, _), why in zip(taken, reasons, strict=True)]
        return self.pager.run([(self.records[e], partial(self._read, e, s)) for e, s in taken])

    def _read(self, expert: int, slot: int) -> None:
        record: Record = self.records[expert]
        try:
            self.scatters[record.layout].read(self.pager.source, record, [bank[slot] for bank in self.banks])
        except ReadError as error:
            raise self._error(expert, str(error)) from error

    def _error(self, expert: int, reason: str) -> ExpertReadError:
        return ExpertReadError(self.pager.file.path, self.layer.layer, expert, self.records[expert].offset, reason)


class _Ahead:
    """Announces what will be read, in order, so that the system always has AHEAD_BYTES to bring in."""

    def __init__(self, source: Source, records: Sequence[Record]) -> None:
        self._source, self._records, self._lock = source, records, threading.Lock()
        self._next = self._bytes = 0

    def reach(self, index: int) -> None:
        """The read of record `index` begins."""
        if len(self._records) == 1 and self._records[0].stored_size <= _ONE_READ:
            return
        with self._lock:
            while self._next < len(self._records) and (self._next <= index or self._bytes < AHEAD_BYTES):
                record = self._records[self._next]
                self._source.announce(record.offset, record.stored_size)
                self._next, self._bytes = self._next + 1, self._bytes + record.stored_size
            self._bytes -= self._records[index].stored_size


def _attempt(read: Callable[[], None], ahead: _Ahead, index: int) -> BaseException | None:
    try:
        ahead.reach(index)
        read()
    except Exception as error:
        return error
    return None
