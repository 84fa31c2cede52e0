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

HALF_LIFE: Final = 24  # tokens; 16 to 32 differ by less than 0.003 of the hit rate
ONE: Final = 1 << 32  # what a choice counts at the beginning of a half-life
# What a choice counts, by token within a half-life. Whole numbers, so that the kernels' shelves count the very same.
STEPS: Final = tuple(round(ONE * 2 ** (i / HALF_LIFE)) for i in range(HALF_LIFE))

# Recall, in whole numbers for the same reason.
MEMORY: Final = 2048  # tokens: subjects come back; see LOG.md
CHANCE: Final = 6  # so much resemblance is none: two experts in common
MOST: Final = 64  # keeps sums within 53 bits; reached where a token has over eleven experts
FOLLOWING: Final = tuple(round(256 * 0.8**d) for d in range(1, 9))  # what comes so many tokens later counts, of 256
WEIGHT: Final = 25  # choices; what always followed counts as much as so many, times the sum of `FOLLOWING`
_FOLLOWING: Final = np.array(FOLLOWING, np.float64)

Choices = Sequence[int] | npt.NDArray[Any]
# Of Recall: the counts of all experts; the token within the half-life; the choices of the last tokens, one token after
# another; how many each token has.
State = tuple[Sequence[int], int, Sequence[int], int]


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

    def scores(self) -> Sequence[int]:
        """What each expert of the layer counts now."""
        return self.counts

    def use(self, expert: int) -> None:
        """`expert` is resident; `see` has counted it."""
        self._known.add(expert)

    def evict(self, keep: Container[int]) -> int:
        """Forget and return the known expert that counts least, `keep` excepted."""
        scores = self.scores()
        victim = min(((scores[e], e) for e in self._known if e not in keep), default=None)
        if victim is None:
            raise LookupError("every resident expert must be kept")
        self._known.remove(victim[1])
        return victim[1]

    def __iter__(self) -> Iterator[int]:
        scores = self.scores()
        return iter(sorted(self._known, key=lambda expert: (scores[expert], expert)))


class Recall(Fading):
    """Fading, and what followed the last times that experts like the present ones were chosen.

    Text repeats itself, and so does routing. Of the last MEMORY tokens, those count that resemble the last one: in
    the experts chosen for them, two thirds as much in those of the token before, and a third in those of the one before
    that. An expert chosen up to 8 tokens after such a token gains by how alike (to the fourth power) and how soon
    (`FOLLOWING`), as a share of all resemblance.
    Computed only when somebody must go. The kernels' shelves (`recall.cpp`) decide the very same.
    """

    def __init__(self, experts: int, prior: Sequence[int] = ()) -> None:
        super().__init__(experts, prior)
        self._history: npt.NDArray[np.int32] = np.empty((0, 0), np.int32)  # [choices, room for tokens]
        self._tokens = 0  # of it in use
        self._scores: Sequence[int] | None = None

    def see(self, chosen: Choices, choices: int) -> None:
        """Count the choices of each token, and remember them."""
        super().see(chosen, choices)
        self._remember(np.asarray(chosen, np.int32).reshape(-1, choices)[-MEMORY:].T)

    def _remember(self, tokens: npt.NDArray[np.int32]) -> None:
        self._scores = None
        if len(self._history) != len(tokens):
            self._history, self._tokens = np.empty((len(tokens), 2 * MEMORY), np.int32), 0
        if self._tokens + tokens.shape[1] > self._history.shape[1]:
            kept = self.history().copy()
            self._history[:, : kept.shape[1]], self._tokens = kept, kept.shape[1]
        end = self._tokens + tokens.shape[1]
        self._history[:, self._tokens : end], self._tokens = tokens, end

    def history(self) -> npt.NDArray[np.int32]:
        """The choices of the last tokens, at most MEMORY: int32 [choices, tokens]."""
        return self._history[:, max(0, self._tokens - MEMORY) : self._tokens]

    def state(self) -> State:
        """What the policy knows besides which experts are resident."""
        history = self.history()
        return self.counts, self.token, history.T.reshape(-1).tolist(), len(history)

    def restore(self, order: Iterable[int], state: State) -> None:
        """Know the experts in `order` and no others; the rest from `state`."""
        counts, self.token, history, choices = state
        self.counts, self._known = list(counts), set(order)
        self._history = np.empty((0, 0), np.int32)
        if choices:
            self._remember(np.array(history, np.int32).reshape(-1, choices).T)

    def scores(self) -> Sequence[int]:
        """What each expert counts now: units of `counts`."""
        if self._scores is None:
            votes, resemblance = self._votes()
            if votes is None:
                self._scores = self.counts
            else:
                unit = (STEPS[self.token - 1] >> 16) * WEIGHT
                self._scores = (((votes << 16) // resemblance * unit >> 8) + self.counts).tolist()
        return self._scores

    def _votes(self) -> tuple[npt.NDArray[np.int64] | None, int]:
        """By expert: resemblance × `FOLLOWING`, summed over what followed (None without any); sum of resemblance."""
        history = self.history()
        choices, last = len(history), history.shape[1] - 1
        if last < 1:
            return None, 0
        # Ten bits for each: thrice the experts in common with the last token, twice those with the one before, and
        # those with the one before that.
        common = np.zeros(len(self.counts), np.int32)
        common[history[:, last]] = 3
        common[history[:, last - 1]] += 2 << 10
        if last > 1:
            common[history[:, last - 2]] += 1 << 20
        shared = common.take(history).sum(0, dtype=np.int32)
        alike = shared[:last] & 1023
        alike[1:] += shared[: last - 1] >> 10 & 1023
        alike[2:] += shared[: max(0, last - 2)] >> 20
        weight = np.square(np.square(np.clip(alike - CHANCE, 0, MOST, dtype=np.float64)))
        total = int(weight.sum())
        if not total:
            return None, 0
        share = np.convolve(weight, _FOLLOWING)[:last]  # what a choice of the next token, and so on, gains
        where = share.nonzero()[0]
        votes = np.bincount(history[:, where + 1].reshape(-1), np.tile(share[where], choices), len(self.counts))
        return votes.astype(np.int64), total  # all sums are below 2^53, so exact
