"""Checkpoint to file: the pipeline, readable from top to bottom.

    open_checkpoint → lay out (names, roles, encodings) → quantize tensor by tensor → Writer

mlx-lm's `sanitize` turns the checkpoint's lazy tensors into lazy model tensors once; each is then
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
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import _encode_tagged_floats, infer_quant_config

from . import __version__, inspection
from .allocation import Plan as TensorPlan
from .architecture import build, expert_modules, layer_ids
from .checkpoint import Checkpoint, open_checkpoint
from .container import Plan, Writer
from .container import open as open_file
from .container.layout import FLOATS, RAW, ZSTD, Encoding, MoeLayer, make_layout
from .container.metadata import MetadataError
from .container.writer import check_target, choose_alignment
from .errors import RecipeError, SourceError
from .guide import Calibration, Guide, prepare
from .planning import Candidate, make_plan
from .quantizers import METHODS
from .recipe import KEEP, Recipe, choose, make_recipe, role_of
from .weights import read as read_weights

Progress = Callable[[int, int], None]
SENSITIVITY_WINDOWS = 4  # of calibration text, on which every tensor's divergence is measured
_DTYPES = {
    mx.float32: "f32", mx.float16: "f16", mx.bfloat16: "bf16", mx.uint8: "u8", mx.int8: "i8", mx.uint16: "u16",
    mx.int16: "i16", mx.uint32: "u32", mx.int32: "i32", mx.uint64: "u64", mx.int64: "i64",
}  # fmt: skip
_QUANTIZATION_KEYS = ("quantization", "quantization_config")


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


@dataclass
class _Item:
    """One tensor to store: `parts` are the lazy arrays of a tensor that comes quantized."""

    name: str
    role: str
    encoding: Encoding
    shape: tuple[int, ...]  # of one expert where role is expert
    weight: str  # key of the (codes or raw) array in the sanitized checkpoint
    packed: bool = False

    def entry(self) -> tuple[str, str, Encoding, tuple[int, ...]]:
        return self.name, self.role, self.encoding, self.shape


@dataclass
class _Job:
    """The whole plan: residents in order, and per expert module its items."""

    residents: list[_Item] = field(default_factory=list)
    experts: dict[str, list[_Item]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    quantizable: list[str] = field(default_factory=list)
    unquantized: list[str] = field(default_factory=list)


def compress(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    recipe: str = "int4",
    quantizer: str = "mse",
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
    progress: Progress | None = None,
    preparing: Progress | None = None,
) -> Summary:
    """Compress a Hugging Face checkpoint (folder or repository id) into the file `output`.

    `recipe` names the encodings (`squizd.recipe.RECIPES`), `overrides` are "PATTERN=SPEC" for tensor
    paths, `quantizer` is "minmax", "mse" or "gptq". `calibration` is text (a file or folder), with which mse
    weighs its fit by activations and without which there is no gptq; `statistics` names a file to keep what was
    learned from it, or to take it from. `progress(done, total)` counts bytes of the file, `preparing` layers
    that were calibrated. `target_bpw` (bits per weight) or `target_size` (bytes of the file) lets measured
    divergences choose every tensor's bits and group size, which takes calibration text; `save_plan` writes what was
    chosen, `plan` does as such a file says. The same
    source and arguments give the same bytes; an interrupted run leaves `output`.partial, and the same
    call goes on from there. A source that is quantized for MLX passes untouched, whatever the recipe.
    Raises SourceError, RecipeError, TextError, OutputError.
    """
    started = time.perf_counter()
    target = os.fspath(output)
    chosen = make_recipe(recipe, overrides)
    if quantizer not in METHODS:
        raise RecipeError(f"no quantizer {quantizer!r}", hint="quantizers: " + ", ".join(METHODS))
    check_target(target, force)
    checkpoint = open_checkpoint(source, revision)
    if isinstance(checkpoint.config.get("quantization"), dict):  # mlx-lm's mark: what it left alone stays alone
        if target_bpw is not None or target_size is not None or plan is not None or calibration is not None:
            raise RecipeError(f"{source} is quantized for MLX already: nothing is left to choose or to fit")
        chosen = make_recipe("keep", overrides)
    old_limit = mx.set_cache_limit(1 << 26)
    try:
        guide = prepare(checkpoint, quantizer, calibration, statistics, preparing)
        if target_bpw is not None or target_size is not None or plan is not None:
            made = _chosen_plan(checkpoint, guide, target_bpw, target_size, plan, save_plan, preparing)
            name = "plan" if plan is not None else f"{target_bpw}bpw" if target_bpw else "size"
            chosen = replace(make_recipe("mixed", [*made.overrides(), *overrides]), name=name)
        weights, job = _lay_out(checkpoint, chosen)
        plan_of_file = _plan(checkpoint, job, chosen, quantizer, zstd, guide)
        with ThreadPoolExecutor(1) as pool, Writer(target, plan_of_file) as writer:
            stop = threading.Event()
            hashes = pool.submit(checkpoint.hashes, stop)
            resumed = writer.done
            report = progress or (lambda done, total: None)
            try:
                _write(writer, weights, job, guide, report)
                plan_of_file.metadata["provenance"]["source"]["files"] = hashes.result()
            finally:
                stop.set()
            writer.finish(plan_of_file.metadata)
    finally:
        mx.set_cache_limit(old_limit)
    with open_file(target) as f:
        size = inspection.weight_size(f)
        file_bytes = f.size
    source_bytes = sum(s.stat().st_size for s in checkpoint.shards)
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
    quantizer: str = "mse",
    calibration: str | os.PathLike[str] | Calibration | None = None,
    statistics: str | os.PathLike[str] | None = None,
    target_bpw: float | None = None,
    target_size: int | None = None,
    plan: str | os.PathLike[str] | None = None,
    save_plan: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    preparing: Progress | None = None,
) -> TensorPlan:
    """What `compress` with these arguments would choose; writes nothing but `save_plan` and `statistics`."""
    if target_bpw is None and target_size is None and plan is None:
        raise RecipeError("there is nothing to plan", hint="give --target-bpw, --target-size or --plan")
    checkpoint = open_checkpoint(source, revision)
    old_limit = mx.set_cache_limit(1 << 26)
    try:
        guide = prepare(checkpoint, quantizer, calibration, statistics, preparing)
        return _chosen_plan(checkpoint, guide, target_bpw, target_size, plan, save_plan, preparing)
    finally:
        mx.set_cache_limit(old_limit)


def _chosen_plan(
    checkpoint: Checkpoint, guide: Guide, target_bpw: float | None, target_size: int | None,
    saved: str | os.PathLike[str] | None, save: str | os.PathLike[str] | None, progress: Progress | None,
) -> TensorPlan:  # fmt: skip
    """A plan that was saved, or one made for the target."""
    if sum(x is not None for x in (target_bpw, target_size, saved)) > 1:
        raise RecipeError("a target and a plan, or two targets, contradict each other", hint="give one of them")
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
    made = make_plan(
        checkpoint, candidates, fixed_bits, parameters, target_bpw, method=guide.method, statistics=guide.statistics,
        windows=guide.windows[:SENSITIVITY_WINDOWS], progress=progress,
    )  # fmt: skip
    if save is not None:
        made.save(save)
    return made


def survey(checkpoint: Checkpoint) -> tuple[list[Candidate], int, int]:
    """What a plan decides on, the bits of all else, and the number of all parameters."""
    weights, job = _lay_out(checkpoint, make_recipe("mixed"))
    items = [(item.name, item, 1) for item in job.residents]
    items += [(f"{path}.{i.name}", i, job.counts[path]) for path, group in job.experts.items() for i in group]
    candidates, fixed, parameters = list[Candidate](), 0, 0
    for name, item, count in items:
        parameters += math.prod(item.shape) * count
        if item.encoding.mode == "affine" and not item.packed:
            shape = (count, *item.shape) if item.role == "expert" else item.shape
            candidates.append(Candidate(name, item.role, _dtype(weights[item.weight]), shape))
        else:
            fixed += 8 * count * sum(item.encoding.part_sizes(item.shape))
    return candidates, fixed, parameters


# -- what is there, and what becomes of it -------------------------------------------------------------


def _lay_out(checkpoint: Checkpoint, recipe: Recipe) -> tuple[dict[str, mx.array], _Job]:
    where = str(checkpoint.repo or checkpoint.folder)
    found = [checkpoint.config[key] for key in _QUANTIZATION_KEYS if isinstance(checkpoint.config.get(key), dict)]
    method = found[0].get("quant_method") if found else None
    if method in ("awq", "gptq"):
        raise SourceError(f"{where} is {method}-quantized", hint="convert it with mlx_lm.convert first")
    model = build(checkpoint.config, where)
    weights = read_weights(checkpoint, model)
    job, left = _Job(), set(weights)
    modules = expert_modules(model)
    parents = frozenset(path.rpartition(".")[0] for path in modules)
    owners: dict[str, nn.Module] = dict(model.named_modules())
    for name, parameter in tree_flatten(model.parameters()):
        path, _, leaf = name.rpartition(".")
        owner = owners.get(path)
        expert_path = next((p for p in modules if name.startswith(p + ".")), "")
        role = "expert" if expert_path else role_of(path, type(owner).__name__, parents)
        if name not in weights:
            raise SourceError(f"{where} has no tensor {name}")
        for item in _items(name, path, leaf, role, parameter.shape, owner, weights, recipe, model, job, where):
            left -= {item.weight, *([f"{path}.scales", f"{path}.biases"] if item.packed else [])}
            if expert_path:
                item.name = item.name.removeprefix(expert_path + ".")
                job.counts[expert_path] = item.shape[0]
                item.shape = item.shape[1:] or (1,)
                job.experts.setdefault(expert_path, []).append(item)
            else:
                job.residents.append(item)
    if left:
        raise SourceError(
            f"{where}: tensor {min(left)} has no place in {checkpoint.config['model_type']} ({len(left)} such)"
        )
    recipe.check_overrides(job.quantizable)
    return weights, job


def _items(
    name: str, path: str, leaf: str, role: str, shape: tuple[int, ...], owner: Any, weights: dict[str, mx.array],
    recipe: Recipe, model: nn.Module, job: _Job, where: str,
) -> list[_Item]:  # fmt: skip
    """How the parameter `name` is stored: one item, or two where it comes with an nvfp4 global scale."""
    w = weights[name]
    if leaf == "weight" and f"{path}.scales" in weights:
        encoding = _packed_encoding(name, path, shape, owner, weights, where)
        items = [_Item(name, role, encoding, tuple(shape), name, packed=True)]
        if f"{path}.global_scale" in weights:
            scale = weights[f"{path}.global_scale"]
            items.append(
                _Item(
                    f"{path}.global_scale",
                    role,
                    Encoding("raw", _dtype(scale)),
                    tuple(scale.shape),
                    f"{path}.global_scale",
                )
            )
        return items
    if tuple(w.shape) != tuple(shape):
        raise SourceError(
            f"{where}: {name} has shape {list(w.shape)}, {type(model).__module__.split('.')[-1]} wants {list(shape)}"
        )
    if w.dtype not in _DTYPES:
        raise SourceError(f"{where}: {name} has type {w.dtype}, which the format does not know")
    encoding = Encoding("raw", _dtype(w))
    if leaf == "weight" and hasattr(owner, "to_quantized") and encoding.dtype in FLOATS:
        predicate = getattr(model, "quant_predicate", None)
        vetoed = predicate is not None and predicate(path, owner) is False  # mlx-lm knows tensors that must stay
        job.quantizable.append(name)
        spec = recipe.override(name) or (KEEP if vetoed else recipe.spec(role))
        quantized = choose(spec, encoding.dtype, tuple(shape))
        if quantized is None:
            job.unquantized.append(name)
        encoding = quantized or encoding
    return [_Item(name, role, encoding, tuple(shape) or (1,), name)]


def _packed_encoding(
    name: str, path: str, shape: tuple[int, ...], owner: Any, weights: dict[str, mx.array], where: str
) -> Encoding:
    """The encoding of a tensor that comes quantized; SourceError unless its parts have the sizes that follow."""
    parts = [weights.get(key) for key in (name, f"{path}.scales", f"{path}.biases")]
    try:
        found = infer_quant_config(path, owner, weights)
        dtype = _dtype(weights[f"{path}.scales"]) if found["mode"] == "affine" else "bf16"
        encoding = Encoding(found["mode"], dtype, found["bits"], found["group_size"])
    except (ValueError, KeyError, ZeroDivisionError) as error:
        raise SourceError(f"{where}: cannot tell how {name} is quantized: {error}") from error
    if not encoding.is_registered():
        raise SourceError(f"{where}: {name} is stored as {encoding}, which the format does not know")
    sizes = tuple(0 if part is None else part.nbytes for part in parts)
    if sizes != encoding.part_sizes(tuple(shape)):
        raise SourceError(f"{where}: {name} and its scales do not make {encoding} of shape {list(shape)}")
    return encoding


def _dtype(array: mx.array) -> str:
    return _DTYPES[array.dtype]


def _plan(checkpoint: Checkpoint, job: _Job, recipe: Recipe, quantizer: str, zstd: bool, guide: Guide) -> Plan:
    paths = list(job.experts)
    layouts = {path: make_layout([item.entry() for item in items]) for path, items in job.experts.items()}
    distinct = list(dict.fromkeys(layouts.values()))
    files = [{"name": s.name, "size": s.stat().st_size, "sha256": "0" * 64} for s in checkpoint.shards]
    source: dict[str, Any] = {"files": files}
    if checkpoint.repo:
        source |= {"repo": checkpoint.repo, "revision": checkpoint.revision}
    config = {key: value for key, value in checkpoint.config.items() if key not in _QUANTIZATION_KEYS}
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


# -- the values ----------------------------------------------------------------------------------------


def _write(writer: Writer, weights: dict[str, mx.array], job: _Job, guide: Guide, report: Progress) -> None:
    report(writer.done_bytes, writer.total_bytes)
    for position, item in enumerate(job.residents):
        if position < writer.done:
            weights.pop(item.weight, None)
            continue
        writer.write([_encode(item, weights, guide)])
        report(writer.done_bytes, writer.total_bytes)
    first = len(job.residents)
    for path, items in job.experts.items():
        count = job.counts[path]
        guide.approach(path)
        if first + count > writer.done:
            stacks = [_encode(item, weights, guide) for item in items]
            for expert in range(writer.done - first, count):
                writer.write([[part[expert : expert + 1] for part in stack if part is not None] for stack in stacks])
                report(writer.done_bytes, writer.total_bytes)
            del stacks
        else:
            for item in items:
                weights.pop(item.weight, None)
        first += count
        mx.clear_cache()


def _encode(item: _Item, weights: dict[str, mx.array], guide: Guide) -> list[np.ndarray[Any, Any] | None]:
    """Evaluate one tensor into its stored parts, and let go of its source."""
    path = item.weight.rpartition(".")[0]
    parts: list[mx.array | None]
    if item.packed:
        parts = [weights.pop(item.weight), weights.pop(f"{path}.scales"), weights.pop(f"{path}.biases", None)]
    elif item.encoding.mode == "raw":
        parts = [weights.pop(item.weight), None, None]
    else:
        try:
            parts = list(guide.quantize(path, weights.pop(item.weight), item.encoding))
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
