"""Bits under a budget: which encoding every tensor gets so that the expected divergence is least.

Knows units (one projection of one layer's experts, which has one encoding or two, or one tensor in constant use) with
the cost and the expected loss of each of their options. Knows nothing about how losses are measured.

Losses add up and each unit takes exactly one option: a multiple-choice knapsack, solved by dynamic programming over
the budget (Kellerer, Pferschy, Pisinger 2004, chapter 11), exactly but for the budget's granularity.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .errors import OutputError, RecipeError
from .recipe import Recipe, make_recipe, parse_spec

BUCKETS = 1 << 16


@dataclass(frozen=True)
class Target:
    """What a plan is for: one of bits per weight, bytes of the file, and a plan that was saved; or nothing.

    Raises RecipeError for more than one. `save` names a file to write the plan to; with `zstd` compressed bytes count;
    `alike` gives all experts of a projection one encoding.
    """

    bits_per_weight: float | None = None
    file_bytes: int | None = None
    saved: str | os.PathLike[str] | None = None
    save: str | os.PathLike[str] | None = None
    zstd: bool = False
    alike: bool = False

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.bits_per_weight, self.file_bytes, self.saved)) > 1:
            raise RecipeError("a target and a plan, or two targets, contradict each other", hint="give one of them")
        if self.alike and self.bits_per_weight is None and self.file_bytes is None:
            raise RecipeError(
                "alike says how a target is reached, and there is none",
                hint='give --target-bpw or --target-size, or take what is under "apart" out of the plan',
            )

    @property
    def name(self) -> str:
        """What a file says in place of a recipe's name; "" without a target."""
        if self.saved is not None:
            return "plan"
        return f"{self.bits_per_weight}bpw" if self.bits_per_weight else "size" if self.file_bytes is not None else ""


@dataclass(frozen=True)
class Option:
    """An encoding ("3g64"), the bits it takes with scales and biases, and the divergence it is expected to cost.

    Of a projection, `experts` (a group of numbers, ascending) may have `other` instead.
    """

    spec: str
    bits: int
    loss: float
    other: str = ""
    experts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Unit:
    """A tensor name and its options; `experts`: how many share it."""

    name: str
    parameters: int
    options: tuple[Option, ...]
    experts: int = 0


def undivided(unit: Unit) -> Unit:
    """Without the options that give experts different encodings."""
    return replace(unit, options=tuple(option for option in unit.options if not option.experts))


@dataclass
class Plan:
    """What was chosen: encodings by tensor name. `bits_per_weight` counts everything stored.

    `apart`: by tensor name, encodings that differ from the tensor's and the experts that have them.
    """

    bits_per_weight: float
    tensors: dict[str, str]
    expected: dict[str, float] = field(default_factory=dict)
    apart: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    def recipe(self, name: str, overrides: Sequence[str] = ()) -> Recipe:
        """As a recipe of this name; `overrides` go before the plan, for all experts of a tensor."""
        before = make_recipe("mixed", overrides)
        apart = {
            tensor: {expert: parse_spec(spec) for spec, some in specs.items() for expert in some}
            for tensor, specs in self.apart.items()
            if before.override(tensor) is None
        }
        planned = make_recipe("mixed", [*(f"{tensor}={spec}" for tensor, spec in self.tensors.items()), *overrides])
        return replace(planned, name=name, apart=apart)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, to read, edit and replay; OutputError if that fails."""
        facts = {"bits_per_weight": self.bits_per_weight, "tensors": self.tensors, "expected": self.expected}
        text = json.dumps(facts, indent=1)
        if self.apart:  # a line for each tensor
            lines = (f"  {json.dumps(name)}: {json.dumps(specs)}" for name, specs in self.apart.items())
            text = text.removesuffix("\n}") + ',\n "apart": {\n' + ",\n".join(lines) + "\n }\n}"
        partial = Path(f"{path}.partial")
        try:
            partial.write_text(text + "\n", "utf-8")
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
            apart = {name: dict(specs) for name, specs in facts.get("apart", {}).items()}
            for name, specs in apart.items():
                numbers = [number for some in specs.values() for number in some]
                if name not in tensors or len(set(numbers)) != len(numbers) or any(type(n) is not int for n in numbers):
                    raise TypeError(f"experts of {name} must be numbers, each once, of a tensor with an encoding")
            return cls(float(facts.get("bits_per_weight", 0)), tensors, dict(facts.get("expected", {})), apart)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"{path} holds no plan: {error}", hint="--save-plan writes one") from error

    def describe(self) -> str:
        """A line per tensor."""
        width = max(map(len, self.tensors), default=0)
        lines = []
        for name, spec in self.tensors.items():
            expected = f"  expected KL divergence {self.expected[name]:.6f}" if name in self.expected else ""
            apart = "".join(f", {len(some)} experts {other}" for other, some in self.apart.get(name, {}).items())
            lines.append(f"{name:{width}}  {spec + apart:6}{expected}")
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
    """The control: the same encodings dealt at random among units of the same size, so that the file is as large.

    Which experts have the other of two encodings is drawn, too. Losses are the dealt options', and mean nothing.
    """
    source, result = random.Random(seed), list(chosen)
    by_size: dict[Hashable, list[int]] = {}
    for position, unit in enumerate(units):
        alike = (unit.parameters, unit.experts, tuple(o.spec for o in unit.options))
        by_size.setdefault(alike, []).append(position)
    for positions in by_size.values():
        dealt = [chosen[p] for p in positions]
        source.shuffle(dealt)
        for position, option in zip(positions, dealt, strict=True):
            drawn = sorted(source.sample(range(units[position].experts), len(option.experts)))
            result[position] = replace(option, experts=tuple(drawn))
    return result
