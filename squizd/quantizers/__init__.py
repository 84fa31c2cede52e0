"""How stored values are chosen: every method turns weights into codes, scales and biases.

A method decides only which numbers are stored. What they mean is the encoding's business, so blocks of
all methods decode alike (`squizd.codecs`) and run in MLX's own kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import mlx.core as mx

from squizd.container.layout import Encoding
from squizd.errors import RecipeError
from squizd.quantizers.gptq import gptq, shifted
from squizd.quantizers.minmax import minmax
from squizd.quantizers.mse import mse
from squizd.quantizers.packing import DTYPES, FLOAT_DTYPES, Quantized, pack, shortened

__all__ = ["METHODS", "Quantized", "pack", "quantize", "shifted"]

METHODS: Final[dict[str, Callable[[mx.array, Encoding, mx.array | None], Quantized]]] = {
    "minmax": minmax,
    "mse": mse,
    "gptq": gptq,
}


def quantize(
    w: mx.array,
    encoding: Encoding,
    method: str = "minmax",
    importance: mx.array | None = None,
    short: bool = False,
) -> Quantized:
    """Turn weights into what a file stores for them.

    Args:
        w: weights [..., out, in], f32, f16 or bf16, finite. For a raw encoding any shape, and integers too.
        encoding: a registered encoding; its group size divides `in`.
        method: a key of `METHODS`. A raw encoding leaves nothing to choose and takes any.
        importance: mse: [in] or [..., in], or None; gptq: the Hessian [..., in, in]; minmax: None.
        short: mse and gptq: scales and biases in few digits, for records that will be compressed.

    Returns:
        codes, scales, biases, evaluated. Affine: uint32 [..., out, in * bits / 32] in MLX's packing, and two
        arrays [..., out, in / group_size] of `encoding.dtype`. Microscaling: the same codes, scales uint8,
        None. Raw: `w` as `encoding.dtype`, None, None.

    Raises:
        RecipeError: the encoding or method is unknown, they do not go together or do not fit `w`, or `w` holds
            values that they cannot represent. Messages do not know the tensor's name.
    """
    if not encoding.is_registered():
        raise RecipeError(f"{encoding} is not a registered encoding")
    if method not in METHODS:
        raise RecipeError(f"unknown quantization method {method!r}", hint=f"known: {', '.join(METHODS)}")
    if w.size == 0:
        raise RecipeError(f"cannot store a tensor of shape {w.shape}: it is empty")
    if encoding.mode == "raw":
        return _cast(w, encoding), None, None
    if w.dtype not in FLOAT_DTYPES:
        raise RecipeError(f"cannot quantize weights of type {w.dtype}")
    if w.ndim < 2:
        raise RecipeError(f"cannot quantize shape {w.shape}: two dimensions are needed")
    if w.shape[-1] % encoding.group_size:
        raise RecipeError(f"rows of {w.shape[-1]} weights do not divide into groups of {encoding.group_size}")
    if not _all_finite(w):
        raise RecipeError("the weights hold NaN or infinity")
    if method == "gptq":
        codes, scales, biases = gptq(w, encoding, importance, short)
    else:
        codes, scales, biases = METHODS[method](w, encoding, importance)
        if short and method == "mse":
            codes, scales, biases = shortened(w, (codes, scales, biases), encoding)
    mx.eval(codes, scales, biases)
    if scales is not None and biases is not None:
        span = mx.abs(scales) * ((1 << encoding.bits) - 1)  # in encoding.dtype, as MLX decodes
        if not bool(mx.all(mx.isfinite(span) & mx.isfinite(biases))):
            raise RecipeError(f"the weights span more than {encoding.dtype} can hold")
    return codes, scales, biases


def _all_finite(w: mx.array) -> bool:
    """Whether no exponent has all bits set, which the largest of each sign tells: 20 times as fast as `mx.isfinite`."""
    (signed, plus), (unsigned, minus) = _INFINITIES[w.dtype]
    largest, most_negative = mx.max(w.view(signed)), mx.max(w.view(unsigned))
    mx.eval(largest, most_negative)
    return int(largest) < plus and int(most_negative) < minus


# Infinities as integers. Read without a sign, negative numbers are the largest, the more negative the larger.
_INFINITIES: Final = {
    mx.float32: ((mx.int32, 0x7F800000), (mx.uint32, 0xFF800000)),
    mx.float16: ((mx.int16, 0x7C00), (mx.uint16, 0xFC00)),
    mx.bfloat16: ((mx.int16, 0x7F80), (mx.uint16, 0xFF80)),
}


def _cast(w: mx.array, encoding: Encoding) -> mx.array:
    """`w` in the raw encoding's type: floats may be rounded, integers must be of that type already."""
    dtype = DTYPES[encoding.dtype]
    if w.dtype == dtype:
        mx.eval(w)
        return w
    if w.dtype not in FLOAT_DTYPES or dtype not in FLOAT_DTYPES:
        raise RecipeError(f"cannot store {w.dtype} numbers as {encoding.dtype}")
    cast = w.astype(dtype)
    if not bool(mx.all(mx.isfinite(cast) | ~mx.isfinite(w))):
        raise RecipeError(f"the numbers exceed what {encoding.dtype} can hold")
    return cast
