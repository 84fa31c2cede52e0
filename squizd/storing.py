"""Quantized values into the file: in its order, or as shards of a repository are fetched.

One tensor, or one layer's experts, is evaluated, quantized and dropped at a time; it is written while the next is
being quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import mlx.core as mx
import numpy as np

from .checkpoint import Checkpoint
from .container import Writer
from .container.layout import Encoding
from .errors import RecipeError
from .guide import Guide
from .hub import Remote
from .inventory import Inventory, Item
from .streaming import by_shard

Progress = Callable[[int, int], None]
Part = np.ndarray[Any, Any] | None
Record = tuple[int, list[list[Part]]]  # its number; by tensor codes, scales and biases


class _Records:
    """Records on their way into the file, in a thread of their own; what goes wrong there is raised by the next call.

    `report(done, total)` in bytes is called there too.
    """

    def __init__(self, writer: Writer, report: Progress) -> None:
        self.writer, self._report = writer, report
        self._pool, self._latest = ThreadPoolExecutor(1), Future[None]()
        report(writer.done_bytes, writer.total_bytes)
        self._latest.set_result(None)

    def put(self, records: Iterable[Record]) -> None:
        """Write these when those before them are written, for which this waits: no more are held in memory."""
        self.wait()
        self._latest = self._pool.submit(self._write, records)

    def wait(self) -> None:
        """Until all are written."""
        self._latest.result()

    def _write(self, records: Iterable[Record]) -> None:
        for position, parts in records:
            self.writer.write(parts, position)
            self._report(self.writer.done_bytes, self.writer.total_bytes)

    def __enter__(self) -> _Records:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._pool.shutdown()
        if error is None:
            self.wait()


def write(writer: Writer, weights: dict[str, mx.array], job: Inventory, guide: Guide, report: Progress) -> None:
    """Everything, in the order of the file; `report(done, total)` in bytes."""
    with _Records(writer, report) as records:
        for position, item in enumerate(job.residents):
            _write_resident(records, position, item, weights, guide)
        for path, first in job.starts().items():
            guide.approach(path)
            _write_experts(records, first, path, job, weights, guide)


def write_by_shard(
    checkpoint: Checkpoint, remote: Remote, writer: Writer, job: Inventory, guide: Guide, report: Progress
) -> list[dict[str, Any]]:
    """Everything, as its shards are fetched; returns their hashes."""
    units: dict[Hashable, list[str]] = {}
    for position, item in enumerate(job.residents):
        if not writer.has(position):
            units[position] = item.names()
    for path, first in job.starts().items():
        if not all(writer.has(first + expert) for expert in range(job.counts[path])):
            units[path] = [name for item in job.experts[path] for name in item.names()]
    with _Records(writer, report) as records:

        def write(unit: Hashable, weights: dict[str, mx.array]) -> None:
            if isinstance(unit, int):
                _write_resident(records, unit, job.residents[unit], weights, guide)
            else:
                _write_experts(records, job.starts()[str(unit)], str(unit), job, weights, guide)
            records.wait()  # its shards may go

        return by_shard(checkpoint, remote, units, write)


def _write_resident(records: _Records, position: int, item: Item, weights: dict[str, mx.array], guide: Guide) -> None:
    if records.writer.has(position):
        weights.pop(item.weight, None)
    else:
        records.put([(position, [_encode(item, weights, guide)(None)])])


def _write_experts(
    records: _Records, first: int, path: str, job: Inventory, weights: dict[str, mx.array], guide: Guide
) -> None:
    """The records of one expert module, of which the first is number `first`."""
    missing = [expert for expert in range(job.counts[path]) if not records.writer.has(first + expert)]
    if missing:
        stacks = [_encode(item, weights, guide) for item in job.experts[path]]
        records.put((first + expert, [stack(expert) for stack in stacks]) for expert in missing)
    for item in job.experts[path]:
        weights.pop(item.weight, None)
    mx.clear_cache()


def _encode(item: Item, weights: dict[str, mx.array], guide: Guide) -> Callable[[int | None], list[Part]]:
    """Evaluate one tensor, and let go of its source: the stored parts of all of it (None), or of an expert."""
    path = item.weight.rpartition(".")[0]
    if item.packed:
        keys = (item.weight, f"{path}.scales", f"{path}.biases")
        stacks = [_evaluated([weights.pop(key, None) for key in keys])]
    elif item.encoding.mode == "raw":
        stacks = [_evaluated([weights.pop(item.weight), None, None])]
    else:
        own, held = weights.pop(item.weight), guide.held(path)
        w = own if held is None else held
        del own, held
        try:
            if not item.apart:
                stacks = [_evaluated(guide.quantize(path, w, item.encoding))]
            else:
                groups = _groups(item, w.shape[0])
                stacks = [_evaluated(guide.quantize(path, w, encoding, some))
                          for encoding, some in groups.items()]  # fmt: skip
                place = {e: (stack, row) for stack, some in enumerate(groups.values()) for row, e in enumerate(some)}
        except RecipeError as error:
            raise RecipeError(f"{item.weight}: {error}", hint=error.hint) from error

    def parts(expert: int | None) -> list[Part]:
        if expert is None:
            return stacks[0]
        stack, row = place[expert] if item.apart else (0, expert)
        return [part if part is None else part[row : row + 1] for part in stacks[stack]]

    return parts


def _groups(item: Item, count: int) -> dict[Encoding, list[int]]:
    """Experts by their encoding."""
    found: dict[Encoding, list[int]] = {}
    for expert in range(count):
        found.setdefault(item.apart.get(expert, item.encoding), []).append(expert)
    return found


def _evaluated(parts: Iterable[mx.array | None]) -> list[Part]:
    present = list(parts)
    mx.eval([part for part in present if part is not None])
    return [None if part is None else _as_numpy(part) for part in present]


def _as_numpy(array: mx.array) -> np.ndarray[Any, Any]:
    """The array's own buffer (bf16, which NumPy lacks, as uint16)."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    contiguous = mx.contiguous(array)
    mx.eval(contiguous)
    return np.array(contiguous, copy=False)
