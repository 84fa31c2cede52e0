"""Which prompt caches a loaded model uses: mlx-lm's own, quantized, or of a bounded number of tokens.

The caches, and the moment at which keys and values are quantized, are those of mlx-lm's `generate_step` with
`quantized_kv_start=0`: the first chunk of a prompt is computed with full numbers, and from its end on they are
kept in fewer bits. What a model's caches cannot do is an error, where mlx-lm would leave the option out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import ArraysCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache

from ..errors import RequestError

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)
GROUP_SIZE = 64
_LEAST = 5  # tokens: mlx-lm's rotating cache keeps the first four for good


@dataclass(frozen=True)
class CacheOptions:
    """`bits` of keys and values (None: full numbers), numbers per scale, most tokens kept (None: all).

    Raises RequestError for what mlx-lm has no cache for.
    """

    bits: int | None = None
    group_size: int = GROUP_SIZE
    max_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and self.bits not in BITS:
            raise RequestError(f"a cache of {self.bits} bits does not exist", hint="kv_bits is one of 2, 3, 4 and 8")
        if self.group_size not in GROUP_SIZES:
            raise RequestError(f"a cache in groups of {self.group_size} does not exist", hint="use 32, 64 or 128")
        if self.max_size is not None and self.max_size < _LEAST:
            raise RequestError(f"a cache of {self.max_size} tokens is too small", hint=f"keep at least {_LEAST}")
        if self.bits is not None and self.max_size is not None:
            raise RequestError(
                "a cache is either quantized or of a bounded size: mlx-lm has none that is both",
                hint="leave out --kv-bits or --max-kv-size",
            )

    @property
    def plain(self) -> bool:
        """Whether these are mlx-lm's usual caches."""
        return self.bits is None and self.max_size is None

    @property
    def steps(self) -> dict[str, Any]:
        """What `generate_step` must be told."""
        if self.bits is None:
            return {}
        return {"kv_bits": self.bits, "kv_group_size": self.group_size, "quantized_kv_start": 0}

    def make(self, model: nn.Module) -> list[Any]:
        """Empty caches for `model`, as `make_prompt_cache` makes them. RequestError if it has none of `max_size`."""
        caches: list[Any] = make_prompt_cache(model, self.max_size)
        if self.max_size is not None:
            other = next((e for e in entries(caches) if not self._bounded(e)), None)
            if other is not None:
                raise RequestError(
                    f"this model's caches cannot be bounded to {self.max_size} tokens: it makes its own "
                    f"({type(other).__name__})",
                    hint="leave out --max-kv-size",
                )
        return caches

    def _bounded(self, entry: Any) -> bool:
        return isinstance(entry, RotatingKVCache) and entry.max_size == self.max_size

    def quantize(self, caches: list[Any]) -> None:
        """Quantize filled caches as `generate_step` does between steps. RequestError for those that cannot be.

        Fixed states (convolutions, recurrences) hold no keys and stay as they are.
        """
        if self.bits is None:
            return
        try:
            maybe_quantize_kv_cache(caches, 0, self.group_size, self.bits)
        except NotImplementedError as error:
            raise self._refused(f"mlx-lm says: {error}", "leave out --kv-bits") from error
        except ValueError as error:  # a head is no whole number of groups
            raise self._refused(str(error), f"try --kv-group-size {GROUP_SIZES[0]}") from error
        found = list(entries(caches))
        other = next((e for e in found if not isinstance(e, QuantizedKVCache | ArraysCache)), None)
        if other is not None or not any(isinstance(e, QuantizedKVCache) for e in found):
            raise self._refused(f"it keeps {type(other or found[0]).__name__}", "leave out --kv-bits")

    def _refused(self, why: str, hint: str) -> RequestError:
        kind = f"{self.bits} bits in groups of {self.group_size}"
        return RequestError(f"this model's caches cannot be kept in {kind}: {' '.join(why.split())}", hint=hint)


def entries(caches: Sequence[Any]) -> Iterator[Any]:
    """The caches in `caches`, nested ones (CacheList) taken apart."""
    for entry in caches:
        nested = getattr(entry, "caches", None)
        if nested is not None:
            yield from entries(nested)
        elif entry is not None:
            yield entry
