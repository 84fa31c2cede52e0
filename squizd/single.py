"""Experts one at a time: a layer's stacked weights stay as stored, and one expert of them is widened in its turn.

In float32 the experts of one layer would take twice the memory of the layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .architecture import expert_modules
from .backend import on_cuda
from .container.layout import Encoding
from .quantizers import Quantized
from .runtime import device

TOGETHER_CUDA = 8  # experts computed before the next are asked for, which a GPU waits for


@dataclass
class Unpacking:
    """Stacked scales (and biases) of weights that are stored in a quantized form, and the function of all three."""

    scales: mx.array
    biases: mx.array | None
    unpack: Callable[..., mx.array]

    def expert(self, codes: mx.array, expert: int) -> mx.array:
        """The weights of one expert, [1, out, in], from its codes."""
        one = slice(expert, expert + 1)
        return self.unpack(codes, self.scales[one], None if self.biases is None else self.biases[one])


@dataclass
class Stored:
    """Weights as a file has them: by expert the stack that it is in, and its place there; affine blocks."""

    stacks: list[tuple[Quantized, Encoding]]
    place: dict[int, tuple[int, int]]

    def expert(self, original: mx.array, expert: int) -> mx.array:
        """The weights of one expert, [1, out, in] float32, in place of the `original` ones."""
        stack, row = self.place[expert]
        (codes, scales, biases), encoding = self.stacks[stack]
        assert scales is not None
        assert biases is not None
        one = slice(row, row + 1)
        grids = scales[one].astype(mx.float32), biases[one].astype(mx.float32)
        return mx.dequantize(codes[one], *grids, group_size=encoding.group_size, bits=encoding.bits)


def alone(module: nn.Module, expert: int) -> nn.Module:
    """A module of one expert of `module` (a SwitchGLU or SwitchMLP of mlx-lm), its weights in float32.

    Where a projection has an attribute `changed`, a function, Unpacking or Stored, that is applied to its weight first.
    """
    one: nn.Module = copy.copy(module)
    for kind in type(module).__mro__:  # without what other modules here have put on top
        if kind.__module__.startswith("mlx_lm."):
            one.__class__ = kind
            break
    for name, child in module.items():
        if isinstance(child, nn.Module) and "weight" in child:
            one[name] = copy.copy(child)
            changed = getattr(child, "changed", None)
            for key, stack in child.items():
                part = stack[expert : expert + 1]
                if key == "weight" and isinstance(changed, Unpacking | Stored):
                    part = changed.expert(part, expert)
                elif key == "weight" and changed is not None:
                    part = changed(part)
                one[name][key] = part.astype(mx.float32) if mx.issubdtype(part.dtype, mx.floating) else part
    device.accelerate(one)
    return one


def with_stored(module: nn.Module, projections: dict[str, Stored]) -> nn.Module:
    """`module` with projections as a file stores them. All else is shared."""
    found: nn.Module = copy.copy(module)
    for name, weights in projections.items():
        found[name] = copy.copy(module[name])
        found[name].changed = weights
    return found


def separate(layer: nn.Module) -> None:
    """Let the expert modules of `layer` compute expert by expert."""
    for module in expert_modules(layer).values():
        module.__class__ = _separate_kind(type(module))


_kinds: dict[type, type] = {}


def _separate_kind(kind: type) -> type:
    if kind not in _kinds:

        class Separate(kind):
            def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
                return _each(self, x, indices)

        _kinds[kind] = Separate
    return _kinds[kind]


def _each(module: nn.Module, x: mx.array, indices: mx.array) -> mx.array:
    """What `module` puts out for x [..., in] and indices [..., k]: [..., k, out]."""
    k = indices.shape[-1]
    flat, chosen = x.reshape(-1, x.shape[-1]), np.array(indices).reshape(-1)
    order = np.argsort(chosen, kind="stable")
    experts, starts = np.unique(chosen[order], return_index=True)
    outs = []
    together = TOGETHER_CUDA if on_cuda() else 1
    for number, (expert, rows) in enumerate(zip(experts.tolist(), np.split(order, starts[1:]), strict=True)):
        inputs = mx.take(flat, mx.array((rows // k).astype(np.int32)), axis=0)
        out = alone(module, expert)(inputs, mx.zeros((len(rows), 1), mx.uint32))
        outs.append(out.reshape(len(rows), -1))
        if number % together == 0:
            mx.eval(outs[-together:])  # one expert's wide weights at a time
    back = np.empty(len(order), np.int32)
    back[order] = np.arange(len(order), dtype=np.int32)
    joined = mx.concatenate(outs)
    mx.eval(joined)
    outs.clear()  # k times the layer's output: not more often in memory than need be
    return mx.take(joined, mx.array(back), axis=0).reshape(*indices.shape, -1)
