"""What a file would do on this machine at each budget: hit rate, bytes read per token, tokens a second.

Hits come from the file's profile: measured there, or from its counts as if each token were drawn anew, or,
without a profile, as if the router chose evenly; the result says which. Times come from two short
measurements: reading some experts (cold, where the system lets go of its cache, and warm), and decoding some
tokens with as few experts resident as work, less the time spent reading. Nothing overlaps in this model.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step

from . import container
from .container.layout import Record
from .container.reader import File
from .errors import BudgetError, ReadError, RequestError
from .runtime.budget import Budget, Demand, make_budget, parse_size
from .runtime.load import demand_of, load_model, state
from .runtime.pager import INLINE_BYTES, READERS
from .runtime.profile import Profile, read_profile
from .runtime.source import Source, open_source

SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125, 0.0)
_SAMPLE_BYTES = 256 << 20
_SAMPLE_SECONDS = 2.0
_TOKENS = 24
_ENDLESS = 1 << 62


@dataclass(frozen=True)
class Row:
    """One budget. Bytes, shares, bytes a token, tokens a second (None where nothing was measured)."""

    memory: int
    resident_share: float
    slots: tuple[int, ...]
    hit_rate: float
    bytes_per_token: int
    tokens_per_second_cold: float | None
    tokens_per_second_warm: float | None


@dataclass(frozen=True)
class Fit:
    """A table of budgets, and where its figures come from.

    `source`: "measured" (profile with hits), "counts" (profile without), "uniform" (no profile).
    Rates in bytes a second; `cold` is None where the system cannot drop a file from its cache.
    """

    path: str
    context: int
    source: str
    expert_bytes: int
    bytes_per_second_cold: float | None
    bytes_per_second_warm: float | None
    compute_seconds: float | None
    rows: tuple[Row, ...]

    @property
    def explanation(self) -> str:
        """One line on `source`."""
        return {
            "measured": "hit rates as measured on the profile's text",
            "counts": "hit rates from the profile's counts, as if each token were drawn anew (a low estimate)",
            "uniform": "no profile in the file: hit rates as if the router chose evenly (a low estimate); "
            "squizd profile adds one",
        }[self.source]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def fit(
    path: str | os.PathLike[str],
    *,
    memory: Sequence[str | int] = (),
    context: int | None = None,
    measure: bool = True,
) -> Fit:
    """Predict for budgets of `memory`, or for shares of the experts from all to as few as work.

    `measure` False leaves the two measurements out, and times with them. Raises BudgetError for a budget that
    holds nothing, RequestError for a model without experts, and what `load` raises.
    """
    demand, tokens = demand_of(path, context)
    if not demand.layers:
        raise RequestError(f"{os.fspath(path)}: its model has no experts to page")
    with container.open(path) as file:
        found = read_profile(file)
        records = [file.experts(x.layer) for x in file.moe_layers]
        cold, warm = _disk(file, [r for layer in records for r in layer]) if measure else (None, None)
    budgets = _budgets(demand, tokens, memory)
    compute = _compute_seconds(path, budgets[-1]) if measure else None
    sizes = [statistics.fmean(r.stored_size for r in layer) for layer in records]
    source = "uniform" if found is None else "measured" if all(x.measured for x in found.layers) else "counts"
    rows = [_row(budget, demand, found, sizes, compute, cold, warm) for budget in budgets]
    every = [r.stored_size for layer in records for r in layer]
    return Fit(os.fspath(path), tokens, source, int(statistics.median(every)), cold, warm, compute, tuple(rows))


def _budgets(demand: Demand, tokens: int, memory: Sequence[str | int]) -> list[Budget]:
    if memory:
        sizes = sorted({parse_size(size) for size in memory}, reverse=True)
        return [make_budget(demand, tokens, memory=size, share=None, available=size) for size in sizes]
    found = [make_budget(demand, tokens, memory=None, share=share, available=_ENDLESS) for share in SHARES]
    return [b for i, b in enumerate(found) if b.slots not in [other.slots for other in found[:i]]]


def _row(
    budget: Budget,
    demand: Demand,
    profile: Profile | None,
    sizes: Sequence[float],
    compute: float | None,
    cold: float | None,
    warm: float | None,
) -> Row:
    missed = needed = stored = 0.0
    for i, (layer, slots) in enumerate(zip(demand.layers, budget.slots, strict=True)):
        rate = slots / layer.experts if profile is None else profile.layers[i].hits(slots)
        needed += layer.top_k
        missed += layer.top_k * (1 - rate)
        stored += layer.top_k * (1 - rate) * sizes[i]

    def speed(bytes_per_second: float | None) -> float | None:
        if compute is None or bytes_per_second is None:
            return None
        return 1 / (compute + stored / bytes_per_second)

    experts = sum(layer.experts for layer in demand.layers)
    share = sum(budget.slots) / experts
    return Row(
        budget.total, share, budget.slots, 1 - missed / needed, round(stored), speed(cold), speed(warm)
    )  # fmt: skip


# -- measurements ------------------------------------------------------------------------------------------


def _disk(file: File, records: Sequence[Record]) -> tuple[float | None, float]:
    """Bytes a second of reading experts in random order: not from the system's cache, and from it (best of three)."""
    chosen = list(records)
    random.Random(0).shuffle(chosen)
    while len(chosen) > READERS and sum(r.stored_size for r in chosen) > _SAMPLE_BYTES:
        del chosen[len(chosen) // 2 :]
    fd = file.fileno()
    cold, source = None, open_source(file)
    if hasattr(os, "posix_fadvise"):
        for r in chosen:
            os.posix_fadvise(fd, r.offset, r.stored_size, os.POSIX_FADV_DONTNEED)
        cold = _read_rate(source, chosen)
    return cold, max(_read_rate(source, chosen) for _ in range(3))


def _read_rate(source: Source, records: Sequence[Record]) -> float:
    def read(record: Record) -> int:
        if time.perf_counter() - began > _SAMPLE_SECONDS:
            return 0
        source.announce(record.offset, record.stored_size)
        if source.fill([np.empty(record.stored_size, np.uint8)], record.offset) < record.stored_size:
            raise ReadError(f"the file is cut short at byte {record.offset}")
        return record.stored_size

    began = time.perf_counter()
    if 2 * max(r.stored_size for r in records) <= INLINE_BYTES:  # as the pager does
        return sum(map(read, records)) / (time.perf_counter() - began)
    with ThreadPoolExecutor(READERS) as pool:
        began = time.perf_counter()
        total = sum(pool.map(read, records))
    return total / (time.perf_counter() - began)


def _compute_seconds(path: str | os.PathLike[str], budget: Budget) -> float | None:
    """Seconds a token without reading, with the slots of `budget`; None if this machine has no room for it."""
    try:
        model: Any = load_model(path, memory=budget.total, context=budget.context)
    except BudgetError:
        return None
    loaded = state(model)
    try:
        steps = generate_step(mx.array([1, 2, 3, 4]), model, max_tokens=_TOKENS + 4)
        for _ in range(4):
            next(steps)
        loaded.reset_stats()
        began = time.perf_counter()
        for _ in range(_TOKENS):
            next(steps)
        return max(time.perf_counter() - began - loaded.stats.read_seconds, 1e-9) / _TOKENS
    finally:
        loaded.close()
