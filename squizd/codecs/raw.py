"""Raw tensors: little-endian IEEE 754 floats, bfloat16, and integers (spec, "Raw")."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from squizd.container.layout import Array, Bytes, Encoding
from squizd.errors import RequestError

NUMPY_DTYPES: Final = {
    "f32": "<f4", "f16": "<f2",
    "u8": "|u1", "i8": "|i1", "u16": "<u2", "i16": "<i2", "u32": "<u4", "i32": "<i4", "u64": "<u8", "i64": "<i8",
}  # fmt: skip


def to_float32(buffer: Bytes, dtype: str) -> npt.NDArray[np.float32]:
    """Read floats of type "f32", "f16" or "bf16" (the upper half of an f32) as float32, exactly.

    Returns:
        float32 [n]; for f32 a read-only view of `buffer`. NaN payloads of f16 may change.

    Raises:
        RequestError: another dtype, or a buffer that is not a whole number of elements.
    """
    if dtype == "bf16":
        high = _view(buffer, "<u2", dtype).astype(np.uint32)
        high <<= np.uint32(16)
        return high.view(np.float32)
    if dtype not in ("f32", "f16"):
        raise RequestError(f"{dtype} is not a float type of the format (f32, f16, bf16)")
    return _view(buffer, NUMPY_DTYPES[dtype], dtype).astype(np.float32, copy=False)


def decode(encoding: Encoding, shape: tuple[int, ...], codes: Bytes, scales: Bytes, biases: Bytes) -> Array:
    """Raw elements of `shape`: floats as float32, integers in their own type. `scales` and `biases` are empty."""
    if encoding.dtype in ("f32", "f16", "bf16"):
        return to_float32(codes, encoding.dtype).reshape(shape)
    return _view(codes, NUMPY_DTYPES[encoding.dtype], encoding.dtype).reshape(shape)


def _view(buffer: Bytes, dtype: str, name: str) -> Array:
    size = np.dtype(dtype).itemsize
    if memoryview(buffer).nbytes % size:
        raise RequestError(f"{memoryview(buffer).nbytes} bytes are not a whole number of {name} elements")
    return np.frombuffer(buffer, dtype=dtype)
