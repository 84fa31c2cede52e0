"""Quantized and rotating prompt caches against mlx-lm's own `generate_step` with the same options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache
from test_runtime_models import CONFIGS, QWEN3, in_float32, make_model, write_file

import squizd
from squizd import container, kernels
from squizd.errors import RequestError
from squizd.generation import Conversation
from squizd.runtime.blueprint import draw
from squizd.runtime.caches import BITS, CacheOptions, entries
from squizd.runtime.device import accelerate
from squizd.runtime.load import load_model, state
from squizd.runtime.probe import probe

WIDE = {**QWEN3, "head_dim": 64, "max_position_embeddings": 2048}
PROMPT = mx.array(np.random.default_rng(1).integers(0, 96, 50))
KINDS: dict[str, dict[str, Any]] = {f"{bits} bits": {"kv_bits": bits} for bits in BITS}
KINDS |= {"4 bits g32": {"kv_bits": 4, "kv_group_size": 32}}
KINDS |= {f"{n} tokens": {"max_kv_size": n} for n in (5, 17, 49, 50, 51, 300)}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_file(tmp_path_factory.mktemp("caches") / "m.squizd", make_model(WIDE), WIDE)


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    return in_float32(make_model(WIDE))


def steps(model: nn.Module, count: int = 40, chunk: int = 16, **options: Any) -> list[tuple[int, np.ndarray]]:
    found = generate_step(PROMPT, model, max_tokens=count, prefill_step_size=chunk, **options)
    return [(token, np.array(logprobs)) for token, logprobs in found]


def same(got: list[tuple[int, np.ndarray]], want: list[tuple[int, np.ndarray]]) -> bool:
    return all(a == b and np.array_equal(x, y) for (a, x), (b, y) in zip(got, want, strict=True))


@pytest.mark.parametrize("share", ["100%", "25%"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_mlx_lm_with_the_same_options(
    kind: str, share: str, file: Path, reference: nn.Module
) -> None:
    theirs = {**KINDS[kind], **({"quantized_kv_start": 0} if "kv_bits" in KINDS[kind] else {})}
    model = load_model(file, resident=share, **KINDS[kind])
    caches = state(model).caches
    found = caches.make(model)
    got = steps(model, prompt_cache=found, **caches.steps)
    assert same(got, steps(reference, **theirs))
    assert all(isinstance(e, QuantizedKVCache if caches.bits else RotatingKVCache) for e in found)
    different = KINDS[kind].get("max_kv_size", 0) < len(PROMPT) + 40
    assert same(got, steps(reference)) != different
    replay = state(model).replay
    if replay is not None:
        assert replay.in_use == (caches.bits is None)
        said = state(model).arithmetic
        assert ("tokens not replayed: its cache is quantized" in said) == (caches.bits is not None)


def test_a_bounded_cache_costs_the_same_for_any_text(tmp_path: Path) -> None:
    config = {**WIDE, "max_position_embeddings": 1 << 17}
    path = write_file(tmp_path / "m.squizd", make_model(config), config)
    bounded, short = (state(load_model(path, max_kv_size=64, context=n)).budget for n in (None, 3000))
    assert (bounded.context, bounded.total) == (1 << 17, short.total)
    assert state(load_model(path)).context == 4096


@pytest.mark.skipif(bool(kernels.missing()), reason=kernels.missing() or "-")
def test_a_rotating_cache_is_replayed_through_growth_and_several_prompts(file: Path, reference: nn.Module) -> None:
    """The array grows at 256 tokens, turns at 300, and is put in order again by the next prompt."""
    model = load_model(file, resident="50%", max_kv_size=300)
    results = []
    for m, make in ((model, state(model).caches.make), (reference, CacheOptions(max_size=300).make)):
        cache, found = make(m), []
        for _ in range(2):
            found += steps(m, 270, prompt_cache=cache)
        results.append(found)
    assert same(*results)
    assert state(model).replay.in_use  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def tiny_reference(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Any:
    folder = tmp_path_factory.mktemp("mlx") / "model"
    mlx_lm.convert(hf_path=str(tiny), mlx_path=str(folder), quantize=True)
    model, tokenizer = mlx_lm.load(str(folder))
    widen = lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a  # noqa: E731
    model.update(tree_map(widen, model.parameters()))
    accelerate(model)
    return model, tokenizer


@pytest.mark.parametrize("options", [{"kv_bits": 2, "kv_group_size": 32}, {"max_kv_size": 12}])
def test_every_way_to_generate_takes_them(
    options: dict[str, Any], tiny_file: Any, tiny_reference: Any, cli: Any
) -> None:
    file, text = str(tiny_file()), "The city was founded in the year"
    theirs = {**options, **({"quantized_kv_start": 0} if "kv_bits" in options else {})}
    wanted = mlx_lm.generate(*tiny_reference, text, max_tokens=30, **theirs)
    assert wanted != mlx_lm.generate(*tiny_reference, text, max_tokens=30)
    model, tokenizer = squizd.load(file, resident="25%", **options)
    assert "".join(p.text for p in squizd.stream_generate(model, tokenizer, text, max_tokens=30)) == wanted
    assert squizd.generate(file, text, max_tokens=30, **options) == wanted
    flags = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    done = cli("run", file, "--no-chat", "-n", "30", "-p", text, *flags).success()
    assert done.out == wanted + "\n"
    if kernels.missing() == "" and "kv_bits" in options:
        assert done.err.endswith("tokens not replayed: its cache is quantized\n")


@pytest.mark.parametrize("options", [{"kv_bits": 8, "kv_group_size": 32}, {"max_kv_size": 64}])
def test_a_conversation_keeps_them(options: dict[str, Any], tiny_file: Any) -> None:
    with squizd.Session(tiny_file(), context=1024, **options) as session:
        conversation = Conversation()
        for message in ("Tell me about the river.", "And the war?", "Why was that?"):
            list(session.reply(conversation, message, max_tokens=30))
            wanted = QuantizedKVCache if "kv_bits" in options else RotatingKVCache
            assert {type(e) for e in conversation.cache} == {wanted}
        assert len(conversation.messages) == 6


@pytest.mark.parametrize("options", [{}, *KINDS.values()], ids=["plain", *KINDS])
def test_the_budget_reserves_what_they_hold(options: dict[str, Any], file: Path, reference: nn.Module) -> None:
    kind = CacheOptions(options.get("kv_bits"), options.get("kv_group_size", 64), options.get("max_kv_size"))
    with container.open(file) as opened:
        needs = probe(draw(opened), WIDE, "m", kind)
    cache, tokens = kind.make(reference), 0
    for chunk in (300, 64, 1, 256, 1, 1, 300):
        mx.eval(reference(mx.zeros((1, chunk), mx.int32), cache=cache))
        before = sum(e.nbytes for e in entries(cache))
        kind.quantize(cache)
        mx.eval([e.state for e in cache])
        tokens += chunk
        held = sum(e.nbytes for e in entries(cache))
        assert held <= needs.cache_bytes(tokens, 300)
        if tokens == chunk and kind.bits:  # the moment at which the first chunk is there both ways
            assert before + held <= needs.cache_bytes(tokens, 300)
    if kind.bits:  # codes, and a float32 scale and bias for each group, of 3 layers × keys and values × 2 heads × 64
        bits = kind.bits + 64 / kind.group_size
        assert held == cache[0].keys[0].shape[2] * 3 * 2 * 2 * 64 * bits / 8
        assert needs.cache_bytes(4096, 256) < 1.1 * 4096 * 3 * 2 * 2 * 64 * bits / 8
    if kind.max_size:
        assert needs.cache_bytes(10**6, 16) == needs.cache_bytes(10**4, 16)


BITS_4, BOUNDED = {"kv_bits": 4, "kv_group_size": 32}, {"max_kv_size": 32}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt_oss", BITS_4),  # sliding windows
        ("deepseek_v3", BITS_4),  # latents
        ("qwen3_next", BITS_4),  # heads of 16
        ("gpt_oss", BOUNDED),
        ("qwen3_next", BOUNDED),
        ("nemotron_h", BOUNDED),
    ],
)
def test_caches_that_cannot_are_refused(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    config = CONFIGS[name]
    path = write_file(tmp_path / "m.squizd", make_model(config), config)
    with pytest.raises(RequestError, match=r"caches? cannot be|cannot use a quantized cache") as caught:
        load_model(path, **options)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_a_hybrid_keeps_its_states_and_quantizes_the_rest(tmp_path: Path) -> None:
    config = {**CONFIGS["qwen3_next"], "head_dim": 32}
    model = load_model(write_file(tmp_path / "m.squizd", make_model(config), config), kv_bits=4, kv_group_size=32)
    ours, caches = state(model).caches, state(model).caches.make(model)
    got = steps(model, prompt_cache=caches, **ours.steps)
    theirs = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 0}
    assert same(got, steps(in_float32(make_model(config)), **theirs))
    assert sum(isinstance(e, QuantizedKVCache) for e in caches) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_bits": 5}, "a cache of 5 bits"),
        ({"kv_bits": 4, "kv_group_size": 48}, "groups of 48"),
        ({"max_kv_size": 4}, "a cache of 4 tokens"),
        ({"kv_bits": 4, "max_kv_size": 64}, "either quantized or of a bounded size"),
        ({"kv_bits": 4, "kv_group_size": 128}, "cannot be kept in 4 bits in groups of 128"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str, file: Path) -> None:
    with pytest.raises(RequestError, match=message):
        load_model(file, **options)


def test_the_command_line_says_it_in_one_line(tiny_file: Any, cli: Any) -> None:
    said = cli("run", tiny_file(), "--kv-bits", "4", "-p", "The river").failure()
    assert "cannot be kept in 4 bits in groups of 64" in said
    assert "--kv-group-size 32" in said
