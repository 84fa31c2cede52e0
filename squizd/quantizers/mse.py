"""Affine blocks fitted for least squared error: the method ``mse`` ("asymmetric MSE").

Knows how to choose scale and bias of every group. Knows nothing about where importance comes from, nor
how blocks are decoded: a fitted block is an ordinary affine block.

For fixed codes the best grid ``scale * q + bias`` is a linear least squares fit; for a fixed grid the
best code is the nearest level. Alternating the two never gets worse, but stops at the minimum next to
where it starts (Lloyd's algorithm on a uniform grid; llama.cpp's ``make_qkx2_quants`` does the same from
starts that shrink both edges together). So, for every group:

1. try `starts` x `starts` grids whose two edges move independently, each by up to `reach` steps of the
   min-max grid around `INSET`, which is where the best edges of most groups lie;
2. move the best start by ever smaller `refinements`, in eight directions;
3. alternate rounding and least squares `ROUNDS` times;
4. round scale and bias to the stored type, neighbouring scales included, and choose the codes again for
   the grid *as stored*;
5. keep that only if its weighted squared error, as stored, is below that of the min-max block.

A start is ranked by the error that its first least squares fit would leave, which takes three sums: for
centred weights u, ``mean u^2 - cov(q, u)^2 / var(q)``. Groups are columns, because MLX sums over the first
axis twice as fast as over the last on a CPU. Operations are few, elementwise and not compiled: fusing
``scale * q + bias`` into one rounding would break the comparison in step 5.

On Linux CPUs squizd's kernels do the same operations in the same order (`kernels/src/fit.h`), with the same bits.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from typing import Any, Final, NamedTuple

import mlx.core as mx
import numpy as np

from squizd import kernels
from squizd.backend import on_cpu, on_cuda
from squizd.container.layout import Encoding
from squizd.errors import RecipeError
from squizd.quantizers import cuda_fit
from squizd.quantizers.minmax import minmax
from squizd.quantizers.packing import DTYPES, Quantized, pack

# Weights worked on at once. About 12 float32 arrays of this size are alive, beside the result, which exists twice for a
# moment. A row is never divided by MLX. NumPy's pieces stay in a CPU's cache, below the size at which malloc asks the
# system for every array: both cost several times the arithmetic.
CPU_CHUNK: Final = 1 << 18
CPU_PIECE: Final = 3 << 13
GPU_CHUNK: Final = 1 << 22  # a GPU's kernels are started one by one
THREADS: Final = min(4, os.cpu_count() or 1)  # on a CPU, beside MLX's own

Array = Any  # of NumPy or MLX, float32
_Fitted = tuple[Array, Array, Array, Array]


class Plan(NamedTuple):
    """Which grids steps 1 and 2 try; distances in steps of the min-max grid."""

    starts: int
    reach: float
    refinements: tuple[float, ...]


# 17 grids come within 0.03 dB of 400 on Gaussian weights. With importance few weights of a group count, so
# the best edges spread wider: 41 grids instead of 24 there gain 0.15 dB more at 4 bits.
PLAIN: Final = Plan(3, 0.45, (0.2,))
WEIGHTED: Final = Plan(5, 0.9, (0.22, 0.11))
ROUNDS: Final = 2

# Steps of the min-max grid from the smallest (largest) weight inward to the best lower (upper) edge, by bits
# and group size: means of a 17 x 17 search on Gaussian, Laplace and trained weights, which agree within 0.1.
INSET: Final = {
    2: {32: 0.25, 64: 0.50, 128: 0.62},
    3: {32: 0.10, 64: 0.42, 128: 0.70},
    4: {32: -0.10, 64: 0.20, 128: 0.50},
    5: {32: -0.20, 64: 0.00, 128: 0.23},
    6: {32: -0.26, 64: -0.10, 128: 0.05},
}
# Neighbours of the stored scale on either side that step 4 tries. At 8 bits half a unit in the last place of
# a bf16 scale moves the far edge by half a step, which outweighs steps 1 and 2: they are left out there.
NEIGHBOURS: Final = {2: 0, 3: 0, 4: 0, 5: 1, 6: 1, 8: 3}

# A fitted block must beat min-max by more than float32 sums over 128 terms can be wrong.
MARGIN: Final = 2.0**-15
MARGIN_ABSOLUTE: Final = 1e-30


def mse(w: mx.array, encoding: Encoding, importance: mx.array | None = None, search: Plan | None = None) -> Quantized:
    """Fit affine blocks to the least squared error, weighted by importance.

    On every group, ``sum importance * (decoded - w)**2`` is at most what `minmax` leaves for the same
    encoding, for decoding in float32 with scales and biases as stored. A group whose importance is zero
    throughout is fitted without weights. The same input gives the same bytes on the same device.

    Args:
        w: weights [..., out, in], f32, f16 or bf16, finite; `in` a multiple of the group size.
        encoding: an affine encoding.
        importance: weight of each input channel's squared error, such as the mean square of its
            activations: [in] for all, or [..., in] with the leading dimensions of `w` (one row per
            expert). Finite, not negative, any unit.
        search: which grids to try; None: `PLAIN`, or `WEIGHTED` with importance.

    Returns:
        codes (uint32, as `mx.quantize` packs them), scales and biases (`encoding.dtype`), evaluated.

    Raises:
        RecipeError: the encoding is not affine, or importance has the wrong shape or values.
    """
    if encoding.mode != "affine":
        raise RecipeError(
            f"mse fits affine blocks only, {encoding.mode} has no scale and bias to fit",
            hint=f"use the method minmax for {encoding.mode}",
        )
    rows, width = w.reshape(-1, w.shape[-1]), w.shape[-1]
    weights, rows_per_weight = _importance(w, importance)
    plan = search or (PLAIN if weights is None else WEIGHTED)
    chunk = max(1, (CPU_CHUNK if on_cpu() else GPU_CHUNK) // width)
    parts: list[tuple[mx.array, mx.array, mx.array]] = []
    waiting: deque[tuple[Quantized, Future[_Fitted]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, rows.shape[0], chunk):
            part, weight = rows[start : start + chunk], None
            if on_cpu() and kernels.native() is not None:
                parts.append(_fit_natively(part, encoding, plan, weights, start, rows_per_weight))
                continue
            if on_cuda():
                parts.append(_fit_on_cuda(part, encoding, plan, weights, start, rows_per_weight))
                continue
            if weights is not None:
                weight = weights[mx.arange(start, start + part.shape[0]) // rows_per_weight]
            blocks, columns = _prepared(part, encoding, weight)
            if not on_cpu():
                parts.append(_merged(blocks, _fit(mx, encoding, plan, *columns), encoding))
                continue
            numbers = [None if x is None else np.array(x, copy=False) for x in columns]
            waiting.append((blocks, pool.submit(_fit_on_cpu, encoding, plan, *numbers)))
            if len(waiting) > THREADS:
                blocks, fitted = waiting.popleft()
                parts.append(_merged(blocks, fitted.result(), encoding))
        parts += [_merged(blocks, fitted.result(), encoding) for blocks, fitted in waiting]
    codes, scales, biases = (mx.concatenate(list(part)).reshape(*w.shape[:-1], -1) for part in zip(*parts, strict=True))
    mx.eval(codes, scales, biases)
    return codes, scales, biases


def _importance(w: mx.array, importance: mx.array | None) -> tuple[mx.array | None, int]:
    """Check importance; returns it as float32 [sets, in] and how many rows of `w` share a set."""
    if importance is None:
        return None, 1
    per_expert = (*w.shape[:-2], w.shape[-1])
    if importance.shape not in (w.shape[-1:], per_expert):
        raise RecipeError(f"importance has shape {importance.shape}, expected {w.shape[-1:]} or {per_expert}")
    weights = importance.astype(mx.float32).reshape(-1, w.shape[-1])
    if not bool(mx.all(mx.isfinite(weights) & (weights >= 0))):
        raise RecipeError("importance holds negative numbers, NaN or infinity")
    return weights, w.size // w.shape[-1] // weights.shape[0]


def _prepared(w: mx.array, encoding: Encoding, weight: mx.array | None) -> tuple[Quantized, list[mx.array | None]]:
    """Min-max blocks of rows [n, in]; and as evaluated columns what `_fit` takes."""
    codes, scales, biases = minmax(w, encoding)
    assert scales is not None
    assert biases is not None
    size = encoding.group_size
    decoded = mx.dequantize(
        codes, scales.astype(mx.float32), biases.astype(mx.float32), group_size=size, bits=encoding.bits
    )
    columns: list[mx.array | None] = [_columns(w, size), _columns(decoded, size), _columns(scales, 1)]
    columns += [_columns(biases, 1), None if weight is None else _columns(weight, size)]
    mx.eval([x for x in columns if x is not None])
    return (codes, scales, biases), columns


def _fit_natively(
    w: mx.array, encoding: Encoding, plan: Plan, weights: mx.array | None, start: int, rows_per_weight: int
) -> tuple[mx.array, mx.array, mx.array]:
    """`_fit` by the kernels, for the rows of `w` from row `start` on."""
    group_size, bits, dtype = encoding.group_size, encoding.bits, DTYPES[encoding.dtype]
    codes, scales, biases = minmax(w, encoding)
    assert scales is not None
    assert biases is not None
    wide = w.astype(mx.float32), scales.astype(mx.float32), biases.astype(mx.float32)
    decoded = mx.dequantize(codes, *wide[1:], group_size=group_size, bits=bits)
    mx.eval(wide, decoded)
    inset = INSET.get(bits, {}).get(group_size)
    found = [np.array(x) for x in (codes, *wide[1:])]
    kernels.native().fit(  # type: ignore[union-attr]
        np.array(mx.contiguous(wide[0]), copy=False), np.array(decoded, copy=False), *found,
        None if weights is None else np.array(weights, copy=False), start, rows_per_weight, group_size, bits,
        encoding.dtype, [] if inset is None else _offsets(plan, inset), [] if inset is None else list(plan.refinements),
        ROUNDS, _factors(bits, dtype), 1 - MARGIN,
    )  # fmt: skip
    codes, scales, biases = (mx.array(x) for x in found)
    result = codes, scales.astype(dtype), biases.astype(dtype)
    mx.eval(result)
    return result


def _fit_on_cuda(
    w: mx.array, encoding: Encoding, plan: Plan, weights: mx.array | None, start: int, rows_per_weight: int
) -> tuple[mx.array, mx.array, mx.array]:
    """`_fit` in a CUDA kernel, for the rows of `w` from row `start` on."""
    codes, scales, biases = minmax(w, encoding)
    assert scales is not None
    assert biases is not None
    inset = INSET.get(encoding.bits, {}).get(encoding.group_size)
    edges, moves = ([], ()) if inset is None else (_offsets(plan, inset), plan.refinements)
    factors = _factors(encoding.bits, DTYPES[encoding.dtype])
    found = cuda_fit.fit(
        w, (codes, scales, biases), encoding.bits, encoding.group_size, weights, start, rows_per_weight,
        [MARGIN, MARGIN_ABSOLUTE, *edges, *moves, *factors], (len(edges), len(moves), len(factors), ROUNDS),
    )  # fmt: skip
    mx.eval(found)
    return found


def _offsets(plan: Plan, inset: float) -> list[float]:
    """Step 1: where edges are tried."""
    return [inset - plan.reach + 2 * plan.reach * i / (plan.starts - 1) for i in range(plan.starts)]


def _factors(bits: int, dtype: mx.Dtype) -> list[float]:
    """Step 4: neighbours of a scale, as multiples of it."""
    return [1 + step * mx.finfo(dtype).eps / 2 for step in range(-NEIGHBOURS[bits], NEIGHBOURS[bits] + 1)]


def _columns(x: mx.array, group_size: int) -> mx.array:
    """[n, in] -> float32 [group_size, groups]: every group a column, in row order."""
    return mx.contiguous(x.astype(mx.float32).reshape(-1, group_size).T)


def _fit_on_cpu(encoding: Encoding, plan: Plan, *columns: Any) -> _Fitted:
    """`_fit` in NumPy, which computes several times as fast as MLX there if its arrays are small enough."""
    step = max(1, CPU_PIECE // encoding.group_size)
    parts = []
    with np.errstate(all="ignore"):  # as in MLX: what is not finite loses
        for start in range(0, columns[0].shape[1], step):
            piece = (None if x is None else np.ascontiguousarray(x[:, start : start + step]) for x in columns)
            parts.append(_fit(np, encoding, plan, *piece))
    won, codes, scale, bias = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    return won, codes, scale, bias


def _fit(
    xp: Any, encoding: Encoding, plan: Plan, w: Array, decoded: Array, scales: Array, biases: Array, weight: Array
) -> _Fitted:
    """Steps 1 to 5: where a fitted block won, its codes, scale and bias.

    w, what min-max blocks decode to, and importance or None: float32 [group_size, groups]; scales and biases of those
    blocks: [1, groups]; all arrays of `xp`, which is NumPy or MLX.
    """
    bits, size = encoding.bits, encoding.group_size
    groups = _Groups(xp, w, bits, weight)
    scale, bias = _search(groups, plan, INSET[bits][size] if bits < 8 else None)
    stored = _Stored(groups, encoding.dtype, decoded, scales, biases)
    stored.offer_nearest(scales, biases)
    for factor in _factors(bits, DTYPES[encoding.dtype]):
        stored.offer(scale * factor, bias)
    return stored.won, stored.codes(), stored.scale, stored.bias


def _merged(blocks: Quantized, fitted: _Fitted, encoding: Encoding) -> tuple[mx.array, mx.array, mx.array]:
    """Fitted blocks where they won, min-max blocks where not; evaluated."""
    codes, scales, biases = blocks
    assert scales is not None
    assert biases is not None
    won, values, scale, bias = (mx.array(x) for x in fitted)
    # A group's codes fill whole words, so a group can keep its min-max codes as they are.
    packed = pack(values.astype(mx.uint8).T, encoding.bits)
    result = (
        mx.where(won.T, packed, codes.reshape(packed.shape)).reshape(codes.shape),
        scale.astype(scales.dtype).reshape(scales.shape),
        bias.astype(biases.dtype).reshape(biases.shape),
    )
    mx.eval(result)
    return result


class _Groups:
    """The weights of many groups, each scaled by a power of two of its own to magnitudes of at most 4.

    The scaling is exact, so rounding behaves here as it does on the weights themselves, and no square
    over- or underflows. All arrays are float32, [group_size, groups] or [1, groups], of NumPy or MLX (`xp`).
    """

    def __init__(self, xp: Any, w: Array, bits: int, weight: Array) -> None:
        self.xp, self.eval = xp, mx.eval if xp is mx else _evaluated
        self.levels = float((1 << bits) - 1)
        exponent = xp.max(xp.abs(w), axis=0, keepdims=True).view(xp.uint32) & 0x7F800000
        # 2**(127 - exponent), or the smallest normal number where that is below it.
        self.power = xp.maximum((254 << 23) - exponent.astype(xp.int32), 1 << 23).astype(xp.uint32).view(xp.float32)
        self.w = w * self.power
        self.weight, self.total = None, w.shape[0]
        if weight is not None:
            top = xp.max(weight, axis=0, keepdims=True)
            shares = xp.where(top > 0, weight / xp.where(top > 0, top, 1.0), 1.0)
            self.weight, self.total = shares / xp.sum(shares, axis=0, keepdims=True), 1
        self.mean = self.sum(self.w) * (1 / self.total)
        self.centred = self.w - self.mean
        self.eval(self.power, self.w, self.weight, self.mean, self.centred)

    def sum(self, x: Array) -> Array:
        """Weighted sum of every group, [1, groups]; the weights themselves add up to `total`."""
        return self.xp.sum(x if self.weight is None else x * self.weight, axis=0, keepdims=True)

    def nearest(self, w: Array, inverse: Array, scale: Array, bias: Array) -> Array:
        """The codes, as float32, of the levels ``scale * q + bias`` nearest to w; inverse is 1 / scale."""
        codes = w - (bias - 0.5 * scale)
        codes *= inverse
        if self.xp is mx:
            return mx.floor(mx.clip(codes, 0.0, self.levels + 0.5))
        np.maximum(codes, np.float32(0), out=codes)
        np.minimum(codes, np.float32(self.levels + 0.5), out=codes)
        return np.floor(codes, out=codes)

    def dot(self, a: Array, b: Array) -> Array:
        """Sum of products of every group, [1, groups]."""
        return mx.sum(a * b, axis=0, keepdims=True) if self.xp is mx else np.einsum("ij,ij->j", a, b)[None]

    def least_squares(self, codes: Array) -> tuple[Array, Array, Array]:
        """(gain, scale, bias): the best grid for the codes of the centred weights, and the error that it removes.

        Codes that are all alike, to rounding, give a scale and a gain near 0.
        """
        weighted = codes if self.weight is None else codes * self.weight
        codes_sum = self.xp.sum(weighted, axis=0, keepdims=True)
        squares, covariance = self.dot(weighted, codes), self.dot(weighted, self.centred)
        mean = codes_sum * (1 / self.total)
        variance = self.xp.maximum(squares - codes_sum * mean, 1e-6 * squares + 1e-30)
        scale = covariance / variance
        return scale * covariance, scale, -scale * mean


def _evaluated(*arrays: Any) -> None:
    """NumPy's arrays always are."""


def _search(groups: _Groups, plan: Plan, inset: float | None) -> tuple[Array, Array]:
    """Steps 1 to 3, without 1 and 2 if inset is None: scale and bias for the centred weights."""
    xp = groups.xp
    lowest = xp.min(groups.centred, axis=0, keepdims=True)
    span = xp.max(groups.centred, axis=0, keepdims=True) - lowest
    step = xp.where(span > 0, span, 1.0) / groups.levels

    def fit(low: Any, high: Any) -> tuple[Array, Array, Array]:
        # Edges that pass each other are no grid: at 2 bits three steps are all there are.
        scale = xp.maximum(step * (1 - (low + high) * (1 / groups.levels)), 0.1 * step)
        return groups.least_squares(groups.nearest(groups.centred, 1 / scale, scale, lowest + step * low))

    best: tuple[Array, ...] = tuple(xp.full(step.shape, x, dtype=xp.float32) for x in (-1.0, 0.0, 0.0))

    def attempt(low: Any, high: Any) -> None:  # best: gain, low, high
        nonlocal best
        gain, _, _ = fit(low, high)
        better = gain > best[0]
        best = tuple(xp.where(better, new, old) for new, old in zip((gain, low, high), best, strict=True))
        best = tuple(x.astype(xp.float32) for x in best)
        groups.eval(*best)  # one attempt's arrays at a time

    if inset is not None:
        for low, high in product(_offsets(plan, inset), repeat=2):
            attempt(low, high)
        for distance in plan.refinements:
            _, centre_low, centre_high = best
            for i, j in product((-distance, 0.0, distance), repeat=2):
                if i or j:
                    attempt(centre_low + i, centre_high + j)
    _, scale, bias = fit(best[1], best[2])
    for _ in range(ROUNDS):
        codes = groups.nearest(groups.centred, 1 / xp.maximum(scale, 1e-30), scale, bias)
        _, scale, bias = groups.least_squares(codes)
        groups.eval(scale, bias)
    return scale, bias


class _Stored:
    """Steps 4 and 5: the best block as stored, at first the min-max one. [1, groups] each, float32.

    `decoded` [group_size, groups] is what the min-max block decodes to; `dtype` is the stored type.
    """

    def __init__(self, groups: _Groups, dtype: str, decoded: Array, scale: Array, bias: Array) -> None:
        self.groups, self.dtype = groups, dtype
        self.scale, self.bias = scale, bias
        error = self._error(decoded * groups.power)
        self.error = groups.xp.maximum(error * (1 - MARGIN) - MARGIN_ABSOLUTE, 0.0)
        self.won = groups.xp.zeros(error.shape, dtype=groups.xp.bool_)
        groups.eval(self.error)

    def offer(self, scale: Array, bias: Array) -> None:
        """Step 4 for a grid of the centred weights: round the scale, then refit the bias to it and round that."""
        groups = self.groups
        stored_scale = self._round(scale)
        scale = stored_scale * groups.power
        codes = self._nearest(scale, bias + groups.mean)
        self.offer_nearest(stored_scale, self._round(groups.mean - scale * groups.sum(codes) * (1 / groups.total)))

    def offer_nearest(self, stored_scale: Array, stored_bias: Array) -> None:
        """Step 5: keep this grid, with the nearest codes, where it leaves less error."""
        groups, where = self.groups, self.groups.xp.where
        scale, bias = stored_scale * groups.power, stored_bias * groups.power
        error = self._error(self._nearest(scale, bias) * scale + bias)
        better = error < self.error
        self.error = where(better, error, self.error)
        self.scale = where(better, stored_scale, self.scale)
        self.bias = where(better, stored_bias, self.bias)
        self.won = self.won | better
        groups.eval(self.error, self.scale, self.bias, self.won)

    def codes(self) -> Array:
        """Nearest codes of the best grid, [group_size, groups]; meaningless where the min-max block won."""
        return self._nearest(self.scale * self.groups.power, self.bias * self.groups.power)

    def _error(self, decoded: Array) -> Array:
        difference = decoded - self.groups.w
        return self.groups.sum(difference * difference)

    def _nearest(self, scale: Array, bias: Array) -> Array:
        return self.groups.nearest(self.groups.w, self.groups.xp.where(scale == 0, 0.0, 1 / scale), scale, bias)

    def _round(self, x: Array) -> Array:
        """A scale or bias in the groups' own scaling, as it is stored."""
        found = x / self.groups.power
        if self.groups.xp is mx:
            return found.astype(DTYPES[self.dtype]).astype(mx.float32)
        if self.dtype == "bf16":  # NumPy has none: to nearest, ties to even
            found = found.view(np.uint32)
            return ((found + 0x7FFF + ((found >> 16) & 1)) & 0xFFFF0000).view(np.float32)
        return found.astype(np.float16).astype(np.float32) if self.dtype == "f16" else found
