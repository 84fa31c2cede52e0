"""How a memory budget is spent: resident tensors, expert slots, prompt cache, staging, workspace. Arithmetic only.

What it cannot know exactly it bounds from above: `Workspace` says how. Python, MLX and the tokenizer
themselves (some 300 MB) are not part of a budget.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import BudgetError, RequestError

CHUNKS = (2048, 1024, 512, 256, 128, 64, 32, 16)  # tokens that prefill computes at once
WORKSPACE_SHARE = 1 / 8  # of the budget, before prefill takes smaller chunks
MACHINE_SHARE = 0.7  # of available memory, when no budget is given
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(value: str | int) -> int:
    """Bytes of "6GB", "700 MB", "1.5GiB", or of a plain number; RequestError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]i?|)b?\s*", str(value).lower())
    if match is None or isinstance(value, bool):
        raise RequestError(f"memory {value!r} is not a size", hint="write for example 6GB, 700MB or 1.5GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_share(value: str | float) -> float:
    """0 to 1 from "25%" or 0.25; RequestError for anything else."""
    text = str(value).strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = math.nan
    if isinstance(value, bool) or not 0 <= share <= 1:
        raise RequestError(f"resident {value!r} is not a share of the experts", hint="write for example 25% or 0.25")
    return share


def format_size(size: int) -> str:
    """`size` in decimal units, rounded up: what it prints is enough when given as a budget."""
    if size < 10**10:
        return f"{-(-size // 10**6):,} MB"
    return f"{math.ceil(size / 10**8) / 10:,.1f} GB"


@dataclass(frozen=True)
class LayerDemand:
    """An expert layer: how many experts, how many one token needs, bytes of one in memory."""

    experts: int
    top_k: int
    slot_bytes: int

    def slots(self, share: float) -> int:
        """Slots for this share of the experts: at least what one token needs."""
        return min(self.experts, max(self.top_k, math.ceil(share * self.experts - 1e-9)))


@dataclass(frozen=True)
class Workspace:
    """An upper bound of the memory that a forward pass takes besides weights and cache.

    Per layer MLX holds some copies of the residual stream, of the experts' rows, and, where attention
    is not fused (CPU), the scores heads × chunk × context. The factors were measured as MLX's peak on
    CPU over chunks and contexts, and rounded up.
    """

    hidden: int
    inner: int  # widest feed-forward row of a token: dense, or top-k experts together
    top_k: int
    heads: int
    vocabulary: int
    item_bytes: int
    layers: int

    def bytes(self, chunk: int, context: int) -> int:
        """For `chunk` tokens at the end of `context`."""
        row = (8 + 4 * self.top_k) * self.hidden + 4 * self.inner
        scores = 3 * self.heads * context
        sampling = 8 * self.vocabulary * 4  # one row of logits, its softmax, order and sums
        kept = self.layers * (1 << 18)  # switch.KEPT_BYTES
        return chunk * (row + scores) * self.item_bytes + sampling + kept


@dataclass(frozen=True)
class Demand:
    """What a model asks for. `cache(tokens, chunk)` and `workspace(chunk, tokens)` are upper bounds in bytes."""

    name: str
    residents: int
    layers: Sequence[LayerDemand]
    staging: int
    cache: Callable[[int, int], int]
    workspace: Callable[[int, int], int]


@dataclass(frozen=True)
class Budget:
    """Where the memory goes, in bytes, and what follows: slots per expert layer, tokens per prefill chunk."""

    limit: int | None  # None: everything is resident and no limit was asked for
    residents: int
    experts: int
    cache: int
    staging: int
    workspace: int
    slots: tuple[int, ...]
    prefill_step_size: int
    context: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.residents + self.experts + self.cache + self.staging + self.workspace

    def __str__(self) -> str:
        return (
            f"{format_size(self.residents)} always-resident weights, {format_size(self.experts)} experts, "
            f"{format_size(self.cache)} cache for {self.context:,} tokens, "
            f"{format_size(self.staging + self.workspace)} to work in"
        )


def make_budget(
    demand: Demand, context: int, *, memory: int | None, share: float | None, available: int
) -> Budget:
    """Spend `memory` bytes, or hold `share` of the experts, or both; with neither, all experts if the machine has room.

    Prefers large prefill chunks until their workspace exceeds an eighth of the budget, then gives what
    is left to slots, the same share in every layer. Raises BudgetError with the minimum that would do.
    """
    limit = memory if memory is not None else int(available * MACHINE_SHARE)
    chunks = [chunk for chunk in CHUNKS if chunk < 2 * context] or [CHUNKS[-1]]
    preferred = [c for c in chunks if demand.workspace(c, context) <= limit * WORKSPACE_SHARE] or chunks[-1:]
    candidates = chunks[chunks.index(preferred[0]) :]
    if share is not None:
        shares = [share]
    else:
        most = max((layer.experts for layer in demand.layers), default=1)
        shares = [i / most for i in range(most, -1, -1)]

    def spend(chunk: int, share: float) -> Budget:
        slots = tuple(layer.slots(share) for layer in demand.layers)
        experts = sum(n * layer.slot_bytes for n, layer in zip(slots, demand.layers, strict=True))
        return Budget(
            memory, demand.residents, experts, demand.cache(context, chunk), demand.staging,
            demand.workspace(chunk, context), slots, chunk, context,
        )  # fmt: skip

    for chunk in candidates:
        for wanted in shares:
            budget = spend(chunk, wanted)
            if budget.total <= limit or (memory is None and share is not None):
                everything = all(n == layer.experts for n, layer in zip(budget.slots, demand.layers, strict=True))
                if memory is None and not everything and share is None:
                    return Budget(**{**vars(budget), "limit": limit})
                return budget
    least = spend(chunks[-1], shares[-1])
    given = format_size(limit) if memory is not None else f"{format_size(limit)} ({MACHINE_SHARE:.0%} of what is free)"
    raise BudgetError(
        f"{given} cannot hold {demand.name}: at least {format_size(least.total)} are needed ({least})",
        minimum=least.total,
        hint="give more memory, or a shorter context",
    )
