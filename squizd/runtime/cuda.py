"""Bytes from host memory into MLX's arrays on CUDA.

MLX's arrays there are managed memory. Written through a NumPy view their pages move to the GPU by
faults at some 2 GB/s; `cudaMemcpy` to the same address, from pinned memory, runs at 30 GB/s and more.
So a record is read into a pinned buffer of the reading thread, and its parts are copied from there.
Only documented calls of the CUDA runtime API are used, from the library that MLX itself has loaded.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np

from ..errors import ReadError
from .io import Bytes

_HOST_TO_DEVICE, _NON_BLOCKING = 1, 1


@cache
def _library() -> ctypes.CDLL | None:
    for name in ("libcudart.so.13", "libcudart.so.12", "libcudart.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


class Uploads(threading.local):
    """A pinned buffer and a stream for each thread that reads."""

    def __init__(self) -> None:
        self._cuda = _library()
        self._buffer: Bytes = np.empty(0, np.uint8)
        self._stream = ctypes.c_void_p()

    def _check(self, code: int) -> None:
        if code:
            raise ReadError(f"CUDA error {code} while an expert was copied to the GPU")

    def _reserve(self, size: int) -> Bytes:
        assert self._cuda is not None
        if not self._stream:
            self._check(self._cuda.cudaStreamCreateWithFlags(ctypes.byref(self._stream), _NON_BLOCKING))
        if self._buffer.size < size:
            place = ctypes.c_void_p()
            self._check(self._cuda.cudaHostAlloc(ctypes.byref(place), ctypes.c_size_t(size), 0))
            if self._buffer.size:
                self._check(self._cuda.cudaFreeHost(ctypes.c_void_p(self._buffer.ctypes.data)))
            self._buffer = np.frombuffer((ctypes.c_uint8 * size).from_address(place.value or 0), np.uint8)
        return self._buffer

    @contextmanager
    def row(self, banks: Sequence[Bytes], slot: int) -> Iterator[list[Bytes]]:
        """Buffers for one row of each of `banks`; what they hold is copied to row `slot` when the block ends well."""
        sizes = [bank.shape[1] for bank in banks]
        starts = [sum(-(-size // 256) * 256 for size in sizes[:i]) for i in range(len(sizes) + 1)]
        buffer = self._reserve(starts[-1])
        parts = [buffer[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        yield parts
        assert self._cuda is not None
        for bank, part in zip(banks, parts, strict=True):
            to = bank.ctypes.data + slot * bank.shape[1]
            self._check(
                self._cuda.cudaMemcpyAsync(
                    ctypes.c_void_p(to),
                    ctypes.c_void_p(part.ctypes.data),
                    ctypes.c_size_t(part.size),
                    _HOST_TO_DEVICE,
                    self._stream,
                )
            )
        self._check(self._cuda.cudaStreamSynchronize(self._stream))


@cache
def uploads() -> Uploads | None:
    """The way to the GPU that all models share, or None if the CUDA runtime cannot be found."""
    return Uploads() if _library() else None
