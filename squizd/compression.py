"""Checkpoint to file: the pipeline, readable from top to bottom.

    open_checkpoint → lay out (names, roles, encodings) → quantize tensor by tensor → Writer

mlx-lm's `sanitize` turns the checkpoint's lazy tensors into lazy model tensors once; each is then
evaluated, quantized, written and dropped, so memory holds one layer, never the model.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import _encode_tagged_floats, infer_quant_config

from . import __version__, inspection
from .architecture import build, expert_modules, layer_ids
from .checkpoint import Checkpoint, open_checkpoint
from .container import Plan, Writer
from .container import open as open_file
from .container.layout import FLOATS, RAW, ZSTD, Encoding, MoeLayer, make_layout
from .container.metadata import MetadataError
from .container.writer import check_target, choose_alignment
from .errors import RecipeError, SourceError
from .quantizers import METHODS, quantize
from .recipe import KEEP, Recipe, choose, make_recipe, role_of

Progress = Callable[[int, int], None]
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
    progress: Progress | None = None,
) -> Summary:
    """Compress a Hugging Face checkpoint (folder or repository id) into the file `output`.

    `recipe` names the encodings (`squizd.recipe.RECIPES`), `overrides` are "PATTERN=SPEC" for tensor
    paths, `quantizer` is "minmax" or "mse". `progress(done, total)` counts bytes of the file. The same
    source and arguments give the same bytes; an interrupted run leaves `output`.partial, and the same
    call goes on from there. A source that is quantized for MLX passes untouched, whatever the recipe.
    Raises SourceError, RecipeError, OutputError.
    """
    started = time.perf_counter()
    target = os.fspath(output)
    chosen = make_recipe(recipe, overrides)
    if quantizer not in METHODS:
        raise RecipeError(f"no quantizer {quantizer!r}", hint="quantizers: " + ", ".join(METHODS))
    check_target(target, force)
    checkpoint = open_checkpoint(source, revision)
    if isinstance(checkpoint.config.get("quantization"), dict):  # mlx-lm's mark: what it left alone stays alone
        chosen = make_recipe("keep", overrides)
    old_limit = mx.set_cache_limit(1 << 26)
    try:
        weights, job = _lay_out(checkpoint, chosen)
        plan = _plan(checkpoint, job, chosen, quantizer, zstd)
        with ThreadPoolExecutor(1) as pool, Writer(target, plan) as writer:
            stop = threading.Event()
            hashes = pool.submit(checkpoint.hashes, stop)
            resumed = writer.done
            report = progress or (lambda done, total: None)
            try:
                _write(writer, weights, job, quantizer, report)
                plan.metadata["provenance"]["source"]["files"] = hashes.result()
            finally:
                stop.set()
            writer.finish(plan.metadata)
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


# -- what is there, and what becomes of it -------------------------------------------------------------


def _lay_out(checkpoint: Checkpoint, recipe: Recipe) -> tuple[dict[str, mx.array], _Job]:
    where = str(checkpoint.repo or checkpoint.folder)
    found = [checkpoint.config[key] for key in _QUANTIZATION_KEYS if isinstance(checkpoint.config.get(key), dict)]
    method = found[0].get("quant_method") if found else None
    if method in ("awq", "gptq"):
        raise SourceError(f"{where} is {method}-quantized", hint="convert it with mlx_lm.convert first")
    model = build(checkpoint.config, where)
    weights: dict[str, mx.array] = {}
    for shard in checkpoint.shards:
        try:
            loaded: Any = mx.load(str(shard))
        except (RuntimeError, ValueError) as error:
            raise SourceError(f"{shard}: MLX cannot read it: {error}") from error
        weights.update(loaded)
    if hasattr(model, "sanitize"):
        try:
            weights = model.sanitize(weights)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise SourceError(f"{where}: tensors do not fit {checkpoint.config['model_type']}: {error!r}") from error
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


def _plan(checkpoint: Checkpoint, job: _Job, recipe: Recipe, quantizer: str, zstd: bool) -> Plan:
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
    if licence := checkpoint.licence():
        metadata["licence"] = licence
    bundle = checkpoint.bundle()
    agreed = (recipe, quantizer, zstd, __version__, [(name, hashlib.sha256(d).digest()) for name, d in bundle.items()])
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


def _write(writer: Writer, weights: dict[str, mx.array], job: _Job, quantizer: str, report: Progress) -> None:
    report(writer.done_bytes, writer.total_bytes)
    for position, item in enumerate(job.residents):
        if position < writer.done:
            weights.pop(item.weight, None)
            continue
        writer.write([_encode(item, weights, quantizer)])
        report(writer.done_bytes, writer.total_bytes)
    first = len(job.residents)
    for path, items in job.experts.items():
        count = job.counts[path]
        if first + count > writer.done:
            stacks = [_encode(item, weights, quantizer) for item in items]
            for expert in range(writer.done - first, count):
                writer.write([[part[expert : expert + 1] for part in stack if part is not None] for stack in stacks])
                report(writer.done_bytes, writer.total_bytes)
            del stacks
        else:
            for item in items:
                weights.pop(item.weight, None)
        first += count
        mx.clear_cache()


def _encode(item: _Item, weights: dict[str, mx.array], quantizer: str) -> list[np.ndarray[Any, Any] | None]:
    """Evaluate one tensor into its stored parts, and let go of its source."""
    path = item.weight.rpartition(".")[0]
    parts: list[mx.array | None]
    if item.packed:
        parts = [weights.pop(item.weight), weights.pop(f"{path}.scales"), weights.pop(f"{path}.biases", None)]
    elif item.encoding.mode == "raw":
        parts = [weights.pop(item.weight), None, None]
    else:
        # Microscaling formats have nothing to fit: their one way is round to nearest.
        method = quantizer if item.encoding.mode == "affine" else "minmax"
        try:
            parts = list(quantize(weights.pop(item.weight), item.encoding, method))
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
