"""How values are chosen, judged by the decode contract (NumPy, float64 sums) and by MLX's own quantizer."""

from __future__ import annotations

import importlib
import itertools

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squizd import codecs
from squizd.container.layout import AFFINE_BITS, AFFINE_GROUPS, FLOATS, MICROSCALING, Encoding, place
from squizd.errors import RecipeError
from squizd.quantizers import METHODS, pack, packing, quantize
from squizd.quantizers.packing import DTYPES

mse_module = importlib.import_module("squizd.quantizers.mse")  # the package's `mse` is the function

MLX_DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}
Quantized = tuple[mx.array, mx.array | None, mx.array | None]
Float64 = npt.NDArray[np.float64]


def raw_bytes(array: mx.array) -> bytes:
    return bytes(memoryview(mx.contiguous(array).view(mx.uint8)))


def same(a: Quantized, b: Quantized) -> bool:
    """Whether two results agree in shape, type and every bit."""
    for x, y in zip(a, b, strict=True):
        if x is None or y is None:
            if x is not y:
                return False
        elif x.shape != y.shape or x.dtype != y.dtype or raw_bytes(x) != raw_bytes(y):
            return False
    return True


def decode(encoding: Encoding, shape: tuple[int, ...], result: Quantized) -> Float64:
    """What a file would hold, through the NumPy codec."""
    tensor, end = place("t", "other", encoding, shape)
    image = bytearray(end)
    for (_, offset, size), part in zip(tensor.parts, (p for p in result if p is not None), strict=True):
        part_bytes = raw_bytes(part)
        assert len(part_bytes) == size
        image[offset : offset + size] = part_bytes
    return codecs.decode(tensor, image).astype(np.float64)


def group_errors(encoding: Encoding, w: mx.array, result: Quantized, importance: Float64 | None = None) -> Float64:
    """Weighted squared error of every group, float64."""
    difference = decode(encoding, w.shape, result) - np.array(w.astype(mx.float32)).astype(np.float64)
    difference = difference.reshape(-1, w.shape[-1] // encoding.group_size, encoding.group_size)
    squares = difference**2
    if importance is not None:
        weights = np.broadcast_to(importance[..., None, :] if importance.ndim > 1 else importance, w.shape)
        squares = squares * weights.reshape(squares.shape)
    return squares.sum(axis=-1)


def gain(encoding: Encoding, w: mx.array, importance: mx.array | None = None) -> float:
    """Decibels that mse gains on minmax, over the whole tensor."""
    weights = None if importance is None else np.array(importance).astype(np.float64)
    before = group_errors(encoding, w, quantize(w, encoding), weights).sum()
    after = group_errors(encoding, w, quantize(w, encoding, "mse", importance), weights).sum()
    return float(10 * np.log10(before / after))


def gaussian(*shape: int, seed: int = 0, dtype: str = "bf16") -> mx.array:
    w = np.random.default_rng(seed).standard_normal(shape) * 0.02
    return mx.array(w.astype(np.float32)).astype(MLX_DTYPES[dtype])


# Packing


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_is_the_stream_of_the_format(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, (3, 5, 96), dtype=np.uint8)
    packed = pack(mx.array(values), bits)
    assert packed.shape == (3, 5, 3 * bits)
    assert packed.dtype == mx.uint32
    assert raw_bytes(packed) == codecs.pack(values, bits)


# minmax


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("group_size", AFFINE_GROUPS)
def test_minmax_affine_is_mx_quantize(bits: int, group_size: int, dtype: str) -> None:
    w = gaussian(2, 3, 384, dtype=dtype)
    expected = mx.quantize(w, group_size=group_size, bits=bits)
    assert same(quantize(w, Encoding("affine", dtype, bits, group_size)), tuple(expected))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", MICROSCALING)
def test_minmax_microscaling_is_mx_quantize(mode: str, dtype: str) -> None:
    bits, group_size = MICROSCALING[mode]
    w = gaussian(2, 5, 96, dtype=dtype)
    codes, scales = mx.quantize(w, mode=mode)
    assert same(quantize(w, Encoding(mode, dtype, bits, group_size)), (codes, scales, None))


@pytest.mark.parametrize("shape", [(17, 1024, 128), (16399, 64)])
def test_minmax_of_a_tensor_that_takes_two_threads_is_mx_quantize(shape: tuple[int, ...]) -> None:
    w = mx.random.normal(shape, key=mx.random.key(3)).astype(mx.bfloat16)
    assert same(quantize(w, Encoding("affine", "bf16", 4, 64)), tuple(mx.quantize(w, group_size=64, bits=4)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", ["inf", "-inf", "nan", "-nan"])
def test_one_number_that_is_none_is_found_among_the_largest(dtype: str, bad: str) -> None:
    limits = {"f32": 3e38, "f16": 65504.0, "bf16": 3e38}[dtype]
    for rest in (0.0, limits, -limits):
        w = np.full((3, 64), rest, np.float32)
        w[1, 7] = float(bad)
        with pytest.raises(RecipeError, match="NaN or infinity"):
            quantize(mx.array(w).astype(DTYPES[dtype]), Encoding("affine", "f32", 4, 64))


def test_minmax_casts_to_the_stored_type_first() -> None:
    w = gaussian(4, 64, dtype="f32")
    expected = mx.quantize(w.astype(mx.bfloat16), group_size=64, bits=4)
    assert same(quantize(w, Encoding("affine", "bf16", 4, 64)), tuple(expected))


def test_minmax_gives_the_literal_vectors_of_the_design() -> None:
    w = mx.array((np.arange(32) / 31).astype(np.float32))[None]
    for bits, codes in ((4, "ffeeddccbbaa99887766554433221100"), (2, "ffafaaaa55550500")):
        result = quantize(w, Encoding("affine", "f32", bits, 32))
        assert raw_bytes(result[0]).hex() == codes
        assert result[1] is not None
        assert result[2] is not None
        assert result[1].item() == pytest.approx(-1 / ((1 << bits) - 1))
        assert result[2].item() == 1.0


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8"])
def test_minmax_microscaling_survives_tiny_weights(mode: str) -> None:
    # mx.quantize wraps the exponent here: it decodes 1e-40 as about 1e37.
    encoding = Encoding(mode, "f32", *MICROSCALING[mode])
    tiny = np.stack([np.full(32, x, np.float32) for x in (1e-36, 1e-38, 1e-40, 0, 0.5)])
    result = decode(encoding, (5, 32), quantize(mx.array(tiny), encoding))
    np.testing.assert_allclose(result, tiny, atol=1e-30, rtol=0.1)


@pytest.mark.parametrize(("mode", "value"), [("mxfp4", 1e38), ("mxfp8", 1e38), ("nvfp4", 3000.0)])
def test_minmax_microscaling_rejects_what_it_cannot_hold(mode: str, value: float) -> None:
    w = mx.array(np.full((2, 32), -value, np.float32))
    with pytest.raises(RecipeError, match=f"{mode} holds magnitudes up to"):
        quantize(w, Encoding(mode, "f32", *MICROSCALING[mode]))


# mse: the guarantee


@st.composite
def blocks(draw: st.DrawFn) -> tuple[mx.array, Encoding, mx.array | None]:
    """Rows of groups of many kinds, an encoding, and importance or None."""
    encoding = Encoding(
        "affine",
        draw(st.sampled_from(FLOATS)),
        draw(st.sampled_from(AFFINE_BITS)),
        draw(st.sampled_from(AFFINE_GROUPS)),
    )
    dtype = draw(st.sampled_from(FLOATS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size, rows, columns = encoding.group_size, draw(st.integers(1, 7)), draw(st.integers(1, 3))
    largest = 4 if "f16" in (dtype, encoding.dtype) else 36
    smallest = -7 if dtype == "f16" else -45
    groups = []
    for _ in range(rows * columns):
        kind = draw(st.sampled_from(["gauss", "laplace", "constant", "zero", "outlier", "two", "offset", "few"]))
        magnitude = 10.0 ** draw(st.integers(smallest, largest))
        values = rng.standard_normal(size)
        if kind == "laplace":
            values = rng.laplace(size=size)
        elif kind == "constant":
            values[:] = rng.standard_normal()
        elif kind == "zero":
            values[:] = 0
        elif kind == "outlier":
            values *= 1e-3
            values[rng.integers(size)] = -3
        elif kind == "two":
            values = rng.choice([-0.3, 1.0], size)
        elif kind == "offset":
            values = 1 + values * 1e-4
        elif kind == "few":
            values[rng.permutation(size)[: size - 3]] = 0
        groups.append(np.clip(values / 8, -0.99, 0.99) * magnitude)
    w = np.array(groups).reshape(rows, columns * size)
    importance = None
    if draw(st.booleans()):
        weights = rng.lognormal(0, draw(st.sampled_from([0.1, 2.0, 8.0])), columns * size)
        weights[rng.random(columns * size) < draw(st.sampled_from([0.0, 0.5, 0.99]))] = 0
        weights *= 10.0 ** draw(st.integers(-20, 20))
        importance = mx.array(weights.astype(np.float32))
    return mx.array(w.astype(np.float32)).astype(MLX_DTYPES[dtype]), encoding, importance


@settings(max_examples=150, deadline=None)
@given(blocks())
def test_mse_is_never_worse_than_minmax_on_any_group(block: tuple[mx.array, Encoding, mx.array | None]) -> None:
    w, encoding, importance = block
    weights = None if importance is None else np.array(importance).astype(np.float64)
    fitted = quantize(w, encoding, "mse", importance)
    before = group_errors(encoding, w, quantize(w, encoding), weights)
    after = group_errors(encoding, w, fitted, weights)
    assert np.isfinite(after).all()
    assert (after <= before).all(), (after / before)[after > before]
    assert fitted[1] is not None
    assert fitted[1].dtype == MLX_DTYPES[encoding.dtype]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_mse_wins_almost_everywhere_on_gaussian_weights(bits: int, dtype: str) -> None:
    w = gaussian(64, 256, seed=bits, dtype=dtype)
    encoding = Encoding("affine", dtype, bits, 64)
    before = group_errors(encoding, w, quantize(w, encoding))
    after = group_errors(encoding, w, quantize(w, encoding, "mse"))
    assert (after <= before).all()
    assert (after < before).mean() > (0.95 if bits < 8 else 0.8)


def test_mse_survives_the_ends_of_float32() -> None:
    # Ranges near the largest float32, and weights that are all subnormal (where min-max decodes to zeros).
    f32, bf16 = Encoding("affine", "f32", 4, 32), Encoding("affine", "bf16", 3, 32)
    for scale, encoding in ((8e37, f32), (8e37, bf16), (1e-37, bf16), (1e-39, f32), (1e-42, f32)):
        w = mx.array((np.linspace(-1, 0.7, 64, dtype=np.float64) * scale).astype(np.float32).reshape(2, 32))
        before = group_errors(encoding, w, quantize(w, encoding)) / scale / scale
        after = group_errors(encoding, w, quantize(w, encoding, "mse")) / scale / scale
        assert (after <= before).all()
        assert (after < 32 * 0.1**2).all()


# mse: how good it is


@pytest.mark.parametrize(
    ("bits", "group_size", "least"),
    [
        (2, 64, 1.83), (3, 64, 1.31), (4, 64, 1.015), (5, 64, 0.925), (6, 64, 0.99), (8, 64, 2.4),
        (2, 32, 1.735), (4, 32, 1.395), (2, 128, 2.14), (4, 128, 0.875),
    ],
)  # fmt: skip
def test_mse_gains_on_gaussian_weights(bits: int, group_size: int, least: float) -> None:
    assert gain(Encoding("affine", "bf16", bits, group_size), gaussian(512, 512, seed=1)) > least


def test_mse_gains_by_least_squares_alone() -> None:
    # 8 bits try no starts, and f32 scales leave no rounding to repair.
    assert gain(Encoding("affine", "f32", 8, 64), gaussian(256, 512, seed=1)) > 0.57


@pytest.mark.parametrize(("bits", "least"), [(2, 3.57), (3, 3.2), (4, 2.75), (8, 3.5)])
def test_mse_gains_more_with_importance(bits: int, least: float) -> None:
    importance = mx.array(np.random.default_rng(3).lognormal(0, 1.5, 512).astype(np.float32))
    assert gain(Encoding("affine", "bf16", bits, 64), gaussian(256, 512, seed=1), importance) > least


def test_mse_finds_nearly_the_best_of_all_two_bit_grids() -> None:
    # The optimum, by enumeration: nearest codes split the sorted group into at most four runs.
    size, rows = 64, 24
    w = gaussian(rows, size, seed=5, dtype="f32")
    ends = np.array(list(itertools.combinations_with_replacement(range(size + 1), 3)))
    counts = np.diff(np.concatenate([np.zeros((len(ends), 1)), ends, np.full((len(ends), 1), size)], axis=1), axis=1)
    mean, square = counts @ np.arange(4) / size, counts @ np.arange(4) ** 2 / size
    variance = square - mean**2
    best = 0.0
    for row in np.array(w).astype(np.float64):
        centred = np.sort(row - row.mean())
        sums = np.concatenate([[0], np.cumsum(centred)])
        covariance = -sums[ends].sum(axis=1) / size
        removed = np.divide(covariance**2, variance, out=np.zeros_like(variance), where=variance > 1e-9)
        best += centred @ centred - size * removed.max()
    encoding = Encoding("affine", "f32", 2, size)
    found = group_errors(encoding, w, quantize(w, encoding, "mse")).sum()
    assert best * (1 - 1e-5) <= found <= best * 1.01


def test_importance_is_what_is_minimized() -> None:
    w = gaussian(128, 512, seed=2)
    importance = mx.array(np.random.default_rng(3).lognormal(0, 1.5, 512).astype(np.float32))
    encoding = Encoding("affine", "bf16", 3, 64)
    weights = np.array(importance).astype(np.float64)
    unweighted = group_errors(encoding, w, quantize(w, encoding, "mse"), weights).sum()
    weighted = group_errors(encoding, w, quantize(w, encoding, "mse", importance), weights).sum()
    assert weighted < 0.75 * unweighted
    # Only ratios within a group matter, and equal weights are no weights, up to the wider search that weights get.
    assert same(quantize(w, encoding, "mse", importance), quantize(w, encoding, "mse", importance * 2.0**40))
    plain = group_errors(encoding, w, quantize(w, encoding, "mse")).sum()
    uniform = group_errors(encoding, w, quantize(w, encoding, "mse", mx.full((512,), 3.0))).sum()
    assert uniform == pytest.approx(plain, rel=4e-3)


def test_groups_without_importance_are_fitted_unweighted() -> None:
    w = gaussian(64, 128, seed=4)
    encoding = Encoding("affine", "bf16", 2, 64)
    importance = mx.concatenate([mx.zeros(64), mx.ones(64)])
    errors = group_errors(encoding, w, quantize(w, encoding, "mse", importance)).sum(axis=0)
    plain = group_errors(encoding, w, quantize(w, encoding, "mse")).sum(axis=0)
    np.testing.assert_allclose(errors, plain, rtol=1e-2)


# mse: shapes, chunks, determinism


def test_experts_are_independent() -> None:
    w = gaussian(3, 5, 128, seed=6)
    importance = mx.array(np.random.default_rng(7).lognormal(0, 1, (3, 128)).astype(np.float32))
    encoding = Encoding("affine", "bf16", 3, 64)
    together = quantize(w, encoding, "mse", importance)
    assert [part.shape for part in together if part is not None] == [(3, 5, 12), (3, 5, 2), (3, 5, 2)]
    for expert in range(3):
        alone = quantize(w[expert], encoding, "mse", importance[expert])
        assert same(alone, tuple(part[expert] for part in together if part is not None))
    shared = quantize(w, encoding, "mse", importance[0])
    assert same(quantize(w[2], encoding, "mse", importance[0]), tuple(part[2] for part in shared if part is not None))


@pytest.mark.parametrize("chunk", [1, 640, 1 << 12])
def test_chunks_do_not_matter(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w, encoding = gaussian(2, 17, 320, seed=8), Encoding("affine", "bf16", 5, 32)
    importance = mx.array(np.random.default_rng(9).lognormal(0, 1, (2, 320)).astype(np.float32))
    whole = quantize(w, encoding, "mse", importance)
    assert same(whole, quantize(w, encoding, "mse", importance))
    monkeypatch.setattr(mse_module, "CPU_CHUNK", chunk)
    assert same(whole, quantize(w, encoding, "mse", importance))


def test_scratch_memory_is_bounded() -> None:
    w = gaussian(2048, 1024, seed=10)
    mx.eval(w)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    result = quantize(w, Encoding("affine", "bf16", 8, 64), "mse")
    stored = sum(part.nbytes for part in result if part is not None)
    assert mx.get_peak_memory() - before < 2 * stored + (32 << 20)


# Raw


def test_raw_is_a_cast() -> None:
    w = gaussian(3, 5, dtype="f32")
    for dtype in FLOATS:
        assert same(quantize(w, Encoding("raw", dtype), "mse"), (w.astype(MLX_DTYPES[dtype]), None, None))
    ids = mx.array([[1, -2]], dtype=mx.int32)
    assert same(quantize(ids, Encoding("raw", "i32")), (ids, None, None))
    infinite = mx.array([float("inf"), 1.0])
    assert quantize(infinite, Encoding("raw", "bf16"))[0].tolist() == [float("inf"), 1.0]


# Errors


def test_every_method_is_registered() -> None:
    assert set(METHODS) == {"minmax", "mse", "gptq"}


@pytest.mark.parametrize(
    ("w", "encoding", "method", "message"),
    [
        (mx.zeros((2, 64)), Encoding("affine", "bf16", 7, 64), "minmax", "not a registered encoding"),
        (mx.zeros((2, 64)), Encoding("affine", "bf16", 4, 64), "magic", "unknown quantization method 'magic'"),
        (mx.zeros((0, 64)), Encoding("affine", "bf16", 4, 64), "mse", "empty"),
        (mx.zeros((64,)), Encoding("affine", "bf16", 4, 64), "mse", "two dimensions"),
        (mx.zeros((2, 96)), Encoding("affine", "bf16", 4, 64), "mse", "rows of 96 weights"),
        (mx.zeros((2, 64), dtype=mx.int32), Encoding("affine", "bf16", 4, 64), "mse", "type mlx.core.int32"),
        (mx.full((2, 64), float("nan")), Encoding("affine", "bf16", 4, 64), "minmax", "NaN or infinity"),
        (mx.full((2, 64), float("inf")), Encoding("affine", "f32", 4, 64), "mse", "NaN or infinity"),
        (mx.zeros((2, 64)), Encoding("mxfp4", "bf16", 4, 32), "mse", "mse fits affine blocks only"),
        (mx.zeros((2, 64)), Encoding("nvfp4", "bf16", 4, 16), "mse", "mse fits affine blocks only"),
        (mx.array([[9e4, -9e4] * 32]), Encoding("affine", "f16", 4, 64), "minmax", "more than f16 can hold"),
        (mx.array([[5e4, -5e4] * 32]), Encoding("affine", "f16", 4, 64), "mse", "more than f16 can hold"),
        (mx.array([[3e38, -3e38] * 32]), Encoding("affine", "f32", 2, 64), "mse", "more than f32 can hold"),
        (mx.array([1e5]), Encoding("raw", "f16"), "minmax", "exceed what f16"),
        (mx.array([1.0]), Encoding("raw", "i32"), "minmax", "cannot store"),
        (mx.array([1]), Encoding("raw", "f32"), "minmax", "cannot store"),
        (mx.array([1]), Encoding("raw", "u8"), "minmax", "cannot store"),
    ],
)
def test_impossible_requests(w: mx.array, encoding: Encoding, method: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        quantize(w, encoding, method)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (mx.ones((64,)), "expected"),
        (mx.ones((4, 128)), "expected"),
        (mx.ones((3, 4, 128)), "expected"),
        (mx.full((128,), -1.0), "negative"),
        (mx.full((128,), float("nan")), "negative"),
        (mx.full((128,), float("inf")), "infinity"),
    ],
)
def test_impossible_importance(importance: mx.array, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        quantize(gaussian(3, 4, 128), Encoding("affine", "bf16", 4, 64), "mse", importance)


def test_minmax_does_not_ignore_importance_silently() -> None:
    with pytest.raises(RecipeError, match="minmax cannot use importance"):
        quantize(gaussian(4, 64), Encoding("affine", "bf16", 4, 64), "minmax", mx.ones((64,)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_short_grids_have_few_digits_and_the_nearest_codes(
    bits: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "SHORTENED", 256)  # several pieces
    source, e = np.random.default_rng(bits), Encoding("affine", dtype, bits, 32)
    w = mx.array(source.normal(size=(2, 6, 64)).astype(np.float32)) * 0.02
    found, error = {}, {}
    for short in (False, True):
        codes, *grids = quantize(w, e, "mse", short=short)
        wide = [x.astype(mx.float32) for x in grids if x is not None]
        decoded = mx.dequantize(codes, *wide, group_size=32, bits=bits)
        found[short], error[short] = [np.array(x) for x in (decoded, *wide)], float(mx.sum(mx.square(decoded - w)))
    decoded, scales, biases = found[True]
    for x, digits in ((scales, max(3, bits)), (biases, max(3, bits) + 1)):
        mantissa, _ = np.frexp(x.astype(np.float64))
        steps = mantissa * 2 ** (1 + digits)
        np.testing.assert_array_equal(steps, np.round(steps))
    levels = scales[..., None] * np.arange(1 << bits) + biases[..., None]  # [2, 6, groups, levels]
    wide_w = np.array(w).reshape(2, 6, 2, 32, 1)
    nearest = np.abs(wide_w - levels[..., None, :]).min(axis=-1)
    np.testing.assert_allclose(np.abs(decoded.reshape(2, 6, 2, 32) - wide_w[..., 0]), nearest, atol=1e-7)
    assert error[True] < (1.2 if bits < 8 else 1.6) * error[False]
