"""mlx-lm's and MLX's layers on the kernels: the same modules with the same parameters, another way to compute.

A module changes its class to a subclass of its own that differs in `__call__` only. Whatever a kernel
does not do (another type, another device, a bias inside a fused block) goes the old way. Three functions
of `mx.fast`, which on CPU are dozens of small operations each, and the step of mlx-lm's usual cache are
replaced for the whole process: same results, same gradients, and what the kernels do not do goes to MLX's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwiGLU, SwitchGLU, SwitchLinear

from . import native

_fast: dict[str, Any] = {}  # MLX's own functions, once they are replaced


class _Nothing:
    """In place of the extension: computes nothing, so MLX does."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


_kernels: Any = _Nothing()


def _quantized(module: nn.Module) -> tuple[Any, ...]:
    return module["weight"], module["scales"], module.get("biases"), module.group_size, module.bits, module.mode


def _plain(module: nn.Module) -> tuple[Any, ...]:
    return module["weight"], None, None, 0, 32, ""


class _QuantizedLinear(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array | None = _kernels.linear(x, *_quantized(self))
        if out is None:
            out = super().__call__(x)
        elif "bias" in self:
            out = out + self["bias"]
        return out


class _Linear(nn.Linear):
    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array | None = _kernels.linear(x, *_plain(self))
        if out is None:
            out = super().__call__(x)
        elif "bias" in self:
            out = out + self["bias"]
        return out


class _QuantizedEmbedding(nn.QuantizedEmbedding):
    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array | None = _kernels.embed(x, *_quantized(self))
        if out is None:
            out = super().__call__(x)
        return out

    def as_linear(self, x: mx.array) -> mx.array:
        out: mx.array | None = _kernels.linear(x, *_quantized(self))
        if out is None:
            out = super().as_linear(x)
        return out


class _Embedding(nn.Embedding):
    def as_linear(self, x: mx.array) -> mx.array:
        out: mx.array | None = _kernels.linear(x, *_plain(self))
        if out is None:
            out = super().as_linear(x)
        return out


class _QuantizedSwitchLinear(QuantizedSwitchLinear):
    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        out: mx.array | None = _kernels.expert_linear(x, indices, *_quantized(self))
        if out is None:
            out = super().__call__(x, indices, sorted_indices)
        elif "bias" in self:
            out = out + mx.expand_dims(self["bias"][indices], -2)
        return out


class _SwitchLinear(SwitchLinear):
    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        out: mx.array | None = _kernels.expert_linear(x, indices, *_plain(self))
        if out is None:
            out = super().__call__(x, indices, sorted_indices)
        elif "bias" in self:
            out = out + mx.expand_dims(self["bias"][indices], -2)
        return out


class _SwitchGLU(SwitchGLU):
    """With the usual activation and no biases, one operation does all of it."""

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        gate, up, down = self["gate_proj"], self["up_proj"], self["down_proj"]
        out: mx.array | None = None
        if type(self.activation) is SwiGLU and not ("bias" in gate or "bias" in up or "bias" in down):
            parts = [_quantized(m) if "scales" in m else _plain(m) for m in (gate, up, down)]
            out = _kernels.swiglu_experts(x, indices, *parts[0], *parts[1], *parts[2])
        if out is None:
            out = super().__call__(x, indices)
        return out


class _RMSNorm(nn.RMSNorm):
    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array | None = _kernels.rms_norm(x, self["weight"], self.eps)
        if out is None:
            out = super().__call__(x)
        return out


class _RoPE(nn.RoPE):
    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        out: mx.array | None = _kernels.rope(x, self.dims, self.traditional, self.base, self.scale, offset, None)
        if out is None:
            out = super().__call__(x, offset)
        return out


_KINDS: dict[type, type] = {
    nn.QuantizedLinear: _QuantizedLinear,
    nn.Linear: _Linear,
    nn.QuantizedEmbedding: _QuantizedEmbedding,
    nn.Embedding: _Embedding,
    QuantizedSwitchLinear: _QuantizedSwitchLinear,
    SwitchLinear: _SwitchLinear,
    SwitchGLU: _SwitchGLU,
    nn.RMSNorm: _RMSNorm,
    nn.RoPE: _RoPE,
}


def _rms_norm(x: mx.array, weight: mx.array | None, eps: float, *, stream: Any = None) -> mx.array:
    out: mx.array | None = _kernels.rms_norm(x, weight, eps) if stream is None else None
    if out is None:
        out = _fast["rms_norm"](x, weight, eps, stream=stream)
    return out


def _rope(
    a: mx.array,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | mx.array,
    freqs: mx.array | None = None,
    stream: Any = None,
) -> mx.array:
    out: mx.array | None = None
    if stream is None:
        out = _kernels.rope(a, dims, traditional, base, scale, offset, freqs)
    if out is None:
        options = {"traditional": traditional, "base": base, "scale": scale, "offset": offset, "freqs": freqs}
        out = _fast["rope"](a, dims, **options, stream=stream)
    return out


def _attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None, **options: Any
) -> mx.array:
    out: mx.array | None = _kernels.attention(q, k, v, scale, mask, sinks) if not options else None
    if out is None:
        out = _fast["scaled_dot_product_attention"](q, k, v, scale=scale, mask=mask, sinks=sinks, **options)
    return out


def _update_and_fetch(self: KVCache, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
    """KVCache.update_and_fetch where there is room: the same operations, built without Python's indexing."""
    if self.keys is not None and self.values is not None:
        k = _kernels.append(self.keys, keys, self.offset)
        v = k and _kernels.append(self.values, values, self.offset)
        if v:
            self.offset += keys.shape[2]
            self.keys, self.values = k[0], v[0]
            return k[1], v[1]
    out: tuple[mx.array, mx.array] = _fast["update_and_fetch"](self, keys, values)
    return out


_FUNCTIONS = {"rms_norm": _rms_norm, "rope": _rope, "scaled_dot_product_attention": _attention}


def adopt(model: nn.Module) -> bool:
    """Let the kernels compute what they can of `model`; False, with nothing changed, if there are none."""
    global _kernels
    found = native()
    if found is None:
        return False
    if not _fast:
        _fast.update({name: getattr(mx.fast, name) for name in _FUNCTIONS})
        for name, function in _FUNCTIONS.items():
            setattr(mx.fast, name, function)
        _fast["update_and_fetch"] = KVCache.update_and_fetch
        KVCache.update_and_fetch = _update_and_fetch
    _kernels = found
    for module in model.modules():
        kind = _KINDS.get(type(module))
        if kind is not None:
            module.__class__ = kind
    return True


def in_use() -> bool:
    """Whether modules that were adopted compute with the kernels now."""
    return not isinstance(_kernels, _Nothing)


@contextmanager
def switched_off() -> Iterator[None]:
    """Everything through MLX while inside: for comparison. Not for use while another thread computes."""
    global _kernels
    before, _kernels = _kernels, _Nothing()
    try:
        yield
    finally:
        _kernels = before
