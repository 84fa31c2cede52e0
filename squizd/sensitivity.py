"""How much the answers suffer when one group of weights is rounded: measured, a tensor at a time, in one walk.

Each tensor in turn is rounded to a reference encoding while all others stay as they are; the hidden states that follow
from that go through the rest of the layers beside the undisturbed ones, and at the end the KL divergence of their
predictions is the tensor's. One layer is in memory at a time; the copies of the hidden states, some per layer,
are what this costs, so it is done on little text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .checkpoint import Checkpoint
from .walk import Walk

Progress = Callable[[int, int], None]
FLOOR = 1e-7  # nats: what is measured below that is arithmetic


def divergences(
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int]],
    references: dict[str, tuple[int, int]],
    progress: Progress | None = None,
) -> dict[str, float]:
    """Mean KL divergence in nats by tensor path (without ".weight").

    `references`: the (bits, group size) that each tensor is rounded to, min-max. Tensors whose modules are not in
    a layer and are not the head (or the embedding that is used as one) are left out.
    """
    walk = Walk(checkpoint, windows)
    copies: dict[str, list[mx.array]] = {}
    batches = range(len(walk.batches))
    count = len(walk.model.layers)
    for position, (path, layer) in enumerate(walk.layers()):
        for tensor, states in copies.items():
            copies[tensor] = [walk.apply(position, layer, n, states[n]) for n in batches]
            mx.eval(copies[tensor])
        for name, module in list(layer.named_modules()):
            tensor = f"{path}.{name}"
            if tensor in references:
                exact = module["weight"]
                module["weight"] = _rounded(exact, *references[tensor])
                copies[tensor] = [walk.apply(position, layer, n, walk.entered[n]) for n in batches]
                mx.eval(copies[tensor])
                module["weight"] = exact
        mx.clear_cache()
        if progress:
            progress(position + 1, count + 1)
    walk.widen_rest()
    clean = [_log_probabilities(walk, n, walk.states[n]) for n in batches]
    mx.eval(clean)
    found = {t: _mean([_divergence(clean[n], _log_probabilities(walk, n, s[n])) for n in batches])
             for t, s in copies.items()}  # fmt: skip
    for name, module in walk.model.named_modules():
        if name in references and name not in found and isinstance(module, nn.Linear | nn.Embedding):
            exact = module["weight"]
            module["weight"] = _rounded(exact, *references[name])
            rows = [_divergence(clean[n], _log_probabilities(walk, n, walk.states[n])) for n in batches]
            module["weight"] = exact
            if _mean(rows) > FLOOR:  # 0 for an embedding that is not the head: its rows were looked up long ago
                found[name] = _mean(rows)
    return {tensor: max(value, FLOOR) for tensor, value in found.items()}


def _rounded(w: mx.array, bits: int, group_size: int) -> mx.array:
    parts = mx.quantize(w, group_size=group_size, bits=bits)
    found = mx.dequantize(*parts, group_size=group_size, bits=bits)
    mx.eval(found)
    return found


def _log_probabilities(walk: Walk, number: int, state: mx.array) -> mx.array:
    logits = walk.logits(walk.batches[number], state)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _divergence(clean: mx.array, other: mx.array) -> np.ndarray[Any, Any]:
    return np.array(mx.sum(mx.exp(clean) * (clean - other), axis=-1)).reshape(-1)


def _mean(parts: Sequence[np.ndarray[Any, Any]]) -> float:
    return float(np.concatenate(parts).astype(np.float64).mean())
