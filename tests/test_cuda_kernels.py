"""The kernels of `quantizers.cuda`, on a GPU if there is one, or else as C++; against NumPy in float64."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import emulated
import mlx.core as mx
import numpy as np
import pytest

from squizd.backend import on_cuda
from squizd.container.layout import Encoding
from squizd.kernels.build import BuildError, find_compiler
from squizd.quantizers import cuda
from squizd.quantizers.minmax import minmax

gptq, mse = (importlib.import_module(f"squizd.quantizers.{name}") for name in ("gptq", "mse"))


@pytest.fixture(scope="module", autouse=True)
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if not on_cuda():
            if sys.platform != "linux":
                pytest.skip("no GPU, and no POSIX barriers to emulate one with")
            try:
                find_compiler()
            except BuildError as error:
                pytest.skip(str(error))
            patch.setattr(mx.fast, "cuda_kernel", emulated.cuda_kernel(tmp_path_factory.mktemp("kernels")))
        cuda.compiled.cache_clear()
        yield
    cuda.compiled.cache_clear()


def hessians(stack: int, width: int) -> np.ndarray:
    random = np.random.default_rng(3)
    x = random.standard_normal((stack, 2 * width, width)) * np.exp(random.standard_normal((stack, 1, width)))
    return x.transpose(0, 2, 1) @ x


@pytest.mark.parametrize(("bits", "group", "dtype", "weighted"), [(4, 64, "bf16", False), (3, 32, "f32", True)])
def test_blocks_are_those_of_the_cpu(bits: int, group: int, dtype: str, weighted: bool) -> None:
    random = np.random.default_rng(1)
    encoding = Encoding("affine", dtype, bits, group)
    w = mx.array(random.standard_normal((3, 10, 192)), mx.float32).astype(mse.DTYPES[dtype])
    weights = mx.array(random.random((3, 192)) ** 3, mx.float32) if weighted else None
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    expected = mse.mse(w, encoding, weights)
    mx.set_default_device(device)
    plan = mse.WEIGHTED if weighted else mse.PLAIN
    rows = w.reshape(-1, 192)
    parts = [mse._fit_on_cuda(rows[i : i + 15], encoding, plan, weights, i, 10) for i in (0, 15)]
    found = [mx.concatenate(part).reshape(3, 10, -1) for part in zip(*parts, strict=True)]
    assert np.mean(np.array(expected[0] == found[0])) > 0.99  # sums in another order

    def error(blocks: tuple[mx.array, ...]) -> float:
        wide = [x.astype(mx.float32) for x in blocks[1:]]
        squares = mx.square(mx.dequantize(blocks[0], *wide, group_size=group, bits=bits) - w.astype(mx.float32))
        return float(mx.sum(squares if weights is None else squares * weights[:, None]))

    assert error(found) == pytest.approx(error(expected), rel=1e-3)
    assert error(found) < 0.95 * error(minmax(w, encoding))


@pytest.mark.parametrize("descend", [False, True])
def test_columns_are_rounded_in_turn(descend: bool) -> None:
    random = np.random.default_rng(2)
    pull, given = random.standard_normal((2, 2, 32, 140)).astype(np.float32)
    between = random.standard_normal((2, 32, 32)).astype(np.float32) * 0.1
    between += 3 * np.eye(32, dtype=np.float32)
    steps = random.random((2, 1, 140)).astype(np.float32) * 0.2 + 0.1
    offsets = random.random((2, 1, 140)).astype(np.float32) - 1.5
    arrays = (mx.array(x) for x in (pull, given, between, steps, offsets))
    codes, changes = (np.array(x).astype(np.float64) for x in cuda.block(descend, *arrays, 4))
    made = codes * steps + offsets
    assert np.abs(changes - (made - given if descend else given - made)).max() < 1e-5
    later = np.triu(between, 1).astype(np.float64)
    now = pull + np.einsum("sij,sio->sjo", later, changes)  # what each column is by its turn
    best = given - now / np.diagonal(between, axis1=1, axis2=2)[:, :, None] if descend else now
    assert np.abs(codes - np.clip((best - offsets) / steps, 0, 15)).max() < 0.5 + 1e-4
    assert set(np.unique(codes)) <= set(range(16))


def test_factors_make_up_the_matrix() -> None:
    h = np.array(gptq._damped(mx.array(hessians(2, 96).astype(np.float32)))).astype(np.float64)
    unit, cost = (np.array(x).astype(np.float64) for x in cuda.factors(mx.array(h.astype(np.float32))))
    assert np.abs(np.tril(unit)).max() == 0
    whole = unit + np.eye(96)
    assert np.abs(whole * cost[:, None, :] @ whole.transpose(0, 2, 1) - h).max() < 1e-5 * h.max()


@pytest.mark.parametrize("size", [8, cuda.LARGEST])
def test_small_systems(size: int) -> None:
    count = 2 if size == 8 else 1
    h = hessians(count, size).astype(np.float32)
    right = np.random.default_rng(5).standard_normal((count, size))
    ridge = 1e-6 * np.trace(h, axis1=1, axis2=2)[:, None, None] / size * np.eye(size)
    expected = np.linalg.solve(h.astype(np.float64) + ridge, right[..., None])[..., 0]
    found = np.array(cuda.solve(mx.array(h), mx.array(right, mx.float32)))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_grids_are_refitted_for_least_output_error() -> None:
    random, h = np.random.default_rng(6), hessians(2, 128)
    codes, left = random.integers(0, 8, (2, 128, 5)).astype(np.float64), random.standard_normal((2, 128, 5))
    found = np.array(cuda.refit(*(mx.array(x, mx.float32) for x in (codes, left, h)), 32))
    for s in range(2):
        for o in range(5):
            basis = np.zeros((128, 8))
            for g in range(4):
                basis[32 * g : 32 * g + 32, g], basis[32 * g : 32 * g + 32, 4 + g] = (
                    codes[s, 32 * g : 32 * g + 32, o],
                    1,
                )
            least = np.linalg.solve(basis.T @ h[s] @ basis, basis.T @ h[s] @ left[s, :, o])
            best, reached = (left[s, :, o] - basis @ change for change in (least, found[s, :, o]))
            assert reached @ h[s] @ reached < 1.001 * best @ h[s] @ best  # where products are of TF32 numbers, too


def test_weights_are_shifted_for_disturbed_inputs() -> None:
    random, h = np.random.default_rng(7), hessians(2, 96)
    h[1] = 0  # never reached
    w, pull = random.standard_normal((2, 7, 96)), h * random.standard_normal((2, 96, 96)) * 0.1
    found = np.array(gptq._shifted_on_cuda(*(mx.array(x, mx.float32) for x in (w, h, pull))))
    damped = h[0] + gptq.DAMPING * np.trace(h[0]) / 96 * np.eye(96)
    change = w[0] @ np.linalg.solve(damped, pull[0].T).T
    assert np.abs(found[0] - w[0] - change).max() < 2e-3 * np.abs(change).max()
    assert np.array_equal(found[1], w[1].astype(np.float32))
