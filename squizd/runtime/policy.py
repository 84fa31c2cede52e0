"""Which expert of a layer to give up when a slot is needed. Pure Python: no I/O, no MLX, no slots.

A policy sees the experts of one layer only. It is told of every choice and every use and asked for a
victim; it never decides whether an expert is read, so no policy can change a model's answer.
`benchmarks/policies.py` compares policies with Belady's optimum; LOG.md says what was tried.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

HALF_LIFE: Final = 32  # tokens; 16 to 64 differ by less than 0.004 of the hit rate
ONE: Final = 1 << 32  # what a choice counts at the beginning of a half-life
# What a choice counts, by token within a half-life. Whole numbers, so that the kernels' shelves count the very same.
STEPS: Final = tuple(round(ONE * 2 ** (i / HALF_LIFE)) for i in range(HALF_LIFE))

Choices = Sequence[int] | npt.NDArray[Any]


def settled(rate: int) -> int:
    """What an expert counts, at the beginning of a half-life, that `rate` of ONE tokens have always chosen."""
    return rate * sum(STEPS) // ONE


class Policy(Protocol):
    """The order in which one layer's resident experts are given up."""

    def see(self, chosen: Choices, choices: int) -> None:
        """A layer call begins: the router's `choices` experts for each of its tokens, one token after another."""

    def use(self, expert: int) -> None:
        """`expert` is resident and needed now; it becomes known with its first use."""

    def evict(self, keep: Container[int]) -> int:
        """Choose a known expert that is not in `keep`, forget it and return it; LookupError if there is none."""

    def __iter__(self) -> Iterator[int]:
        """The known experts, next victim first."""


class LRU:
    """Least recently used first. `use` and `evict` take constant time (plus the kept experts skipped)."""

    def __init__(self) -> None:
        self._order: dict[int, None] = {}  # a dict keeps insertion order: oldest use first

    def see(self, chosen: Choices, choices: int) -> None:
        """Nothing: an order of uses is all there is."""

    def use(self, expert: int) -> None:
        """Make `expert` the last to go."""
        self._order.pop(expert, None)
        self._order[expert] = None

    def evict(self, keep: Container[int]) -> int:
        """Forget and return the expert whose last use is longest ago, `keep` excepted."""
        for expert in self._order:
            if expert not in keep:
                del self._order[expert]
                return expert
        raise LookupError("every resident expert must be kept")

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)


class Fading:
    """Least often chosen first, where a choice counts half as much after each HALF_LIFE tokens.

    Between least recently used (half-life 0) and least frequently used (infinite): LRFU of Lee et al. 2001.
    Choices of experts that are not resident count too. Equal counts: the lower number goes first.

    Counts never fade by themselves; a later choice counts more instead (`STEPS`), and every HALF_LIFE tokens all
    counts are halved, rounding down. So their order changes only where an expert is chosen.
    """

    def __init__(self, experts: int, prior: Sequence[int] = ()) -> None:
        """`prior`: what each of the layer's `experts` counts before the first token, in units of 2^-32 choices."""
        self.counts = list(prior) or [0] * experts
        self.token = 0  # within the half-life
        self._known: set[int] = set()

    def see(self, chosen: Choices, choices: int) -> None:
        """Count the choices of each token."""
        if len(chosen) > 2 * choices:
            self._see_many(np.asarray(chosen).reshape(-1, choices))
            return
        for start in range(0, len(chosen), choices):
            for expert in chosen[start : start + choices]:
                self.counts[expert] += STEPS[self.token]
            self._next(1)

    def _see_many(self, chosen: npt.NDArray[np.int64]) -> None:
        done = 0
        while done < len(chosen):
            part = chosen[done : done + HALF_LIFE - self.token]
            steps = np.repeat(np.array(STEPS[self.token : self.token + len(part)], np.float64), part.shape[1])
            sums = np.bincount(part.reshape(-1), steps, len(self.counts))  # below 2^53, so exact
            self.counts = [a + b for a, b in zip(self.counts, sums.astype(np.int64).tolist(), strict=True)]
            self._next(len(part))
            done += len(part)

    def _next(self, tokens: int) -> None:
        self.token += tokens
        if self.token == HALF_LIFE:
            self.token = 0
            self.counts = [count >> 1 for count in self.counts]

    def state(self) -> tuple[list[int], int]:
        """The counts of all experts, and the token within the half-life."""
        return self.counts, self.token

    def restore(self, order: Iterable[int], counts: Sequence[int], token: int) -> None:
        """Know the experts in `order` and no others; `counts` and `token` as in `state`."""
        self.counts, self.token = list(counts), token
        self._known = set(order)

    def use(self, expert: int) -> None:
        """`expert` is resident; `see` has counted it."""
        self._known.add(expert)

    def evict(self, keep: Container[int]) -> int:
        """Forget and return the known expert that counts least, `keep` excepted."""
        counts = self.counts
        victim = min(((counts[e], e) for e in self._known if e not in keep), default=None)
        if victim is None:
            raise LookupError("every resident expert must be kept")
        self._known.remove(victim[1])
        return victim[1]

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._known, key=lambda expert: (self.counts[expert], expert)))
