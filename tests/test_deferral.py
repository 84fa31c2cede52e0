"""Waiting late for routers, transfers, fused experts: what GPUs use, here on the CPU, where bits can be compared."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU
from test_runtime_models import QWEN3, codes_of, experts_at, make_model, write_file

from squizd import kernels
from squizd.errors import ExpertReadError
from squizd.quantizers.packing import pack
from squizd.runtime import blueprint, device
from squizd.runtime import transfer as transfers
from squizd.runtime.fused import FusedSwitchGLU
from squizd.runtime.load import load_model, state
from squizd.runtime.mailbox import Mailbox, Post
from squizd.runtime.switch import PagedSwitch
from squizd.runtime.transfer import Transfer

PROMPT = [[5, 17, 400, 23, 99, 7]]


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device interface answers as on CUDA, but for where memory is."""
    if transfers.missing():
        pytest.skip(transfers.missing())
    monkeypatch.setattr(device, "accelerate", lambda model, lending: None)
    monkeypatch.setattr(device, "transfer", lambda size: Transfer(size, ""))
    monkeypatch.setattr(device, "widened", lambda stored: "")
    monkeypatch.setattr(blueprint, "widened", lambda stored: "")
    for name in ("defers", "small_mail", "fuses"):
        monkeypatch.setattr(device, name, lambda: True)


def ask_from_here(chosen: mx.array, note: mx.array) -> mx.array:
    """What the CUDA kernel does (runtime/asking.py), by the host and at once."""
    count = chosen.size
    address = int(np.array(note)[:2].view(np.uint64)[0])
    box = np.frombuffer((ctypes.c_uint32 * 192).from_address(address), np.uint32)
    box[1 : 1 + count] = np.array(chosen).reshape(-1)
    number = np.uint32(int(box[0]) + 1)
    box[0] = number
    if not wait(lambda: box[32] == number, box):
        return mx.zeros(chosen.shape, mx.uint32)
    table = np.frombuffer((ctypes.c_uint64 * 64).from_address(int(box[66:68].view(np.uint64)[0])), np.uint64)
    for coming in box[68:188].reshape(30, 4)[: box[64]]:
        if not wait(lambda coming=coming: coming[3] == number, box):
            return mx.zeros(chosen.shape, mx.uint32)
        source = int(coming[:2].view(np.uint64)[0])
        for offset, size, to, stride in table.reshape(16, 4)[: box[65]].tolist():
            if source:
                ctypes.memmove(to + stride * int(coming[2]), source + offset, size)
    return mx.array(box[33 : 33 + count]).reshape(chosen.shape)


def wait(done: Callable[[], bool], box: np.ndarray) -> bool:
    began = time.monotonic()
    while not done():
        time.sleep(0)
        if time.monotonic() - began > box[63] / 1000 + 5:  # this machine may be busy
            box[31] = 1
            return False
    return True


@pytest.fixture(params=["late", "asked"])
def way(request: pytest.FixtureRequest, like_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """How single tokens learn their slots."""
    monkeypatch.setattr(device, "ask", lambda: ask_from_here if request.param == "asked" else None)
    return str(request.param)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's own arithmetic."""
    monkeypatch.setattr(device, "accelerate", lambda model, lending: None)
    if kernels.native() is not None:
        pytest.skip("where the kernels are in use MLX's functions are replaced (SQUIZD_KERNELS=0)")


def decode(model: nn.Module, tokens: int = 24) -> list[np.ndarray]:
    """Logits of a prompt and of greedy tokens after it."""
    cache = make_prompt_cache(model)
    logits = model(mx.array(PROMPT), cache=cache)[:, -1:]
    out = [np.array(logits.astype(mx.float32))]
    for _ in range(tokens):
        logits = model(mx.argmax(logits[:, -1:], axis=-1), cache=cache)
        out.append(np.array(logits.astype(mx.float32)))
    return out


@pytest.mark.parametrize("share", ["100%", "50%", "25%", "0%"])
def test_deferred_tokens_have_the_same_bits(
    share: str, tiny_file: Callable[..., Path], plain: None, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_file()
    model = load_model(path, resident=share)
    got = decode(model)
    assert any(isinstance(m, FusedSwitchGLU) for m in model.modules())
    if share != "100%":
        deferral = state(model).deferral
        assert deferral is not None
        assert deferral.reason == ""
        assert deferral.tried
        assert (deferral.exchange is not None) == (way == "asked")
        assert deferral.exchange_reason == ""
        assert state(model).stats.misses > 0
    monkeypatch.setattr(device, "transfer", lambda size: None)
    for name in ("defers", "small_mail", "fuses"):
        monkeypatch.setattr(device, name, lambda: False)
    wanted = decode(load_model(path))
    assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("bits", [(2, 3, 4), (3, 4, 3), (5, 8, 2)])
def test_narrow_codes_are_wide_before_they_are_copied(
    bits: tuple[int, int, int], tmp_path: Path, plain: None, way: str
) -> None:
    """Experts of three sizes by turns, and of some bits no expert has the most for all of its tensors."""
    wide, model = max(bits), make_model(QWEN3, experts_at(max(bits)))
    narrow = lambda name, expert: bits[(expert + len(name)) % 3]  # noqa: E731
    for name, module in model.named_modules():
        if isinstance(module, QuantizedSwitchLinear):
            codes = codes_of(np.array(module.weight), wide)
            for expert, own in enumerate(codes):
                own &= (1 << narrow(f"{name}.weight", expert)) - 1
            module.weight = pack(mx.array(codes), wide)
    file = write_file(tmp_path / "m.squizd", model, QWEN3, narrow=narrow)
    found = load_model(file, resident="50%")
    cache, plain_cache = make_prompt_cache(found), make_prompt_cache(model)
    for i in range(30):
        token = mx.array([[i * 37 % 96]])
        assert mx.array_equal(found(token, cache=cache), model(token, cache=plain_cache)).item(), i
    deferral, stats = state(found).deferral, state(found).stats
    assert deferral is not None
    assert (deferral.exchange is not None) == (way == "asked")
    assert deferral.exchange_reason == ""
    assert stats.misses > 10
    for switch in (m for m in found.modules() if isinstance(m, PagedSwitch)):
        assert switch.slots.shelf_handle is not None


def test_who_asks_in_vain_waits_instead(
    tiny_file: Callable[..., Path], plain: None, like_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots that are not the host's answer are noticed in the first token, and nothing is asked any more."""
    monkeypatch.setattr(device, "ask", lambda: lambda chosen, note: ask_from_here(chosen, note) * 0)
    model = load_model(tiny_file(), resident="50%")
    got = decode(model, 6)
    deferral = state(model).deferral
    assert deferral is not None
    assert deferral.exchange is None
    assert "other bits" in deferral.exchange_reason
    assert deferral.reason == ""
    monkeypatch.setattr(device, "defers", lambda: False)
    wanted = decode(load_model(tiny_file(), resident="50%"), 6)
    assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_damage_is_told_before_a_token_is_and_a_mended_file_goes_on(
    tiny_file: Callable[..., Path], tmp_path: Path, plain: None, way: str
) -> None:
    """Every expert is damaged while the model runs: the token that needs one fails, the cache stays as it was."""
    whole = tiny_file().read_bytes()
    path = tmp_path / "m.squizd"
    path.write_bytes(whole)
    model = load_model(path, resident="0%")
    cache = make_prompt_cache(model)
    model(mx.array(PROMPT), cache=cache)
    token = mx.array([[11]])
    for _ in range(3):
        model(token, cache=cache)
    file = state(model).file
    records = [file.expert(x.layer, e) for x in file.moe_layers for e in range(x.expert_count)]
    with path.open("r+b") as f:
        for record in records:
            f.seek(record.offset + record.stored_size // 2)
            byte = f.read(1)[0]
            f.seek(record.offset + record.stored_size // 2)
            f.write(bytes([byte ^ 1]))
    position = cache[0].offset
    with pytest.raises(ExpertReadError, match="digest"):
        for t in range(100):
            model(mx.array([[t * 37 % 500]]), cache=cache)
            position += 1
    assert [c.offset for c in cache] == [position] * len(cache)
    with path.open("r+b") as f:
        f.write(whole)
    again = model(token, cache=cache)
    fresh = make_prompt_cache(model)
    model(mx.array(PROMPT), cache=fresh)
    for _ in range(3):
        model(token, cache=fresh)
    for t in range(position - fresh[0].offset):
        model(mx.array([[t * 37 % 500]]), cache=fresh)
    assert mx.array_equal(again, model(token, cache=fresh)).item()


def test_a_file_that_shrinks_fails_the_token(
    tiny_file: Callable[..., Path], tmp_path: Path, plain: None, way: str
) -> None:
    path = tmp_path / "m.squizd"
    path.write_bytes(tiny_file().read_bytes())
    model = load_model(path, resident="0%")
    cache = make_prompt_cache(model)
    model(mx.array(PROMPT), cache=cache)
    first = state(model).file.expert(state(model).file.moe_layers[0].layer, 0)
    with path.open("r+b") as f:
        f.truncate(first.offset + 10)
    with pytest.raises(ExpertReadError, match="cut short"):
        for t in range(100):
            model(mx.array([[t * 37 % 500]]), cache=cache)


@pytest.mark.parametrize(("count", "bound"), [(1, 2), (8, 256), (8, 257), (22, 500), (4, 60000)])
def test_numbers_travel_both_ways(count: int, bound: int) -> None:
    rng = np.random.default_rng(count)
    for small in (False, True):
        box = Mailbox(count, bound, small)
        for _ in range(3):
            numbers = rng.integers(0, bound, count).tolist()
            box.write(numbers)
            out = box.read((1, 1, count))
            assert out.dtype == mx.uint32
            assert out.reshape(-1).tolist() == numbers
            assert Post.receive(Post(bound, small).send(mx.array(numbers).reshape(1, -1))) == numbers


@pytest.mark.parametrize("rows", [(1, 1), (1, 3), (2, 40)])
def test_fused_experts_are_the_two_products(rows: tuple[int, int], plain: None) -> None:
    mx.random.seed(1)
    inner = SwitchGLU(64, 32, 8)
    nn.quantize(inner, 32, 4)
    fused = FusedSwitchGLU(inner)
    for name in ("weight", "scales", "biases"):
        fused.gate_up_proj[name] = mx.concatenate([inner.gate_proj[name], inner.up_proj[name]], axis=1)
    x, chosen = mx.random.normal((*rows, 64)), mx.random.randint(0, 8, (*rows, 4))
    assert np.array_equal(np.array(fused(x, chosen)), np.array(inner(x, chosen)))
