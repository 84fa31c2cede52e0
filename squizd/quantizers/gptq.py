"""Affine blocks whose errors cancel in the layer's output: the method ``gptq``.

Knows how to round with error feedback, given the products of inputs (the Hessian of the layer's squared output error).
Knows nothing about where those come from.

Frantar et al. 2022 (arXiv:2210.17323): columns are rounded one after another, and what rounding one of them does to the
output is taken out of the columns that follow. Here:

1. groups are taken in the order of their inputs' energy, largest first, and columns within a group too: the gain of
   "act-order" without its cost, for a group stays a group in MLX's layout;
2. a group's grid is fitted (`mse`, weighted by what an error in each column costs once later columns make up for it)
   when the group's turn comes, to the weights as they are by then, and rounding uses the grid as stored;
3. once every code is known, scales and biases of all groups of a row are solved together for the least output error
   (a linear problem), rounded to the stored type, and columns are rounded once more on these grids. That is kept
   by rows, where it leaves less error.

All matrices of a stack are worked on at once; the only loop is over columns.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import mlx.core as mx
import numpy as np

from squizd.backend import on_cpu
from squizd.container.layout import Encoding
from squizd.errors import RecipeError
from squizd.quantizers.mse import mse
from squizd.quantizers.packing import DTYPES, Quantized, pack

DAMPING: Final = 0.03  # of the mean square input, added to every one: limits how far weights move to make up for others
BLOCK: Final = 32  # columns between two matrix products
REFITS: Final = 1  # times step 3: a second adds 0.02 dB


class Grids(NamedTuple):
    """Scales and biases as stored, [stack, groups, out], in the order in which groups are taken."""

    scales: mx.array
    biases: mx.array


def gptq(w: mx.array, encoding: Encoding, hessian: mx.array | None) -> Quantized:
    """Quantize with error feedback.

    Args:
        w: weights [..., out, in], f32, f16 or bf16, finite.
        encoding: an affine encoding whose group size divides `in`.
        hessian: sum over tokens of x xᵀ for inputs x, any unit: [..., in, in] with the leading dimensions of `w`,
            float32, symmetric, positive semidefinite.

    Returns:
        codes (uint32, as `mx.quantize` packs them), scales and biases (`encoding.dtype`), evaluated.

    Raises:
        RecipeError: the encoding is not affine, or the Hessian has the wrong shape or is not finite.
    """
    if encoding.mode != "affine":
        raise RecipeError(f"gptq fits affine blocks only, not {encoding.mode}", hint="use the method minmax")
    if hessian is None:
        raise RecipeError("gptq needs the products of inputs", hint="give calibration text, or use the method mse")
    width, group = w.shape[-1], encoding.group_size
    if hessian.shape != (*w.shape[:-2], width, width):
        raise RecipeError(f"the Hessian has shape {hessian.shape}, expected {(*w.shape[:-2], width, width)}")
    stack = w.astype(mx.float32).reshape(-1, *w.shape[-2:])
    h = np.array(hessian.astype(mx.float32)).astype(np.float64).reshape(-1, width, width)
    if not np.isfinite(h).all():
        raise RecipeError("the Hessian holds NaN or infinity")
    h = _damped(h)
    order = _order(np.einsum("eii->ei", h), group)
    h = np.take_along_axis(np.take_along_axis(h, order[:, :, None], 1), order[:, None, :], 2)
    columns = mx.take_along_axis(mx.swapaxes(stack, 1, 2), mx.array(order)[:, :, None], axis=1)  # [stack, in, out]
    feedback, cost = _feedback(h)
    ordered = mx.array(h.astype(np.float32))
    codes, grids = _round(columns, feedback, cost, encoding, None)
    error = _error(columns, codes, grids, ordered, group)
    for _ in range(REFITS):
        again, refitted = _round(columns, feedback, cost, encoding, _refit(columns, codes, grids, ordered, encoding))
        left = _error(columns, again, refitted, ordered, group)
        better = left < error
        codes = mx.where(better[:, None, :], again, codes)
        grids = Grids(*(mx.where(better[:, None, :], new, old) for new, old in zip(refitted, grids, strict=True)))
        error = mx.minimum(left, error)
        mx.eval(codes, grids, error)
    return _stored(codes, grids, order, encoding, w.shape)


def _damped(h: np.ndarray) -> np.ndarray:
    """Symmetric, with mean 1 on the diagonal and `DAMPING` added; the identity where no input was ever seen."""
    h = (h + np.swapaxes(h, 1, 2)) / 2
    mean = np.einsum("eii->e", h)[:, None, None] / h.shape[-1]
    seen = mean > 0
    identity = np.eye(h.shape[-1])
    damped: np.ndarray = np.where(seen, h / np.where(seen, mean, 1.0), identity) + DAMPING * identity
    return damped


def _order(diagonal: np.ndarray, group: int) -> np.ndarray:
    """Step 1: positions [stack, in], groups of largest energy first, columns of largest energy first within."""
    stack, width = diagonal.shape
    energy = diagonal.reshape(stack, width // group, group)
    within = np.argsort(-energy, axis=-1, kind="stable")
    groups = np.argsort(-energy.sum(axis=-1), axis=-1, kind="stable")
    positions = groups[:, :, None] * group + np.take_along_axis(within, groups[:, :, None], axis=1)
    order: np.ndarray = positions.reshape(stack, width)
    return order


def _feedback(h: np.ndarray) -> tuple[mx.array, mx.array]:
    """What an error in column i adds to the target of column j > i, [stack, in, in], and what one costs, [stack, in].

    h = (U + 1) D (U + 1)ᵀ with U strictly upper triangular: rounding w_j + sum_i error_i U_ij in turn is GPTQ without
    an inverse (Chee et al. 2023, arXiv:2307.13304, show that the two are one), and leaves sum_j D_j error_j².
    """
    upper = np.linalg.cholesky(h[:, ::-1, ::-1])[:, ::-1, ::-1]  # h = upper upperᵀ
    diagonal = np.einsum("eii->ei", upper)
    unit = np.triu(upper / diagonal[:, None, :], 1)
    return mx.array(unit.astype(np.float32)), mx.array((diagonal**2).astype(np.float32))


def _product(a: mx.array, b: mx.array) -> mx.array:
    """a @ b. NumPy's BLAS is ten times as fast as MLX's on Linux CPUs."""
    return mx.array(np.array(a, copy=False) @ np.array(b, copy=False)) if on_cpu() else a @ b


def _round(
    columns: mx.array, feedback: mx.array, cost: mx.array, encoding: Encoding, grids: Grids | None
) -> tuple[mx.array, Grids]:
    """Round columns [stack, in, out] in turn; fits grids where none are given. Codes are float32 [stack, in, out]."""
    width, group, top = columns.shape[1], encoding.group_size, float((1 << encoding.bits) - 1)
    codes, errors, scales, biases = list[mx.array](), list[mx.array](), list[mx.array](), list[mx.array]()
    later = mx.arange(BLOCK)[:, None] > mx.arange(BLOCK)  # [j, i]: column j comes after i
    for start in range(0, width, group):
        end = start + group
        target = columns[:, start:end]
        if errors:
            target = target + _product(
                mx.swapaxes(feedback[:, :start, start:end], 1, 2), mx.concatenate(errors, axis=1)
            )
        if grids is None:
            _, scale, bias = mse(mx.contiguous(mx.swapaxes(target, 1, 2)), encoding, cost[:, start:end])
            assert scale is not None
            assert bias is not None
            scale, bias = scale[..., 0], bias[..., 0]
        else:
            scale, bias = grids.scales[:, start // group], grids.biases[:, start // group]
        scales.append(scale)
        biases.append(bias)
        step, offset = (x.astype(mx.float32)[:, None] for x in (scale, bias))
        inverse = mx.where(step == 0, 0.0, 1 / step)
        for at in range(start, end, BLOCK):
            block = target[:, at - start : at - start + BLOCK]
            if at > start:  # errors of this group's earlier blocks
                seen = mx.concatenate(errors[-((at - start) // BLOCK) :], axis=1)
                block = block + _product(mx.swapaxes(feedback[:, start:at, at : at + BLOCK], 1, 2), seen)
            own = mx.where(later.T, feedback[:, at : at + BLOCK, at : at + BLOCK], 0.0)
            found, made = [], []
            for i in range(BLOCK):
                code = mx.clip(mx.round((block[:, i : i + 1] - offset) * inverse), 0.0, top)
                error = columns[:, at + i : at + i + 1] - (code * step + offset)
                block = block + own[:, i, :, None] * error
                found.append(code)
                made.append(error)
                if i % 8 == 7:
                    mx.eval(block, found, made)
            codes.append(mx.concatenate(found, axis=1))
            errors.append(mx.concatenate(made, axis=1))
            mx.eval(codes[-1], errors[-1])
    return mx.concatenate(codes, axis=1), Grids(mx.stack(scales, axis=1), mx.stack(biases, axis=1))


def _decoded(codes: mx.array, grids: Grids, group: int) -> mx.array:
    """[stack, in, out]."""
    scales, biases = (mx.repeat(x.astype(mx.float32), group, axis=1) for x in grids)
    return codes * scales + biases


def _error(columns: mx.array, codes: mx.array, grids: Grids, h: mx.array, group: int) -> mx.array:
    """What a row's rounding does to the output: d H dᵀ, [stack, out]."""
    difference = _decoded(codes, grids, group) - columns
    found = mx.sum(difference * _product(h, difference), axis=1)
    mx.eval(found)
    return found


def _refit(columns: mx.array, codes: mx.array, grids: Grids, h: mx.array, encoding: Encoding) -> Grids:
    """Step 3: changes of all scales and biases of each row that leave the least output error, for these codes."""
    stack, width, out = columns.shape
    group = encoding.group_size
    groups = width // group
    left = columns - _decoded(codes, grids, group)
    basis = mx.concatenate([codes.reshape(stack, groups, group, out), mx.ones((stack, groups, group, out))], axis=1)
    # Group i of the basis is 0 outside its own columns, so only blocks of H take part in its products.
    blocks = h.reshape(stack, groups, group, groups, group)
    products = []
    for i in range(2 * groups):
        rows = blocks[:, i % groups].reshape(stack, group, width)
        through = _product(mx.swapaxes(rows, 1, 2), basis[:, i])  # H b, [stack, in, out]
        parts = through.reshape(stack, groups, group, out)
        products.append(mx.concatenate([mx.sum(parts * basis[:, :groups], axis=2), mx.sum(parts, axis=2)], axis=1))
        mx.eval(products[-1])
    pushed = _product(h, left).reshape(stack, groups, group, out)
    target = mx.concatenate([mx.sum(pushed * basis[:, :groups], axis=2), mx.sum(pushed, axis=2)], axis=1)
    matrix = np.array(mx.stack(products, axis=1)).transpose(0, 3, 1, 2).astype(np.float64)  # [stack, out, 2g, 2g]
    ridge = 1e-6 * np.trace(matrix, axis1=-2, axis2=-1)[..., None, None] / (2 * groups) + 1e-30
    solved = np.linalg.solve(matrix + ridge * np.eye(2 * groups), np.array(target).transpose(0, 2, 1)[..., None])
    change = mx.array(solved[..., 0].astype(np.float32).transpose(0, 2, 1))
    dtype = DTYPES[encoding.dtype]
    scales = (grids.scales.astype(mx.float32) + change[:, :groups]).astype(dtype)
    biases = (grids.biases.astype(mx.float32) + change[:, groups:]).astype(dtype)
    finite = mx.isfinite(scales) & mx.isfinite(biases)
    return Grids(mx.where(finite, scales, grids.scales), mx.where(finite, biases, grids.biases))


def _stored(codes: mx.array, grids: Grids, order: np.ndarray, encoding: Encoding, shape: tuple[int, ...]) -> Quantized:
    """Columns and groups back where they belong, packed."""
    back = np.argsort(order, axis=-1)
    values = mx.take_along_axis(codes, mx.array(back)[:, :, None], axis=1)
    packed = pack(mx.contiguous(mx.swapaxes(values, 1, 2)).astype(mx.uint8), encoding.bits)
    groups = np.argsort(order[:, :: encoding.group_size] // encoding.group_size, axis=-1)
    parts = [mx.take_along_axis(x, mx.array(groups)[:, :, None], axis=1) for x in grids]
    scales, biases = (mx.contiguous(mx.swapaxes(x, 1, 2)).reshape(*shape[:-1], -1) for x in parts)
    packed = packed.reshape(*shape[:-1], -1)
    mx.eval(packed, scales, biases)
    return packed, scales, biases
