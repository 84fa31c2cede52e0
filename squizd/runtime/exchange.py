"""A token that runs through the GPU without stopping at the host: see `kernels/src/exchange.h`.

In place of a read-back, each paged layer has a kernel that writes the router's choice into host memory and waits
there for the slots, which a thread of the compiled library answers within microseconds; what is missing it copies
from pinned memory into its slot as it is read. Python builds the graph of the whole token meanwhile. A kernel that
waits longer than `PATIENCE` goes on, and the token fails. Native code then decides what lies in which
slot, until `give_back`: as with `lending`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..errors import ExpertReadError, ReadError, RequestError
from .asking import NOTE, Ask
from .library import pointer
from .policy import FOLLOWING, MEMORY, STEPS, WEIGHT

if TYPE_CHECKING:
    from .pager import Pager, Slots
    from .transfer import Transfer

PATIENCE, FIRST_PATIENCE = 60_000, 1_000  # milliseconds; the first token is a trial
MOST_CHOICES = 30
SCHEDULED = 4  # layers at once: scheduling one by itself costs the host more than it gains the GPU
_BAD_CHOICE = -4

Lock = AbstractContextManager[bool]


class Exchange:
    """The paged layers of one model in the hands of native code; the pager's borrower between tokens."""

    def __init__(self, pager: Pager, layers: Sequence[tuple[Slots, int]], ask: Ask, lock: Lock) -> None:
        """`layers`: slots, and how many experts a token has. `lock`: held for a whole token.

        OSError if native code cannot serve these.
        """
        self._pager, self._ask, self._lock = pager, ask, lock
        self._slots = [slots for slots, _ in layers]
        transfer = pager.transfer
        if transfer is None or any(slots.shelf_handle is None for slots in self._slots):
            raise OSError("its experts are stored in a way that only Python reads")
        self._transfer: Transfer = transfer
        shape = np.array([(slots.count, k) for slots, k in layers], np.int32)
        steps, following = np.array(STEPS, np.uint64), np.array(FOLLOWING, np.uint64)
        handles = (ctypes.c_void_p * len(layers))(*[slots.shelf_handle for slots in self._slots])
        self._handle: int | None = transfer.native.squizd_exchange_open(
            ctypes.c_void_p(transfer.handle), len(layers), handles, pointer(shape), len(steps), pointer(steps),
            len(following), pointer(following), ctypes.c_uint64(WEIGHT), MEMORY,
        )  # fmt: skip
        if not self._handle:
            raise OSError("it has layers with more choices than slots, or than there is room for")
        transfer.before_close.append(self._close)
        native = transfer.native
        boxes = [native.squizd_exchange_box(ctypes.c_void_p(self._handle), i) for i in range(len(layers))]
        notes = [mx.array([box & 0xFFFFFFFF, box >> 32] + [0] * (NOTE - 2), mx.uint32) for box in boxes]
        self._notes = [note + 0 for note in notes]  # computed, so that it lies in the device's own memory
        mx.eval(self._notes)
        self._asked = 0

    def rows(self, layer: int, indices: mx.array) -> mx.array:
        """The slots of the experts `indices`, once it is computed and they are resident: uint32 of the same shape."""
        self._asked += 1
        return self._ask(indices.astype(mx.uint32), self._notes[layer])

    @property
    def due(self) -> bool:
        """Whether what has been built of the token should be scheduled, so that the GPU has work."""
        return self._asked % SCHEDULED == 1 % SCHEDULED

    def begin(self, trial: bool) -> None:
        """A token begins."""
        if self._pager.closed:
            raise ReadError(f"{self._pager.file.path}: the model is closed")
        if self._pager.borrower is not self:
            self._pager.reclaim()
            self._pager.stop_warming()
            for index, slots in enumerate(self._slots):
                self._arrange(index, slots)
            self._pager.borrower = self
        self._asked = 0
        self._transfer.native.squizd_exchange_begin(self._at(), FIRST_PATIENCE if trial else PATIENCE)

    def finish(self) -> None:
        """All of the token is scheduled: wait until its experts are there and verified. Raises what failed first."""
        failure = (ctypes.c_int * 3)()
        self._transfer.native.squizd_exchange_finish(self._at(), self._asked, failure)
        index, expert, status = failure
        if not status:
            return
        slots, path = self._slots[index], self._pager.file.path
        if status == _BAD_CHOICE:
            raise RequestError(f"{slots.layer.path}: the router chose expert {expert}; there are {len(slots.records)}")
        reason = self._transfer.reason(status)
        raise ExpertReadError(path, slots.layer.layer, expert, slots.records[expert].offset, reason)

    def abandon(self) -> None:
        """The token came to nothing; the GPU is idle."""
        self._transfer.native.squizd_exchange_stop(self._at())

    def give_back(self) -> None:
        """Let Python decide again, once no token is under way."""
        with self._lock:
            if self._pager.borrower is self:
                self._collect()
                self._pager.borrower = None

    def _collect(self) -> None:
        stats = self._pager.stats
        for index, slots in enumerate(self._slots):
            resident = np.empty(slots.count, np.int32)
            counts, numbers = np.empty(len(slots.records), np.uint64), np.empty(8, np.uint64)
            history = np.empty(MEMORY * MOST_CHOICES, np.uint32)
            self._transfer.native.squizd_exchange_state(
                self._at(), index, pointer(resident), pointer(counts), pointer(history), pointer(numbers)
            )
            token, choices, tokens, hits, misses, evictions, size, nanoseconds = numbers.tolist()
            order = [(int(expert), slot) for slot, expert in enumerate(resident) if expert >= 0]
            slots.restore(order, (counts.tolist(), token, history[: tokens * choices].tolist(), choices))
            stats.hits += hits
            stats.misses += misses
            stats.evictions += evictions
            stats.bytes_read += size
            stats.read_seconds += nanoseconds / 1e9

    def _arrange(self, index: int, slots: Slots) -> None:
        counts, token, history, choices = slots.state()
        pairs = np.array(list(slots.slot_of.items()), np.int32).reshape(-1, 2).T.copy()
        weights, remembered = np.array(counts, np.uint64), np.array(history, np.uint32)
        tokens = len(history) // choices if choices else 0
        if self._transfer.native.squizd_exchange_arrange(
            self._at(), index, pairs.shape[1], pointer(pairs[0]), pointer(pairs[1]), pointer(weights),
            token, pointer(remembered), tokens, choices,
        ):  # fmt: skip
            raise AssertionError("Slots in a state that native code does not know")

    def _at(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._handle)

    def _close(self) -> None:
        handle, self._handle = self._handle, None
        if handle:
            mx.synchronize()
            self._transfer.native.squizd_exchange_close(ctypes.c_void_p(handle))
