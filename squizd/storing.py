"""Quantized values into the file: in its order, or as shards of a repository are fetched.

One tensor, or one layer's experts, is evaluated, quantized, written and dropped at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import mlx.core as mx
import numpy as np

from .checkpoint import Checkpoint
from .container import Writer
from .errors import RecipeError
from .guide import Guide
from .hub import Remote
from .inventory import Inventory, Item
from .streaming import by_shard

Progress = Callable[[int, int], None]


def write(writer: Writer, weights: dict[str, mx.array], job: Inventory, guide: Guide, report: Progress) -> None:
    """Everything, in the order of the file; `report(done, total)` in bytes."""
    report(writer.done_bytes, writer.total_bytes)
    for position, item in enumerate(job.residents):
        _write_resident(writer, position, item, weights, guide)
        report(writer.done_bytes, writer.total_bytes)
    for path, first in job.starts().items():
        guide.approach(path)
        _write_experts(writer, first, path, job, weights, guide, report)


def write_by_shard(
    checkpoint: Checkpoint, remote: Remote, writer: Writer, job: Inventory, guide: Guide, report: Progress
) -> list[dict[str, Any]]:
    """Everything, as its shards are fetched; returns their hashes."""
    report(writer.done_bytes, writer.total_bytes)
    units: dict[Hashable, list[str]] = {}
    for position, item in enumerate(job.residents):
        if not writer.has(position):
            units[position] = item.names()
    for path, first in job.starts().items():
        if not all(writer.has(first + expert) for expert in range(job.counts[path])):
            units[path] = [name for item in job.experts[path] for name in item.names()]

    def write(unit: Hashable, weights: dict[str, mx.array]) -> None:
        if isinstance(unit, int):
            _write_resident(writer, unit, job.residents[unit], weights, guide)
        else:
            path = str(unit)
            _write_experts(writer, job.starts()[path], path, job, weights, guide, report)
        report(writer.done_bytes, writer.total_bytes)

    return by_shard(checkpoint, remote, units, write)


def _write_resident(writer: Writer, position: int, item: Item, weights: dict[str, mx.array], guide: Guide) -> None:
    if writer.has(position):
        weights.pop(item.weight, None)
    else:
        writer.write([_encode(item, weights, guide)], position)


def _write_experts(
    writer: Writer, first: int, path: str, job: Inventory, weights: dict[str, mx.array], guide: Guide, report: Progress
) -> None:  # fmt: skip
    """The records of one expert module, of which the first is number `first`."""
    missing = [expert for expert in range(job.counts[path]) if not writer.has(first + expert)]
    if missing:
        stacks = [_encode(item, weights, guide) for item in job.experts[path]]
        for expert in missing:
            parts = [[part[expert : expert + 1] for part in stack if part is not None] for stack in stacks]
            writer.write(parts, first + expert)
            report(writer.done_bytes, writer.total_bytes)
    for item in job.experts[path]:
        weights.pop(item.weight, None)
    mx.clear_cache()


def _encode(item: Item, weights: dict[str, mx.array], guide: Guide) -> list[np.ndarray[Any, Any] | None]:
    """Evaluate one tensor into its stored parts, and let go of its source."""
    path = item.weight.rpartition(".")[0]
    parts: list[mx.array | None]
    if item.packed:
        parts = [weights.pop(item.weight), weights.pop(f"{path}.scales"), weights.pop(f"{path}.biases", None)]
    elif item.encoding.mode == "raw":
        parts = [weights.pop(item.weight), None, None]
    else:
        try:
            own, held = weights.pop(item.weight), guide.held(path)
            parts = list(guide.quantize(path, own if held is None else held, item.encoding))
            del own, held
        except RecipeError as error:
            raise RecipeError(f"{item.weight}: {error}", hint=error.hint) from error
    present = [part for part in parts if part is not None]
    mx.eval(present)
    return [None if part is None else _as_numpy(part) for part in parts]


def _as_numpy(array: mx.array) -> np.ndarray[Any, Any]:
    """The array's own buffer (bf16, which NumPy lacks, as uint16)."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    contiguous = mx.contiguous(array)
    mx.eval(contiguous)
    return np.array(contiguous, copy=False)
