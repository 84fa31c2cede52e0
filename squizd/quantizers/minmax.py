"""Round to nearest on the grid that spans each group: the method ``minmax``.

This is `mx.quantize`, so a file made with it holds what `mlx_lm.convert` would have made. Knows only what
MLX's own quantizer must be protected from.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import mlx.core as mx

from squizd.backend import on_cpu
from squizd.container.layout import Encoding
from squizd.errors import RecipeError
from squizd.quantizers.packing import DTYPES, Quantized

# The largest magnitude that each mode can hold: nvfp4 without a global scale ends at 448 * 6 (the largest
# E4M3 scale times the largest E2M1 code), the E8M0 modes stay clear of the end of float32.
LIMITS: Final = {"mxfp4": 2.0**125, "mxfp8": 2.0**125, "nvfp4": 2688.0}
# MLX 0.32 computes E8M0 exponents of groups below about 2**-118 modulo 256, so that they decode to huge numbers.
E8M0_FLOOR: Final = 2.0**-100
SPLIT: Final = 1 << 20  # weights that are worth a second thread


def minmax(w: mx.array, encoding: Encoding, importance: mx.array | None = None) -> Quantized:
    """Quantize with `mx.quantize`, in any mode that has groups.

    Affine: the larger edge of a group is exact, the step is (max - min) / (2**bits - 1), adjusted so that
    zero is a level. Microscaling: the largest magnitude sets the scale. nvfp4 has no global scale here,
    so groups of magnitude below 6 * 2**-10 become zeros.

    Args:
        w: weights [..., out, in], f32, f16 or bf16; cast to `encoding.dtype` first, as `mlx_lm.convert` does.
        encoding: affine or a microscaling mode.
        importance: must be None, this method has nothing to weigh.

    Returns:
        Bit for bit what `mx.quantize(w.astype(dtype), ...)` returns: codes, scales, biases (None for
        microscaling modes). One exception: in mxfp4 and mxfp8, groups whose magnitudes are all below
        2**-100 are taken as zeros.

    Raises:
        RecipeError: importance was given, or weights are larger than the mode can hold.
    """
    if importance is not None:
        raise RecipeError("minmax cannot use importance weights", hint="use the method mse")
    w = w.astype(DTYPES[encoding.dtype])
    group_size, bits = encoding.group_size, encoding.bits
    if encoding.mode == "affine":
        return _affine(w, group_size, bits)
    groups = w.reshape(-1, group_size)
    largest = mx.max(mx.abs(groups), axis=-1, keepdims=True).astype(mx.float32)
    limit = LIMITS[encoding.mode]
    if float(largest.max()) > limit:
        raise RecipeError(
            f"{encoding.mode} holds magnitudes up to {limit:g}, the weights reach {float(largest.max()):g}",
            hint="use affine, or a wider mode, for this tensor",
        )
    if encoding.mode != "nvfp4":
        w = mx.where(largest < E8M0_FLOOR, 0.0, groups).reshape(w.shape).astype(w.dtype)
    codes, scales, *_ = mx.quantize(w, group_size=group_size, bits=bits, mode=encoding.mode)
    return codes, scales, None


def _affine(w: mx.array, group_size: int, bits: int) -> Quantized:
    """`mx.quantize`, which takes one core of a CPU: there the halves of a large tensor go two ways."""
    if not on_cpu() or w.size < SPLIT:
        codes, scales, biases = mx.quantize(w, group_size=group_size, bits=bits)
        return codes, scales, biases
    rows = w.reshape(-1, w.shape[-1])
    half = rows.shape[0] // 2
    first = mx.quantize(rows[:half], group_size=group_size, bits=bits, stream=_second_core())
    second = mx.quantize(rows[half:], group_size=group_size, bits=bits)
    codes, scales, biases = (
        mx.concatenate(list(x)).reshape(*w.shape[:-1], -1) for x in zip(first, second, strict=True)
    )
    return codes, scales, biases


@cache
def _second_core() -> mx.ThreadLocalStream:
    return mx.new_thread_local_stream(mx.cpu)
