"""gptq against a naive float64 implementation, and the properties that it promises."""

from __future__ import annotations

import importlib

import mlx.core as mx
import numpy as np
import pytest

from squizd.container import frames
from squizd.container.layout import Encoding
from squizd.errors import RecipeError
from squizd.quantizers import quantize, shifted

module = importlib.import_module("squizd.quantizers.gptq")  # the package has the function under that name


def problem(stack: int, out: int, width: int, seed: int = 0) -> tuple[mx.array, mx.array]:
    """Weights, and Hessians of inputs with very unequal and correlated channels."""
    source = np.random.default_rng(seed)
    w = source.normal(size=(stack, out, width))
    mix = source.normal(size=(stack, width, width)) / width**0.5 + np.eye(width)
    x = source.normal(size=(stack, 3 * width, width)) * np.exp(source.normal(size=(stack, 1, width))) @ mix
    h = np.swapaxes(x, 1, 2) @ x
    return mx.array(w.astype(np.float32)).astype(mx.bfloat16), mx.array(h.astype(np.float32))


def decode(parts: tuple[mx.array, mx.array | None, mx.array | None], e: Encoding) -> np.ndarray:
    codes, scales, biases = parts
    assert scales is not None
    assert biases is not None
    return np.array(mx.dequantize(codes, scales.astype(mx.float32), biases.astype(mx.float32),
                                  group_size=e.group_size, bits=e.bits)).astype(np.float64)  # fmt: skip


def output_error(w: mx.array, decoded: np.ndarray, h: mx.array) -> np.ndarray:
    d = decoded - np.array(w.astype(mx.float32)).astype(np.float64)
    return np.einsum("eoi,eij,eoj->e", d, np.array(h).astype(np.float64), d)


def naive(w: np.ndarray, h: np.ndarray, order: np.ndarray, scale: np.ndarray, bias: np.ndarray, top: int) -> np.ndarray:
    """Algorithm 1 of arXiv:2210.17323 on one matrix [out, in], by the inverse Hessian; grids [out, in] by column."""
    w, inverse = w.copy(), np.linalg.inv(h)
    decoded = np.zeros_like(w)
    left = list(order)
    for j in order:
        code = np.clip(np.round((w[:, j] - bias[:, j]) / scale[:, j]), 0, top)
        decoded[:, j] = code * scale[:, j] + bias[:, j]
        error = (w[:, j] - decoded[:, j]) / inverse[j, j]
        left.remove(j)
        w[:, left] -= error[:, None] * inverse[j, left]
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]  # j leaves the problem
    return decoded


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 32)])
def test_codes_are_those_of_the_naive_algorithm_on_the_same_grids(
    bits: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PASSES", 0)
    w, h = problem(2, 24, 128)
    e = Encoding("affine", "bf16", bits, group)
    parts = quantize(w, e, "gptq", h)
    scales, biases = (np.repeat(np.array(p.astype(mx.float32)), group, axis=-1) for p in parts[1:] if p is not None)
    h64 = np.array(module._damped(h)).astype(np.float64)
    order = module._order(np.einsum("eii->ei", h64), group)
    found = decode(parts, e)
    w64 = np.array(w.astype(mx.float32)).astype(np.float64)
    for i in range(2):
        wanted = naive(
            w64[i], h64[i], order[i], scales[i].astype(np.float64), biases[i].astype(np.float64), 2**bits - 1
        )
        # float32 decides a few ties differently, and what follows in those rows differs with them
        rows = np.isclose(found[i], wanted, atol=1e-5).all(axis=1)
        assert rows.mean() > 0.9
        np.testing.assert_allclose(
            output_error(w[i : i + 1], found[i : i + 1], h[i : i + 1]),
            output_error(w[i : i + 1], wanted[None], h[i : i + 1]), rtol=0.02,
        )  # fmt: skip


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_leaves_much_less_output_error_than_a_weighted_fit(bits: int) -> None:
    w, h = problem(3, 64, 256)
    e = Encoding("affine", "bf16", bits, 64)
    importance = mx.diagonal(h, axis1=1, axis2=2)
    errors = {m: output_error(w, decode(quantize(w, e, m, i), e), h)
              for m, i in (("minmax", None), ("mse", importance), ("gptq", h))}  # fmt: skip
    assert (errors["gptq"] < 0.6 * errors["mse"]).all()
    assert (errors["gptq"] < 0.5 * errors["minmax"]).all()


def test_refitted_grids_never_make_a_row_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = problem(2, 32, 128)
    e = Encoding("affine", "bf16", 3, 64)
    refitted = output_error(w, decode(quantize(w, e, "gptq", h), e), h)
    monkeypatch.setattr(module, "PASSES", 0)
    assert (refitted < output_error(w, decode(quantize(w, e, "gptq", h), e), h)).all()


def descended(w: np.ndarray, h: np.ndarray, found: np.ndarray, s: np.ndarray, b: np.ndarray, top: int) -> np.ndarray:
    """One pass over the columns of a matrix [out, in]: each the best of all levels, the others as they are."""
    found = found.copy()
    for j in range(w.shape[1]):
        levels = np.arange(top + 1)[:, None] * s[:, j] + b[:, j]  # [levels, out]
        others = (found - w) @ h[:, j] - (found[:, j] - w[:, j]) * h[j, j]
        error = h[j, j] * (levels - w[:, j]) ** 2 + 2 * (levels - w[:, j]) * others
        found[:, j] = np.take_along_axis(levels, error.argmin(axis=0)[None], axis=0)[0]
    return found


@pytest.mark.parametrize("bits", [2, 4])
def test_descent_is_that_of_a_naive_search_over_levels(bits: int) -> None:
    w, h = problem(1, 24, 128)
    e = Encoding("affine", "bf16", bits, 32)
    codes, scales, biases = quantize(w, e, "mse")
    assert scales is not None
    assert biases is not None
    decoded = decode((codes, scales, biases), e)
    steps, offsets = (
        np.repeat(np.array(x.astype(mx.float32)).astype(np.float64), 32, axis=-1) for x in (scales, biases)
    )
    h64 = np.array(module._damped(mx.array(h))).astype(np.float64)
    columns = mx.swapaxes(w.astype(mx.float32), 1, 2)
    start = mx.array(np.round((decoded - offsets) / steps).astype(np.float32).swapaxes(1, 2))
    grids = module.Grids(mx.swapaxes(scales, 1, 2), mx.swapaxes(biases, 1, 2))
    found = module._descend(columns, start, grids, mx.array(h64.astype(np.float32)), e)
    w64 = np.array(w.astype(mx.float32)).astype(np.float64)
    wanted = descended(w64[0], h64[0], decoded[0], steps[0], offsets[0], 2**bits - 1)
    rows = np.isclose(np.array(found).swapaxes(1, 2)[0] * steps[0] + offsets[0], wanted, atol=1e-5).all(axis=1)
    assert rows.mean() > 0.9  # float32 decides a few ties differently


def test_uncorrelated_inputs_leave_nothing_to_feed_back() -> None:
    w, _ = problem(2, 16, 64)
    e = Encoding("affine", "bf16", 4, 32)
    h = mx.broadcast_to(mx.eye(64), (2, 64, 64))
    plain = output_error(w, decode(quantize(w, e, "mse"), e), h)
    np.testing.assert_allclose(output_error(w, decode(quantize(w, e, "gptq", h), e), h), plain, rtol=0.03)


@pytest.mark.parametrize("kind", ["zero", "one input", "huge", "dead channels"])
def test_degenerate_hessians(kind: str) -> None:
    w, h = problem(2, 16, 64)
    match kind:
        case "zero":
            h = mx.zeros_like(h)
        case "one input":
            x = mx.random.normal((2, 64, 1), key=mx.random.key(1))
            h = x @ mx.swapaxes(x, 1, 2)
        case "huge":
            h = h * 1e25
        case "dead channels":
            live = (mx.arange(64) % 4 > 0).astype(mx.float32)
            h = h * live * live[:, None]
    e = Encoding("affine", "bf16", 4, 32)
    decoded = decode(quantize(w, e, "gptq", h), e)
    assert np.isfinite(decoded).all()
    assert np.abs(decoded - np.array(w.astype(mx.float32))).max() < 2


def test_constant_rows_stay_exact_and_results_repeat() -> None:
    w, h = problem(1, 8, 64)
    w = mx.concatenate([mx.zeros((1, 4, 64)).astype(mx.bfloat16), w], axis=1)
    e = Encoding("affine", "bf16", 4, 32)
    first, second = quantize(w, e, "gptq", h), quantize(w, e, "gptq", h)
    assert not decode(first, e)[0, :4].any()
    for a, b in zip(first, second, strict=True):
        assert a is not None
        assert b is not None
        assert bool(mx.all(a == b))


def test_what_it_refuses() -> None:
    w, h = problem(2, 8, 64)
    e = Encoding("affine", "bf16", 4, 32)
    with pytest.raises(RecipeError, match="needs the products"):
        quantize(w, e, "gptq")
    with pytest.raises(RecipeError, match="shape"):
        quantize(w, e, "gptq", h[:1])
    with pytest.raises(RecipeError, match="NaN"):
        quantize(w, e, "gptq", h * float("nan"))
    with pytest.raises(RecipeError, match="affine"):
        quantize(w, Encoding("mxfp4", "bf16", 4, 32), "gptq", h)


def test_shifted_weights_are_the_damped_least_squares_solution() -> None:
    source = np.random.default_rng(3)
    y = source.normal(size=(2, 300, 32)) * np.exp(source.normal(size=32))
    x = y + 0.3 * source.normal(size=y.shape) @ source.normal(size=(32, 32)) / 6
    w = source.normal(size=(2, 5, 32))
    h, pull = (np.swapaxes(a, 1, 2) @ x for a in (x, y - x))
    found = shifted(*(mx.array(a.astype(np.float32)) for a in (w, h, pull)))
    for i in range(2):
        weight = (module.DAMPING * np.trace(h[i]) / 32) ** 0.5 * np.eye(32)
        rows, target = np.concatenate([x[i], weight]), np.concatenate([y[i] @ w[i].T, weight @ w[i].T])
        np.testing.assert_allclose(found[i], np.linalg.lstsq(rows, target)[0].T, atol=2e-4)
    np.testing.assert_array_equal(shifted(mx.ones((1, 3, 32)), mx.zeros((1, 32, 32)), mx.zeros((1, 32, 32))), 1)


def test_short_grids_cost_little_and_compress_well() -> None:
    w, h = problem(1, 256, 256)
    e, left, size = Encoding("affine", "bf16", 3, 64), {}, {}
    for short in (False, True):
        parts = quantize(w, e, "gptq", h, short)
        left[short] = float(output_error(w, decode(parts, e), h)[0])
        grids = b"".join(np.array(p.view(mx.uint16)).tobytes() for p in parts[1:] if p is not None)
        size[short] = len(frames.compress(grids, parts=[0, len(grids) // 2]))
    assert left[True] < 1.1 * left[False]
    assert size[True] < 0.7 * size[False]
