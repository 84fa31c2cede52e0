"""The expert slots of paged layers in the hands of the kernels while they replay tokens: see `kernels.replay`.

Slots and what lies in them belong either to `Slots` (Python decides, in `switch`) or to native shelves
(the kernels decide, without asking Python), never to both. `lent` hands them over; whoever needs them in
Python calls `Pager.reclaim` first, holding no layer's lock, and looks again whose they are once it has one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx

from ..errors import ExpertReadError, ReadError
from .pager import Pager, Slots
from .policy import FOLLOWING, MEMORY, STEPS, WEIGHT, Recall
from .switch import PagedSwitch


class _Running(threading.local):
    """Results that a thread began and has not waited for.

    A failed read is raised once, in whichever thread waits for it first; the results of others must not be touched.
    """

    def __init__(self) -> None:
        self.results: deque[mx.array] = deque()


class Lending:
    """All paged layers of one model."""

    def __init__(self, pager: Pager, switches: Sequence[PagedSwitch]) -> None:
        self._pager, self._switches = pager, tuple(switches)
        self._shelves: list[tuple[Slots, Any]] = []
        self._lock = threading.RLock()  # taken before any layer's
        self._running = _Running()
        self._wait: Callable[[], None] = lambda: None  # until the kernels compute nothing

    def shelve(self, kernels: Any) -> None:
        """Make the native counterparts of all slots; a layer that has none cannot be replayed."""
        kernels.on_failed_read(ExpertReadError)
        for switch in self._switches:
            switch.slots.shelf = make_shelf(kernels, switch.slots)
            self._shelves.append((switch.slots, switch.slots.shelf))

    @contextmanager
    def lent(self) -> Iterator[None]:
        """While inside, the kernels decide what lies in the slots; nothing in flight reads one when they begin to."""
        with self._lock:
            if self._pager.borrower is not self:
                self._hand_over()
            yield

    def _hand_over(self) -> None:
        if self._pager.closed:
            raise ReadError(f"{self._pager.file.path}: the model is closed")
        self._pager.stop_warming()
        with ExitStack() as stack:  # no layer is called from here on until it can see who has the slots
            for switch in self._switches:
                stack.enter_context(switch.settled())
            for slots, shelf in self._shelves:
                shelf.arrange(slots.order(), *slots.state())
            self._pager.borrower = self

    def started(self, result: mx.array, wait: Callable[[], None]) -> None:
        """`result` is computed from what is lent: begin at once, for slots change with every token.

        Up to three tokens of a thread may be under way. A read that fails is raised here, or where MLX waits for the
        token, in the thread that began it.
        """
        if not self._shelves:
            return
        self._wait, results = wait, self._running.results
        results.append(result)
        try:
            mx.async_eval(result)
            if len(results) > 2:
                mx.eval(results.popleft())
        except ReadError:
            results.clear()
            raise

    def give_back(self) -> None:
        """Wait for the kernels, and let Python decide again."""
        with self._lock:
            if self._pager.borrower is not self:
                return
            self._wait()
            stats = self._pager.stats
            for slots, shelf in self._shelves:
                slots.restore(shelf.order(), shelf.state())
                hits, misses, evictions, size, seconds = shelf.take_counts()
                stats.hits += hits
                stats.misses += misses
                stats.evictions += evictions
                stats.bytes_read += size
                stats.read_seconds += seconds
            self._pager.borrower = None  # last: from here on layers are called


def make_shelf(kernels: Any, slots: Slots) -> Any:
    """The native counterpart of `slots`, or None: for raw records under Recall only."""
    if not slots.readable or type(slots.policy) is not Recall:
        return None
    layouts = [sorted(enumerate(parts), key=lambda numbered: numbered[1].offset) for parts in slots.layouts]
    return kernels.Shelf(
        str(slots.pager.file.path),
        slots.pager.file.fileno(),
        slots.layer.layer,
        list(slots.banks),
        [[(bank, p.offset, p.size, p.widen, *(p.bits or (0, 0))) for bank, p in layout] for layout in layouts],
        [(record.offset, record.stored_size, record.digest, layout) for record, layout in slots.numbered],
        (STEPS, FOLLOWING, WEIGHT, MEMORY),
        slots.pager.source.step,
    )
