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
"""

from __future__ import annotations

from itertools import product
from typing import Final, NamedTuple

import mlx.core as mx

from squizd.backend import on_cpu
from squizd.container.layout import Encoding
from squizd.errors import RecipeError
from squizd.quantizers.minmax import minmax
from squizd.quantizers.packing import DTYPES, Quantized, pack

# Weights worked on at once. About 12 float32 arrays of this size are alive: 12 MiB (they stay in a CPU's
# cache) or 48 MiB, beside the result, which exists twice for a moment. A row is never divided.
CPU_CHUNK: Final = 1 << 18
GPU_CHUNK: Final = 1 << 20


class Plan(NamedTuple):
    """Which grids steps 1 and 2 try; distances in steps of the min-max grid."""

    starts: int
    reach: float
    refinements: tuple[float, ...]


# 24 grids come within 0.02 dB of 400 on Gaussian weights. With importance few weights of a group count, so
# the best edges spread wider: 41 grids instead of 24 there gain 0.15 dB more at 4 bits.
PLAIN: Final = Plan(4, 0.5, (0.17,))
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


def mse(w: mx.array, encoding: Encoding, importance: mx.array | None = None) -> Quantized:
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
    chunk = max(1, (CPU_CHUNK if on_cpu() else GPU_CHUNK) // width)
    parts: list[tuple[mx.array, mx.array, mx.array]] = []
    for start in range(0, rows.shape[0], chunk):
        part = rows[start : start + chunk]
        weight = None
        if weights is not None:
            weight = weights[mx.arange(start, start + part.shape[0]) // rows_per_weight]
        parts.append(_fit(part, encoding, weight))
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


def _fit(w: mx.array, encoding: Encoding, weight: mx.array | None) -> tuple[mx.array, mx.array, mx.array]:
    """Steps 1 to 5 for rows [n, in] (weight alike); returns evaluated codes, scales and biases, n rows each."""
    group_size, bits, dtype = encoding.group_size, encoding.bits, DTYPES[encoding.dtype]
    codes, scales, biases = minmax(w, encoding)
    assert scales is not None
    assert biases is not None
    decoded = mx.dequantize(
        codes, scales.astype(mx.float32), biases.astype(mx.float32), group_size=group_size, bits=bits
    )
    groups = _Groups(_columns(w, group_size), bits, None if weight is None else _columns(weight, group_size))
    scale, bias = _search(groups, INSET[bits][group_size] if bits < 8 else None)
    stored = _Stored(groups, dtype, _columns(decoded, group_size), scales.reshape(1, -1), biases.reshape(1, -1))
    stored.offer_nearest(scales.reshape(1, -1), biases.reshape(1, -1))
    for step in range(-NEIGHBOURS[bits], NEIGHBOURS[bits] + 1):
        stored.offer(scale * (1 + step * mx.finfo(dtype).eps / 2), bias)
    # A group's codes fill whole words, so a group can keep its min-max codes as they are.
    fitted = pack(stored.codes().T, bits)
    codes = mx.where(stored.won.T, fitted, codes.reshape(fitted.shape)).reshape(codes.shape)
    result = codes, stored.scale.reshape(scales.shape), stored.bias.reshape(biases.shape)
    mx.eval(result)
    return result


def _columns(x: mx.array, group_size: int) -> mx.array:
    """[n, in] -> float32 [group_size, groups]: every group a column, in row order."""
    return mx.contiguous(x.astype(mx.float32).reshape(-1, group_size).T)


class _Groups:
    """The weights of many groups, each scaled by a power of two of its own to magnitudes of at most 4.

    The scaling is exact, so rounding behaves here as it does on the weights themselves, and no square
    over- or underflows. All arrays are float32, [group_size, groups] or [1, groups].
    """

    def __init__(self, w: mx.array, bits: int, weight: mx.array | None) -> None:
        self.levels = float((1 << bits) - 1)
        exponent = mx.max(mx.abs(w), axis=0, keepdims=True).view(mx.uint32) & 0x7F800000
        # 2**(127 - exponent), or the smallest normal number where that is below it.
        self.power = mx.maximum((254 << 23) - exponent.astype(mx.int32), 1 << 23).astype(mx.uint32).view(mx.float32)
        self.w = w * self.power
        self.weight, self.total = None, w.shape[0]
        if weight is not None:
            top = mx.max(weight, axis=0, keepdims=True)
            shares = mx.where(top > 0, weight / mx.where(top > 0, top, 1.0), 1.0)
            self.weight, self.total = shares / mx.sum(shares, axis=0, keepdims=True), 1
        self.mean = self.sum(self.w) * (1 / self.total)
        self.centred = self.w - self.mean
        mx.eval(self.power, self.w, self.weight, self.mean, self.centred)

    def sum(self, x: mx.array) -> mx.array:
        """Weighted sum of every group, [1, groups]; the weights themselves add up to `total`."""
        return mx.sum(x if self.weight is None else x * self.weight, axis=0, keepdims=True)

    def nearest(self, w: mx.array, inverse: mx.array, scale: mx.array, bias: mx.array) -> mx.array:
        """The codes, as float32, of the levels ``scale * q + bias`` nearest to w; inverse is 1 / scale."""
        # Truncation of x + 1/2: several times faster than mx.round on a CPU.
        codes = mx.clip((w - (bias - 0.5 * scale)) * inverse, 0.0, self.levels + 0.5)
        return codes.astype(mx.uint8).astype(mx.float32)

    def least_squares(self, codes: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """(gain, scale, bias): the best grid for the codes of the centred weights, and the error that it removes.

        Codes that are all alike, to rounding, give a scale and a gain near 0.
        """
        codes_sum = self.sum(codes)
        squares = self.sum(codes * codes)
        covariance = self.sum(codes * self.centred)
        mean = codes_sum * (1 / self.total)
        variance = mx.maximum(squares - codes_sum * mean, 1e-6 * squares + 1e-30)
        scale = covariance / variance
        return scale * covariance, scale, -scale * mean


def _search(groups: _Groups, inset: float | None) -> tuple[mx.array, mx.array]:
    """Steps 1 to 3, without 1 and 2 if inset is None: scale and bias for the centred weights."""
    lowest = mx.min(groups.centred, axis=0, keepdims=True)
    span = mx.max(groups.centred, axis=0, keepdims=True) - lowest
    step = mx.where(span > 0, span, 1.0) / groups.levels

    def fit(low: mx.array | float, high: mx.array | float) -> tuple[mx.array, mx.array, mx.array]:
        # Edges that pass each other are no grid: at 2 bits three steps are all there are.
        scale = mx.maximum(step * (1 - (low + high) * (1 / groups.levels)), 0.1 * step)
        return groups.least_squares(groups.nearest(groups.centred, 1 / scale, scale, lowest + step * low))

    best: tuple[mx.array, ...] = tuple(mx.full(step.shape, x) for x in (-1.0, 0.0, 0.0))  # gain, low, high

    def attempt(low: mx.array | float, high: mx.array | float) -> None:
        nonlocal best
        gain, _, _ = fit(low, high)
        better = gain > best[0]
        best = tuple(mx.where(better, new, old) for new, old in zip((gain, low, high), best, strict=True))
        mx.eval(best)  # one attempt's arrays at a time

    if inset is not None:
        plan = PLAIN if groups.weight is None else WEIGHTED
        offsets = [inset - plan.reach + 2 * plan.reach * i / (plan.starts - 1) for i in range(plan.starts)]
        for low, high in product(offsets, offsets):
            attempt(low, high)
        for distance in plan.refinements:
            _, centre_low, centre_high = best
            for i, j in product((-distance, 0.0, distance), repeat=2):
                if i or j:
                    attempt(centre_low + i, centre_high + j)
    _, scale, bias = fit(best[1], best[2])
    for _ in range(ROUNDS):
        codes = groups.nearest(groups.centred, 1 / mx.maximum(scale, 1e-30), scale, bias)
        _, scale, bias = groups.least_squares(codes)
        mx.eval(scale, bias)
    return scale, bias


class _Stored:
    """Steps 4 and 5: the best block as stored, at first the min-max one. [1, groups] each.

    `decoded` [group_size, groups] is what the min-max block decodes to.
    """

    def __init__(self, groups: _Groups, dtype: mx.Dtype, decoded: mx.array, scale: mx.array, bias: mx.array) -> None:
        self.groups, self.dtype = groups, dtype
        self.scale, self.bias = scale, bias
        error = self._error(decoded * groups.power)
        self.error = mx.maximum(error * (1 - MARGIN) - MARGIN_ABSOLUTE, 0.0)
        self.won = mx.zeros(error.shape, dtype=mx.bool_)
        mx.eval(self.error)

    def offer(self, scale: mx.array, bias: mx.array) -> None:
        """Step 4 for a grid of the centred weights: round the scale, then refit the bias to it and round that."""
        groups = self.groups
        stored_scale = self._round(scale)
        codes = self._nearest(scale := self._scaled(stored_scale), bias + groups.mean)
        stored_bias = self._round(groups.mean - scale * groups.sum(codes) * (1 / groups.total))
        self.offer_nearest(stored_scale, stored_bias)

    def offer_nearest(self, stored_scale: mx.array, stored_bias: mx.array) -> None:
        """Step 5: keep this grid, with the nearest codes, where it leaves less error."""
        scale, bias = self._scaled(stored_scale), self._scaled(stored_bias)
        error = self._error(self._nearest(scale, bias) * scale + bias)
        better = error < self.error
        self.error = mx.where(better, error, self.error)
        self.scale = mx.where(better, stored_scale, self.scale)
        self.bias = mx.where(better, stored_bias, self.bias)
        self.won = self.won | better
        mx.eval(self.error, self.scale, self.bias, self.won)

    def codes(self) -> mx.array:
        """Nearest codes of the best grid, [group_size, groups]; meaningless where the min-max block won."""
        return self._nearest(self._scaled(self.scale), self._scaled(self.bias))

    def _error(self, decoded: mx.array) -> mx.array:
        difference = decoded - self.groups.w
        return self.groups.sum(difference * difference)

    def _nearest(self, scale: mx.array, bias: mx.array) -> mx.array:
        return self.groups.nearest(self.groups.w, mx.where(scale == 0, 0.0, 1 / scale), scale, bias)

    def _round(self, x: mx.array) -> mx.array:
        """A scale or bias in the groups' own scaling, as it is stored."""
        return (x / self.groups.power).astype(self.dtype)

    def _scaled(self, stored: mx.array) -> mx.array:
        """And back."""
        return stored.astype(mx.float32) * self.groups.power
