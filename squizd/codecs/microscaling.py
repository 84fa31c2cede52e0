"""Microscaling blocks: small floats times one shared scale of a byte (spec, "Microscaling").

mxfp4 and mxfp8 follow the OCP Microscaling Formats (MX) specification 1.0: groups of 32 elements, E2M1 or
E4M3, with an E8M0 scale. nvfp4 has groups of 16 E2M1 elements with an E4M3 scale and, in this format, no
tensor-wide scale: MLX's optional `global_scale` g multiplies decoded weights by g / (448 * 6), and is taken
as absent.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from squizd.codecs.bits import unpack
from squizd.container.layout import Array, Bytes, Encoding


def _small_floats(exponent_bits: int, mantissa_bits: int, bias: int) -> npt.NDArray[np.float32]:
    """The value of every code of a sign, exponent and mantissa, without infinities or NaN."""
    code = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    mantissa = code & ((1 << mantissa_bits) - 1)
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    fraction = np.where(exponent > 0, 1 << mantissa_bits, 0) + mantissa
    magnitude = np.ldexp(fraction.astype(np.float32), np.maximum(exponent, 1) - bias - mantissa_bits)
    values: npt.NDArray[np.float32] = np.where(code >> (exponent_bits + mantissa_bits), -magnitude, magnitude)
    return values


# 0 0.5 1 1.5 2 3 4 6 and their negatives.
E2M1: Final = _small_floats(2, 1, bias=1)

# Subnormals below 2**-6, largest 448; 0x7F and 0xFF are NaN (the variant without infinities).
E4M3: Final = _small_floats(4, 3, bias=7)
E4M3[[0x7F, 0xFF]] = np.nan
E4M3.setflags(write=False)

# 2**(code - 127); 0xFF is NaN. MLX makes it infinity: the validator rejects it, so neither is ever used.
E8M0: Final = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))

_ELEMENTS: Final = {"mxfp4": E2M1, "mxfp8": E4M3, "nvfp4": E2M1}
_SCALES: Final = {"mxfp4": E8M0, "mxfp8": E8M0, "nvfp4": E4M3}


def decode(encoding: Encoding, shape: tuple[int, ...], codes: Bytes, scales: Bytes, biases: Bytes) -> Array:
    """Decode one code per element (low nibble first) times one scale byte per group. `biases` is empty.

    Every product is exact in float32, and in bf16, unless it is subnormal or overflows. In float32 this equals
    `mx.dequantize` bit for bit, but for scales 0xFF of E8M0.

    Returns:
        float32 of `shape`, not rounded to `encoding.dtype`.
    """
    count = math.prod(shape)
    weights = _ELEMENTS[encoding.mode].take(unpack(codes, encoding.bits, count)).reshape(-1, encoding.group_size)
    with np.errstate(over="ignore"):  # overflow is the validator's to report
        weights *= _SCALES[encoding.mode].take(np.frombuffer(scales, dtype=np.uint8))[:, None]
    return weights.reshape(shape)
