"""A few numbers between the host and computations of MLX, both ways, without making a copy of anything large.

On CUDA an array that the host reads becomes managed memory, and its pages then move with whoever touches them; only
arrays of up to eight bytes come from a pool that both sides can always reach. So there numbers travel in such
pieces. Elsewhere memory is shared, and one piece holds all. Either way the values are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

PIECE_BYTES = 8  # MLX's CUDA allocator: `small_block_size`


class Mailbox:
    """`count` numbers below `bound` that the host writes and computations read."""

    def __init__(self, count: int, bound: int, small: bool) -> None:
        """`small`: in pieces of PIECE_BYTES."""
        self.count = count
        post = Post(bound, small)
        sizes = [min(post.length, count - start) for start in range(0, count, post.length)]
        self._arrays = [mx.zeros((size,), post.dtype) for size in sizes]
        mx.eval(self._arrays)
        self._views: list[Any] = [np.array(array, copy=False) for array in self._arrays]

    def write(self, values: Sequence[int]) -> None:
        """Only while nothing in flight reads them."""
        at = 0
        for view in self._views:
            view[:] = values[at : at + len(view)]
            at += len(view)

    def read(self, shape: tuple[int, ...]) -> mx.array:
        """uint32 of `shape`: what is written by the time it is computed."""
        pieces = [array.astype(mx.uint32) for array in self._arrays]
        return (pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)).reshape(shape)


class Post:
    """How numbers below `bound` travel."""

    def __init__(self, bound: int, small: bool) -> None:
        self.dtype = mx.uint32 if not small else mx.uint8 if bound <= 1 << 8 else mx.uint16
        assert bound <= 1 << 8 * self.dtype.size
        self.length = PIECE_BYTES // self.dtype.size if small else 1 << 30

    def send(self, numbers: mx.array) -> list[mx.array]:
        """Begin to compute `numbers`; give what is returned to `receive`."""
        flat = numbers.reshape(-1)
        pieces = [
            (flat if flat.size <= self.length else flat[at : at + self.length]).astype(self.dtype)
            for at in range(0, flat.size, self.length)
        ]
        mx.async_eval(pieces)
        return pieces

    @staticmethod
    def receive(pieces: Sequence[mx.array]) -> list[int]:
        """Wait for the numbers."""
        mx.eval(pieces)
        out: list[int] = []
        for piece in pieces:
            out += np.array(piece, copy=False).tolist()
        return out
