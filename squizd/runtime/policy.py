"""Which expert of a layer to give up when a slot is needed. Pure Python: no I/O, no MLX, no slots.

A policy sees the experts of one layer only. It is told of every use and asked for a victim; it never
decides whether an expert is read, so no policy can change a model's answer.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Protocol


class Policy(Protocol):
    """The order in which one layer's resident experts are given up."""

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
