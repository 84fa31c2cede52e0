"""Bits under a budget: which encoding every tensor gets so that the expected divergence is least.

Knows units (tensors that must share an encoding: one projection of one layer's experts, or one tensor in constant use)
with the cost and the expected loss of each of their options. Knows nothing about how losses are measured.

Losses add up and each unit takes exactly one option: a multiple-choice knapsack, solved by dynamic programming over
the budget (Kellerer, Pferschy, Pisinger 2004, chapter 11), exactly but for the budget's granularity.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import OutputError, RecipeError

BUCKETS = 1 << 16


@dataclass(frozen=True)
class Target:
    """What a plan is for: one of bits per weight, bytes of the file, and a plan that was saved; or nothing.

    Raises RecipeError for more than one. `save` names a file to write the plan to; with `zstd` compressed bytes count.
    """

    bits_per_weight: float | None = None
    file_bytes: int | None = None
    saved: str | os.PathLike[str] | None = None
    save: str | os.PathLike[str] | None = None
    zstd: bool = False

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.bits_per_weight, self.file_bytes, self.saved)) > 1:
            raise RecipeError("a target and a plan, or two targets, contradict each other", hint="give one of them")

    @property
    def name(self) -> str:
        """What a file says in place of a recipe's name; "" without a target."""
        if self.saved is not None:
            return "plan"
        return f"{self.bits_per_weight}bpw" if self.bits_per_weight else "size" if self.file_bytes is not None else ""


@dataclass(frozen=True)
class Option:
    """An encoding ("3g64"), the bits it takes with scales and biases, and the divergence it is expected to cost."""

    spec: str
    bits: int
    loss: float


@dataclass(frozen=True)
class Unit:
    """A tensor name and its options."""

    name: str
    parameters: int
    options: tuple[Option, ...]


@dataclass
class Plan:
    """What was chosen: encodings by tensor name. `bits_per_weight` counts everything stored."""

    bits_per_weight: float
    tensors: dict[str, str]
    expected: dict[str, float] = field(default_factory=dict)

    def overrides(self) -> list[str]:
        """As `recipe.make_recipe` takes them."""
        return [f"{name}={spec}" for name, spec in self.tensors.items()]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, to read, edit and replay; OutputError if that fails."""
        facts = {"bits_per_weight": self.bits_per_weight, "tensors": self.tensors, "expected": self.expected}
        partial = Path(f"{path}.partial")
        try:
            partial.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OutputError(f"{path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote and somebody may have edited; RecipeError if it is no plan."""
        try:
            facts = json.loads(Path(path).read_text("utf-8"))
            tensors = facts["tensors"]
            if not all(isinstance(k, str) and isinstance(v, str) for k, v in tensors.items()):
                raise TypeError("tensors must be names and encodings")
            return cls(float(facts.get("bits_per_weight", 0)), tensors, dict(facts.get("expected", {})))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"{path} holds no plan: {error}", hint="--save-plan writes one") from error

    def describe(self) -> str:
        """A line per tensor."""
        width = max(map(len, self.tensors), default=0)
        lines = []
        for name, spec in self.tensors.items():
            expected = f"  expected KL divergence {self.expected[name]:.6f}" if name in self.expected else ""
            lines.append(f"{name:{width}}  {spec:6}{expected}")
        return "\n".join([*lines, f"{self.bits_per_weight:.3f} bits per weight"])


def allocate(units: Sequence[Unit], budget: int) -> list[Option]:
    """One option per unit with the least sum of losses among those whose bits sum to at most `budget`.

    Exact up to rounding every unit's bits up to a multiple of budget / BUCKETS. Raises RecipeError if not even
    the smallest options fit.
    """
    least = sum(min(o.bits for o in u.options) for u in units)
    if least > budget:
        raise RecipeError(f"the smallest encodings take {least} bits, the target allows {budget}")
    step = max(1, -(-(budget - least) // BUCKETS))
    room = (budget - least) // step  # costs are counted above each unit's smallest option, which keeps steps small
    best = np.zeros(room + 1)
    choices: list[np.ndarray[Any, Any]] = []
    for unit in units:
        smallest = min(o.bits for o in unit.options)
        total, choice = np.full(room + 1, np.inf), np.zeros(room + 1, np.int16)
        for number, option in enumerate(unit.options):
            cost = -(-(option.bits - smallest) // step)
            if cost > room:
                continue
            candidate = np.full(room + 1, np.inf)
            candidate[cost:] = best[: room + 1 - cost] + option.loss
            better = candidate < total
            total = np.where(better, candidate, total)
            choice[better] = number
        best = total
        choices.append(choice)
    at, found = int(np.argmin(best)), list[Option]()
    for unit, choice in zip(reversed(units), reversed(choices), strict=True):
        option = unit.options[int(choice[at])]
        found.append(option)
        at -= -(-(option.bits - min(o.bits for o in unit.options)) // step)
    return found[::-1]


def shuffled(units: Sequence[Unit], chosen: Sequence[Option], seed: int) -> list[Option]:
    """The control: the same encodings dealt at random among units of the same size, so that the file is as large."""
    source, result = random.Random(seed), list(chosen)
    by_size: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for position, unit in enumerate(units):
        by_size.setdefault((unit.parameters, tuple(o.spec for o in unit.options)), []).append(position)
    for positions in by_size.values():
        dealt = [chosen[p].spec for p in positions]
        source.shuffle(dealt)
        for position, spec in zip(positions, dealt, strict=True):
            result[position] = next(o for o in units[position].options if o.spec == spec)
    return result
