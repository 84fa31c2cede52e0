"""The compiled kernels against MLX, against float64, and against themselves over shapes and instruction sets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear, SwitchMLP

import squizd
from squizd import kernels
from squizd.container.layout import Encoding
from squizd.kernels import layers
from squizd.quantizers import quantize
from squizd.quantizers.packing import DTYPES
from squizd.runtime import device

FORMATS = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)] + [("mxfp4", 4, 32)]
needs_kernels = pytest.mark.skipif(bool(kernels.missing()), reason=kernels.missing() or "compiled")


@pytest.fixture
def native() -> ModuleType:
    found = kernels.native()
    assert found is not None
    return found


@pytest.fixture(params=["AVX-512", "AVX2", "NEON", "plain"])
def each_set(request: pytest.FixtureRequest, native: ModuleType) -> Iterator[ModuleType]:
    """The extension, on each instruction set that this processor has."""
    before = native.in_use()
    if not native.use(request.param):
        pytest.skip("not on this processor")
    yield native
    native.use(before)


def numbers(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def quantized(w: mx.array, mode: str, bits: int, group: int) -> tuple[Any, ...]:
    codes, scales, *biases = mx.quantize(w, group, bits, mode=mode)
    return codes, scales, biases[0] if biases else None, group, bits, mode


def relative(ours: mx.array, theirs: mx.array) -> float:
    """Largest difference, relative to the largest number."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return float(mx.abs(ours - theirs).max()) / max(float(mx.abs(theirs).max()), 1e-30)


def rope(*args: Any, **options: Any) -> mx.array:
    """Whatever mx.fast.rope is now."""
    return mx.fast.rope(*args, **options)


def same_bits(a: mx.array, b: mx.array) -> bool:
    return bool(mx.array_equal(a.view(mx.uint32), b.view(mx.uint32)))


# -- against MLX -------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize(("mode", "bits", "group"), FORMATS)
def test_linear_is_mlx_quantized_matmul(each_set: ModuleType, mode: str, bits: int, group: int) -> None:
    for rows, outputs, width in [(1, 1, 128), (1, 7, 384), (2, 64, 256), (3, 33, 128), (25, 130, 640)]:
        w = quantized(numbers(outputs, width, seed=rows), mode, bits, group)
        x = numbers(rows, width, seed=1)
        theirs = mx.quantized_matmul(x, *w[:3], transpose=True, group_size=group, bits=bits, mode=mode)
        assert relative(each_set.linear(x, *w), theirs) < 1e-5


@needs_kernels
@pytest.mark.parametrize(
    ("mode", "bits", "group"), [("affine", 4, 64), ("affine", 3, 32), ("affine", 6, 128), ("mxfp4", 4, 32)]
)
def test_linear_with_thousands_of_rows(native: ModuleType, mode: str, bits: int, group: int) -> None:
    w, x = quantized(numbers(2051, 256), mode, bits, group), numbers(1030, 256, seed=1)
    theirs = mx.matmul(x, mx.dequantize(*w[:3], group_size=group, bits=bits, mode=mode).astype(mx.float32).T)
    assert relative(native.linear(x, *w), theirs) < 1e-5
    assert relative(native.linear(x[:1], *w), theirs[:1]) < 1e-5


@needs_kernels
def test_linear_of_floats(each_set: ModuleType) -> None:
    for rows, outputs, width in [(1, 5, 1), (1, 64, 33), (3, 7, 100), (20, 65, 16), (9, 31, 257)]:
        w, x = numbers(outputs, width), numbers(rows, width, seed=1)
        assert relative(each_set.linear(x, w, None, None, 0, 32, ""), x @ w.T) < 1e-5


@needs_kernels
@pytest.mark.parametrize(("mode", "bits", "group"), FORMATS)
def test_experts_are_mlx_gather_qmm(native: ModuleType, mode: str, bits: int, group: int) -> None:
    w = quantized(numbers(6, 40, 128), mode, bits, group)
    for tokens in (1, 2, 50):
        ids = mx.array(np.random.default_rng(tokens).integers(0, 6, (tokens, 3)), mx.uint32)
        x = numbers(tokens, 1, 1, 128, seed=2)
        theirs = mx.gather_qmm(x, *w[:3], rhs_indices=ids, transpose=True, group_size=group, bits=bits, mode=mode)
        assert relative(native.expert_linear(x, ids, *w), theirs) < 1e-5


@needs_kernels
@pytest.mark.parametrize("bits", [(4, 4, 4), (4, 8, 3), (8, 4, 2), (32, 32, 32)])
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_gated_experts_are_mlx_lms(native: ModuleType, bits: tuple[int, int, int], tokens: int) -> None:
    """Every mixture of encodings in one block, sorted by MLX (from 64 pairs on) or not."""
    block = SwitchGLU(128, 96, 7)
    for name, b in zip(("gate_proj", "up_proj", "down_proj"), bits, strict=True):
        if b < 32:
            setattr(block, name, getattr(block, name).to_quantized(group_size=32, bits=b))
    x = numbers(2, tokens, 128)
    # The router's choice is a slice of a partition: its rows do not lie side by side.
    ids = mx.argpartition(numbers(2, tokens, 7, seed=3), kth=-2, axis=-1)[..., -2:]
    theirs = block(x, ids)
    assert layers.adopt(block)
    assert relative(block(x, ids), theirs) < 1e-5
    assert relative(block(x, ids.astype(mx.int32)), theirs) < 1e-5


@needs_kernels
@pytest.mark.parametrize("kind", ["biased", "another activation", "mlp"])
def test_blocks_that_are_not_the_usual_one(kind: str) -> None:
    if kind == "mlp":
        block = SwitchMLP(64, 96, 5, bias=True)
    else:
        block = SwitchGLU(
            64, 96, 5, bias=kind == "biased", **({} if kind == "biased" else {"activation": lambda x, g: x * g})
        )
    nn.quantize(block, 32, 4)
    for module in block.modules():
        if "bias" in module:
            module.bias = numbers(*module.bias.shape)
    x, ids = numbers(40, 64), mx.array(np.random.default_rng(0).integers(0, 5, (40, 2)), mx.uint32)
    theirs = [block(x, ids), block(x[:1], ids[:1])]
    layers.adopt(block)
    for ours, their in zip([block(x, ids), block(x[:1], ids[:1])], theirs, strict=True):
        assert relative(ours, their) < 1e-5


@needs_kernels
def test_norms_rotations_and_embeddings(each_set: ModuleType) -> None:
    x = numbers(2, 3, 5, 64)
    table = nn.QuantizedEmbedding(50, 64, 32, 4)
    calls: list[Callable[[], mx.array]] = [
        lambda: mx.fast.rms_norm(x, numbers(64, seed=1), 1e-5),
        lambda: mx.fast.rms_norm(x.transpose(0, 1, 3, 2), None, 1e-5),
        lambda: mx.fast.rms_norm(x[..., :37], None, 1e-6),
        lambda: table(mx.array([[3, 49, 0]])),
        lambda: table.as_linear(x),
    ]
    for offset in (0, 1000, mx.array([7]), mx.array([3, 90])):
        for traditional in (False, True):
            calls.append(partial(rope, x, 64, traditional=traditional, base=1e4, scale=1.0, offset=offset))
            calls.append(
                partial(rope, x.swapaxes(1, 2), 24, traditional=traditional, base=1e6, scale=0.5, offset=offset)
            )
    freqs = mx.exp(numbers(32, seed=4))
    calls.append(lambda: mx.fast.rope(x, 64, traditional=False, base=None, scale=1.0, offset=9, freqs=freqs))
    with layers.switched_off():
        theirs = [call() for call in calls]
        mx.eval(theirs)
    layers.adopt(table)
    for i, (call, their) in enumerate(zip(calls, theirs, strict=True)):
        # Angles of hundreds of radians: MLX's own frequencies are off by an ulp, which counts there.
        assert relative(call(), their) < (1e-5 if i < 5 else 2e-4), i


@needs_kernels
def test_rotations_are_the_definition() -> None:
    x, width = numbers(1, 2, 40, 64), 64
    layers.adopt(nn.Module())
    ours = np.array(mx.fast.rope(x, width, traditional=False, base=1e4, scale=1.0, offset=100))
    at = np.arange(100, 140)[:, None] * 1e4 ** (-np.arange(32) / 32)
    a, b = np.array(x, np.float64)[..., :32], np.array(x, np.float64)[..., 32:]
    theirs = np.concatenate([a * np.cos(at) - b * np.sin(at), a * np.sin(at) + b * np.cos(at)], -1)
    assert np.abs(ours - theirs).max() < 5e-5  # an angle of 140 radians in float32


@needs_kernels
@pytest.mark.parametrize("keys", [1, 17, 256, 300, 700])
@pytest.mark.parametrize("heads", [(4, 4, 64), (6, 2, 32), (3, 1, 80)])
def test_attention_is_mlxs(each_set: ModuleType, heads: tuple[int, int, int], keys: int) -> None:
    query_heads, key_heads, width = heads
    for queries in {1, min(keys, 30)}:
        q = numbers(2, queries, query_heads, width).transpose(0, 2, 1, 3)  # as models hand them over
        k, v = (numbers(2, key_heads, keys + 5, width, seed=s)[:, :, :keys] for s in (1, 2))  # a view of a cache
        sinks = numbers(query_heads, seed=5)
        bools = mx.array(np.random.default_rng(6).random((2, 1, queries, keys)) < 0.7)
        bools[..., 0] = True
        adds = numbers(queries, keys, seed=7)
        for mask, sink in [(None, None), ("causal", None), (bools, None), (adds, None), ("causal", sinks)]:
            options: dict[str, Any] = {"scale": width**-0.5, "mask": mask, "sinks": sink}
            ours = each_set.attention(q, k, v, width**-0.5, mask, sink)
            with layers.switched_off():
                theirs = mx.fast.scaled_dot_product_attention(q, k, v, **options)
            assert relative(ours, theirs) < 1e-5


@needs_kernels
def test_what_kernels_do_not_do_goes_to_mlx(native: ModuleType) -> None:
    w = quantized(numbers(8, 64), "affine", 4, 32)
    assert native.linear(numbers(2, 64).astype(mx.float16), *w) is None
    assert native.linear(numbers(2, 64), *quantized(numbers(8, 64), "mxfp8", 8, 32)) is None
    with mx.stream(mx.cpu):
        assert native.linear(numbers(2, 32), *w) is None  # a width that does not fit: MLX words the error
    module = nn.QuantizedLinear(64, 8, group_size=32)
    layers.adopt(module)
    half = numbers(2, 64).astype(mx.float16)
    assert module(half).shape == (2, 8)
    with pytest.raises(ValueError):
        module(numbers(2, 32))


@needs_kernels
def test_gradients_and_vmap_are_mlxs() -> None:
    layers.adopt(nn.Module())
    w = numbers(64, seed=1)

    def loss(x: mx.array) -> mx.array:
        y = mx.fast.rope(mx.fast.rms_norm(x, w, 1e-5), 64, traditional=False, base=1e4, scale=1.0, offset=3)
        return (mx.fast.scaled_dot_product_attention(y, y, y, scale=0.1, mask="causal") ** 2).sum()

    x = numbers(1, 2, 5, 64)
    ours, batched = mx.grad(loss)(x), mx.vmap(lambda a: mx.fast.rms_norm(a, w, 1e-5))(x)
    with layers.switched_off():
        assert relative(ours, mx.grad(loss)(x)) < 1e-5
        assert relative(batched, mx.vmap(lambda a: mx.fast.rms_norm(a, w, 1e-5))(x)) < 1e-5


# -- against float64 ---------------------------------------------------------------------------------------


@needs_kernels
def test_error_grows_no_faster_than_the_root_of_the_length(native: ModuleType) -> None:
    """Sixteen running sums: the error of a dot product stays below half of a single running sum's bound."""
    for width in (128, 1024, 8192, 65536):
        w, x = quantized(numbers(16, width), "affine", 8, 64), numbers(4, width, seed=1)
        exact_w = np.array(mx.dequantize(*w[:3], group_size=64, bits=8), np.float64)
        exact = np.array(x, np.float64) @ exact_w.T
        scale = np.sqrt((np.array(x, np.float64) ** 2) @ (exact_w.T**2))
        error = np.abs(np.array(native.linear(x, *w)) - exact) / scale
        assert error.max() < 2**-24 * (8 + np.sqrt(width / 16))


# -- the same bits whatever the company ----------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize(("mode", "bits", "group"), FORMATS)
def test_a_rows_bits_do_not_depend_on_the_batch_or_the_threads(
    native: ModuleType, mode: str, bits: int, group: int
) -> None:
    w, x = quantized(numbers(200, 384), mode, bits, group), numbers(67, 384, seed=1)
    whole = native.linear(x, *w)
    for i in (0, 5, 66):
        assert same_bits(native.linear(x[i : i + 1], *w), whole[i : i + 1])
    assert same_bits(native.linear(x[3:10], *w), whole[3:10])
    threads = native.threads()
    mx.synchronize()
    for count in (1, 3):
        native.set_threads(count)
        again = native.linear(x, *w)
        mx.eval(again)
        assert same_bits(again, whole)
    native.set_threads(threads)


@needs_kernels
def test_all_instruction_sets_give_the_same_bits(native: ModuleType) -> None:
    q, k, v = (numbers(1, 2, 40, 64, seed=s) for s in range(3))
    before, found = native.in_use(), []
    for name in native.instruction_sets():
        native.use(name)
        got = [native.attention(q, k, v, 0.125, "causal", None), native.rms_norm(q, None, 1e-6)]
        for mode, bits, group in FORMATS:
            w = quantized(numbers(37, 256), mode, bits, group)
            got += [native.linear(numbers(n, 256, seed=1), *w) for n in (1, 5)]
        mx.eval(got)
        found.append(got)
    native.use(before)
    assert len(found) > 1
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))


@needs_kernels
def test_attention_of_one_token_is_that_of_many() -> None:
    native = kernels.native()
    assert native is not None
    q, k, v = numbers(1, 6, 530, 64), numbers(1, 2, 530, 64, seed=1), numbers(1, 2, 530, 64, seed=2)
    whole = native.attention(q, k, v, 0.125, "causal", None)
    for i in (0, 255, 256, 529):
        one = native.attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], 0.125, None, None)
        assert same_bits(one, whole[:, :, i : i + 1])


# -- rejected before the arithmetic ------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("bad", [4, -1, 2**31])
def test_an_id_that_is_no_expert_is_an_error(bad: int) -> None:
    block = SwitchGLU(64, 64, 4)
    nn.quantize(block, 32, 4)
    layers.adopt(block)
    ids = mx.array(np.array([[0, bad]]).astype(np.uint32 if bad > 2**30 else np.int32))
    for call in (lambda: block(numbers(1, 64), ids), lambda: block.gate_proj(numbers(1, 1, 1, 64), ids)):
        with pytest.raises((IndexError, RuntimeError), match="there are 4"):
            mx.eval(call())
    assert block(numbers(1, 64), mx.array([[0, 3]])).shape == (1, 2, 64)  # and the next call works


# -- in a model ----------------------------------------------------------------------------------------------


@needs_kernels
def test_a_model_computes_what_mlx_computes(tiny_file: Callable[..., Path]) -> None:
    ids = mx.array([list(range(5, 60))])
    for recipe in ("int4", "mixed3", "mxfp4", "keep"):
        model, _ = squizd.load(tiny_file(recipe), resident="100%")
        ours = model(ids)
        with layers.switched_off():
            theirs = model(ids)
            mx.eval(theirs)
        assert relative(ours, theirs) < 1e-5


@needs_kernels
def test_paged_and_resident_have_the_same_bits(tiny_file: Callable[..., Path]) -> None:
    """At any budget and any split of the prompt: waves, chunks and single tokens."""
    ids = mx.array([[(7 * i) % 250 + 3 for i in range(90)]])
    whole = squizd.load(tiny_file(), resident="100%")[0](ids)
    for share in ("0%", "25%", "50%"):
        model = squizd.load(tiny_file(), resident=share)[0]
        assert same_bits(model(ids), whole)
        cache = make_prompt_cache(model)
        parts = [model(ids[:, at : at + n], cache=cache) for at, n in [(0, 70), (70, 1), (71, 1), (72, 18)]]
        assert same_bits(mx.concatenate(parts, axis=1), whole)


@needs_kernels
def test_switch_linear_of_floats(native: ModuleType) -> None:
    layer = SwitchLinear(48, 24, 4, bias=True)
    x, ids = numbers(5, 1, 1, 48), mx.array(np.random.default_rng(0).integers(0, 4, (5, 2)), mx.uint32)
    theirs = layer(x, ids)
    layers.adopt(layer)
    assert relative(layer(x, ids), theirs) < 1e-5


# -- without them --------------------------------------------------------------------------------------------


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernels are for Linux")


@on_linux
@pytest.mark.skipif(not device.on_cpu(), reason="the kernels are for CPUs")
def test_they_are_used_unless_turned_off(tiny_file: Callable[..., Path], cli: Any) -> None:
    args = ["run", tiny_file(), "--no-chat", "-n", "5", "-p", "The city"]
    usual, asked, off = (
        cli.process(*args, env=cli.environment(SQUIZD_KERNELS=value)).success() for value in (None, "1", "0")
    )
    assert usual.out == asked.out == off.out
    assert off.err.endswith(", MLX: the kernels are off (SQUIZD_KERNELS=0)\n")
    for on in (usual, asked):
        assert "squizd kernels (" in on.err or (kernels.missing() and "MLX: the kernels are not compiled" in on.err)


@on_linux
@pytest.mark.parametrize(
    ("found", "says"),
    [
        ("raise ModuleNotFoundError(name)", "the kernels are not compiled"),
        ("raise ImportError('_native.so: undefined symbol: _ZN3mlx')", "the kernels were compiled for another MLX"),
        ("raise ImportError('_native.so: file too short')", "the compiled kernels do not load: _native.so: file too"),
        ("sys.modules[name] = SimpleNamespace(mlx_version='0.1.0')", "the kernels were compiled for MLX 0.1.0, "),
    ],
)
def test_an_extension_that_cannot_be_used_is_named_in_one_line(found: str, says: str, cli: Any) -> None:
    code = (
        "import sys\n"
        "from types import SimpleNamespace\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'squizd.kernels._native': {found if 'raise' in found else 'pass'}\n"
        "sys.meta_path.insert(0, Finder())\n"
        "name = 'squizd.kernels._native'\n"
        f"{found if 'raise' not in found else 'pass'}\n"
        "from squizd import kernels\n"
        "print(kernels.missing()); print(kernels.native())\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=cli.environment(SQUIZD_KERNELS="1"))
    line, none = done.stdout.splitlines()
    assert line.startswith(says)
    assert line.endswith(" (python -m squizd.kernels.build)")
    assert none == "None"


def test_the_statistics_say_what_computes() -> None:
    said = device.arithmetic()
    if sys.platform == "linux" and device.on_cpu():
        assert said == (f"MLX: {kernels.missing()}" if kernels.missing() else kernels.describe())
    else:
        assert said == "MLX"


def test_on_another_device_they_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled or not: where MLX computes on a GPU nothing changes, and nothing is said."""
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    module = nn.Linear(4, 4)
    device.accelerate(module)
    assert type(module) is nn.Linear
    assert (device.arithmetic(), device.scratch_bytes()) == ("MLX", 0)


@needs_kernels
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 128), (5, 32), (8, 64)])
def test_blocks_are_fitted_with_the_very_bits_that_mlx_gives(
    bits: int, group: int, dtype: str, each_set: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = mx.random.key(bits)
    w = mx.random.normal((3, 7, 384), key=key) * 0.05
    w[0, 0], w[0, 1], w[0, 2, 5], w[1, 3] = 0.0, 1.5, 100.0, w[1, 3] * 1e-4
    w = w.astype(DTYPES[dtype])
    per_channel = mx.random.uniform(shape=(384,), key=key) ** 4
    per_expert = mx.random.uniform(shape=(3, 384), key=key) * (mx.arange(384) % 5 > 0)
    for importance in (None, per_channel, per_expert, mx.zeros(384)):
        encoding = Encoding("affine", dtype, bits, group)
        found = quantize(w, encoding, "mse", importance)
        with monkeypatch.context() as without:
            without.setattr(kernels, "_found", (None, "off"))
            expected = quantize(w, encoding, "mse", importance)
        for a, b in zip(found, expected, strict=True):
            assert a is not None
            assert b is not None
            assert a.dtype == b.dtype
            assert bool(mx.all(a.view(mx.uint8) == b.view(mx.uint8)))
