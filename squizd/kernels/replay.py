"""One new token without building MLX's graph again: the model's own code is traced once, then replayed in C++.

Building and walking the graph of one token costs Python and MLX more than the arithmetic of a small model.
`install` gives a model a `__call__` that notices a single token with mlx-lm's usual caches. The first such
call runs as ever, and is also traced: the model's code is called with placeholders for token, position and
caches, and the graph that comes out becomes a list of operations over fixed memory. If replaying that list gives
the first call's logits and cache rows *bit for bit*, the following tokens are replayed; if the trace fails
or anything differs, the model goes on as before. So nothing here knows an architecture.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache

from . import layers, native

_trace = threading.local()


class Lender(Protocol):
    """Who owns what the replay needs besides the model: the expert slots of paged layers."""

    def lent(self) -> AbstractContextManager[None]:
        """Within this a token is replayed: the kernels decide what lies in the slots."""

    def started(self, result: mx.array, wait: Callable[[], None]) -> None:
        """`result` is what the token computes from the slots; called before `lent` ends.

        `wait` returns when no token is under way.
        """


class _Refused(Exception):
    """The model asks a cache for something that a replay cannot give."""


class _TracedCache:
    """In place of a KVCache while the model's code is traced."""

    def __init__(self, index: int, position: mx.array) -> None:
        self.index, self.offset = index, position

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        kernels: Any = native()
        return kernels.cached(keys, 2 * self.index), kernels.cached(values, 2 * self.index + 1)

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> None:
        if return_array or window_size is not None:
            raise _Refused("its attention has a mask")


def tracing() -> bool:
    """Whether this thread is tracing a model, so that nothing may be evaluated."""
    return getattr(_trace, "on", False)


def _paused() -> bool:
    return getattr(_trace, "paused", False)


@contextmanager
def paused() -> Iterator[None]:
    """No token of this thread is replayed while inside: the model's own code runs, and can be watched."""
    before, _trace.paused = _paused(), True
    try:
        yield
    finally:
        _trace.paused = before


def placed(ids: mx.array, shelf: Any) -> mx.array:
    """In a trace: the slots of expert `ids` on a native shelf, which reads what is missing when replayed."""
    if shelf is None:
        raise _Refused("its experts are paged in a way that only Python knows")
    out: mx.array = native().placed(ids, shelf)  # type: ignore[union-attr]
    return out


class Replay:
    """The replayed token of one model. `reason` says why there is none, "" while unknown or in use."""

    def __init__(self, lender: Lender) -> None:
        self.reason = ""
        self._lender = lender
        self._program: Any = None
        self._lock = threading.Lock()

    @property
    def in_use(self) -> bool:
        """Whether tokens are replayed."""
        return self._program is not None

    def fits(self, inputs: mx.array, cache: Any) -> bool:
        """One token, and a plain or rotating cache with room for it in every layer."""
        if (
            self.reason
            or tracing()
            or _paused()
            or not layers.in_use()
            or inputs.shape != (1, 1)
            or not isinstance(cache, list)
            or not cache
        ):
            return False
        first = cache[0]
        return all(
            type(entry) is type(first)
            and _row(entry) is not None
            and (entry.offset, _row(entry)) == (first.offset, _row(first))
            and entry.keys.shape[0] == 1
            and entry.keys.dtype == entry.values.dtype == mx.float32
            for entry in cache
        )

    def step(self, model: Any, inputs: mx.array, cache: list[KVCache | RotatingKVCache]) -> mx.array:
        """The logits of the next token; the caches hold one position more."""
        with self._lock:
            token = inputs if inputs.dtype == mx.uint32 else inputs.astype(mx.uint32)
            if self._program is None:
                return self._first(model, inputs, token, cache)
            with self._lender.lent():
                arrays = [array for entry in cache for array in (entry.keys, entry.values)]
                row: int = _row(cache[0])  # type: ignore[assignment]  # `fits` has looked
                logits, *rows = self._program.step(token, arrays, cache[0].offset, row)
                for entry, keys, values in zip(cache, rows[::2], rows[1::2], strict=True):
                    entry.keys, entry.values = keys, values
                    entry.offset += 1
                    if type(entry) is RotatingKVCache:
                        entry._idx = row + 1
                del arrays, keys, values  # or the old rows would seem to be somebody else's, and be copied
                self._lender.started(logits, self._program.wait)
            return logits  # type: ignore[no-any-return]

    def _first(self, model: Any, inputs: mx.array, token: mx.array, cache: list[Any]) -> mx.array:
        position, row = cache[0].offset, _row(cache[0])
        logits: mx.array = model.compute(inputs, cache=cache)
        arrays: list[Any] = [array for entry in cache for array in (entry.keys, entry.values)]
        mx.eval(logits, arrays)
        try:
            program = _record(model, len(cache))
            with self._lender.lent():
                again = program.step(token, arrays, position, row)
                self._lender.started(again[0], program.wait)
            mx.eval(again)
            if not all(mx.array_equal(a, b).item() for a, b in zip(again, [logits, *arrays], strict=True)):
                raise _Refused("replayed, it gives other bits")
            self._program = program
        except Exception as error:  # whatever the model's code makes of placeholders
            self.reason = str(error) or type(error).__name__
        return logits


def _row(entry: Any) -> int | None:
    """Where in its arrays a cache keeps the next token; None if that takes more than writing there, or is unknown."""
    if type(entry) is KVCache and entry.keys is not None:
        return int(entry.offset) if entry.offset < entry.keys.shape[2] else None
    if type(entry) is RotatingKVCache and entry.keys is not None:
        room = entry.keys.shape[2]
        if room > entry.max_size or entry.offset >= room != entry.max_size:  # it is cut, or grows, before that
            return None
        return int(entry.keep if entry._idx == entry.max_size else entry._idx)
    return None


def _record(model: Any, layers: int) -> Any:
    """The program of one token of `model`."""
    kernels: Any = native()
    token, position = kernels.placeholder([1, 1], False), kernels.placeholder([], True)
    caches = [_TracedCache(i, position) for i in range(layers)]
    _trace.on = True
    mx.disable_compile()  # fused operations cannot be told apart; unfused they are the same numbers
    try:
        result = model.compute(token, cache=caches)
    finally:
        mx.enable_compile()
        _trace.on = False
    return kernels.Program(result, token, position, 2 * layers)


def install(model: nn.Module, lender: Lender) -> Replay:
    """Let `model` replay single tokens; its class becomes a subclass of its own."""
    base = type(model)
    replay = Replay(lender)

    class Replayed(base):  # type: ignore[misc, valid-type]
        def compute(self, inputs: mx.array, cache: Any) -> Any:
            return base.__call__(self, inputs, cache=cache)

        def __call__(self, *args: Any, **options: Any) -> Any:
            if len(args) == 1 and options.keys() == {"cache"} and replay.fits(args[0], options["cache"]):
                return replay.step(self, args[0], options["cache"])
            return base.__call__(self, *args, **options)

    Replayed.__name__, Replayed.__qualname__ = base.__name__, base.__qualname__
    model.__class__ = Replayed
    return replay
