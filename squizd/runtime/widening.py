"""Stored numbers as wider ones of the same value, where an array has room for the widest only. Exact. No MLX."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from .library import compiled, pointer
from .source import Bytes

_AT_ONCE = 1 << 13  # words of eight codes: their arrays stay in a processor's cache


def widen_floats(stored: npt.NDArray[Any], dtype: str, target: Bytes) -> None:
    """Write the f16 or bf16 numbers in `stored` (bytes) as f32 into `target` (bytes)."""
    if dtype == "bf16":  # the upper half of a float32
        np.left_shift(stored.view(np.uint16), 16, out=target.view(np.uint32), dtype=np.uint32)
    else:
        target.view(np.float32)[...] = stored.view(np.float16)


def widen_codes(stored: Bytes, bits: tuple[int, int], target: Bytes) -> None:
    """Write codes of `bits[0]` bits as codes of `bits[1]`, more and 8 at most, in the order of `quantizers.packing`.

    `stored` has a multiple of `bits[0]` bytes: eight codes each, `bits[1]` bytes of the contiguous `target`.
    """
    narrow, wide = bits
    library = compiled()
    if isinstance(library, str):
        spread_codes(stored, bits, target)
    else:
        stored = np.ascontiguousarray(stored)
        library.squizd_widen_codes(pointer(stored), ctypes.c_uint64(stored.size), narrow, wide, pointer(target))


def spread_codes(stored: Bytes, bits: tuple[int, int], target: Bytes) -> None:
    """`widen_codes` by NumPy alone: eight codes are a word, whose halves move apart, then their halves, then theirs."""
    narrow, wide = bits
    few, many = stored.reshape(-1, narrow), target.reshape(-1, wide)
    steps = []
    for half in (4, 2, 1):
        low = sum(((1 << half * narrow) - 1) << code * wide for code in range(0, 8, 2 * half))
        steps.append((np.uint64(low), np.uint64(half * narrow), np.uint64(half * (wide - narrow))))
    for at in range(0, len(few), _AT_ONCE):
        piece = few[at : at + _AT_ONCE]
        columns = np.zeros((len(piece), 8), np.uint8)
        for byte in range(narrow):  # by columns: rows are too short for NumPy
            columns[:, byte] = piece[:, byte]
        words = columns.reshape(-1).view("<u8")
        for lower, width, up in steps:
            words = (words & lower) | ((words >> width & lower) << (width + up))
        columns = words.view(np.uint8).reshape(-1, 8)
        for byte in range(wide):
            many[at : at + _AT_ONCE, byte] = columns[:, byte]
