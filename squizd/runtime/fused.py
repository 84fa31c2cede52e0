"""Experts whose gate and up projections are one: on GPUs one gather of twice the rows is faster than two.

Every row of a product is computed by itself, so the numbers are those of two products. Memory is the same: the
rows of `up_proj` follow those of `gate_proj` in each expert's part of one bank.
"""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, _gather_sort, _scatter_unsort

GATE, UP, BOTH = "gate_proj.", "up_proj.", "gate_up_proj."
_SORTED_FROM = 64  # rows; as mlx-lm sorts them


class FusedSwitchGLU(SwitchGLU):
    """mlx-lm's SwitchGLU with `gate_up_proj` [experts, 2 x width, ...] in place of `gate_proj` and `up_proj`."""

    def __init__(self, inner: SwitchGLU) -> None:
        """Of `inner`'s settings; its arrays are to be filled in."""
        nn.Module.__init__(self)
        self.gate_up_proj = copy.copy(inner.gate_proj)
        self.down_proj = inner.down_proj
        self.activation = inner.activation
        self.freeze()

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """x: [..., D], indices: [..., k]; returns [..., k, D]."""
        x = mx.expand_dims(x, (-2, -3))
        chosen, back = mx.stop_gradient(indices), None
        is_sorted = indices.size >= _SORTED_FROM
        if is_sorted:
            x, chosen, back = _gather_sort(x, indices)
        gate, up = mx.split(self.gate_up_proj(x, chosen, sorted_indices=is_sorted), 2, axis=-1)
        out: mx.array = self.down_proj(self.activation(up, gate), chosen, sorted_indices=is_sorted)
        if is_sorted:
            out = _scatter_unsort(out, back, indices.shape)
        return out.squeeze(-2)


def fusable(module: nn.Module) -> bool:
    """Whether `module` is a plain SwitchGLU whose gate and up projections are quantized alike and add no biases."""
    if type(module) is not SwitchGLU:
        return False
    gate, up = module.gate_proj, module.up_proj
    return (
        type(gate) is QuantizedSwitchLinear
        and type(up) is QuantizedSwitchLinear
        and (gate.bits, gate.group_size, gate.mode) == (up.bits, up.group_size, up.mode)
        and gate.global_scale is None
        and up.global_scale is None
        and "bias" not in gate
        and "bias" not in up
        and gate["weight"].shape == up["weight"].shape
    )
