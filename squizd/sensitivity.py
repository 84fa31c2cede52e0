"""How much the answers suffer when one group of weights is rounded: measured, a tensor at a time, in one walk.

Each tensor in turn is rounded to a reference encoding while all others stay as they are; the hidden states that follow
from that go through the rest of the layers beside the undisturbed ones, and at the end the KL divergence of their
predictions is the tensor's. One layer is in memory at a time, the copies of the hidden states, some per layer, are
on disk; every copy goes through every layer that follows, so this is done on little text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from .backend import on_cuda
from .checkpoint import Checkpoint
from .scratch import Folder, Scratch
from .walk import Walk

Progress = Callable[[int, int], None]
FLOOR = 1e-7  # nats: what is measured below that is arithmetic
LOGITS = 1 << 23  # computed at once
TOGETHER_CUDA = 8  # copies: a GPU computes experts one at a time as fast for some thousand tokens as for some hundred
ROUNDED = 1 << 22  # weights at once


def divergences(
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int]],
    references: dict[str, tuple[int, int]],
    progress: Progress | None = None,
    folder: Folder = None,
) -> dict[str, float]:
    """Mean KL divergence in nats by tensor path (without ".weight").

    `references`: the (bits, group size) that each tensor is rounded to, min-max. Tensors that are in no layer, no
    embedding and not the head are left out. An embedding that is the head as well is rounded in both places. Hidden
    states lie in `folder`.
    """
    walk = Walk(checkpoint, windows, folder, twice=True)
    assert walk.entered is not None
    copies: dict[str, Scratch] = {}
    batches = range(len(walk.batches))
    count = len(walk.model.layers)
    around = {name: module for name, module in walk.model.named_modules()
              if name in references and isinstance(module, nn.Linear | nn.Embedding)}  # fmt: skip
    for name, module in around.items():
        if isinstance(module, nn.Embedding):
            exact = module["weight"]
            module["weight"] = _rounded(exact, *references[name])
            copies[name] = Scratch(folder)
            for n in batches:
                copies[name].append(walk.entering(n))
            module["weight"] = exact
            del exact
    for position, (path, layer) in enumerate(walk.layers()):
        together = TOGETHER_CUDA if on_cuda() else 1
        for start in range(0, len(copies), together):
            group = list(copies.values())[start : start + together]
            for n in batches:
                joined = walk.apply(position, layer, n, mx.concatenate([states[n] for states in group]))
                for states, out in zip(group, mx.split(joined, len(group)), strict=True):
                    states[n] = out
        for name, module in list(layer.named_modules()):
            tensor = f"{path}.{name}"
            if tensor in references:
                exact, (bits, group_size) = module["weight"], references[tensor]
                if exact.ndim == 3:  # one expert at a time, as they are computed
                    module.changed = partial(_rounded, bits=bits, group_size=group_size)
                else:
                    module["weight"] = _rounded(exact, bits, group_size)
                copies[tensor] = Scratch(folder)
                for n in batches:
                    copies[tensor].append(walk.apply(position, layer, n, walk.entered[n]))
                module.changed, module["weight"] = None, exact
        mx.clear_cache()
        if progress:
            progress(position + 1, count + 1)
    walk.widen_rest()
    clean = Scratch(folder)
    inside = {tensor: states for tensor, states in copies.items() if tensor not in around}
    found = dict(zip(inside, _divergences(walk, list(inside.values()), clean), strict=True))
    for name, module in around.items():
        heard = _is_heard(walk, module)
        walk.read_rest()
        if heard:  # as stored: rounding it takes half the memory
            module["weight"] = _rounded(module["weight"], *references[name])
        walk.widen_rest()
        (found[name],) = _divergences(walk, [copies.get(name, walk.states)], clean)
    return {tensor: max(value, FLOOR) for tensor, value in found.items()}


def _is_heard(walk: Walk, module: nn.Module) -> bool:
    """Whether logits depend on a module's weight: not of an embedding that is not the head."""
    if not isinstance(module, nn.Linear | nn.Embedding):
        return False
    exact, first = module["weight"], np.zeros(1, np.intp)
    before = _log_probabilities(walk, first, walk.states)
    module["weight"] = mx.broadcast_to(mx.zeros(()), exact.shape)
    after = _log_probabilities(walk, first, walk.states)
    module["weight"] = exact
    return not bool(mx.array_equal(before, after))


def _rounded(w: mx.array, bits: int, group_size: int) -> mx.array:
    rows, found = w.reshape(-1, w.shape[-1]), list[mx.array]()
    step = max(1, ROUNDED // w.shape[-1])
    for start in range(0, len(rows), step):  # MLX's CPU takes twenty times the memory of what it decodes
        parts = mx.quantize(rows[start : start + step].astype(mx.float32), group_size=group_size, bits=bits)
        found.append(mx.dequantize(*parts, group_size=group_size, bits=bits).astype(w.dtype))
        mx.eval(found[-1])
    whole = mx.concatenate(found).reshape(w.shape)
    mx.eval(whole)
    return whole


def _divergences(walk: Walk, states: Sequence[Scratch], clean: Scratch) -> list[float]:
    """Mean divergence of each of `states` from `clean`, log-probabilities in pieces; those are of the walk if empty."""
    tokens = sum(batch.size for batch in walk.batches)
    first = len(clean) == 0
    sums, start, number = np.zeros(len(states)), 0, 0
    while start < tokens:
        if first:
            size = max(1, LOGITS // walk.logits(walk.batches[0], walk.states[0]).shape[-1])
            clean.append(_log_probabilities(walk, np.arange(start, min(start + size, tokens)), walk.states))
        expected = clean[number]
        rows = np.arange(start, start + expected.shape[0])
        for i, other in enumerate(states):
            difference = expected - _log_probabilities(walk, rows, other)
            sums[i] += np.array(mx.sum(mx.exp(expected) * difference, axis=-1)).astype(np.float64).sum()
        start, number = start + len(rows), number + 1
    return [float(total / tokens) for total in sums]


def _log_probabilities(walk: Walk, rows: npt.NDArray[np.intp], states: Scratch) -> mx.array:
    """[rows, vocabulary] for rows of hidden states."""
    logits = walk.logits(mx.zeros((1, len(rows)), mx.int32), states.rows(rows)[None])[0]
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
