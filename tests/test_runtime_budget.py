"""Budgets: what they parse, that they are kept, and what the minimum is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from test_runtime_models import CONFIGS, QWEN3, make_model, write_file

from squizd import container, kernels
from squizd.errors import BudgetError, RequestError
from squizd.runtime.blueprint import draw
from squizd.runtime.budget import CHUNKS, Demand, LayerDemand, format_size, make_budget, parse_share, parse_size
from squizd.runtime.load import DEFAULT_CONTEXT, load_model, state
from squizd.runtime.probe import probe


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GB", 6 * 10**9), ("700MB", 7 * 10**8), ("1.5GiB", 3 << 29), ("1.5 gib", 3 << 29), ("512k", 512_000),
        ("2T", 2 * 10**12), (".5G", 5 * 10**8), ("123", 123), (" 7 b ", 7), (4096, 4096), ("3Mi", 3 << 20),
    ],
)  # fmt: skip
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "6 PB", "six", "6GBs", "1,000", "nan", True, -5, "0x10"])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(RequestError, match="not a size"):
        parse_size(text)


@given(st.integers(0, 1 << 50))
def test_a_printed_size_is_enough(size: int) -> None:
    assert size <= parse_size(format_size(size)) <= size * 1.01 + 10**6


@pytest.mark.parametrize(
    ("text", "share"), [("25%", 0.25), ("0%", 0), (0.5, 0.5), (1, 1), ("100 %", 1), ("0.125", 0.125), ("12.5%", 0.125)]
)
def test_shares(text: str | float, share: float) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["", "half", "101%", "-1%", 25, "25", "nan", "nan%", True, float("inf")])
def test_what_is_no_share(text: Any) -> None:
    with pytest.raises(RequestError, match="not a share"):
        parse_share(text)


LAYERS = st.lists(
    st.tuples(st.integers(1, 64), st.integers(1, 8), st.integers(1, 500)).map(
        lambda x: LayerDemand(x[0], min(x[1], x[0]), x[2])
    ),
    max_size=5,
)


def demand(layers: list[LayerDemand], fixed: int) -> Demand:
    return Demand("toy", fixed, layers, 10, lambda tokens, chunk: tokens, lambda chunk, tokens: chunk * 4 + tokens)


@given(LAYERS, st.integers(0, 5000), st.integers(1, 3000), st.integers(0, 200_000))
def test_a_budget_is_kept_or_its_minimum_is_exact(
    layers: list[LayerDemand], fixed: int, context: int, memory: int
) -> None:
    wanted = demand(layers, fixed)
    error: BudgetError | None = None
    try:
        budget = make_budget(wanted, context, memory=memory, share=None, available=0)
    except BudgetError as raised:
        error = raised
    if error is not None:
        assert error.minimum > memory
        assert format_size(error.minimum) in str(error)
        assert make_budget(wanted, context, memory=error.minimum, share=None, available=0).total == error.minimum
        with pytest.raises(BudgetError):
            make_budget(wanted, context, memory=error.minimum - 1, share=None, available=0)
        return
    assert budget.total <= memory
    assert budget.experts == sum(n * x.slot_bytes for n, x in zip(budget.slots, layers, strict=True))
    for n, layer in zip(budget.slots, layers, strict=True):
        assert layer.top_k <= n <= layer.experts
    assert budget.prefill_step_size in CHUNKS
    most = max((x.experts for x in layers), default=1)
    used = max((n / x.experts for n, x in zip(budget.slots, layers, strict=True)), default=1)
    if used < 1:  # one step more in every layer would not fit
        step = next(i for i in range(most + 1) if tuple(x.slots(i / most) for x in layers) == budget.slots)
        more = [i for i in range(step, most + 1) if tuple(x.slots(i / most) for x in layers) != budget.slots]
        assert all(
            budget.total - budget.experts + sum(x.slots(i / most) * x.slot_bytes for x in layers) > memory for i in more
        )


def test_a_share_is_rounded_up_and_never_below_top_k() -> None:
    layers = [LayerDemand(64, 4, 1), LayerDemand(10, 4, 1)]
    for share, slots in ((0.25, (16, 4)), (0, (4, 4)), (0.5, (32, 5)), (0.51, (33, 6)), (1, (64, 10))):
        assert make_budget(demand(layers, 0), 1, memory=None, share=share, available=10**9).slots == slots


def test_share_and_memory_must_agree() -> None:
    layers = [LayerDemand(64, 4, 1000)]
    need = make_budget(demand(layers, 0), 1, memory=None, share=0.5, available=10**9)
    with pytest.raises(BudgetError) as caught:
        make_budget(demand(layers, 0), 1, memory=32_000, share=0.5, available=0)
    assert 32_000 < caught.value.minimum <= need.total
    assert make_budget(demand(layers, 0), 1, memory=caught.value.minimum, share=0.5, available=0).slots == (32,)


def test_without_a_wish_everything_is_resident_if_the_machine_has_room() -> None:
    layers = [LayerDemand(64, 4, 1000)]
    assert make_budget(demand(layers, 0), 1, memory=None, share=None, available=10**6).slots == (64,)
    small = make_budget(demand(layers, 0), 1, memory=None, share=None, available=50_000)
    assert small.slots[0] < 64
    assert small.total <= small.limit == 35_000
    with pytest.raises(BudgetError, match="free memory"):
        make_budget(demand(layers, 0), 1, memory=None, share=None, available=1000)


# -- on models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_estimate_bounds_what_a_run_allocates(name: str, tmp_path: Path) -> None:
    config = {**CONFIGS[name], "max_position_embeddings": 2048}
    model = make_model(config)
    with container.open(write_file(tmp_path / "m.squizd", model, config)) as file:
        needs = probe(draw(file), config, "m")
    if file.moe_layers:
        assert set(needs.top_k) == {2}
    running = load_model(tmp_path / "m.squizd", context=1024)
    cache, tokens = make_prompt_cache(running), 0
    for chunk in (64, 256, 1, 64, 300):
        mx.eval(running(mx.zeros((1, chunk), mx.int32), cache=cache))
        tokens += chunk
        held = sum(entry.nbytes for entry in cache)
        assert held <= needs.cache_bytes(tokens, 300)
    if name == "qwen3_moe":  # 3 layers × keys and values × 2 heads × 16 × float32
        assert needs.cache_bytes(1024, 64) == (1024 + 255) * 3 * 2 * 2 * 16 * 4


def wide_model(tmp_path: Path) -> Path:
    """16 MB of experts in a model whose every other tensor is small."""
    config = {
        **QWEN3, "hidden_size": 128, "moe_intermediate_size": 256, "num_experts": 64, "mlp_only_layers": [],
        "max_position_embeddings": 4096,
    }  # fmt: skip
    return write_file(tmp_path / "wide.squizd", make_model(config), config)


def test_memory_stays_within_the_budget(tmp_path: Path) -> None:
    path = wide_model(tmp_path)
    prompt = mx.array(np.random.default_rng(0).integers(0, 96, 400))
    least = _minimum(path, context=512)
    texts = set()
    for memory in (least, least * 3 // 2):
        mx.clear_cache()
        before = mx.get_active_memory()
        model = load_model(path, memory=memory, context=512)
        budget = state(model).budget
        assert budget.total <= memory
        assert mx.get_active_memory() - before <= budget.residents + budget.experts + 10_000
        mx.reset_peak_memory()
        step = state(model).prefill_step_size
        tokens = [t for t, _ in generate_step(prompt, model, max_tokens=60, prefill_step_size=step)]
        texts.add(tuple(tokens))
        assert mx.get_peak_memory() - before <= memory
        assert mx.get_cache_memory() <= budget.workspace
        del model
    assert len(texts) == 1


@pytest.mark.parametrize("memory", ["40MB", "250MB"])
def test_the_chunk_of_a_long_prompt_keeps_to_the_budget(memory: str, tmp_path: Path) -> None:
    """And is no smaller than it need be: twice as many tokens at once would not."""
    model = load_model(wide_model(tmp_path), memory=memory, context=2048)
    prompt, budget = mx.array(np.random.default_rng(0).integers(0, 96, 2000)), state(model).budget
    weights, peaks = mx.get_active_memory(), []
    for step in (budget.prefill_step_size, 2 * budget.prefill_step_size):
        mx.clear_cache()
        mx.reset_peak_memory()
        assert len(list(generate_step(prompt, model, max_tokens=1, prefill_step_size=step))) == 1
        peaks.append(mx.get_peak_memory() - weights)
    assert peaks[0] <= budget.cache + budget.workspace
    if not kernels.missing():  # MLX's own attention is bounded less closely
        assert budget.cache + budget.workspace < peaks[1]


def _minimum(path: Path, context: int) -> int:
    with pytest.raises(BudgetError, match=r"cannot hold wide\.squizd") as caught:
        load_model(path, memory=1, context=context)
    assert state(load_model(path, memory=caught.value.minimum, context=context)).budget.slots == (2, 2, 2)
    with pytest.raises(BudgetError):
        load_model(path, memory=caught.value.minimum - 1, context=context)
    return caught.value.minimum


def test_context_is_reserved(tmp_path: Path) -> None:
    path = write_file(tmp_path / "m.squizd", make_model(QWEN3), QWEN3)
    assert state(load_model(path)).context == QWEN3["max_position_embeddings"] < DEFAULT_CONTEXT
    short, long = (state(load_model(path, context=n)).budget for n in (256, 4096))
    assert long.cache * 511 == short.cache * (4096 + 255)
    with pytest.raises(RequestError):
        load_model(path, context=0)
