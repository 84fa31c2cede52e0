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
   (a linear problem) and rounded to the stored type; then each code in turn is chosen anew, all others being as they
   are (coordinate descent: Behdin et al. 2023, arXiv:2309.01885). Both are done `PASSES` times, and kept by rows, where
   they leave less error.

All matrices of a stack are worked on at once; the only loops are over columns.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import mlx.core as mx
import numpy as np

from squizd.backend import on_cpu, on_cuda
from squizd.container.layout import Encoding
from squizd.errors import RecipeError
from squizd.quantizers import cuda
from squizd.quantizers.mse import Plan, mse
from squizd.quantizers.packing import DTYPES, Quantized, pack, short_grids

DAMPING: Final = 0.1  # of the mean square input, added to every one: limits how far weights move to make up for others
BLOCK: Final = 32  # columns between two matrix products
PASSES: Final = 4  # times step 3: the third and fourth add 0.03 dB together
SEARCH: Final = Plan(3, 0.6, (0.2,))  # 17 grids instead of 41: with step 3, the rest of the search is worth 0.02 dB
REFIT_BYTES: Final = 1 << 25  # of the equations of step 3 that are solved at once, which takes six times as much
REFIT_BYTES_GPU: Final = 1 << 30
THREADS: Final = min(8, os.cpu_count() or 1)  # each holds three matrices in float64


class Grids(NamedTuple):
    """Scales and biases as stored, [stack, groups, out], in the order in which groups are taken."""

    scales: mx.array
    biases: mx.array


def gptq(w: mx.array, encoding: Encoding, hessian: mx.array | None, short: bool = False) -> Quantized:
    """Quantize with error feedback.

    With `short` scales and biases have few digits, for an entropy code to gain by (`packing.short_grids`).

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
    h = hessian.astype(mx.float32).reshape(-1, width, width)
    if not bool(mx.all(mx.isfinite(h))):
        raise RecipeError("the Hessian holds NaN or infinity")
    h = _damped(h)
    order = _order(np.array(mx.diagonal(h, axis1=1, axis2=2)), group)
    by_column = mx.array(order.astype(np.int32))
    ordered = mx.take_along_axis(mx.take_along_axis(h, by_column[:, :, None], axis=1), by_column[:, None, :], axis=2)
    del h
    columns = mx.take_along_axis(mx.swapaxes(stack, 1, 2), by_column[:, :, None], axis=1)  # [stack, in, out]
    feedback, cost = cuda.factors(ordered) if on_cuda() else _feedback(np.array(ordered, copy=False))
    codes, grids = _round(columns, feedback, cost, encoding, short)
    error = _error(columns, codes, grids, ordered, group)

    def offer(new_codes: mx.array, new_grids: Grids) -> None:
        nonlocal codes, grids, error
        left = _error(columns, new_codes, new_grids, ordered, group)
        better = (left < error)[:, None, :]
        codes = mx.where(better, new_codes, codes)
        grids = Grids(*(mx.where(better, new, old) for new, old in zip(new_grids, grids, strict=True)))
        error = mx.minimum(left, error)
        mx.eval(codes, grids, error)

    for _ in range(PASSES):
        offer(codes, _refit(columns, codes, grids, ordered, encoding, short))
        offer(_descend(columns, codes, grids, ordered, encoding), grids)
    if PASSES:
        offer(codes, _refit(columns, codes, grids, ordered, encoding, short))
    return _stored(codes, grids, order, encoding, w.shape)


def shifted(w: mx.array, hessian: mx.array, pull: mx.array) -> mx.array:
    """Weights that put out for disturbed inputs x, as nearly as can be, what `w` does for the true inputs y.

    The least |w y - w' x|² + damping · |w' - w|², damped as in `gptq`, which then rounds them for the inputs x. (Li et
    al. 2025, arXiv:2504.02692, take this difference into account column by column.)

    Args:
        w: weights [..., out, in].
        hessian: sum over tokens of x xᵀ, [..., in, in].
        pull: sum over tokens of (y - x) xᵀ, in the same unit.

    Returns:
        float32, of w's shape, evaluated.
    """
    if on_cuda() and w.shape[-1] % cuda.BLOCK == 0:
        return _shifted_on_cuda(w, hessian, pull)
    wide, h, p = (np.array(x.astype(mx.float32), copy=False) for x in (w, hessian, pull))
    found = wide.reshape(-1, *w.shape[-2:]).copy()
    h, p = h.reshape(-1, *h.shape[-2:]), p.reshape(-1, *p.shape[-2:])

    def solve(i: int) -> None:
        symmetric = (h[i] + h[i].T).astype(np.float64) * 0.5
        mean = np.trace(symmetric) / len(symmetric)
        if mean > 0:
            symmetric[np.diag_indices(len(symmetric))] += DAMPING * mean
            found[i] += found[i] @ np.linalg.solve(symmetric, p[i].T.astype(np.float64)).T.astype(np.float32)

    _on_threads(solve, len(found))
    return mx.array(found).reshape(w.shape)


def _shifted_on_cuda(w: mx.array, hessian: mx.array, pull: mx.array) -> mx.array:
    wide, h, p = (x.astype(mx.float32).reshape(-1, *x.shape[-2:]) for x in (w, hessian, pull))
    mean = mx.mean(mx.diagonal(h, axis1=1, axis2=2), axis=-1)[:, None, None]
    change = cuda.solve_damped(_damped(h), mx.swapaxes(p, 1, 2) / mx.where(mean > 0, mean, 1.0))
    found = (wide + wide @ mx.swapaxes(change, 1, 2)).reshape(w.shape)
    mx.eval(found)
    return found


def _damped(h: mx.array) -> mx.array:
    """Symmetric, with mean 1 on the diagonal and `DAMPING` added; the identity where no input was ever seen."""
    h = (h + mx.swapaxes(h, 1, 2)) * 0.5
    mean = mx.mean(mx.diagonal(h, axis1=1, axis2=2), axis=-1)[:, None, None]
    seen = mean > 0
    identity = mx.eye(h.shape[-1])
    damped = mx.where(seen, h / mx.where(seen, mean, 1.0), identity) + DAMPING * identity
    mx.eval(damped)
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
    unit, cost = np.empty(h.shape, np.float32), np.empty(h.shape[:2], np.float32)

    def factor(i: int) -> None:
        upper = np.linalg.cholesky(h[i, ::-1, ::-1].astype(np.float64))[::-1, ::-1]  # h = upper upperᵀ
        diagonal = np.diagonal(upper).copy()
        upper /= diagonal
        unit[i], cost[i] = upper, diagonal**2
        np.fill_diagonal(unit[i], 0)

    _on_threads(factor, len(h))
    return mx.array(unit), mx.array(cost)


def _on_threads(work: Callable[[int], None], count: int) -> None:
    """`work(0)` to `work(count - 1)`; beside a GPU that waits for it, on several threads."""
    if on_cpu():
        for i in range(count):
            work(i)
        return
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(work, range(count)))


def _product(a: mx.array, b: mx.array) -> mx.array:
    """a @ b. NumPy's BLAS is ten times as fast as MLX's on Linux CPUs."""
    return mx.array(np.array(a, copy=False) @ np.array(b, copy=False)) if on_cpu() else a @ b


def _round(
    columns: mx.array, feedback: mx.array, cost: mx.array, encoding: Encoding, short: bool
) -> tuple[mx.array, Grids]:
    """Steps 1 and 2 for columns [stack, in, out] in turn. Codes are float32 [stack, in, out]."""
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
        _, scale, bias = mse(mx.contiguous(mx.swapaxes(target, 1, 2)), encoding, cost[:, start:end], SEARCH)
        assert scale is not None
        assert bias is not None
        scale, bias = scale[..., 0], bias[..., 0]
        if short:
            scale, bias = short_grids(scale, bias, top / 2, encoding.bits)
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
            if on_cuda():
                whole, missed = cuda.block(False, block, columns[:, at : at + BLOCK], own, step, offset, encoding.bits)
                codes.append(whole)
                errors.append(missed)
                continue
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


def _descend(columns: mx.array, codes: mx.array, grids: Grids, h: mx.array, encoding: Encoding) -> mx.array:
    """Step 3's codes [stack, in, out]: in turn the best of each column, for these grids and all other codes."""
    group, top = encoding.group_size, float((1 << encoding.bits) - 1)
    steps, offsets = (mx.repeat(x.astype(mx.float32), group, axis=1) for x in grids)
    decoded = codes * steps + offsets
    inverse = mx.where(steps == 0, 0.0, 1 / steps)
    pull = _product(h, decoded - columns)  # half the error's slope, for the columns that are still to come
    found = []
    for start in range(0, columns.shape[1], BLOCK):
        end = start + BLOCK
        own, block, changes = h[:, start:end, start:end], pull[:, :BLOCK], []
        if on_cuda():
            grid = steps[:, start : start + 1], offsets[:, start : start + 1]
            whole, change = cuda.block(True, block, decoded[:, start:end], own, *grid, encoding.bits)
            found.append(whole)
            changes.append(change)
        for i in range(0 if changes else BLOCK):
            step, offset, old, per = (x[:, start + i : start + i + 1] for x in (steps, offsets, decoded, inverse))
            best = old - block[:, i : i + 1] / own[:, i : i + 1, i : i + 1]
            code = mx.clip(mx.round((best - offset) * per), 0.0, top)
            changes.append(code * step + offset - old)
            block = block + own[:, i, :, None] * changes[-1]
            found.append(code)
            if i % 8 == 7:
                mx.eval(block, changes, found[-8:])
        pull = pull[:, BLOCK:]
        if end < columns.shape[1]:
            pull = pull + _product(h[:, end:, start:end], mx.concatenate(changes, axis=1))
        mx.eval(pull)
    return mx.concatenate(found, axis=1)


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


def _refit(columns: mx.array, codes: mx.array, grids: Grids, h: mx.array, encoding: Encoding, short: bool) -> Grids:
    """Step 3: scales and biases, all of a row together, that leave the least output error for these codes."""
    stack, width, out = columns.shape
    most = REFIT_BYTES if on_cpu() else REFIT_BYTES_GPU
    size = max(1, most // (4 * stack * (2 * width // encoding.group_size) ** 2))
    made = []
    for start in range(0, out, size):
        rows = slice(start, start + size)
        own = Grids(grids.scales[..., rows], grids.biases[..., rows])
        made.append(_refit_rows(columns[..., rows], codes[..., rows], own, h, encoding, short))
        mx.eval(made)
    return Grids(*(mx.concatenate(list(parts), axis=2) for parts in zip(*made, strict=True)))


def _refit_rows(
    columns: mx.array, codes: mx.array, grids: Grids, h: mx.array, encoding: Encoding, short: bool
) -> Grids:
    """The same for rows few enough that their systems of equations fit into memory."""
    stack, width, out = columns.shape
    group = encoding.group_size
    groups = width // group
    left = columns - _decoded(codes, grids, group)
    on_gpu = on_cuda() and 2 * groups <= cuda.LARGEST
    change = (cuda.refit if on_gpu else _changes)(codes, left, h, group)
    dtype = DTYPES[encoding.dtype]
    scales, biases = grids.scales.astype(mx.float32) + change[:, :groups], grids.biases + change[:, groups:]
    if short:
        scales, biases = short_grids(
            scales, biases, mx.mean(codes.reshape(stack, groups, group, out), axis=2), encoding.bits
        )
    scales, biases = scales.astype(dtype), biases.astype(dtype)
    finite = mx.isfinite(scales) & mx.isfinite(biases)
    return Grids(mx.where(finite, scales, grids.scales), mx.where(finite, biases, grids.biases))


def _changes(codes: mx.array, left: mx.array, h: mx.array, group: int) -> mx.array:
    """Those of scales and then biases, [stack, 2 groups, out], for what the codes leave of the weights."""
    stack, width, out = codes.shape
    groups = width // group
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
    matrices, targets = np.array(mx.stack(products, axis=1), copy=False), np.array(target, copy=False)
    solved = np.empty((stack, 2 * groups, out), np.float32)

    def solve(i: int) -> None:
        matrix = matrices[i].transpose(2, 0, 1).astype(np.float64)  # [out, 2g, 2g]
        diagonal = np.einsum("oii->oi", matrix)  # a view
        diagonal += 1e-6 * diagonal.sum(axis=-1, keepdims=True) / (2 * groups) + 1e-30
        solved[i] = np.linalg.solve(matrix, targets[i].T[..., None])[..., 0].T

    _on_threads(solve, stack)
    return mx.array(solved)


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
