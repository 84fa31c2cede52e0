"""What a model needs besides its weights, read off the shapes of a forward pass that is never evaluated."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import QuantizedKVCache

from ..architecture import replace_module
from ..errors import RequestError, SourceError
from .blueprint import Blueprint
from .budget import Workspace
from .caches import CacheOptions, entries
from .device import compute_type, fuses_attention

_STEP = 256  # tokens; mlx-lm's caches grow by as many
_LANES = 16  # the kernels' attention takes heads whose width is a multiple


@dataclass(frozen=True)
class CacheGrowth:
    """Memory of one cache entry (a layer's keys and values, or a fixed state), known after 256 and 512 tokens."""

    first: int
    second: int
    window: int | None  # tokens that a rotating cache keeps
    unquantized: int = 0  # what 256 tokens take before they are quantized, where they are

    def bytes(self, tokens: int, chunk: int) -> int:
        """An upper bound after `tokens`, prefilled `chunk` at a time."""
        if self.window is not None:  # holds a whole chunk beside its window while that is computed
            return -(-self.first * min(tokens + _STEP, self.window + chunk) // _STEP)
        growth = max(0, self.second - self.first)
        spare = _STEP - 1  # it grows by _STEP from any length
        held = self.first + -(-growth * (tokens + spare - _STEP) // _STEP)
        if not self.unquantized:
            return held
        # The first chunk is there both ways while it is quantized; what comes later is quantized token by token.
        begun = -(-min(tokens, chunk) // _STEP)
        return max(held, begun * (self.unquantized + max(self.first, growth)))


@dataclass(frozen=True)
class Needs:
    """Experts per token for each expert layer, the growth of the prompt cache, and room to compute in.

    `max_context` is the longest text that the model was made for, 0 if it does not say.
    """

    top_k: tuple[int, ...]
    caches: tuple[CacheGrowth, ...]
    space: Workspace
    max_context: int

    def workspace_bytes(self, chunk: int, context: int) -> int:
        """An upper bound of what a pass over `chunk` tokens at the end of `context` allocates for a while."""
        largest = max((cache.bytes(context, chunk) for cache in self.caches), default=0)
        windows = [cache.window for cache in self.caches]
        longest = max((w for w in windows if w is not None), default=0) if None not in windows else context
        reach = min(context, longest + chunk)  # what a token attends to
        return self.space.bytes(chunk, reach) + 2 * largest  # a cache grows by copying

    def cache_bytes(self, tokens: int, chunk: int) -> int:
        """An upper bound of the prompt cache after `tokens`, prefilled `chunk` at a time."""
        return sum(cache.bytes(tokens, chunk) for cache in self.caches)


class _Recorder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.top_k = 0

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        self.top_k = max(self.top_k, indices.shape[-1])
        out: mx.array = self.inner(x, indices)
        return out


def probe(blueprint: Blueprint, config: dict[str, Any], where: str, options: CacheOptions | None = None) -> Needs:
    """Run the empty model lazily on 256 tokens, then on 256 more, with the caches of `options`.

    Raises SourceError, naming `where`, when mlx-lm cannot run the architecture or a cache has no size, and
    RequestError when the model cannot do with such caches.
    """
    options = options or CacheOptions()
    recorders = [_Recorder(layer.module) for layer in blueprint.layers]
    for layer, recorder in zip(blueprint.layers, recorders, strict=True):
        replace_module(blueprint.model, layer.layer.path, recorder)
    model: Any = blueprint.model
    tokens = mx.zeros((1, _STEP), mx.int32)
    try:
        cache = options.make(model)
        with _attentions() as seen:
            model(tokens, cache=cache)
        unquantized = [_size(entry) for entry in entries(cache)]
        options.quantize(cache)
        first = [_size(entry) for entry in entries(cache)]
        _again(model, tokens, cache, options)
        found = list(entries(cache))
        second = [_size(entry) for entry in found]
    except RequestError as error:
        raise RequestError(f"{where}: {error}", hint=error.hint) from error
    except Exception as error:  # whatever an architecture raises when it is run on nothing
        raise SourceError(f"{where}: mlx-lm cannot run {config.get('model_type')} as stored: {error}") from error
    finally:
        for layer in blueprint.layers:
            replace_module(blueprint.model, layer.layer.path, layer.module)
    caches = [
        CacheGrowth(
            a,
            b,
            window if isinstance(window := getattr(entry, "max_size", None), int) else None,
            whole if isinstance(entry, QuantizedKVCache) else 0,
        )
        for a, b, whole, entry in zip(first, second, unquantized, found, strict=True)
    ]
    # A module that a plain forward pass leaves out (multi-token prediction) routes like the others.
    usual = max((recorder.top_k for recorder in recorders), default=1) or 1
    top_k = tuple(recorder.top_k or usual for recorder in recorders)
    longest = _find(config, "max_position_embeddings", "max_sequence_length", "max_seq_len", "n_positions", "n_ctx")
    growing = sum(entry.second > entry.first or entry.window is not None for entry in caches)
    fused = fuses_attention() and options.bits is None and len(seen) >= growing
    space = _workspace(blueprint, top_k, config, fused=fused)
    return Needs(top_k, tuple(caches), space, longest)


@contextmanager
def _attentions() -> Iterator[list[None]]:
    """One entry for each time that this thread calls MLX's attention while inside, where the kernels keep no scores."""
    seen: list[None] = []
    thread, attention = threading.get_ident(), mx.fast.scaled_dot_product_attention

    def counted(q: mx.array, *args: Any, **options: Any) -> Any:
        tiled = not isinstance(options.get("mask"), mx.array) and q.shape[-1] % _LANES == 0
        if tiled and threading.get_ident() == thread:
            seen.append(None)
        return attention(q, *args, **options)

    mx.fast.scaled_dot_product_attention = counted
    try:
        yield seen
    finally:
        mx.fast.scaled_dot_product_attention = attention


def _workspace(blueprint: Blueprint, top_k: tuple[int, ...], config: dict[str, Any], fused: bool) -> Workspace:
    """Widths come from the tensors; of attention heads only the config knows (else one per 64 of the hidden size)."""
    tensors = [resident.tensor for resident in blueprint.residents]
    vocabulary, hidden = max((t.shape for t in tensors if t.role == "embedding" and len(t.shape) == 2), default=(1, 1))
    hidden = _find(config, "hidden_size", "n_embd", "d_model", "model_dim", "dim") or hidden
    widths = [t.shape[-2] for t in tensors if t.role not in ("embedding", "head") and len(t.shape) > 1]
    for layer, k in zip(blueprint.layers, top_k, strict=True):
        widths.append(k * max(target.shape[0] for target in layer.targets if target.shape))
    heads = _find(config, "num_attention_heads", "n_head", "n_heads", "num_heads") or max(1, hidden // 64)
    latent = _find(config, "kv_lora_rank") and _find(config, "qk_nope_head_dim") + _find(config, "v_head_dim")
    return Workspace(
        hidden=hidden,
        inner=max(widths, default=hidden),
        top_k=max(top_k, default=0),
        heads=heads,
        latent_width=latent,
        vocabulary=vocabulary,
        item_bytes=compute_type("bf16").size,
        layers=len(top_k),
        fused=fused,
    )


def _find(config: dict[str, Any], *names: str) -> int:
    """The first positive integer under one of `names`, in the config or in its `text_config`; 0 if there is none."""
    for scope in (config, config.get("text_config")):
        for name in names:
            value = scope.get(name) if isinstance(scope, dict) else None
            if isinstance(value, int) and value > 0:
                return value
    return 0


def _again(model: Any, tokens: mx.array, cache: list[Any], options: CacheOptions) -> None:
    """More tokens, which see what the caches hold: here a model shows that it cannot use quantized ones."""
    try:
        model(tokens, cache=cache)
    except Exception as error:
        if options.bits is None:
            raise
        raise RequestError(
            f"this model cannot use a quantized cache: {' '.join(str(error).split())}", hint="leave out --kv-bits"
        ) from error


def _size(entry: Any) -> int:
    try:
        return int(entry.nbytes)
    except (NotImplementedError, AttributeError):
        return sum(array.nbytes for _, array in tree_flatten(entry.state) if isinstance(array, mx.array))
