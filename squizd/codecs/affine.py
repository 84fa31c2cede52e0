"""Affine blocks: ``w = scale * q + bias`` for every group of a row (spec, "Affine").

Whatever method chose scale and bias (`squizd.quantizers`), this is what they mean.
"""

from __future__ import annotations

import math

import numpy as np

from squizd.codecs.bits import unpack
from squizd.codecs.raw import to_float32
from squizd.container.layout import Array, Bytes, Encoding


def decode(encoding: Encoding, shape: tuple[int, ...], codes: Bytes, scales: Bytes, biases: Bytes) -> Array:
    """Decode codes of `encoding.bits` bits, one (scale, bias) of `encoding.dtype` for each group of each row.

    The product is rounded to float32, then the sum; neither is rounded to `encoding.dtype`. That equals
    `mx.dequantize` on a CPU, bit for bit, with scales and biases cast to float32. Where the two operations are
    fused the same holds for f16 and bf16 scales, whose product with a code is exact in float32; with f32 scales
    the sum can differ by ``2**-24 * |scale * q|`` before it is rounded.

    Given f16 or bf16 scales, MLX rounds product and sum to that type. It then differs from the value here by at
    most ``u * (1 + u) * (|scale * q| + |w|)``, with u = 2**-11 for f16 and 2**-8 for bf16, plus 2**-25 where f16 is
    subnormal.

    Returns:
        float32 of `shape`. A row's groups are consecutive; scales and biases are [..., in / group_size].
    """
    count = math.prod(shape)
    weights = unpack(codes, encoding.bits, count).astype(np.float32).reshape(-1, encoding.group_size)
    with np.errstate(over="ignore", invalid="ignore"):  # overflow is the validator's to report
        weights *= to_float32(scales, encoding.dtype)[:, None]
        weights += to_float32(biases, encoding.dtype)[:, None]
    return weights.reshape(shape)
