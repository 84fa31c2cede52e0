"""Sums of products of a layer's inputs, over tokens, and what they promise of error feedback."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .backend import on_cpu, on_cuda
from .quantizers import cuda


def products(x: mx.array, y: mx.array | None = None) -> mx.array:
    """xᵀ y, or xᵀ x, for x and y [tokens, in]. NumPy's BLAS is ten times as fast as MLX's on Linux CPUs."""
    if not on_cpu():
        product = x.T @ (x if y is None else y)
        mx.eval(product)
        return product
    rows = np.array(x, copy=False)
    return mx.array(rows.T @ (rows if y is None else np.array(y, copy=False)))


def left_by_feedback(hessians: mx.array | npt.NDArray[np.float32]) -> float:
    """With Hessians [n, in, in] = U D Uᵀ: the sum of D over their diagonals', the share of output error that is left.

    On unseen text a little less is left of what a weighted fit leaves: 0.32 and 0.75 where this says 0.38 and 0.89.
    """
    h = np.array(hessians, copy=False)
    diagonal = np.einsum("eii->ei", h).astype(np.float64)
    left = 0.0
    if on_cuda() and h.shape[-1] % cuda.BLOCK == 0:
        damping = (0.01 * float(diagonal.mean()) + 1e-30) * mx.eye(h.shape[-1])
        left = float(cuda.factors(mx.array(h) + damping)[1].sum())
        h = h[:0]
    for one in h:
        damped = one[::-1, ::-1].astype(np.float64)
        damped[np.diag_indices(len(damped))] += 0.01 * diagonal.mean() + 1e-30
        left += float((np.diagonal(np.linalg.cholesky(damped)) ** 2).sum())
    return float(min(1.0, left / max(1.01 * diagonal.sum(), 1e-30)))
