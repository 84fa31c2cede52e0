"""Tensors with known values: codes and scales first, what they decode to computed element by element.

Plain Python floats throughout. A double holds every product of the decode contract exactly, and rounding
a sum to double first changes no float32 result (53 >= 2 * 24 + 2).
"""

from __future__ import annotations

import hashlib
import math
import struct
from typing import Any

from .build import Tensor

INTEGERS = {
    "u8": "<B", "i8": "<b", "u16": "<H", "i16": "<h", "u32": "<I", "i32": "<i", "u64": "<Q", "i64": "<q",
}  # fmt: skip


class Stream:
    """Reproducible numbers: SHA-256 of a seed and a counter."""

    def __init__(self, seed: str) -> None:
        self.seed, self.counter, self.pool = seed, 0, b""

    def take(self, size: int) -> bytes:
        """The next bytes."""
        while len(self.pool) < size:
            self.pool += hashlib.sha256(f"{self.seed} {self.counter}".encode()).digest()
            self.counter += 1
        out, self.pool = self.pool[:size], self.pool[size:]
        return out

    def below(self, limit: int) -> int:
        """An integer in [0, limit)."""
        return int.from_bytes(self.take(8), "little") % limit


def f32(value: float) -> float:
    """The nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def encode_float(value: float, dtype: str) -> bytes:
    """A float that `dtype` holds exactly, as stored."""
    if dtype == "f16":
        return struct.pack("<e", value)
    raw = struct.pack("<f", value)
    if dtype == "bf16":
        if math.isnan(value):
            return b"\xc0\x7f"
        assert raw[:2] == b"\0\0", value
        return raw[2:]
    return b"\0\0\xc0\x7f" if math.isnan(value) else raw


def product(shape: tuple[int, ...]) -> int:
    """How many elements."""
    return math.prod(shape)


def pack(codes: list[int], bits: int) -> bytes:
    """Codes as one stream of bits, least significant first."""
    stream = 0
    for i, code in enumerate(codes):
        stream |= code << (i * bits)
    return stream.to_bytes(len(codes) * bits // 8, "little")


def small(stream: Stream, dtype: str, signed: bool = True) -> float:
    """A number around 0.1 with as many significant bits as `dtype` has."""
    bits = {"f32": 24, "f16": 11, "bf16": 8}[dtype]
    mantissa = (1 << (bits - 1)) + stream.below(1 << (bits - 1))
    value = math.ldexp(mantissa, -bits - 2 - stream.below(3))
    return -value if signed and stream.below(2) else value


def raw(name: str, role: str, dtype: str, shape: tuple[int, ...], values: list[Any] | None = None) -> Tensor:
    """A raw tensor, with numbers of its own unless `values` says which."""
    stream, count = Stream(name), product(shape)
    if dtype in INTEGERS:
        size = struct.calcsize(INTEGERS[dtype])
        codes = stream.take(count * size)
        if values is not None:
            codes = b"".join(struct.pack(INTEGERS[dtype], v) for v in values)
        found = [v[0] for v in struct.iter_unpack(INTEGERS[dtype], codes)]
    else:
        found = values if values is not None else [small(stream, dtype) for _ in range(count)]
        codes = b"".join(encode_float(v, dtype) for v in found)
    assert len(found) == count
    return Tensor(name, role, "raw", dtype, 0, 0, shape, codes, values=found)


def affine(
    name: str, role: str, bits: int, group_size: int, dtype: str, shape: tuple[int, ...], seed: str = ""
) -> Tensor:
    """An affine tensor whose every code occurs, if it has enough elements."""
    stream, count = Stream(name + seed), product(shape)
    codes = [i % (1 << bits) if i < 1 << bits else stream.below(1 << bits) for i in range(count)]
    scales = [small(stream, dtype) for _ in range(count // group_size)]
    biases = [small(stream, dtype) for _ in range(count // group_size)]
    values = [f32(f32(scales[i // group_size] * q) + biases[i // group_size]) for i, q in enumerate(codes)]
    parts = [b"".join(encode_float(v, dtype) for v in some) for some in (scales, biases)]
    return Tensor(name, role, "affine", dtype, bits, group_size, shape, pack(codes, bits), *parts, values=values)


def e2m1(code: int) -> float:
    """0 0.5 1 1.5 2 3 4 6, negative with bit 3."""
    value = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)[code & 7]
    return -value if code & 8 else value


def e4m3(code: int) -> float:
    """Sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities."""
    exponent, mantissa = code >> 3 & 15, code & 7
    value = math.ldexp(8 + mantissa, exponent - 10) if exponent else math.ldexp(mantissa, -9)
    return -value if code & 128 else value


def e8m0(code: int) -> float:
    """2^(code - 127)."""
    return math.ldexp(1.0, code - 127)


def microscaling(
    name: str, role: str, mode: str, dtype: str, shape: tuple[int, ...], scales: list[int] | None = None
) -> Tensor:
    """A tensor of a microscaling mode; `scales` are its scale bytes, around 1 if None."""
    stream, count = Stream(name), product(shape)
    group = 16 if mode == "nvfp4" else 32
    if mode == "mxfp8":
        usable = [c for c in range(256) if c & 127 != 127]
        codes = [usable[i] if i < len(usable) else usable[stream.below(len(usable))] for i in range(count)]
        packed = bytes(codes)
    else:
        codes = [i % 16 if i < 16 else stream.below(16) for i in range(count)]
        packed = pack(codes, 4)
    if scales is None:
        base = 0x30 if mode == "nvfp4" else 120
        scales = [base + stream.below(8) for _ in range(count // group)]
    element, scale = (e4m3 if mode == "mxfp8" else e2m1), (e4m3 if mode == "nvfp4" else e8m0)
    values = [f32(element(c) * scale(scales[i // group])) for i, c in enumerate(codes)]
    return Tensor(
        name, role, mode, dtype, 8 if mode == "mxfp8" else 4, group, shape, packed, bytes(scales), values=values
    )
