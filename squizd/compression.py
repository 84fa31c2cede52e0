"""Checkpoint to file: the pipeline, readable from top to bottom.

    open_checkpoint → lay out (`inventory`) → calibrate, plan → quantize tensor by tensor (`storing`) → Writer

mlx-lm's `sanitize` turns the checkpoint's lazy tensors into lazy model tensors; each is then
evaluated, quantized, written and dropped, so memory holds one layer, never the model.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx_lm.utils import _encode_tagged_floats

from . import __version__, inspection
from .allocation import Plan as TensorPlan
from .architecture import layer_ids
from .checkpoint import Checkpoint, open_checkpoint
from .container import Plan, Writer
from .container import open as open_file
from .container.layout import RAW, ZSTD, MoeLayer, make_layout
from .container.metadata import MetadataError
from .container.writer import check_target, choose_alignment
from .errors import RecipeError, SourceError
from .guide import Calibration, Guide, prepare
from .inventory import QUANTIZATION_KEYS, Inventory, dtype_of, lay_out
from .planning import Candidate, make_plan
from .quantizers import METHODS
from .recipe import Recipe, make_recipe
from .storing import write, write_by_shard
from .workplace import Workplace

Progress = Callable[[int, int], None]
SENSITIVITY_WINDOWS = 4  # of calibration text, on which every tensor's divergence is measured


@dataclass(frozen=True)
class Summary:
    """What `compress` did. Sizes in bytes; `unquantized` names tensors whose rows fit no group."""

    path: str
    source_bytes: int
    file_bytes: int
    parameters: int
    bits_per_weight: float
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
    have few digits); `save_plan` writes what was chosen, `plan` does as such a file says. The same source and arguments
    give the same bytes; an interrupted run leaves `output`.partial (and
    `output`.work: what it learned from text), and the same call goes on from there. A source that is quantized for MLX
    passes untouched, whatever the recipe. A repository is fetched shard by shard and not kept, unless `keep_source`
    puts it into the hub's cache; so do `zstd` and calibration, which read it in another order or more than once.
    Raises SourceError, RecipeError, TextError, OutputError.
    """
    started = time.perf_counter()
    target = os.fspath(output)
    work = Workplace(target)
    chosen = make_recipe(recipe, overrides)
    quantizer = quantizer or default_quantizer(calibration)
    if quantizer not in METHODS:
        raise RecipeError(f"no quantizer {quantizer!r}", hint="quantizers: " + ", ".join(METHODS))
    _one_of(target_bpw, target_size, plan)
    check_target(target, force)
    several_passes = keep_source or zstd or calibration is not None
    checkpoint = open_checkpoint(source, revision, None if several_passes else work.folder)
    if isinstance(checkpoint.config.get("quantization"), dict):  # mlx-lm's mark: what it left alone stays alone
        if target_bpw is not None or target_size is not None or plan is not None or calibration is not None:
            raise RecipeError(f"{source} is quantized for MLX already: nothing is left to choose or to fit")
        chosen = make_recipe("keep", overrides)
    old_limit = mx.set_cache_limit(1 << 26)
    try:
        guide = prepare(checkpoint, quantizer, calibration, statistics, preparing, work, short=zstd)
        if target_bpw is not None or target_size is not None or plan is not None:
            made = _chosen_plan(checkpoint, guide, target_bpw, target_size, plan, save_plan, zstd, preparing, work)
            name = "plan" if plan is not None else f"{target_bpw}bpw" if target_bpw else "size"
            chosen = replace(make_recipe("mixed", [*made.overrides(), *overrides]), name=name)
        weights, job = lay_out(checkpoint, chosen)
        plan_of_file = _plan(checkpoint, job, chosen, quantizer, zstd, guide)
        with ThreadPoolExecutor(1) as pool, Writer(target, plan_of_file) as writer:
            stop = threading.Event()
            hashes = pool.submit(checkpoint.hashes, stop)
            resumed = writer.done
            report = progress or (lambda done, total: None)
            try:
                if checkpoint.remote is None:
                    write(writer, weights, job, guide, report)
                    found = hashes.result()
                else:
                    found = write_by_shard(checkpoint, checkpoint.remote, writer, job, guide, report)
                plan_of_file.metadata["provenance"]["source"]["files"] = found
            finally:
                stop.set()
            writer.finish(plan_of_file.metadata)
        work.remove()
    finally:
        mx.set_cache_limit(old_limit)
    with open_file(target) as f:
        size = inspection.weight_size(f)
        file_bytes = f.size
    source_bytes = sum(size for _, size in checkpoint.files())
    seconds = time.perf_counter() - started
    return Summary(
        target,
        source_bytes,
        file_bytes,
        size.parameters,
        size.bits_per_weight,
        seconds,
        resumed,
        tuple(job.unquantized),
        chosen.name,
    )


def plan(
    source: str | os.PathLike[str],
    *,
    quantizer: str | None = None,
    calibration: str | os.PathLike[str] | Calibration | None = None,
    statistics: str | os.PathLike[str] | None = None,
    target_bpw: float | None = None,
    target_size: int | None = None,
    plan: str | os.PathLike[str] | None = None,
    save_plan: str | os.PathLike[str] | None = None,
    zstd: bool = False,
    revision: str | None = None,
    preparing: Progress | None = None,
) -> TensorPlan:
    """What `compress` with these arguments would choose; writes nothing but `save_plan` and `statistics`."""
    if target_bpw is None and target_size is None and plan is None:
        raise RecipeError("there is nothing to plan", hint="give --target-bpw, --target-size or --plan")
    _one_of(target_bpw, target_size, plan)
    checkpoint = open_checkpoint(source, revision)
    old_limit = mx.set_cache_limit(1 << 26)
    try:
        method = quantizer or default_quantizer(calibration)
        guide = prepare(checkpoint, method, calibration, statistics, preparing)
        return _chosen_plan(checkpoint, guide, target_bpw, target_size, plan, save_plan, zstd, preparing)
    finally:
        mx.set_cache_limit(old_limit)


def _one_of(*choices: object) -> None:
    if sum(x is not None for x in choices) > 1:
        raise RecipeError("a target and a plan, or two targets, contradict each other", hint="give one of them")


def default_quantizer(calibration: object) -> str:
    """The best method that the arguments allow."""
    return "mse" if calibration is None else "gptq"


def _chosen_plan(
    checkpoint: Checkpoint, guide: Guide, target_bpw: float | None, target_size: int | None,
    saved: str | os.PathLike[str] | None, save: str | os.PathLike[str] | None, zstd: bool,
    progress: Progress | None, work: Workplace | None = None,
) -> TensorPlan:  # fmt: skip
    """A plan that was saved, or one made for the target, which an earlier run may have left in `work`."""
    if saved is not None:
        return TensorPlan.load(saved)
    if guide.statistics is None or guide.windows is None:
        raise RecipeError("a target needs calibration text", hint="give some with --calibration")
    candidates, fixed_bits, parameters = survey(checkpoint)
    if target_bpw is None:
        assert target_size is not None
        # Beside weights a file holds tokenizer, indexes and padding; of the last at most 1 % (`choose_alignment`).
        beside = sum(map(len, checkpoint.bundle().values())) + (1 << 18)
        target_bpw = (target_size * 0.99 - beside) * 8 / parameters
    kept = work.place("plan", guide.digest(), guide.method, target_bpw, zstd, SENSITIVITY_WINDOWS) if work else None
    made = None
    if kept is not None and kept.exists():
        try:
            made = TensorPlan.load(kept)
        except RecipeError:  # half of it: a machine that went down
            kept.unlink()
    if made is None:
        made = make_plan(
            checkpoint, candidates, fixed_bits, parameters, target_bpw, method=guide.method,
            statistics=guide.statistics, windows=guide.windows[:SENSITIVITY_WINDOWS], zstd=zstd,
            progress=progress, folder=work.folder if work else None,
        )  # fmt: skip
        if work is not None and kept is not None:
            work.make()
            made.save(kept)
    if save is not None:
        made.save(save)
    return made


def survey(checkpoint: Checkpoint) -> tuple[list[Candidate], int, int]:
    """What a plan decides on, the bits of all else, and the number of all parameters."""
    weights, job = lay_out(checkpoint, make_recipe("mixed"))
    items = [(item.name, item, 1) for item in job.residents]
    items += [(f"{path}.{i.name}", i, job.counts[path]) for path, group in job.experts.items() for i in group]
    candidates, fixed, parameters = list[Candidate](), 0, 0
    for name, item, count in items:
        parameters += math.prod(item.shape) * count
        if item.encoding.mode == "affine" and not item.packed:
            shape = (count, *item.shape) if item.role == "expert" else item.shape
            candidates.append(Candidate(name, item.role, dtype_of(weights[item.weight]), shape))
        else:
            fixed += 8 * count * sum(item.encoding.part_sizes(item.shape))
    return candidates, fixed, parameters


def _plan(checkpoint: Checkpoint, job: Inventory, recipe: Recipe, quantizer: str, zstd: bool, guide: Guide) -> Plan:
    paths = list(job.experts)
    layouts = {path: make_layout([item.entry() for item in items]) for path, items in job.experts.items()}
    distinct = list(dict.fromkeys(layouts.values()))
    files = [{"name": name, "size": size, "sha256": "0" * 64} for name, size in checkpoint.files()]
    source: dict[str, Any] = {"files": files}
    if checkpoint.repo:
        source |= {"repo": checkpoint.repo, "revision": checkpoint.revision}
    config = {key: value for key, value in checkpoint.config.items() if key not in QUANTIZATION_KEYS}
    metadata: dict[str, Any] = {
        "model": {"config": _encode_tagged_floats(config)},
        "recipe": {**recipe.describe(), "quantizer": quantizer},
        "provenance": {"tool": "squizd", "version": __version__, "source": source},
    }
    if guide.statistics is not None:
        metadata["provenance"]["calibration"] = guide.statistics.source
    if licence := checkpoint.licence():
        metadata["licence"] = licence
    bundle = checkpoint.bundle()
    agreed = (
        recipe,
        quantizer,
        zstd,
        guide.digest(),
        __version__,
        [(name, hashlib.sha256(d).digest()) for name, d in bundle.items()],
    )
    fingerprint = hashlib.sha256(checkpoint.fingerprint() + repr(agreed).encode()).digest()
    try:
        return Plan(
            metadata,
            [item.entry() for item in job.residents],
            bundle,
            distinct,
            [MoeLayer(i, path, job.counts[path]) for i, path in zip(layer_ids(paths), paths, strict=True)],
            [[distinct.index(layouts[path])] * job.counts[path] for path in paths],
            choose_alignment(layouts[path].raw_size for path in paths for _ in range(job.counts[path])),
            ZSTD if zstd else RAW,
            fingerprint=fingerprint,
        )
    except MetadataError as error:
        raise SourceError(f"config.json cannot be stored: {error}") from error
