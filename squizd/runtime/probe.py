"""What a model needs besides its weights, read off the shapes of a forward pass that is never evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from ..errors import SourceError
from .blueprint import Blueprint

_STEP = 256  # tokens; mlx-lm's caches grow by as many


@dataclass(frozen=True)
class CacheGrowth:
    """Memory of one cache entry (a layer's keys and values, or a fixed state), from its size after 256 and 512 tokens."""

    first: int
    second: int
    window: int | None  # tokens that a rotating cache keeps

    def bytes(self, tokens: int, chunk: int) -> int:
        """An upper bound after `tokens`, prefilled `chunk` at a time."""
        if self.window is not None:  # holds a whole chunk beside its window while that is computed
            return -(-self.first * min(tokens, self.window + chunk) // _STEP)
        return self.first + max(0, self.second - self.first) * max(0, -(-tokens // _STEP) - 1)


@dataclass(frozen=True)
class Needs:
    """`top_k` experts per token for each expert layer, its input and output width, and the prompt cache's growth."""

    top_k: tuple[int, ...]
    caches: tuple[CacheGrowth, ...]

    def cache_bytes(self, tokens: int, chunk: int) -> int:
        """An upper bound of the prompt cache after `tokens`, prefilled `chunk` at a time."""
        return sum(cache.bytes(tokens, chunk) for cache in self.caches)

    def largest_cache_entry(self, tokens: int, chunk: int) -> int:
        """The same for the largest entry."""
        return max((cache.bytes(tokens, chunk) for cache in self.caches), default=0)


class _Recorder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.top_k = 0

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        self.top_k = max(self.top_k, indices.shape[-1])
        out: mx.array = self.inner(x, indices)
        return out


def probe(blueprint: Blueprint, where: str) -> Needs:
    """Run the empty model lazily on 256 tokens, then on 256 more.

    Raises SourceError, naming `where`, when mlx-lm cannot run the architecture or a cache has no size.
    """
    recorders = [_Recorder(layer.module) for layer in blueprint.layers]
    for layer, recorder in zip(blueprint.layers, recorders, strict=True):
        blueprint.replace(layer.layer.path, recorder)
    model: Any = blueprint.model
    tokens = mx.zeros((1, _STEP), mx.int32)
    try:
        cache = make_prompt_cache(model)
        model(tokens, cache=cache)
        first = [_size(entry) for entry in _entries(cache)]
        model(tokens, cache=cache)
        entries = list(_entries(cache))
        second = [_size(entry) for entry in entries]
    except Exception as error:  # whatever an architecture raises when it is run on nothing
        raise SourceError(f"{where}: cannot tell how much memory this architecture needs: {error!r}") from error
    finally:
        for layer in blueprint.layers:
            blueprint.replace(layer.layer.path, layer.module)
    caches = [
        CacheGrowth(a, b, window if isinstance(window := getattr(entry, "max_size", None), int) else None)
        for a, b, entry in zip(first, second, entries, strict=True)
    ]
    # A module that a plain forward pass leaves out (multi-token prediction) routes like the others.
    usual = max((recorder.top_k for recorder in recorders), default=1) or 1
    return Needs(tuple(recorder.top_k or usual for recorder in recorders), tuple(caches))


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
