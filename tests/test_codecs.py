"""The decode contract, against literal bytes, Python's integers, and MLX's own dequantize."""

from __future__ import annotations

import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squizd.codecs import DECODERS, decode, pack, to_float32, unpack
from squizd.codecs.microscaling import E2M1, E4M3, E8M0
from squizd.container.layout import (
    AFFINE_BITS,
    AFFINE_GROUPS,
    FLOATS,
    MICROSCALING,
    MODES,
    Encoding,
    Tensor,
    place,
)
from squizd.errors import RequestError

MLX_DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}
UNIT_ROUNDOFF = {"f16": 2.0**-11, "bf16": 2.0**-8}


def raw_bytes(array: mx.array) -> bytes:
    """The bytes of an MLX array, in memory order."""
    return bytes(memoryview(mx.contiguous(array).view(mx.uint8)))


def record(tensor: Tensor, *parts: bytes) -> bytes:
    """A record that holds these parts where `tensor` says, and 0xEE elsewhere."""
    end = max(offset + size for _, offset, size in tensor.parts)
    image = bytearray(b"\xee" * (end + 9))
    for (_, offset, size), part in zip(tensor.parts, parts, strict=True):
        assert len(part) == size
        image[offset : offset + size] = part
    return bytes(image)


def decoded(encoding: Encoding, shape: tuple[int, ...], *parts: bytes, start: int = 0) -> np.ndarray:
    tensor, _ = place("t", "other", encoding, shape, start)
    return decode(tensor, memoryview(record(tensor, *parts)))


# Literal bytes


def test_literal_vectors_of_the_design() -> None:
    # w = i / 31 for i = 0..31 in one group, quantized by MLX.
    four = decoded(
        Encoding("affine", "f32", 4, 32),
        (1, 32),
        bytes.fromhex("ffeeddccbbaa99887766554433221100"),
        np.float32(-1 / 15).tobytes(),
        np.float32(1).tobytes(),
    )
    codes = np.repeat(np.arange(15, -1, -1), 2)
    np.testing.assert_array_equal(four[0], np.float32(-1 / 15) * codes.astype(np.float32) + np.float32(1))
    np.testing.assert_allclose(four[0], 1 - codes / 15, atol=1e-6)
    np.testing.assert_allclose(four[0], np.arange(32) / 31, atol=0.5 / 15 + 1e-6)
    two = decoded(
        Encoding("affine", "f32", 2, 32),
        (1, 32),
        bytes.fromhex("ffafaaaa55550500"),
        np.float32(-1 / 3).tobytes(),
        np.float32(1).tobytes(),
    )
    codes = np.array([3] * 6 + [2] * 10 + [1] * 10 + [0] * 6)
    np.testing.assert_allclose(two[0], 1 - codes / 3, atol=1e-6)


def test_literal_streams() -> None:
    assert pack([1, 2, 3, 4, 5, 6, 7, 0], 3) == bytes([0b11_010_001, 0b0_101_100_0, 0b000_111_11])
    assert pack([31, 0, 1, 2, 3, 4, 5, 6], 5).hex() == "1f04314831"
    assert unpack(bytes([0x21, 0x43]), 4, 4).tolist() == [1, 2, 3, 4]
    assert unpack(bytes([0b11100100]), 2, 4).tolist() == [0, 1, 2, 3]
    assert unpack(bytes([0x01, 0xF0, 0xFF]), 6, 4).tolist() == [1, 0, 63, 63]
    assert pack([], 3) == b""


def test_literal_bf16_block() -> None:
    # scale 0.5 = 0x3F00, bias -1 = 0xBF80, low nibble first.
    encoding = Encoding("affine", "bf16", 4, 32)
    codes = bytes([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2)
    expected = [-1, -0.5, 0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 6.5] * 2
    result = decoded(encoding, (1, 32), codes, b"\x00\x3f", b"\x80\xbf", start=100)
    assert result.dtype == np.float32
    assert result.tolist() == [expected]


def test_literal_microscaling_blocks() -> None:
    nibbles = bytes([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE])
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert decoded(Encoding("mxfp4", "bf16", 4, 32), (1, 32), nibbles * 2, bytes([128])).tolist() == [
        [2 * v for v in values] * 2
    ]
    # E4M3 0x3C = 1.5 and 0xB8 = -1.
    assert decoded(Encoding("nvfp4", "bf16", 4, 16), (1, 32), nibbles * 2, b"\x3c\xb8").tolist() == [
        [1.5 * v for v in values] + [-v for v in values]
    ]
    eights = bytes([0x00, 0x01, 0x08, 0x38, 0x3C, 0x7E, 0xB8, 0xFE] * 4)
    assert decoded(Encoding("mxfp8", "bf16", 8, 32), (1, 32), eights, bytes([126])).tolist() == [
        [0, 2.0**-10, 2.0**-7, 0.5, 0.75, 224, -0.5, -224] * 4
    ]


def test_small_float_tables() -> None:
    assert E2M1.tolist()[:8] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    np.testing.assert_array_equal(E4M3, np.array(mx.from_fp8(mx.arange(256).astype(mx.uint8), mx.float32)))
    assert [E8M0[i] for i in (0, 1, 127, 254)] == [2.0**-127, 2.0**-126, 1.0, 2.0**127]
    assert np.isnan(E8M0[255])


# Bit streams


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), data=st.data())
def test_streams_are_little_endian_integers(bits: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=70))
    number = sum(value << (i * bits) for i, value in enumerate(values))
    stream = number.to_bytes(-(-len(values) * bits // 8), "little")
    assert pack(values, bits) == stream
    assert unpack(stream + b"\xff", bits, len(values)).tolist() == values


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_long_streams_and_shapes(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, (3, 700_001), dtype=np.uint8)
    np.testing.assert_array_equal(unpack(pack(values, bits), bits, values.size), values.reshape(-1))


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_streams_are_those_of_mlx(bits: int) -> None:
    w = mx.random.normal((3, 96), key=mx.random.key(bits))
    codes, scales, biases = mx.quantize(w, group_size=32, bits=bits)
    values = unpack(raw_bytes(codes), bits, w.size)
    assert pack(values, bits) == raw_bytes(codes)
    levels = values.reshape(3, 3, 32) * np.array(scales)[..., None] + np.array(biases)[..., None]
    assert np.abs(levels.reshape(3, 96) - np.array(w)).max() <= np.abs(np.array(scales)).max() * 1.01


def test_streams_reject_what_does_not_fit() -> None:
    for bits in (0, 9, -1):
        with pytest.raises(RequestError, match="1 to 8 bits"):
            unpack(b"", bits, 0)
    with pytest.raises(RequestError, match="take 3 bytes"):
        unpack(b"\0\0", 3, 6)
    with pytest.raises(RequestError):
        unpack(b"\0\0", 3, -1)
    for values in ([8], [-1], [0.5]):
        with pytest.raises(RequestError, match="integers from 0 to 7"):
            pack(values, 3)


# Against MLX


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group_size", AFFINE_GROUPS)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_affine_is_mlx(bits: int, group_size: int, dtype: str) -> None:
    rng = np.random.default_rng(bits * group_size)
    shape = (2, 3, 2 * group_size)
    codes = mx.array(rng.integers(0, 1 << 32, (2, 3, 2 * group_size * bits // 32), dtype=np.uint32))
    scales = mx.array(rng.normal(size=(2, 3, 2)).astype(np.float32)).astype(MLX_DTYPES[dtype])
    biases = mx.array(rng.normal(size=(2, 3, 2)).astype(np.float32) * 100).astype(MLX_DTYPES[dtype])
    result = decoded(
        Encoding("affine", dtype, bits, group_size), shape, raw_bytes(codes), raw_bytes(scales), raw_bytes(biases)
    )
    assert result.dtype == np.float32
    wide = scales.astype(mx.float32), biases.astype(mx.float32)
    expected = mx.dequantize(codes, *wide, group_size=group_size, bits=bits)
    np.testing.assert_array_equal(result, np.array(expected))
    if dtype != "f32":  # the stated tolerance to MLX in the stored type
        native = np.array(mx.dequantize(codes, scales, biases, group_size=group_size, bits=bits).astype(mx.float32))
        product = np.abs(result.astype(np.float64) - np.repeat(np.array(wide[1]), group_size, axis=-1))
        u = UNIT_ROUNDOFF[dtype]
        assert (np.abs(native - result) <= u * (1 + u) * (product + np.abs(result)) * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("mode", MICROSCALING)
def test_microscaling_is_mlx(mode: str, dtype: str) -> None:
    bits, group_size = MICROSCALING[mode]
    rng = np.random.default_rng(7)
    groups = 254
    codes = rng.integers(0, 256, groups * group_size * bits // 8, dtype=np.uint8)
    if mode == "mxfp8":
        codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    # Every scale but NaN and those whose products leave the range of float32 (or the normal one of bf16).
    scales = np.arange(groups).astype(np.uint8) % 127
    if mode == "nvfp4":
        scales[127:] |= 0x80
    else:
        low, high = (16 if dtype == "bf16" else 0), (246 if mode == "mxfp8" else 252)
        scales = np.clip(np.arange(groups), low, high).astype(np.uint8)
    result = decoded(Encoding(mode, dtype, bits, group_size), (groups, group_size), codes.tobytes(), scales.tobytes())
    expected = mx.dequantize(
        mx.array(codes).view(mx.uint32).reshape(groups, -1),
        mx.array(scales).reshape(groups, -1),
        group_size=group_size,
        bits=bits,
        mode=mode,
        dtype=MLX_DTYPES[dtype],
    )
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, np.array(expected.astype(mx.float32)))


# Raw


def test_raw_floats() -> None:
    assert to_float32(bytes.fromhex("803f 20c1 807f 0100 0080".replace(" ", "")), "bf16").tolist() == [
        1.0, -10.0, float("inf"), 2.0**-133, -0.0,
    ]  # fmt: skip
    assert to_float32(bytes.fromhex("003c00c8ff7b0100"), "f16").tolist() == [1.0, -8.0, 65504.0, 2.0**-24]
    assert np.isnan(to_float32(bytes.fromhex("c07f"), "bf16")[0])
    assert decoded(Encoding("raw", "f32"), (2,), b"\0\0\x80\x3f\0\0\0\xc0").tolist() == [1.0, -2.0]


@pytest.mark.parametrize("dtype", FLOATS)
def test_raw_floats_are_those_of_mlx(dtype: str) -> None:
    w = (mx.random.normal((4, 3, 5)) * 10).astype(MLX_DTYPES[dtype])
    result = decoded(Encoding("raw", dtype), (4, 3, 5), raw_bytes(w))
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, np.array(w.astype(mx.float32)))


def test_raw_integers_stay_integers() -> None:
    assert decoded(Encoding("raw", "u8"), (3,), b"\x01\xff\x00").tolist() == [1, 255, 0]
    result = decoded(Encoding("raw", "i64"), (1, 2), b"\xfe" + b"\xff" * 7 + b"\0" * 7 + b"\x80")
    assert result.dtype == np.int64
    assert result.tolist() == [[-2, -(2**63)]]
    for dtype in ("i8", "u16", "i16", "u32", "i32", "u64"):
        kind = ("uint" if dtype[0] == "u" else "int") + dtype[1:]
        assert decoded(Encoding("raw", dtype), (1,), np.array([7], kind).tobytes()).dtype == np.dtype(kind)


def test_to_float32_rejects_other_types_and_sizes() -> None:
    with pytest.raises(RequestError, match="not a float type"):
        to_float32(b"\0\0", "i16")
    for dtype in FLOATS:
        with pytest.raises(RequestError, match="whole number"):
            to_float32(b"\0\0\0", dtype)


# The registry


def test_every_mode_has_a_decoder() -> None:
    assert set(DECODERS) == set(MODES.values())


def test_decode_rejects_tensors_that_no_valid_file_holds() -> None:
    encoding = Encoding("affine", "bf16", 4, 64)
    good, end = place("layer.weight", "other", encoding, (2, 64))
    image = bytes(end)
    assert decode(good, image).shape == (2, 64)
    with pytest.raises(RequestError, match=r"layer\.weight: biases take bytes"):
        decode(good, image[:-1])
    for bad in (
        Encoding("affine", "bf16", 7, 64),
        Encoding("affine", "bf16", 4, 48),
        Encoding("affine", "i32", 4, 64),
        Encoding("ternary", "bf16", 2, 64),
        Encoding("affine", "f32", 4, 64),
        Encoding("nvfp4", "bf16", 4, 32),
    ):
        with pytest.raises(RequestError, match=r"layer\.weight"):
            decode(Tensor("layer.weight", "other", bad, good.shape, good.codes, good.scales, good.biases), image)
    for shape in ((2, 128), (), (0, 64), (4, 32), (-2, -64)):
        with pytest.raises(RequestError, match=r"layer\.weight"):
            decode(Tensor("layer.weight", "other", encoding, shape, good.codes, good.scales, good.biases), image)
    for codes in ((-64, 64), (1 << 62, 64)):
        with pytest.raises(RequestError, match="codes take bytes"):
            decode(Tensor("layer.weight", "other", encoding, good.shape, codes, good.scales, good.biases), image)


def test_codecs_need_no_mlx() -> None:
    program = "import sys; sys.modules['mlx'] = None; import squizd.codecs; assert 'mlx.core' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
