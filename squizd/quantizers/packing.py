"""Types of stored numbers in MLX, and codes as MLX packs them.

Knows the bit order of `spec/squizd.md` ("Affine"). Knows nothing about how codes are chosen.
"""

from __future__ import annotations

from typing import Final

import mlx.core as mx

# What a method returns: codes, scales, biases; None where the encoding has no such part.
Quantized = tuple[mx.array, mx.array | None, mx.array | None]

DTYPES: Final[dict[str, mx.Dtype]] = {
    "f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16,
    "u8": mx.uint8, "i8": mx.int8, "u16": mx.uint16, "i16": mx.int16,
    "u32": mx.uint32, "i32": mx.int32, "u64": mx.uint64, "i64": mx.int64,
}  # fmt: skip
FLOAT_DTYPES: Final = (mx.float32, mx.float16, mx.bfloat16)


def pack(values: mx.array, bits: int) -> mx.array:
    """Pack codes into one LSB-first little-endian bit stream per row: the inverse of MLX's decoding.

    Args:
        values: codes [..., in], any integer dtype, each below 2**bits; `in` a multiple of 32.
        bits: width of a code, 1 to 8.

    Returns:
        uint32 [..., in * bits / 32], equal to the first result of `mx.quantize` for the same codes.
    """
    # 32 codes fill `bits` words exactly. Word k holds the codes that start in it, shifted up (uint32 drops what
    # runs over its top), and the rest of a code that straddles its lower end, shifted down. Codes of one
    # position lie side by side here, so that sums run over whole rows.
    blocks = mx.contiguous(values.reshape(-1, 32).T).astype(mx.uint32)
    words = []
    for base in range(0, 32 * bits, 32):
        first, last = -(-base // bits), -(-(base + 32) // bits)
        shifts = mx.array([[code * bits - base] for code in range(first, last)], dtype=mx.uint32)
        word = mx.sum(blocks[first:last] << shifts, axis=0)
        if first * bits > base:
            word = word | (blocks[first - 1] >> (base - (first - 1) * bits))
        words.append(word)
    return mx.contiguous(mx.stack(words).T).reshape(*values.shape[:-1], -1)
