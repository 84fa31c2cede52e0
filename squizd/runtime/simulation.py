"""Hits and misses of one expert layer on a recorded trace, without a model: as `pager` and `switch` would have them.

A trace is a sequence of layer calls, each the experts that the router chose: integers [tokens, k]. Decoding
is calls of one token. Belady's optimum knows the future, so nothing can have more hits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .policy import Policy

Call = npt.NDArray[Any]
_NEVER = 1 << 60


@dataclass
class Tally:
    """Experts needed that were resident, and that were not: once per layer call, as in `pager.Stats`."""

    hits: int = 0
    misses: int = 0

    @property
    def rate(self) -> float:
        """Share of hits; 1.0 before the first."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 1.0


@dataclass
class Shelf:
    """The slots of one layer under `policy`, filled with `resident` at the start."""

    policy: Policy
    slots: int
    resident: set[int] = field(default_factory=set)
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        for expert in self.resident:
            self.policy.use(expert)

    def call(self, chosen: Call) -> None:
        """One layer call; like `switch`, in waves of half the slots where more are needed than there are."""
        choices: list[int] = chosen.reshape(-1).tolist()
        self.policy.see(choices, chosen.shape[-1])
        if len(choices) <= 64:
            needed = list(dict.fromkeys(choices))
        else:
            uses = np.bincount(choices)
            distinct = np.flatnonzero(uses)
            needed = distinct[np.argsort(uses[distinct], kind="stable")].tolist()
        if len(needed) <= self.slots:
            self._acquire(needed, ())
            return
        groups = [[e for e in needed if e in self.resident]]
        missing, size = [e for e in needed if e not in self.resident], max(1, self.slots // 2)
        groups += [missing[i : i + size] for i in range(0, len(missing), size)]
        computing: list[list[int]] = []
        for group in filter(None, groups):
            while computing and sum(map(len, computing)) + len(group) > self.slots:
                del computing[0]
            self._acquire(group, {e for g in computing for e in g})
            computing.append(group)

    def _acquire(self, experts: Sequence[int], keep: Iterable[int]) -> None:
        resident, policy = self.resident, self.policy
        hits = [e for e in experts if e in resident]
        for expert in hits:
            policy.use(expert)
        self.tally.hits += len(hits)
        missing = [e for e in experts if e not in resident]
        if not missing:
            return
        kept = {*hits, *keep}
        self.tally.misses += len(missing)
        for victim in [policy.evict(kept) for _ in range(len(resident) + len(missing) - self.slots)]:
            resident.remove(victim)
        for expert in missing:
            resident.add(expert)
            policy.use(expert)


def replay(policy: Policy, calls: Iterable[Call], slots: int, resident: Iterable[int] = ()) -> Tally:
    """The hits of `policy` on `calls` with `slots` slots, at least as many as one token needs."""
    shelf = Shelf(policy, slots, set(resident))
    for chosen in calls:
        shelf.call(chosen)
    return shelf.tally


def belady(calls: Sequence[Call], slots: int, resident: Iterable[int] = ()) -> Tally:
    """The most hits that any choice of victims can have: who is needed again last goes first (Belady 1966).

    A call that needs more experts than slots reads each missing one once; of all that went by, those needed
    again first may stay. That is at least what waves can do.
    """
    needs = [sorted(set(call.reshape(-1).tolist())) for call in calls]
    uses: dict[int, list[int]] = {}
    for when, needed in reversed(list(enumerate(needs))):
        for expert in needed:
            uses.setdefault(expert, []).append(when)
    tally, held = Tally(), set(resident)

    def next_use(expert: int) -> tuple[int, int]:
        times = uses.get(expert)
        return (times[-1] if times else _NEVER, expert)

    for needed in needs:
        for expert in needed:
            uses[expert].pop()
        hits = held.intersection(needed)
        tally.hits += len(hits)
        tally.misses += len(needed) - len(hits)
        held.update(needed)
        surplus = len(held) - slots
        if surplus > 0:
            free = held.difference(needed) if len(needed) <= slots else held
            held.difference_update(sorted(free, key=next_use)[-surplus:])
    return tally


def decode_calls(experts: npt.NDArray[Any]) -> list[Call]:
    """The calls in which `experts` [tokens, k] are decoded: one for each token."""
    return list(experts[:, None, :])


def curve(
    make_policy: Callable[[], Policy], calls: Sequence[Call], least: int, experts: int, points: int = 24
) -> list[tuple[int, int]]:
    """(slots, hits) from `least` slots to all `experts`, ascending: at most `points`, closer where slots are few."""
    least = min(least, experts)
    sizes = sorted({least + round((experts - least) * x**1.5) for x in np.linspace(0, 1, points)})
    return [(size, replay(make_policy(), calls, size).hits) for size in sizes]
