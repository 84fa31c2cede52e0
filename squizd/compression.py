"""Checkpoint to file: the pipeline, readable from top to bottom.

    open_checkpoint → calibrate (`guide`), choose (`choosing`) → lay out (`inventory`, `filing`)
                    → quantize tensor by tensor (`storing`) → Writer

mlx-lm's `sanitize` turns the checkpoint's lazy tensors into lazy model tensors; each is then
evaluated, quantized, written and dropped, so memory holds one layer, never the model.

Importing mlx-lm takes longer than compressing a small model, and the GIL. What needs it is therefore imported when the
source's shards, which need only be hashed, are being hashed.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from . import inspection
from .allocation import Plan as TensorPlan
from .allocation import Target
from .backend import on_cuda
from .checkpoint import Checkpoint, open_checkpoint
from .container import Writer
from .container import open as open_file
from .container.writer import check_target
from .errors import RecipeError
from .quantizers import METHODS
from .recipe import make_recipe
from .workplace import Workplace

if TYPE_CHECKING:
    from .guide import Calibration

Progress = Callable[[int, int], None]
CACHE_CUDA = 1 << 32  # there giving memory back makes the GPU wait, and taking it is slow


@dataclass(frozen=True)
class Summary:
    """What `compress` did. Sizes in bytes; `unquantized` names tensors whose rows fit no group.

    `memory_bits_per_weight`: of the model once read, where records are not compressed and experts of a layer have equal
    room, in the file's number types (CPUs hold scales and biases in float32).
    """

    path: str
    source_bytes: int
    file_bytes: int
    parameters: int
    bits_per_weight: float
    memory_bits_per_weight: float
    seconds: float
    resumed: int
    unquantized: tuple[str, ...]
    recipe: str  # "keep" in place of the one asked for where the source is quantized for MLX already


def compress(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    recipe: str = "int4",
    quantizer: str | None = None,
    overrides: Sequence[str] = (),
    revision: str | None = None,
    zstd: bool = False,
    force: bool = False,
    calibration: str | os.PathLike[str] | Calibration | None = None,
    statistics: str | os.PathLike[str] | None = None,
    target_bpw: float | None = None,
    target_size: int | None = None,
    plan: str | os.PathLike[str] | None = None,
    save_plan: str | os.PathLike[str] | None = None,
    alike: bool = False,
    keep_source: bool = False,
    progress: Progress | None = None,
    preparing: Progress | None = None,
) -> Summary:
    """Compress a Hugging Face checkpoint (folder or repository id) into the file `output`.

    `recipe` names the encodings (`squizd.recipe.RECIPES`), `overrides` are "PATTERN=SPEC" for tensor
    paths, `quantizer` is "minmax", "mse" or "gptq"; None means gptq with calibration, mse without. `calibration`
    is text (a file or folder), with which mse weighs its fit by activations and without which there is no gptq;
    `statistics` names a file to keep what was learned from it, or to take it from. `progress(done, total)` counts
    bytes of the file, `preparing` layers that were calibrated. `target_bpw` (bits per weight) or `target_size` (bytes
    of the file) lets measured divergences choose every tensor's bits and group size, which takes calibration text, and
    counts what is stored, so `zstd` leaves more bits to choose (for its sake scales and biases that are fitted to text
    have few digits). Experts of a projection may get two widths: in memory each takes the room of the wider one, unless
    `alike` forbids it. `save_plan` writes what was chosen, `plan` does as such a file says.

    The same source and arguments give the same bytes on the same kind of device; an interrupted run leaves
    `output`.partial (and `output`.work: what it learned from text), and the same call goes on from there. A source that
    is quantized for MLX passes untouched, whatever the recipe. A repository is fetched shard by shard and not kept,
    unless `keep_source` puts it into the hub's cache; so do `zstd` and calibration, which read it in another order or
    more than once.
    Raises SourceError, RecipeError, TextError, OutputError.
    """
    started = time.perf_counter()
    path = os.fspath(output)
    work = Workplace(path)
    chosen, method = make_recipe(recipe, overrides), _method(quantizer, calibration)
    target = Target(target_bpw, target_size, plan, save_plan, zstd, alike)
    check_target(path, force)
    several_passes = keep_source or zstd or calibration is not None
    checkpoint = open_checkpoint(source, revision, None if several_passes else work.folder)
    if isinstance(checkpoint.config.get("quantization"), dict):  # mlx-lm's mark: what it left alone stays alone
        if target.name or calibration is not None:
            raise RecipeError(f"{source} is quantized for MLX already: nothing is left to choose or to fit")
        chosen = make_recipe("keep", overrides)
    with _hashing(checkpoint) as hashes, _little_kept():
        with _importing():
            from .filing import plan_of_file
            from .guide import prepare
            from .inventory import lay_out
            from .storing import write, write_by_shard

        guide = prepare(checkpoint, method, calibration, statistics, preparing, work, short=zstd)
        if target.name:
            from .choosing import chosen_plan

            made = chosen_plan(checkpoint, guide, target, preparing, work, overrides)
            chosen = made.recipe(target.name, overrides)
        weights, job = lay_out(checkpoint, chosen)
        whole = plan_of_file(checkpoint, job, chosen, method, zstd, guide)
        with Writer(path, whole) as writer:
            resumed = writer.done
            report = progress or (lambda done, total: None)
            if checkpoint.remote is None:
                write(writer, weights, job, guide, report)
                found = hashes.result()
            else:
                found = write_by_shard(checkpoint, checkpoint.remote, writer, job, guide, report)
            whole.metadata["provenance"]["source"]["files"] = found
            writer.finish(whole.metadata)
        work.remove()
    with open_file(path) as f:
        size = inspection.weight_size(f)
        file_bytes = f.size
    source_bytes = sum(size for _, size in checkpoint.files())
    return Summary(
        path,
        source_bytes,
        file_bytes,
        size.parameters,
        size.bits_per_weight,
        8 * job.weight_bytes(widest=True) / size.parameters,
        time.perf_counter() - started,
        resumed,
        tuple(job.unquantized),
        chosen.name,
    )


def plan(
    source: str | os.PathLike[str],
    *,
    quantizer: str | None = None,
    overrides: Sequence[str] = (),
    calibration: str | os.PathLike[str] | Calibration | None = None,
    statistics: str | os.PathLike[str] | None = None,
    target_bpw: float | None = None,
    target_size: int | None = None,
    plan: str | os.PathLike[str] | None = None,
    save_plan: str | os.PathLike[str] | None = None,
    alike: bool = False,
    zstd: bool = False,
    revision: str | None = None,
    preparing: Progress | None = None,
) -> TensorPlan:
    """What `compress` with these arguments would choose; writes nothing but `save_plan` and `statistics`."""
    method = _method(quantizer, calibration)
    target = Target(target_bpw, target_size, plan, save_plan, zstd, alike)
    if not target.name:
        raise RecipeError("there is nothing to plan", hint="give --target-bpw, --target-size or --plan")
    checkpoint = open_checkpoint(source, revision)
    with _little_kept():
        from .choosing import chosen_plan
        from .guide import prepare

        guide = prepare(checkpoint, method, calibration, statistics, preparing)
        return chosen_plan(checkpoint, guide, target, preparing, overrides=overrides)


def _method(quantizer: str | None, calibration: object) -> str:
    """The quantizer asked for, or the best that the arguments allow."""
    method = quantizer or ("mse" if calibration is None else "gptq")
    if method not in METHODS:
        raise RecipeError(f"no quantizer {method!r}", hint="quantizers: " + ", ".join(METHODS))
    return method


@contextmanager
def _hashing(checkpoint: Checkpoint) -> Iterator[Future[list[dict[str, Any]]]]:
    """The shards' hashes, computed meanwhile in a thread, which gives up when the work is over."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(checkpoint.hashes, stop)
        finally:
            stop.set()


@contextmanager
def _importing() -> Iterator[None]:
    """Without the garbage collector, which takes a tenth of a large import and finds nothing, then or soon after."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # what the caller froze stays frozen
            gc.freeze()
            gc.unfreeze()  # into the oldest generation, as if they had been searched
        if enabled:
            gc.enable()


@contextmanager
def _little_kept() -> Iterator[None]:
    """MLX gives memory back to the system instead of keeping it for later."""
    old_limit = mx.set_cache_limit(CACHE_CUDA if on_cuda() else 1 << 26)
    try:
        yield
    finally:
        mx.set_cache_limit(old_limit)
