"""A checkpoint's tensors under the names that mlx-lm's model gives them, lazy: nothing is read before it is evaluated.

Shared by compress, calibration and evaluation. mlx-lm's `sanitize` maps names and stacks experts.
"""

from __future__ import annotations

import io
import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .checkpoint import Checkpoint
from .errors import SourceError


def read(checkpoint: Checkpoint, model: nn.Module) -> dict[str, mx.array]:
    """Lazy arrays by parameter name of `model`, in the types the checkpoint stores.

    An array that was evaluated stays in memory for as long as this dictionary holds it: pop it, or read anew.
    Raises SourceError for shards that MLX cannot read and tensors that `model` cannot take.
    """
    return _sanitized(checkpoint, model, _load(checkpoint))


def sources(checkpoint: Checkpoint, model: nn.Module) -> dict[str, set[str]]:
    """By name of `read`, the checkpoint's tensors that an array is made from.

    Raises SourceError where that cannot be told, because `sanitize` looks at numbers.
    """
    where = str(checkpoint.repo or checkpoint.folder)
    loaded = {name: mx.stop_gradient(array) for name, array in _load(checkpoint).items()}  # a node of its own for each
    made = _sanitized(checkpoint, model, dict(loaded))
    labels = {f"in {i}": name for i, name in enumerate(loaded)}
    results = {f"out {i}": name for i, name in enumerate(made)}
    inputs = {label: loaded[name] for label, name in labels.items()}
    outputs = {label: mx.stop_gradient(made[name]) for label, name in results.items()}
    graph = io.StringIO()
    mx.export_to_dot(graph, *outputs.values(), **inputs, **outputs)
    parents: dict[str, set[str]] = {}
    for a, b in re.findall(r'^("[^"]*"|\d+) -> ("[^"]*"|\d+)$', graph.getvalue(), re.MULTILINE):
        parents.setdefault(b.strip('"'), set()).add(a.strip('"'))
    known: dict[str, set[str]] = {label: {name} for label, name in labels.items()}

    def trace(node: str) -> set[str]:
        stack = [node]
        while stack:
            at = stack[-1]
            if at in known:
                stack.pop()
                continue
            if at not in parents:
                raise SourceError(
                    f"{where}: mlx-lm computes with tensors before they are used, so they cannot be fetched one by one",
                    hint="--keep-source fetches all of them first",
                )
            ahead = [p for p in parents[at] if p not in known]
            if ahead:
                stack += ahead
            else:
                known[at] = set().union(*(known[p] for p in parents[at]))
                stack.pop()
        return known[node]

    return {name: trace(label) for label, name in results.items()}


def _load(checkpoint: Checkpoint) -> dict[str, mx.array]:
    weights: dict[str, mx.array] = {}
    for shard in checkpoint.shards:
        try:
            loaded: Any = mx.load(str(shard))
        except (RuntimeError, ValueError) as error:
            raise SourceError(f"{shard}: MLX cannot read it: {error}") from error
        weights.update(loaded)
    return weights


def _sanitized(checkpoint: Checkpoint, model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    where = str(checkpoint.repo or checkpoint.folder)
    weights = _from_fp8(checkpoint, weights)
    if hasattr(model, "sanitize"):
        try:
            weights = model.sanitize(weights)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise SourceError(f"{where}: tensors do not fit {checkpoint.config['model_type']}: {error!r}") from error
    return weights


def _from_fp8(checkpoint: Checkpoint, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Block-scaled FP8 (E4M3) as DeepSeek-V3 and Qwen3 are published, in bfloat16; anything else as it is.

    Each block of `weight_block_size` weights (128 x 128) is to be multiplied by its number in NAME_scale_inv. Blocks
    of 32 x 32 with powers of two are mxfp8, which mlx-lm's models take as they are.
    """
    facts = checkpoint.config.get("quantization_config")
    if not isinstance(facts, dict) or facts.get("quant_method") != "fp8":
        return weights
    block: list[int] = list(facts.get("weight_block_size") or ())
    if facts.get("scale_fmt") == "ue8m0" and block == [32, 32]:
        return weights
    where = str(checkpoint.repo or checkpoint.folder)
    found = {name: array for name, array in weights.items() if not name.endswith("_scale_inv")}
    for name, scale in weights.items():
        target = name.removesuffix("_scale_inv")
        if target == name:
            continue
        w = weights.get(target)
        if w is None or w.dtype != mx.uint8 or w.ndim < 2 or len(block) != 2:
            raise SourceError(f"{where}: {name} scales no FP8 tensor in blocks", hint="use the model's bf16 checkpoint")
        shape: tuple[int, ...] = tuple(w.shape)
        rows, columns = shape[-2:]
        counts = -(-rows // block[0]), -(-columns // block[1])
        if tuple(scale.shape) != (*shape[:-2], *counts):
            raise SourceError(f"{where}: {name} has shape {list(scale.shape)}, blocks of {target} are {list(counts)}")
        padding = [(0, 0)] * (w.ndim - 2) + [(0, -rows % block[0]), (0, -columns % block[1])]
        blocks = mx.pad(mx.from_fp8(w, dtype=mx.bfloat16), padding)
        blocks = blocks.reshape(*shape[:-2], counts[0], block[0], counts[1], block[1])
        wide = (blocks * scale.astype(mx.float32)[..., :, None, :, None]).astype(mx.bfloat16)
        wide = wide.reshape(*shape[:-2], counts[0] * block[0], counts[1] * block[1])
        found[target] = wide[..., :rows, :columns]
    return found
