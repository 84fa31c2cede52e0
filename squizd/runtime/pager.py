"""Which expert lies in which slot, and how it gets there. No MLX: slots are plain writable bytes.

One `Slots` per MoE layer, one `Pager` for all: it owns the reader threads and the statistics. Slots
are overwritten here without asking who reads them; `switch` calls `acquire` and `start` only when
nothing in flight does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from ..container.layout import MoeLayer, Record
from ..container.reader import File
from ..errors import ExpertReadError, ReadError, RequestError
from .io import Bytes, Scatter
from .policy import Fading, Policy

# Where the bytes of a slot are put: buffers for one row of each bank, moved there when the block ends without an error.
Row = Callable[[Sequence[Bytes], int], AbstractContextManager[list[Bytes]]]

READERS = 4  # threads; on a 2-core VM eight gave no more than four
INLINE_BYTES = 1 << 18  # below this, handing reads to threads costs more than reading


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

    def __init__(self, file: File, readers: int = READERS) -> None:
        self.file = file
        self.stats = Stats()
        self.borrower: Borrower | None = None
        self.warmer: Background | None = None
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(readers, thread_name_prefix="squizd-read")

    def run(self, jobs: Sequence[Callable[[], None]], total_bytes: int) -> list[BaseException | None]:
        """Run reads, in this thread or the pool; returns each one's error. None is running any more afterwards."""
        if self._pool is None:
            raise ReadError(f"{self.file.path}: the model is closed")
        if len(jobs) == 1 or total_bytes <= INLINE_BYTES:
            errors: list[BaseException | None] = [_attempt(job) for job in jobs]
        else:
            futures: list[Future[BaseException | None]] = [self._pool.submit(_attempt, job) for job in jobs]
            try:
                errors = [future.result() for future in futures]
            finally:  # Ctrl-C: a slot must not be written once this call is over
                for future in futures:
                    future.cancel()
                wait(futures)
        return errors

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
        try:
            self.reclaim()
        except ReadError:  # of a token that nobody waits for
            pass
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False)
        self.file.close()


class Slots:
    """The experts of one layer that are in memory.

    `banks` has one array of bytes [slots, bytes of the part in use] for each part of the layer's
    records; `row` says how bytes get into a row of them, if not by writing there; `scatters` says per
    shard-layout id how a record fills one row of each.
    """

    def __init__(
        self,
        pager: Pager,
        layer: MoeLayer,
        banks: Sequence[Bytes],
        scatters: dict[int, Scatter],
        policy: Policy | None = None,
        row: Row | None = None,
    ) -> None:
        self._row = row or _in_place
        self.layer, self.pager, self.banks = layer, pager, tuple(banks)
        self.count = len(banks[0])
        self.slot_of: dict[int, int] = {}  # only experts whose bytes are verified
        self.policy: Policy = Fading(layer.expert_count) if policy is None else policy
        self._free = list(range(self.count))[::-1]
        self.shelf: Any = None  # the native counterpart, where there is one: see `lending`
        self.scatters = scatters
        self.records = [pager.file.expert(layer.layer, e) for e in range(layer.expert_count)]

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

    def state(self) -> tuple[list[int], int]:
        """What the policy knows besides `order`."""
        assert isinstance(self.policy, Fading)
        return self.policy.state()

    def restore(self, order: Sequence[tuple[int, int]], counts: Sequence[int], token: int) -> None:
        """Take over what somebody else did to the slots under the same policy: the inverse of `order` and `state`."""
        assert isinstance(self.policy, Fading)
        self.slot_of = dict(order)
        self.policy.restore(self.slot_of, counts, token)
        taken = set(self.slot_of.values())
        self._free = [slot for slot in range(self.count)[::-1] if slot not in taken]

    def touch(self, experts: Sequence[int]) -> None:
        """Count distinct resident experts as hits and as used now."""
        for expert in experts:
            self.policy.use(expert)
        self.pager.stats.hits += len(experts)

    def acquire(self, experts: Sequence[int], keep: Collection[int] = ()) -> None:
        """Make distinct valid `experts`, at most `count` with `keep`, resident: `slot_of` has them all afterwards.

        Evicts neither them nor `keep`. Raises ExpertReadError for the first that cannot be read; what
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
        stats.read_seconds += time.perf_counter() - began

    def fill(self, experts: Sequence[int]) -> None:
        """Read those of distinct `experts` that are not resident into empty slots, as far as there are any.

        Counts neither as hits nor as misses. Raises as `acquire` does.
        """
        missing = [e for e in experts if e not in self.slot_of][: len(self._free)]
        for expert in self._bring(missing, ()):
            self.pager.stats.bytes_warmed += self.records[expert].stored_size

    def _bring(self, missing: Sequence[int], kept: Collection[int]) -> Iterator[int]:
        """Read `missing` experts into slots, yielding those that were read; then raises the first error."""
        slot_of = self.slot_of
        taken: list[tuple[int, int]] = []
        done: set[int] = set()
        try:
            for expert in missing:
                taken.append((expert, self._take(kept)))
            errors = self.pager.run(
                [lambda e=e, s=s: self._read(e, s) for e, s in taken],  # type: ignore[misc]
                sum(self.records[e].stored_size for e in missing),
            )
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

    def _read(self, expert: int, slot: int) -> None:
        record: Record = self.records[expert]
        try:
            with self._row(self.banks, slot) as parts:
                self.scatters[record.layout].read(self.pager.file, record, parts)
        except ReadError as error:
            raise ExpertReadError(self.pager.file.path, self.layer.layer, expert, record.offset, str(error)) from error


@contextmanager
def _in_place(banks: Sequence[Bytes], slot: int) -> Iterator[list[Bytes]]:
    yield [bank[slot] for bank in banks]


def _attempt(job: Callable[[], None]) -> BaseException | None:
    try:
        job()
    except Exception as error:
        return error
    return None
