"""The paged model at work: order of reads and writes, waves, faults under way, what is refused at load."""

from __future__ import annotations

import gc
import os
import threading
from collections import Counter
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU
from test_runtime_models import AFFINE, QWEN3, TOKENS, in_float32, logits, make_model, write_file

from squizd import container
from squizd.container.layout import RAW, ZSTD
from squizd.errors import ExpertReadError, ReadError, RequestError, SourceError
from squizd.runtime.load import Residency, load_model, state
from squizd.runtime.policy import LRU
from squizd.runtime.switch import PagedSwitch
from squizd.tracing import join, trace


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny qwen3_moe: layers 0 and 2 with 8 experts, top 2, layer 1 dense. Never write to it."""
    return write_file(tmp_path_factory.mktemp("runtime") / "m.squizd", make_model(QWEN3), QWEN3)


@pytest.fixture(scope="module")
def wanted(file: Path) -> list[np.ndarray]:
    """mlx-lm's logits on the same weights."""
    return logits(in_float32(make_model(QWEN3)))


def same(got: list[np.ndarray], wanted: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))


def paged_layers(model: nn.Module) -> list[PagedSwitch]:
    return [m for _, m in sorted(model.named_modules()) if isinstance(m, PagedSwitch)]


# -- the wrapper alone ---------------------------------------------------------------------------------

SWITCH = {**QWEN3, "num_hidden_layers": 1, "mlp_only_layers": [], "num_experts": 16, "num_experts_per_tok": 3}


@pytest.fixture(scope="module")
def switch_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_file(tmp_path_factory.mktemp("switch") / "m.squizd", make_model(SWITCH), SWITCH)


@pytest.fixture(scope="module")
def switch() -> SwitchGLU:
    """All 16 experts, as mlx-lm holds them."""
    model = in_float32(make_model(SWITCH))
    return next(m for m in model.modules() if isinstance(m, SwitchGLU))


@given(st.integers(0, 1 << 32), st.sampled_from([(1, 1), (1, 7), (2, 5), (9,), (1, 40), (2, 3, 4), (3, 30)]),
       st.integers(1, 5), st.floats(0, 0.9), st.integers(1, 4))  # fmt: skip
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_indices_at_any_share_give_the_rows_of_the_whole(
    switch_file: Path, switch: SwitchGLU, seed: int, leading: tuple[int, ...], choices: int, share: float, calls: int
) -> None:
    """Repeated and few or many experts, any leading dimensions, several calls on the same slots: waves included."""
    model = load_model(switch_file, resident=share)
    (paged,) = paged_layers(model)
    rng = np.random.default_rng(seed)
    for _ in range(calls):
        x = mx.array(rng.standard_normal((*leading, 64), np.float32))
        chosen = rng.integers(0, rng.integers(1, 17), (*leading, choices)).astype(rng.choice([np.uint32, np.int32]))
        before = state(model).stats
        got = paged(x, mx.array(chosen))
        np.testing.assert_array_equal(np.array(got), np.array(switch(x, mx.array(chosen))))
        after = state(model).stats
        used = after.hits + after.misses - before.hits - before.misses
        assert used == len(np.unique(chosen))  # each once, read at most once


class Counted:
    """A source, and how often each extent was begun to be read from it."""

    def __init__(self, source: Any) -> None:
        self.source, self.step, self.begun = source, source.step, Counter[int]()

    def fill(self, buffers: Any, offset: int) -> int:
        self.begun[offset] += 1
        return int(self.source.fill(buffers, offset))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


def test_a_long_prompt_reads_each_needed_expert_once(tiny_file: Callable[..., Path]) -> None:
    """2,000 tokens with a quarter of the experts resident; logits as with all of them."""
    ids = mx.array([np.random.default_rng(3).integers(5, 2000, 2000).tolist()])
    model, whole = (load_model(tiny_file(), resident=share, context=2010) for share in ("25%", "100%"))
    assert state(model).prefill_step_size == 2048
    pager = state(model)._pager
    pager.source = counted = Counted(pager.source)
    got = model(ids, cache=make_prompt_cache(model))
    assert mx.array_equal(got, whole(ids, cache=make_prompt_cache(whole)))
    file = state(model).file
    starts = {file.expert(x.layer, e).offset for x in file.moe_layers for e in range(x.expert_count)}
    begun = {offset: n for offset, n in counted.begun.items() if offset in starts}
    assert set(begun.values()) == {1}
    needed = join(next(iter(trace(whole, [ids[0].tolist()])))).experts
    assert len(begun) == state(model).stats.misses == sum(len(np.unique(layer)) for layer in needed)


def test_indices_need_not_be_contiguous(switch_file: Path, switch: SwitchGLU) -> None:
    (paged,) = paged_layers(load_model(switch_file, resident="0%"))
    x = mx.random.normal((1, 30, 64))
    chosen = mx.argpartition(mx.random.normal((1, 30, 16)), 3, axis=-1)[..., :3]
    assert mx.array_equal(paged(x, chosen), switch(x, chosen))


@pytest.mark.parametrize("bad", [16, 99, -1, 1 << 30])
@pytest.mark.parametrize("tokens", [1, 50])
def test_a_forged_expert_is_refused_and_does_no_harm(
    switch_file: Path, switch: SwitchGLU, bad: int, tokens: int
) -> None:
    (paged,) = paged_layers(load_model(switch_file, resident="25%"))
    x = mx.random.normal((1, tokens, 64))
    good = np.random.default_rng(0).integers(0, 16, (1, tokens, 3)).astype(np.int32)
    forged = good.copy()
    forged[0, -1, 1] = bad
    for _ in range(2):
        with pytest.raises(RequestError, match=f"chose expert {bad}; there are 16"):
            paged(x, mx.array(forged))
        assert mx.array_equal(paged(x, mx.array(good)), switch(x, mx.array(good)))


def test_an_empty_batch_is_no_experts(switch_file: Path) -> None:
    (paged,) = paged_layers(load_model(switch_file, resident="25%"))
    assert paged(mx.zeros((1, 0, 64)), mx.zeros((1, 0, 3), mx.uint32)).shape == (1, 0, 3, 64)


# -- slots are not overwritten while something reads them ------------------------------------------------


class Slow(nn.Module):
    """Takes its time before it reads the banks, so that a premature overwrite shows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        burn = mx.full((300, 300), 1e-3)
        for _ in range(8):
            burn = burn @ burn
        return self.inner(x + 0 * burn[0, 0], indices)


@pytest.mark.parametrize("where", ["same stream", "two streams", "two threads"])
def test_known_indices_wait_for_the_call_before(switch_file: Path, switch: SwitchGLU, where: str) -> None:
    """Indices that need no computation prove nothing about what is still running."""
    model = load_model(switch_file, resident="0%")
    (paged,) = paged_layers(model)
    paged.inner = Slow(paged.inner)
    x = mx.random.normal((1, 1, 64))
    chosen = [mx.array([[[3 * i, 3 * i + 1, 3 * i + 2]]]) for i in range(5)]
    mx.eval(x, chosen)
    wanted = [np.array(switch(x, c)) for c in chosen]
    streams = [mx.default_stream(mx.default_device()), mx.new_stream(mx.default_device())]
    got: list[Any] = [None] * len(chosen)

    def call(i: int) -> None:
        if where == "two streams":
            with mx.stream(streams[i % 2]):
                got[i] = paged(x, chosen[i])
        else:
            got[i] = paged(x, chosen[i])

    for i in range(len(chosen)):
        if where == "two threads" and i % 2:
            worker = threading.Thread(target=call, args=(i,))
            worker.start()
            worker.join()
        else:
            call(i)
    for g, w in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(np.array(g), w)


class MRU(LRU):
    """Gives up what was used last: the worst choice there is, and the first that may still be read."""

    def evict(self, keep: Container[int]) -> int:
        for expert in reversed(list(self)):
            if expert not in keep:
                del self._order[expert]
                return expert
        raise LookupError


def test_no_policy_changes_an_answer(switch_file: Path, switch: SwitchGLU) -> None:
    (paged,) = paged_layers(load_model(switch_file, resident="50%"))
    paged._paging.slots.policy = MRU()
    paged.inner = Slow(paged.inner)
    rng = np.random.default_rng(0)
    for tokens in (1, 6, 30):
        x = mx.array(rng.standard_normal((1, tokens, 64), np.float32))
        chosen = mx.array(rng.integers(0, 16, (1, tokens, 3)))
        assert mx.array_equal(paged(x, chosen), switch(x, chosen))


@pytest.mark.parametrize("share", ["0%", "50%"])
def test_lazy_passes_and_interleaved_caches(file: Path, share: str) -> None:
    reference, model = in_float32(make_model(QWEN3)), load_model(file, resident=share)
    rng = np.random.default_rng(0)
    texts = [mx.array(rng.integers(0, 96, (1, n))) for n in (20, 33, 5)]
    lazy = [model(text) for text in texts]
    mx.eval(lazy)
    for got, text in zip(lazy, texts, strict=True):
        assert mx.array_equal(got, reference(text))
    caches = [[make_prompt_cache(m) for _ in texts] for m in (model, reference)]
    steps: list[tuple[mx.array, mx.array]] = []
    for _ in range(4):
        for i, text in enumerate(texts):
            steps.append((model(text, cache=caches[0][i]), reference(text, cache=caches[1][i])))
        texts = [mx.array(rng.integers(0, 96, (1, n))) for n in (1, 1, 3)]
    for got, want in steps:
        assert mx.array_equal(got, want)
    assert state(model).stats.evictions > 0


def test_threads_share_a_model(file: Path, wanted: list[np.ndarray]) -> None:
    model, results = load_model(file, resident="0%"), []

    def work() -> None:
        results.append(logits(model))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(same(result, wanted) for result in results)


def test_a_batch_is_its_rows(file: Path) -> None:
    reference, model = in_float32(make_model(QWEN3)), load_model(file, resident="25%")
    ids = mx.array(np.random.default_rng(2).integers(0, 96, (3, 9)))
    assert mx.array_equal(model(ids), reference(ids))


# -- faults ----------------------------------------------------------------------------------------------


def copy_of(file: Path, folder: Path) -> Path:
    target = folder / "copy.squizd"
    target.write_bytes(file.read_bytes())
    return target


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as f:
        f.seek(offset)
        byte = f.read(1)[0]
        f.seek(offset)
        f.write(bytes([byte ^ 0x04]))


@pytest.mark.parametrize("codec", [RAW, ZSTD], ids=["raw", "zstd"])
@pytest.mark.parametrize("share", ["0%", "50%"])
def test_damage_stops_generation_and_repair_resumes_it(
    tmp_path: Path, share: str, codec: int, wanted: list[np.ndarray]
) -> None:
    """Whatever byte of an expert is wrong: right logits (it was not needed) or ExpertReadError, never others."""
    path = write_file(tmp_path / "m.squizd", make_model(QWEN3), QWEN3, codec=codec)
    model, noticed = load_model(path, resident=share), 0
    rng = np.random.default_rng(0)
    for _ in range(8):
        layer, expert = int(rng.integers(0, 2)), int(rng.integers(0, 8))
        record = state(model).file.expert(layer, expert)
        at = record.offset + int(rng.integers(0, record.stored_size))
        flip(path, at)
        error: ExpertReadError | None = None
        try:
            got = logits(model)
        except ExpertReadError as raised:
            error = raised
        if error is None:
            assert same(got, wanted)
        else:
            noticed += 1
            assert (error.layer, error.expert, error.offset, error.path) == (layer, expert, record.offset, str(path))
        flip(path, at)
        assert same(logits(model), wanted)
    assert noticed >= 4


def test_a_file_cut_under_a_running_model(file: Path, tmp_path: Path, wanted: list[np.ndarray]) -> None:
    path = copy_of(file, tmp_path)
    model = load_model(path, resident="0%")
    assert same(logits(model), wanted)
    content = path.read_bytes()
    os.truncate(path, len(content) // 2)
    with pytest.raises(ExpertReadError, match="the file is cut short"):
        logits(model)
    path.write_bytes(content)
    assert same(logits(model), wanted)
    path.unlink()  # an open file outlives its name
    assert same(logits(model), wanted)


def test_damage_found_while_loading(file: Path, tmp_path: Path) -> None:
    path = copy_of(file, tmp_path)
    with container.open(path) as f:
        name, (tensor, record) = next((n, r) for n, r in f.residents.items() if n.endswith("q_proj.weight"))
        expert = f.expert(1, 5)
    flip(path, expert.offset + 100)
    with pytest.raises(ExpertReadError, match="layer 1 expert 5"):
        load_model(path, resident="100%")
    flip(path, record.offset + tensor.scales[0])
    with pytest.raises(ReadError, match=f"{name} at byte {record.offset}: the bytes do not match their digest"):
        load_model(path, resident="0%")


# -- what is refused ---------------------------------------------------------------------------------------


def renamed(old: str, new: str | None) -> Callable[[str], str | None]:
    return lambda name: new if name == old else name


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"),
        ("model.norm.weight", None, r"no tensor model\.norm\.weight \[64\], which qwen3_moe wants"),
        ("model.norm.weight", "model.norm.wait", r"tensor model\.norm\.wait has no place in qwen3_moe"),
        ("model.layers.0.mlp.gate.weight", "model.layers.9.mlp.gate.weight", r"model\.layers\.9\.mlp\.gate\.weight"),
        ("model.layers.0.mlp.switch_mlp.up_proj.weight", None, r"model\.layers\.0\.mlp\.switch_mlp\.up_proj\.weight"),
        (
            "model.layers.2.mlp.switch_mlp.up_proj.weight", "model.layers.2.mlp.switch_mlp.up.weight",
            r"model\.layers\.2\.mlp\.switch_mlp\.up\.weight",
        ),
    ],
)  # fmt: skip
def test_wrong_names(tmp_path: Path, old: str, new: str | None, message: str) -> None:
    path = write_file(tmp_path / "m.squizd", make_model(QWEN3), QWEN3, rename=renamed(old, new))
    with pytest.raises(SourceError, match=message):
        load_model(path)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 128}, r"tensor model\.[a-z_.0-9]+weight is stored as \[\d+, 64\], .* \[\d+, 128\]"),
        ({"num_experts": 16}, r"tensor model\.layers\.0\.mlp\.\S+weight is stored as \[(8, |)\d+, 64\], .* \[16, "),
        ({"num_hidden_layers": 4}, r"no tensor model\.layers\.3\.\S+ \["),
        ({"num_hidden_layers": 2}, r"tensor model\.layers\.2\.\S+ "),
        ({"mlp_only_layers": [0, 1]}, r"model\.layers\.0\.mlp"),
        ({"model_type": "no_such_model"}, "unknown architecture 'no_such_model'"),
        ({"model_type": "switch_layers"}, "switch_layers"),
        ({"num_attention_heads": "many"}, "qwen3_moe"),
        ({"model_file": "evil.py"}, r"evil\.py"),
        ({"quantize_activations": True}, "quantized activations"),
    ],
)
def test_wrong_config(tmp_path: Path, change: dict[str, Any], message: str, quantized: bool) -> None:
    model = make_model(QWEN3, (lambda path, module: AFFINE) if quantized else None)
    path = write_file(tmp_path / "m.squizd", model, {**QWEN3, **change})
    with pytest.raises(SourceError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def test_a_quantized_tensor_where_none_can_be(tmp_path: Path) -> None:
    model = make_model(QWEN3)
    path = write_file(
        tmp_path / "m.squizd", model, QWEN3,
        rename=lambda name: "model.norm.weight" if name == "model.layers.1.mlp.up_proj.weight"
        else None if name == "model.norm.weight" else name,
    )  # fmt: skip
    with pytest.raises(SourceError, match=r"model\.norm\.weight is stored quantized"):
        load_model(path)


def test_state_wants_a_loaded_model() -> None:
    with pytest.raises(RequestError):
        state(nn.Linear(2, 2))


# -- manners -----------------------------------------------------------------------------------------------


def test_resident_graph_is_mlx_lms_own(file: Path) -> None:
    model, reference = load_model(file, resident="100%"), in_float32(make_model(QWEN3))
    assert isinstance(model, type(reference))  # with kernels, of a class that replays single tokens
    assert [(n, type(m)) for n, m in model.named_modules() if n] == [
        (n, type(m)) for n, m in reference.named_modules() if n
    ]
    assert state(model).paged_layers == 0
    parameters = dict(tree_flatten(model.parameters()))
    for name, array in tree_flatten(reference.parameters()):
        assert parameters[name].dtype == array.dtype
        assert mx.array_equal(parameters[name], array)
    assert state(model).resident_bytes == sum(a.nbytes for a in parameters.values())


def test_residency_tells_what_is_there(file: Path) -> None:
    model = load_model(file, resident="50%", context=100)
    s = state(model)
    assert (s.resident_share, s.paged_layers, s.context, s.budget.slots) == (0.5, 2, 100, (4, 4))
    assert s.stats.hit_rate == 1
    logits(model)
    stats = s.stats
    assert stats.bytes_read == sum(s.file.expert(0, 0).stored_size for _ in range(stats.misses))
    assert 0 < stats.hit_rate < 1
    assert stats.resident_bytes == s.resident_bytes == sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    s.reset_stats()
    assert s.stats.misses == 0
    assert stats.misses > 0


def test_loading_leaves_the_random_state(file: Path) -> None:
    mx.random.seed(11)
    wanted = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(11)
    load_model(file, resident="50%")
    assert mx.random.uniform(shape=(4,)).tolist() == wanted


def test_nothing_random_is_materialised(tmp_path: Path) -> None:
    """Loading a model of which a hundredth is held takes a hundredth: no weight exists before its replacement."""
    config = {**QWEN3, "num_experts": 256, "moe_intermediate_size": 128}
    path = write_file(tmp_path / "m.squizd", make_model(config), config)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_model(path, resident="0%", context=64)
    assert mx.get_peak_memory() - before < 1.1 * state(model).resident_bytes + 50_000 < path.stat().st_size / 4


def test_closing_and_collecting(file: Path) -> None:
    model = load_model(file, resident="0%")
    kept: Residency = state(model)
    fd = kept.file.fileno()
    kept.close()
    kept.close()
    with pytest.raises(ReadError, match="closed"):
        model(mx.array(TOKENS))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    del kept
    model = load_model(file, resident="0%")
    logits(model)
    fd, threads = state(model).file.fileno(), threading.active_count()
    os.fstat(fd)
    del model
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert threading.active_count() <= threads


def test_a_refused_file_is_closed(tmp_path: Path) -> None:
    path = write_file(tmp_path / "m.squizd", make_model(QWEN3), {**QWEN3, "num_hidden_layers": 4})
    held = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    with pytest.raises(SourceError):
        load_model(path)
    gc.collect()
    if held is not None:
        assert set(os.listdir("/proc/self/fd")) <= held
