"""Tokens replayed from C++ against the same model's own graph: the same bits, experts read, and errors."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import xxhash
from conftest import environment
from mlx_lm.models.cache import KVCache, make_prompt_cache
from test_runtime_models import CONFIGS, QWEN3, in_float32, make_model, write_file

from squizd import kernels
from squizd.errors import ExpertReadError
from squizd.kernels import replay
from squizd.runtime.load import load_model, state
from squizd.runtime.switch import PagedSwitch

pytestmark = pytest.mark.skipif(bool(kernels.missing()), reason=kernels.missing() or "-")

TOKENS = np.random.default_rng(5).integers(0, 96, 300)
REPLAYED = ("qwen3_moe", "qwen2_moe", "mixtral", "phixtral", "llama")
REFUSED = {"glm4_moe": "it uses Matmul", "deepseek_v3": "its attention has a mask"}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_file(tmp_path_factory.mktemp("replay") / "m.squizd", make_model(QWEN3), QWEN3)


def continued(model: nn.Module, count: int, prompt: int = 8, cache: list[Any] | None = None) -> list[np.ndarray]:
    """Logits of `count` single tokens after a prompt."""
    if cache is None:
        cache = make_prompt_cache(model)
        mx.eval(model(mx.array(TOKENS[None, :prompt]), cache=cache))
    found = []
    for token in TOKENS[prompt : prompt + count]:
        out = model(mx.array([[int(token)]]), cache=cache)
        mx.eval(out)
        found.append(np.array(out))
    return found


def same(got: list[np.ndarray], want: list[np.ndarray]) -> bool:
    return len(got) == len(want) and all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("share", ["100%", "50%"])
@pytest.mark.parametrize("name", REPLAYED)
def test_replayed_tokens_have_the_bits_of_the_graph(name: str, share: str, tmp_path: Path) -> None:
    """Over more positions than a cache has at first, so that it grows in between."""
    config = CONFIGS[name]
    model = load_model(write_file(tmp_path / "m.squizd", make_model(config), config), resident=share)
    assert same(continued(model, 260), continued(in_float32(make_model(config)), 260))
    assert state(model).replay.reason == ""
    assert state(model).replay.in_use


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_replayed_goes_on_as_before(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = load_model(write_file(tmp_path / "m.squizd", make_model(config), config), resident="50%")
    assert same(continued(model, 4), continued(in_float32(make_model(config)), 4))
    assert state(model).replay.reason == REFUSED[name]


def test_the_same_experts_are_read(file: Path) -> None:
    replayed, graph = load_model(file, resident="25%"), load_model(file, resident="25%")
    state(graph).replay.reason = "for comparison"
    assert same(continued(replayed, 120), continued(graph, 120))
    assert same(continued(replayed, 50, prompt=40), continued(graph, 50, prompt=40))  # slots go to Python and back
    got, want = state(replayed).stats, state(graph).stats
    # The first replayed token is computed twice, and finds everything there: one call of each layer more.
    layers = state(replayed).paged_layers
    assert (got.misses, got.evictions, got.bytes_read) == (want.misses, want.evictions, want.bytes_read)
    assert got.hits - want.hits == layers * QWEN3["num_experts_per_tok"]
    assert got.misses > 20


def shelves(model: nn.Module) -> list[Any]:
    switches = [m for m in model.modules() if isinstance(m, PagedSwitch)]
    return [m.slots.shelf for m in sorted(switches, key=lambda m: m.slots.layer.layer)]


def test_guesses_change_no_answer_and_no_slot(file: Path) -> None:
    """They are what the next router says of an earlier residual, and cost nothing while nothing is read from a disk."""
    models = {when: load_model(file, resident="50%") for when in ("never", "from disk", "always")}
    found, guesses = {}, {}
    for when, model in models.items():
        for shelf in shelves(model):
            shelf.foresee(when)
        found[when] = continued(model, 60)
        guesses[when] = [shelf.take_guesses() for shelf in shelves(model)]
        assert state(model).stats.misses == state(models["never"]).stats.misses > 20
    assert same(found["never"], found["always"])
    assert same(found["never"], found["from disk"])
    assert guesses["never"] == guesses["from disk"] == [(0, 0, 0, 0)] * 2

    reference, seen = in_float32(make_model(QWEN3)), []
    first, last = (reference.layers[i] for i in (0, 2))  # those with experts

    class Watched(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def __call__(self, x: mx.array) -> mx.array:
            seen.append(x)
            return self.norm(x)

    for layer in (first, last):
        layer.post_attention_layernorm = Watched(layer.post_attention_layernorm)
    continued(reference, 60)

    def top(residual: mx.array) -> set[int]:
        logits = last.mlp.gate(last.post_attention_layernorm.norm(residual))
        return set(np.argsort(np.array(logits).reshape(-1))[-2:].tolist())

    right = [len(top(a) & top(b)) for a, b in zip(seen[2::2], seen[3::2], strict=True)]  # without the prompt's
    assert len(right) == 60
    # The first token is computed twice: as ever, and replayed.
    assert guesses["always"][0] == (0, 0, 0, 0)
    guessed, hit, announced, used = guesses["always"][1]
    assert (guessed, hit) == (2 * 60, sum(right))
    assert guessed > announced > used > 0


def test_guesses_that_are_mostly_wrong_are_not_read(file: Path) -> None:
    """Each rank is judged by itself, as it goes."""
    model = load_model(file, resident="50%")
    continued(model, 3)  # lends the slots
    shelf = shelves(model)[0]
    shelf.foresee("always")

    def announced(tokens: int, wrong: bool) -> int:
        shelf.take_guesses()
        for _ in range(tokens):
            resident = {expert for expert, _ in shelf.order()}
            first, second, third = [e for e in range(8) if e not in resident][:3]
            shelf.expect([first, second, *resident][:4])
            shelf.place([first, third if wrong else second])
        guessed, right, sent, used = shelf.take_guesses()
        assert guessed == 4 * tokens
        assert right >= used >= tokens
        return int(sent)

    assert 64 <= announced(64, wrong=True) <= 64 + 16
    assert announced(20, wrong=True) == 20
    announced(100, wrong=False)
    assert announced(20, wrong=False) == 40
    shelf.take_counts()  # as when slots are given back: nothing is announced any more


def test_caches_that_share_memory_stay_apart(file: Path) -> None:
    """Rows are written in place only where nobody else can see them."""
    model, reference = load_model(file, resident="100%"), in_float32(make_model(QWEN3))
    results = []
    for m in (model, reference):
        first = make_prompt_cache(m)
        mx.eval(m(mx.array(TOKENS[None, :8]), cache=first))
        continued(m, 3, cache=first)  # from here on tokens are replayed
        second = copy.copy(first)
        second[:] = [copy.copy(entry) for entry in first]  # other caches, the same arrays
        held = [entry.keys for entry in first]
        before = [np.array(keys) for keys in held]
        one = continued(m, 4, prompt=20, cache=first)
        two = continued(m, 4, prompt=30, cache=second)
        assert all(np.array_equal(np.array(keys), b) for keys, b in zip(held, before, strict=True))
        results.append(one + two)
    assert same(*results)


def test_a_cache_can_be_cut_back(file: Path) -> None:
    model, reference = load_model(file, resident="50%"), in_float32(make_model(QWEN3))
    results = []
    for m in (model, reference):
        cache = make_prompt_cache(m)
        mx.eval(m(mx.array(TOKENS[None, :8]), cache=cache))
        found = continued(m, 10, cache=cache)
        for entry in cache:
            entry.trim(5)
        results.append(found + continued(m, 10, prompt=50, cache=cache))
    assert same(*results)


def test_several_tokens_or_texts_are_not_replayed(file: Path) -> None:
    model, reference = load_model(file, resident="50%"), in_float32(make_model(QWEN3))
    continued(model, 3)
    for shape in ((1, 2), (2, 1), (3, 4)):
        ids = mx.array(TOKENS[: shape[0] * shape[1]].reshape(shape))
        a, b = make_prompt_cache(model), make_prompt_cache(reference)
        for _ in range(2):
            assert mx.array_equal(model(ids, cache=a), reference(ids, cache=b))
    assert mx.array_equal(model(mx.array([[3]])), reference(mx.array([[3]])))  # no cache at all


class Toy(nn.Module):
    """One linear layer after another; `twist` changes a result."""

    def __init__(self, twist: Any) -> None:
        super().__init__()
        self.embed, self.out, self.twist = nn.Embedding(96, 32), nn.Linear(32, 96, bias=False), twist

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        x = self.embed(inputs)
        heads = x.reshape(*inputs.shape, 2, 16).transpose(0, 2, 1, 3)
        keys, values = cache[0].update_and_fetch(heads, heads)
        y = mx.fast.scaled_dot_product_attention(heads, keys, values, scale=0.25)
        return self.out(self.twist(y.transpose(0, 2, 1, 3).reshape(x.shape), cache[0]))


class NoLender:
    def lent(self) -> AbstractContextManager[None]:
        return nullcontext()

    def started(self, result: mx.array, wait: Any) -> None:
        pass


def toy(twist: Any) -> tuple[nn.Module, replay.Replay]:
    mx.random.seed(1)
    model = Toy(twist)
    kernels.layers.adopt(model)
    return model, replay.install(model, NoLender())


def grown_cache() -> list[KVCache]:
    cache = KVCache()
    cache.update_and_fetch(mx.ones((1, 2, 3, 16)), mx.ones((1, 2, 3, 16)))
    return [cache]


def test_code_that_looks_at_the_position_is_refused() -> None:
    """A trace would keep the branch that it took."""
    model, found = toy(lambda x, cache: x * 2 if cache.offset > 5 else x)
    outputs = continued(model, 6, cache=grown_cache())
    plain, _ = toy(lambda x, cache: x)
    assert found.reason
    assert not found.in_use
    assert same([outputs[-1]], [continued(toy(lambda x, cache: x * 2)[0], 6, cache=grown_cache())[-1]])
    assert same([outputs[0]], [continued(plain, 1, cache=grown_cache())[0]])


def test_code_that_gives_other_numbers_each_time_is_refused() -> None:
    calls = []

    def twist(x: mx.array, cache: Any) -> mx.array:
        calls.append(1)
        return x * len(calls)

    model, found = toy(twist)
    outputs = continued(model, 3, cache=grown_cache())
    assert found.reason == "replayed, it gives other bits"
    assert len(calls) == 4  # one of them traced
    assert not np.array_equal(outputs[0], outputs[1])


def test_code_without_surprises_is_replayed() -> None:
    model, found = toy(lambda x, cache: mx.softmax(x, axis=-1) * mx.sigmoid(x) + mx.max(x, axis=-1, keepdims=True))
    outputs = continued(model, 6, cache=grown_cache())
    assert found.in_use
    found.reason = "for comparison"
    assert same(outputs, continued(model, 6, cache=grown_cache()))


def test_a_failed_read_is_an_error_wherever_it_is_noticed(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.squizd"
    path.write_bytes(file.read_bytes())
    model = load_model(path, resident="25%")
    continued(model, 4)
    whole = path.read_bytes()
    experts = [state(model).file.expert(x.layer, e) for x in state(model).file.moe_layers for e in range(8)]
    with path.open("r+b") as f:
        for record in experts:
            f.seek(record.offset)
            f.write(bytes(64))
    with pytest.raises(ExpertReadError, match="do not match their digest") as caught:
        continued(model, 20, cache=fresh(model, whole, path, experts))
    record = state(model).file.expert(caught.value.layer, caught.value.expert)
    assert (caught.value.path, caught.value.offset) == (str(path), record.offset)
    path.write_bytes(whole)
    assert same(continued(model, 8), continued(in_float32(make_model(QWEN3)), 8))


def fresh(model: nn.Module, whole: bytes, path: Path, experts: list[Any]) -> list[Any]:
    """A cache with a prompt, computed from an undamaged file that is damaged again afterwards."""
    damaged = path.read_bytes()
    path.write_bytes(whole)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array(TOKENS[None, :8]), cache=cache))
    path.write_bytes(damaged)
    return cache


def test_logits_of_a_failed_read_are_no_numbers(file: Path, tmp_path: Path) -> None:
    """Whatever swallows the error, as NumPy's conversion does, finds nothing that looks like a result."""
    path = tmp_path / "m.squizd"
    path.write_bytes(file.read_bytes())
    model = load_model(path, resident="25%")
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array(TOKENS[None, :8]), cache=cache))
    continued(model, 2, cache=cache)
    with path.open("r+b") as f:
        f.truncate(state(model).file.expert(0, 0).offset)
    swallowed = tries = 0
    while not swallowed and tries < 400:  # a read that fails early is told before NumPy asks
        token = TOKENS[10 + tries % 20]
        tries += 1
        try:
            found = np.array(model(mx.array([[int(token)]]), cache=cache))
        except ExpertReadError:
            continue
        swallowed += bool(np.isnan(found).all())
        assert np.isnan(found).all() or np.isfinite(found).all()
    assert swallowed


_FAILING = """
import os, sys
import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from squizd.errors import ReadError
from squizd.runtime.load import load_model, state

model = load_model(sys.argv[1], resident="25%")
cache = make_prompt_cache(model)
for tokens in ([5, 17, 40], [3], [8], [9]):
    mx.eval(model(mx.array([tokens]), cache=cache))
assert state(model).replay.in_use
os.truncate(sys.argv[1], state(model).file.expert(0, 0).offset)
failed = 0
for t in range(1500):
    for entry in cache:
        entry.trim(entry.offset - 6)
    try:
        model(mx.array([[t % 96]]), cache=cache)
    except (ReadError, RuntimeError):
        failed += 1
print(failed)
"""


def test_what_fails_again_and_again_leaves_nothing_to_wait_for(file: Path, tmp_path: Path) -> None:
    """MLX's count of what is under way would grow with errors until evaluations wait for ever: a process of its own."""
    path = tmp_path / "m.squizd"
    path.write_bytes(file.read_bytes())
    command = [sys.executable, "-c", _FAILING, str(path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 500


def test_digests_are_xxh64() -> None:
    native = kernels.native()
    rng = np.random.default_rng(0)
    for size in (*range(70), 127, 128, 4096, 100_003):
        data = rng.bytes(size)
        assert native.xxh64(data) == xxhash.xxh64_intdigest(data)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_stored_floats_are_widened_exactly(dtype: mx.Dtype, tmp_path: Path) -> None:
    path = write_file(tmp_path / "m.squizd", make_model(QWEN3, dtype=dtype), QWEN3)
    paged, whole = load_model(path, resident="0%"), load_model(path, resident="100%")
    assert same(continued(paged, 30), continued(whole, 30))
    assert state(paged).replay.in_use
    assert state(paged).stats.misses > 30


def test_switched_off_nothing_is_replayed(file: Path) -> None:
    model = load_model(file, resident="100%")
    replayed = continued(model, 5)
    with kernels.layers.switched_off():
        plain = continued(model, 5)
    assert not same(replayed, plain)  # MLX adds in another order
    np.testing.assert_allclose(replayed, plain, rtol=0, atol=1e-5 * np.abs(plain).max())


def test_threads_that_replay_and_threads_that_do_not(file: Path) -> None:
    """Slots go back and forth between Python, for prompts, and the kernels, for single tokens."""
    model, results = load_model(file, resident="25%"), {}
    wanted = {n: continued(in_float32(make_model(QWEN3)), 12, prompt=n) for n in (5, 9, 14)}

    def work(n: int) -> None:
        results[n] = [continued(model, 12, prompt=n) for _ in range(6)]

    threads = [threading.Thread(target=work, args=(n,)) for n in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(results) == sorted(wanted)
    assert all(same(found, wanted[n]) for n, all_found in results.items() for found in all_found)
    assert state(model).replay.in_use
