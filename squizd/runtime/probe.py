"""What a model needs besides its weights, read off the shapes of a forward pass that is never evaluated."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from ..architecture import replace_module
from ..errors import SourceError
from .blueprint import Blueprint
from .budget import Workspace
from .device import compute_type, fuses_attention

_STEP = 256  # tokens; mlx-lm's caches grow by as many
_LANES = 16  # the kernels' attention takes heads whose width is a multiple


@dataclass(frozen=True)
class CacheGrowth:
    """Memory of one cache entry (a layer's keys and values, or a fixed state), known after 256 and 512 tokens."""

    first: int
    second: int
    window: int | None  # tokens that a rotating cache keeps

    def bytes(self, tokens: int, chunk: int) -> int:
        """An upper bound after `tokens`, prefilled `chunk` at a time."""
        if self.window is not None:  # holds a whole chunk beside its window while that is computed
            return -(-self.first * min(tokens + _STEP, self.window + chunk) // _STEP)
        growth = max(0, self.second - self.first)
        spare = _STEP - 1  # it grows by _STEP from any length
        return self.first + -(-growth * (tokens + spare - _STEP) // _STEP)


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
        return self.space.bytes(chunk, context) + 2 * largest  # a cache grows by copying

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


def probe(blueprint: Blueprint, config: dict[str, Any], where: str) -> Needs:
    """Run the empty model lazily on 256 tokens, then on 256 more.

    Raises SourceError, naming `where`, when mlx-lm cannot run the architecture or a cache has no size.
    """
    recorders = [_Recorder(layer.module) for layer in blueprint.layers]
    for layer, recorder in zip(blueprint.layers, recorders, strict=True):
        replace_module(blueprint.model, layer.layer.path, recorder)
    model: Any = blueprint.model
    tokens = mx.zeros((1, _STEP), mx.int32)
    try:
        cache = make_prompt_cache(model)
        with _attentions() as seen:
            model(tokens, cache=cache)
        first = [_size(entry) for entry in _entries(cache)]
        model(tokens, cache=cache)
        entries = list(_entries(cache))
        second = [_size(entry) for entry in entries]
    except Exception as error:  # whatever an architecture raises when it is run on nothing
        raise SourceError(f"{where}: mlx-lm cannot run {config.get('model_type')} as stored: {error}") from error
    finally:
        for layer in blueprint.layers:
            replace_module(blueprint.model, layer.layer.path, layer.module)
    caches = [
        CacheGrowth(a, b, window if isinstance(window := getattr(entry, "max_size", None), int) else None)
        for a, b, entry in zip(first, second, entries, strict=True)
    ]
    # A module that a plain forward pass leaves out (multi-token prediction) routes like the others.
    usual = max((recorder.top_k for recorder in recorders), default=1) or 1
    top_k = tuple(recorder.top_k or usual for recorder in recorders)
    longest = _find(config, "max_position_embeddings", "max_sequence_length", "max_seq_len", "n_positions", "n_ctx")
    growing = sum(entry.second > entry.first or entry.window is not None for entry in caches)
    space = _workspace(blueprint, top_k, config, fused=fuses_attention() and len(seen) >= growing)
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


def _entries(cache: Sequence[Any]) -> Iterator[Any]:
    """The caches in `cache`, nested ones (CacheList) taken apart."""
    for entry in cache:
        nested = getattr(entry, "caches", None)
        if nested is not None:
            yield from _entries(nested)
        elif entry is not None:
            yield entry


def _size(entry: Any) -> int:
    try:
        return int(entry.nbytes)
    except (NotImplementedError, AttributeError):
        return sum(array.nbytes for _, array in tree_flatten(entry.state) if isinstance(array, mx.array))
