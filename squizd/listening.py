"""Visitor of a walk: what enters linear layers, and embeddings that serve as the head.

Sums only, so nothing of the text's length is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from .knowledge import Statistics
from .moments import left_by_feedback, products

PRODUCT_ROWS = 1 << 15  # tokens of which products of inputs are summed for tensors in constant use
PRODUCT_BYTES = 1 << 28  # of all such products: tensors that come later in the model do without


class LinearInputs:
    """Visitor: per linear layer the sum of squares of its inputs, and of their products where there is room."""

    def __init__(self) -> None:
        self.sums: dict[str, mx.array] = {}
        self.rows: dict[str, int] = {}
        self.products: dict[str, npt.NDArray[np.float32]] = {}
        self.product_rows: dict[str, int] = {}
        self.shared: dict[str, str] = {}
        self._room = PRODUCT_BYTES
        self._last: tuple[mx.array, str] | None = None

    def enter(self, path: str, layer: nn.Module) -> None:
        for name, module in list(layer.named_modules()):
            full = ".".join(filter(None, (path, name)))
            if isinstance(module, nn.Linear | nn.Embedding):
                _listen(module, partial(self._add, full, isinstance(module, nn.Linear)))

    def leave(self, path: str, layer: nn.Module) -> None:
        self._last = None

    def _add(self, path: str, linear: bool, x: mx.array) -> None:
        flat = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        total = mx.sum(flat * flat, axis=0)
        self.sums[path] = total + self.sums[path] if path in self.sums else total
        self.rows[path] = self.rows.get(path, 0) + flat.shape[0]
        mx.eval(self.sums[path])
        if not linear:  # an embedding that is the head as well: what its rows are as inputs counts more
            return
        if self._last is not None and self._last[0] is x:  # query, key and value
            self.shared[path] = self._last[1]
            return
        self._last = (x, path)
        if path not in self.products and self._room >= 4 * flat.shape[-1] ** 2:
            self.products[path] = np.zeros((flat.shape[-1], flat.shape[-1]), np.float32)
            self.product_rows[path] = 0
            self._room -= self.products[path].nbytes
        if path in self.products and self.product_rows[path] < PRODUCT_ROWS:
            self.products[path] += np.array(products(flat), copy=False)
            self.product_rows[path] += flat.shape[0]

    def summarize(self, found: Statistics) -> None:
        """Means, into `found`."""
        found.moments |= {path: np.array(total / self.rows[path]) for path, total in self.sums.items()}
        found.products = {p: total / np.float32(self.product_rows[p]) for p, total in self.products.items()}
        found.shared = self.shared
        for path in [*found.products, *found.shared]:
            hessian = found.hessian(path)
            if hessian is not None:
                found.feedback[path] = left_by_feedback(hessian[None])


_muted: list[bool] = []


@contextmanager
def muted() -> Iterator[None]:
    """Meanwhile nothing listens: what is computed is no input of the model."""
    _muted.append(True)
    try:
        yield
    finally:
        _muted.pop()


_listeners: dict[type, type] = {}


def _listen(module: nn.Module, listener: Callable[[mx.array], None]) -> None:
    """Let `listener` have the inputs of a linear layer, or of an embedding that is used as one.

    The module changes its class to one that differs in this only, so whoever asks for its weights finds them.
    """
    kind = type(module)
    if kind not in _listeners:

        class Listening(kind):  # type: ignore[valid-type,misc]
            def __call__(self, x: mx.array, *args: Any) -> Any:
                if not isinstance(self, nn.Embedding) and not _muted:
                    self._listener[0](x)
                return super().__call__(x, *args)

            def as_linear(self, x: mx.array) -> Any:
                self._listener[0](x)
                return super().as_linear(x)

        _listeners[kind] = Listening
    module._listener = (listener,)
    module.__class__ = _listeners[kind]
