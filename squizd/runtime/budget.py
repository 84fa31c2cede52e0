"""How a memory budget is spent: resident tensors, expert slots, prompt cache, staging, workspace. Arithmetic only.

What it cannot know exactly it bounds from above: `Workspace` says how. Python, MLX and the tokenizer
themselves (some 300 MB) are not part of a budget.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ..errors import BudgetError, RequestError

# Tokens that prefill computes at once, and the share of a budget that their workspace may take. A larger
# chunk reads each expert fewer times, which matters most where few experts fit.
CHUNKS = {2048: 1 / 8, 1024: 1 / 8, 512: 1 / 8, 256: 1 / 4, 128: 1 / 4, 64: 1 / 4, 32: 1, 16: 1}
WORTH = 0.02  # of misses; one text differs from another by as much
MACHINE_SHARE = 0.7  # of available memory, when no budget is given
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(value: str | int) -> int:
    """Bytes of "6GB", "700 MB", "1.5GiB", or of a plain number; RequestError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]i?|)b?\s*", str(value).lower())
    if match is None or isinstance(value, bool):
        raise RequestError(f"{value!r} is not a size", hint="write for example 6GB, 700MB or 1.5GiB")
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
        return f"{-(-size // 10**6)} MB"
    return f"{-(-size // 10**8) / 10} GB"


@dataclass(frozen=True)
class LayerDemand:
    """An expert layer: how many experts, how many one token needs, bytes of one in memory."""

    experts: int
    top_k: int
    slot_bytes: int
    hits: tuple[tuple[int, int], ...] = ()  # (slots, hits in some text), ascending, if known: see `profile`

    def slots(self, share: float) -> int:
        """Slots for this share of the experts: at least what one token needs."""
        return min(self.experts, max(self.top_k, math.ceil(share * self.experts - 1e-9)))


@dataclass(frozen=True)
class Workspace:
    """An upper bound of the memory that a forward pass takes besides weights and cache.

    MLX holds copies of the residual stream and of the experts' rows; on CPU, where its attention is not
    fused, some copies of its scores (heads × chunk × context); and where a model caches latents, keys and
    values expanded from them. The factors bound MLX's measured peak for qwen3_moe, gpt_oss, deepseek_v3 and
    nemotron_h on CPU, chunks of 1 to 512, contexts of 512 to 2048. A fifth is for buffers kept for reuse.
    """

    hidden: int
    inner: int  # numbers in the widest feed-forward row of a token; a token's experts count together
    top_k: int
    heads: int
    latent_width: int  # numbers per head and token that are expanded from a cached latent, 0 without
    vocabulary: int
    item_bytes: int
    layers: int
    fused: bool = False  # attention keeps no scores: squizd's kernels compute it

    def bytes(self, chunk: int, context: int) -> int:
        """For `chunk` tokens at the end of `context`."""
        row = (12 + 4 * self.top_k) * self.hidden + 6 * self.inner
        scores = 0 if self.fused else 7 * self.heads * context // 2
        expanded = 5 * self.latent_width * self.heads * context // 2
        sampling = 8 * self.vocabulary * 4  # one token's logits, probabilities and their order
        kept = self.layers << 18  # switch.KEPT_BYTES
        return ((chunk * (row + scores) + expanded) * self.item_bytes + sampling + kept) * 5 // 4


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

    limit: int  # what the total may be: the memory asked for, else the machine's
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
            f"{format_size(self.residents)} weights always in use, {format_size(self.experts)} experts, "
            f"{format_size(self.cache)} cache for {self.context:,} tokens, "
            f"{format_size(self.staging + self.workspace)} to work in"
        )


def by_need(layers: Sequence[LayerDemand], even: tuple[int, ...], room: int) -> tuple[int, ...]:
    """`spread`, if by the layers' own curves it saves `WORTH` of what `even` slots read again; else `even`."""

    def hits(slots: Sequence[int]) -> float:
        return sum(
            float(np.interp(n, [s for s, _ in layer.hits], [h for _, h in layer.hits]))
            for n, layer in zip(slots, layers, strict=True)
        )

    found = spread(layers, room)
    most = sum(layer.hits[-1][1] for layer in layers)
    return found if hits(found) - hits(even) > WORTH * (most - hits(even)) else even


def spread(layers: Sequence[LayerDemand], room: int) -> tuple[int, ...]:
    """Slots for each layer in `room` bytes so that the most hits are gained, from `LayerDemand.hits`.

    Every layer has what one token needs; then the slot goes where a byte gains most. A hit saves the bytes
    that a slot takes, so gain per byte is gained hits alone. Curves are taken as their concave hulls, on which
    greedy is best (Fox 1966).
    """
    slots = [layer.slots(0) for layer in layers]
    room = max(0, room - sum(n * layer.slot_bytes for n, layer in zip(slots, layers, strict=True)))
    steps: list[tuple[float, int, int]] = []  # (-hits gained per slot, layer, up to how many slots)
    for index, layer in enumerate(layers):
        hull: list[tuple[int, int]] = []
        # From one point to the next the gain falls; a point that would make it rise is left out.
        for point in sorted({(slots[index], 0), *(p for p in layer.hits if p[0] >= slots[index])}):
            if hull and point[0] <= hull[-1][0]:
                hull[-1] = point
                continue
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], point):
                hull.pop()
            hull.append(point)
        steps += [(-_slope(a, b), index, b[0]) for a, b in pairwise(hull)]
    # What no curve speaks of comes last: slots that gain nothing are better than unused memory.
    steps += [(0.0, index, layer.experts) for index, layer in enumerate(layers)]
    for _, index, most in sorted(steps):
        size = max(layers[index].slot_bytes, 1)
        extra = min(max(0, min(most, layers[index].experts) - slots[index]), room // size)
        slots[index] += extra
        room -= extra * size
    return tuple(slots)


def _slope(a: tuple[int, int], b: tuple[int, int]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def make_budget(demand: Demand, context: int, *, memory: int | None, share: float | None, available: int) -> Budget:
    """Spend `memory` bytes, or hold `share` of the experts, or both; with neither, spend 70 % of `available`.

    Takes the largest prefill chunk whose workspace keeps to its share of the limit (`CHUNKS`), then gives
    what is left to slots: the same share in every layer, or, where the hits of all layers are known, `spread`
    `by_need` (`share` is then one of the whole model). Raises BudgetError with the minimum that would do.
    """
    limit = memory if memory is not None else int(available * (MACHINE_SHARE if share is None else 1))
    chunks = [chunk for chunk in CHUNKS if chunk < 2 * context] or [min(CHUNKS)]
    while len(chunks) > 1 and demand.workspace(chunks[0], context) > limit * CHUNKS[chunks[0]]:
        chunks.pop(0)
    most = max((layer.experts for layer in demand.layers), default=1)
    shares = [i / most for i in range(most, -1, -1)] if share is None else [share]

    def spend(chunk: int, share: float) -> Budget:
        slots = tuple(layer.slots(share) for layer in demand.layers)
        return Budget(
            limit=limit,
            residents=demand.residents,
            experts=sum(n * layer.slot_bytes for n, layer in zip(slots, demand.layers, strict=True)),
            cache=demand.cache(context, chunk),
            staging=demand.staging,
            workspace=demand.workspace(chunk, context),
            slots=slots,
            prefill_step_size=chunk,
            context=context,
        )

    for chunk in chunks:
        for part in shares:
            budget = spend(chunk, part)
            if budget.total <= limit:
                if not all(layer.hits for layer in demand.layers):
                    return budget
                room = budget.experts + (limit - budget.total if share is None else 0)
                slots = by_need(demand.layers, budget.slots, room)
                experts = sum(n * layer.slot_bytes for n, layer in zip(slots, demand.layers, strict=True))
                return replace(budget, slots=slots, experts=experts)
    given = format_size(limit) + ("" if memory is not None else " of free memory")
    raise BudgetError(
        f"{given} cannot hold {demand.name}: at least {format_size(budget.total)} are needed ({budget})",
        minimum=budget.total,
        hint="give more memory or a shorter context" if share is None else "hold fewer experts, or give more memory",
    )
