"""The paged stand-in for mlx-lm's SwitchGLU and SwitchMLP: the same module over fewer rows.

The wrapped module does all arithmetic; its arrays are banks [slots, ...] where they were [experts, ...],
and it is called with slots for experts. Rows (a token and one of its experts) do not depend on each
other, so the result has the same bits on CPU however they are grouped.

Order of reads and writes. A slot may be overwritten only when no computation that reads it is in
flight. Every call therefore first waits for the router's choice *and* for its own previous result,
whatever stream or thread that ran on, and schedules its result before it returns.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from ..kernels import replay
from .deferral import Deferral
from .mailbox import Mailbox, Post
from .pager import Slots

KEPT_BYTES = 1 << 18  # a larger result is waited for at once, so that it need not be kept
_FEW = 64  # up to so many (token, expert) pairs, plain Python is faster than NumPy

Ints = npt.NDArray[Any]


class _Paging:
    """What a PagedSwitch knows beside its parameters (an nn.Module would list arrays among those)."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.lock = threading.Lock()
        self.last: mx.array | None = None  # the previous result, if it may still be in flight
        self.called = False
        self.deferral: Deferral | None = None
        self.index = 0
        self.post = Post(slots.layer.expert_count, small=False)
        self.mailbox: Mailbox | None = None


class PagedSwitch(nn.Module):
    """Calls `inner(x, slots)` after making the experts named in `indices` resident.

    x: [..., D] float; indices: [..., k] integer, same leading dimensions; returns [..., k, D'] as `inner`
    does. Raises ExpertReadError, with nothing computed, when an expert's bytes cannot be had, and
    RequestError for an index that is no expert.
    """

    def __init__(self, inner: nn.Module, slots: Slots) -> None:
        super().__init__()
        self.inner = inner
        self._paging = _Paging(slots)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        paging = self._paging
        if replay.tracing():
            return self._inner(x, replay.placed(indices, paging.slots.shelf))
        if paging.deferral is not None:
            return self._deferred(paging.deferral, x, indices)
        while True:
            paging.slots.pager.reclaim()
            with paging.lock:
                paging.called = True
                if paging.slots.pager.borrower is None:  # another thread may have lent them again
                    return self._call(paging, x, indices)

    def _deferred(self, deferral: Deferral, x: mx.array, indices: mx.array) -> mx.array:
        paging = self._paging
        with deferral.lock:
            paging.called = True
            if not deferral.running:
                deferral.settled()
                paging.slots.pager.reclaim()
                return self._call(paging, x, indices)
            if deferral.exchange is not None:
                out = self._inner(x, deferral.exchange.rows(paging.index, indices))
                if deferral.exchange.due:
                    mx.async_eval(out)
                return out
            deferral.resolve()
            if paging.mailbox is None or indices.size != paging.mailbox.count:
                return self._call(paging, x, indices)
            out = self._inner(x, paging.mailbox.read(indices.shape))
            deferral.pending(self, paging.post.send(indices))
            return out

    def defer_to(self, deferral: Deferral, index: int, choices: int, small: bool) -> None:
        """Let `deferral` put off the wait for the router's `choices` of a token; `small` as in `mailbox`.

        `index`: of this layer among those of an exchange.
        """
        paging = self._paging
        paging.deferral, paging.index = deferral, index
        if choices <= paging.slots.count:
            paging.post = Post(paging.slots.layer.expert_count, small)
            paging.mailbox = Mailbox(choices, paging.slots.count, small)

    def place(self, sent: Sequence[mx.array]) -> None:
        """Receive a deferred choice, make the experts resident (not verified yet), and post their slots."""
        paging = self._paging
        assert paging.mailbox is not None
        chosen = paging.post.receive(sent)
        if paging.last is not None:
            mx.eval(paging.last)
            paging.last = None
        slots = paging.slots
        slots.check(min(chosen), max(chosen))
        slots.policy.see(chosen, len(chosen))
        slots.acquire(list(dict.fromkeys(chosen)), verified=False)
        paging.mailbox.write([slots.slot_of[expert] for expert in chosen])

    def _call(self, paging: _Paging, x: mx.array, indices: mx.array) -> mx.array:
        if paging.last is None:
            mx.eval(indices)
        else:
            mx.eval(indices, paging.last)
            paging.last = None
        slots, shape = paging.slots, indices.shape
        chosen = np.array(indices, copy=False).reshape(-1)
        if chosen.size <= _FEW:
            out = self._few(slots, x, chosen.tolist(), shape)
        else:
            out = self._many(slots, x, chosen, shape)
        if out.nbytes <= KEPT_BYTES:
            paging.last = out
            mx.async_eval(out)
        else:
            mx.eval(out)
        return out

    @property
    def slots(self) -> Slots:
        """What is resident, and where."""
        return self._paging.slots

    @contextmanager
    def settled(self) -> Iterator[None]:
        """While inside, nothing reads a slot, and this layer is not called."""
        with self._paging.lock:
            if self._paging.last is not None:
                mx.eval(self._paging.last)
                self._paging.last = None
            yield

    @contextmanager
    def untouched(self) -> Iterator[Slots | None]:
        """The slots, which no call uses meanwhile, if there never was a call; else None."""
        with self._paging.lock:
            yield None if self._paging.called else self._paging.slots

    def _few(self, slots: Slots, x: mx.array, chosen: list[int], shape: tuple[int, ...]) -> mx.array:
        slot_of = slots.slot_of
        distinct = list(dict.fromkeys(chosen))
        try:  # a hit is in range: slot_of has nothing else
            rows = [slot_of[expert] for expert in chosen]
        except KeyError:
            slots.check(min(distinct), max(distinct))
            slots.policy.see(chosen, shape[-1])
            if len(distinct) > slots.count:
                return self._waves(slots, x, np.array(chosen), distinct, shape)
            slots.acquire(distinct)
            rows = [slot_of[expert] for expert in chosen]
        else:
            slots.policy.see(chosen, shape[-1])
            slots.touch(distinct)
        return self._inner(x, mx.array(rows, mx.uint32).reshape(shape))

    def _many(self, slots: Slots, x: mx.array, chosen: Ints, shape: tuple[int, ...]) -> mx.array:
        if chosen.size == 0:
            return self._inner(x, indices=mx.zeros(shape, mx.uint32))
        slots.check(int(chosen.min()), int(chosen.max()))
        slots.policy.see(chosen, shape[-1])
        uses = np.bincount(chosen, minlength=slots.layer.expert_count)
        distinct = np.flatnonzero(uses)
        order = distinct[np.argsort(uses[distinct], kind="stable")].tolist()  # the busiest stay longest
        if len(order) > slots.count:
            return self._waves(slots, x, chosen, order, shape)
        slots.acquire(order)
        return self._inner(x, mx.array(self._rows(slots, order, chosen)).reshape(shape))

    def _inner(self, x: mx.array, indices: mx.array) -> mx.array:
        out: mx.array = self.inner(x, indices)
        return out

    @staticmethod
    def _rows(slots: Slots, experts: Sequence[int], chosen: Ints) -> npt.NDArray[np.uint32]:
        """The slot of each chosen expert; all of them are among `experts`, all of which are resident."""
        table = np.zeros(slots.layer.expert_count, np.uint32)
        table[experts] = [slots.slot_of[expert] for expert in experts]
        return table[chosen]

    def _waves(
        self, slots: Slots, x: mx.array, chosen: Ints, experts: Sequence[int], shape: tuple[int, ...]
    ) -> mx.array:
        """More experts than slots: first those that are resident, then the others in groups of half the slots.

        A group is read while the one before is computed. Every expert is read at most once. (An error leaves
        computations in flight whose results nobody gets.)
        """
        choices = shape[-1]
        tokens = mx.broadcast_to(x, (*shape[:-1], x.shape[-1])).reshape(-1, x.shape[-1])
        resident = [e for e in experts if e in slots.slot_of]
        missing = [e for e in experts if e not in slots.slot_of]
        size = max(1, slots.count // 2)
        groups = [missing[i : i + size] for i in range(0, len(missing), size)]
        if resident:
            groups.insert(0, resident)
        in_flight: list[tuple[Sequence[int], mx.array]] = []
        results, order = [], []
        for group in groups:
            while in_flight and sum(len(g) for g, _ in in_flight) + len(group) > slots.count:
                mx.eval(in_flight[0][1])
                del in_flight[0]
            slots.acquire(group, keep={e for g, _ in in_flight for e in g})
            wanted = np.zeros(slots.layer.expert_count, np.bool_)
            wanted[group] = True
            pairs = np.flatnonzero(wanted[chosen])
            rows = mx.array(self._rows(slots, group, chosen[pairs]))[:, None]
            result = self._inner(tokens[mx.array(pairs // choices)], rows)[:, 0]
            in_flight.append((group, result))
            mx.async_eval(result)
            results.append(result)
            order.append(pairs)
        slots.pager.stats.waves += len(groups) - 1
        place = np.empty(chosen.size, np.uint32)
        place[np.concatenate(order)] = np.arange(chosen.size, dtype=np.uint32)
        return mx.concatenate(results)[mx.array(place)].reshape(*shape, -1)
