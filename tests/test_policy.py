"""Policies against models of the whole history, the optimum against exhaustive search, shelves against Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache

from squizd import kernels
from squizd.kernels import replay as kernel_replay
from squizd.runtime.budget import LayerDemand, by_need, spread
from squizd.runtime.lending import make_shelf
from squizd.runtime.load import load_model, state
from squizd.runtime.policy import HALF_LIFE, LRU, MEMORY, ONE, STEPS, Fading, Policy, Recall, settled
from squizd.runtime.simulation import Call, belady, curve, decode_calls, replay
from squizd.runtime.switch import PagedSwitch
from squizd.tracing import join, trace

CALLS = st.lists(
    st.one_of(st.tuples(st.just("use"), st.integers(0, 9)), st.tuples(st.just("evict"), st.sets(st.integers(0, 9)))),
    max_size=60,
)


class History:
    """Every use ever; the victim is the known expert whose last use is earliest."""

    def __init__(self) -> None:
        self.uses: list[int] = []
        self.known: set[int] = set()

    def last_use(self, expert: int) -> int:
        return max(i for i, used in enumerate(self.uses) if used == expert)

    def order(self) -> list[int]:
        return sorted(self.known, key=self.last_use)


@given(CALLS)
def test_lru_gives_up_the_expert_whose_last_use_is_longest_ago(calls):
    policy, history = LRU(), History()
    for name, argument in calls:
        if name == "use":
            policy.use(argument)
            history.uses.append(argument)
            history.known.add(argument)
        else:
            candidates = [e for e in history.order() if e not in argument]
            if candidates:
                assert policy.evict(argument) == candidates[0]
                history.known.remove(candidates[0])
            else:
                with pytest.raises(LookupError):
                    policy.evict(argument)
        assert list(policy) == history.order()


@given(st.integers(1, 6), st.lists(st.integers(0, 9), max_size=80))
def test_misses_equal_a_brute_force_lru_cache(slots, requests):
    policy, resident, misses = LRU(), set(), 0
    expected, recent = 0, []
    for expert in requests:
        if expert not in resident:
            misses += 1
            if len(resident) == slots:
                resident.remove(policy.evict({expert}))
            resident.add(expert)
        policy.use(expert)
        if expert in recent[:slots]:  # `recent`: distinct experts, latest first
            recent.remove(expert)
        else:
            expected += 1
            recent = [e for e in recent if e != expert]
        recent.insert(0, expert)
    assert misses == expected
    assert resident == set(recent[:slots])


# -- fading frequency ------------------------------------------------------------------------------------


def tokens_of(experts: int, choices: int, most: int = 60, least: int = 0) -> st.SearchStrategy[list[list[int]]]:
    """Tokens, each with `choices` distinct experts."""
    token = st.lists(st.integers(0, experts - 1), min_size=choices, max_size=choices, unique=True)
    return st.lists(token, min_size=least, max_size=most)


@given(tokens_of(6, 2, 150), st.integers(0, 6))
@settings(deadline=None)
def test_fading_gives_up_the_least_frequency_that_halves_with_time(tokens: list[list[int]], kept: int) -> None:
    policy = Fading(6)
    for token in tokens:
        policy.see(token, 2)
        for expert in token:
            policy.use(expert)
    now = len(tokens)
    frequency = [sum(2 ** (-(now - t) / HALF_LIFE) for t, token in enumerate(tokens) if e in token) for e in range(6)]
    known = {e for token in tokens for e in token}
    assert set(policy) == known
    candidates = known - {kept}
    if candidates:
        victim = policy.evict({kept})
        assert victim in candidates
        assert frequency[victim] <= min(frequency[e] for e in candidates) + 1e-6  # rounding down loses 2^-32 at a time
        assert set(policy) == known - {victim}
    else:
        with pytest.raises(LookupError):
            policy.evict({kept})


@given(tokens_of(8, 3, 120), st.data())
@settings(deadline=None)
def test_many_tokens_at_once_count_as_one_by_one(tokens: list[list[int]], data: Any) -> None:
    single, several = Fading(8, range(8)), Fading(8, range(8))
    for token in tokens:
        single.see(token, 3)
    while tokens:
        cut = data.draw(st.integers(1, len(tokens)))
        flat = [e for token in tokens[:cut] for e in token]
        several.see(np.array(flat) if cut % 2 else flat, 3)
        tokens = tokens[cut:]
    assert (several.counts, several.token) == (single.counts, single.token)


def test_what_was_always_chosen_has_settled() -> None:
    policy = Fading(2, [settled(ONE), settled(0)])
    before = list(policy.counts)
    for _ in range(5 * HALF_LIFE):
        policy.see([0], 1)
    assert abs(policy.counts[0] - before[0]) < 100
    assert policy.counts[1] == 0


# -- recall ----------------------------------------------------------------------------------------------


def recalled(tokens: list[list[int]], experts: int) -> list[float]:
    """What each expert counts after `tokens`, in choices made now: from its definition, in floating point."""
    now, count = len(tokens) - 1, [0.0] * experts
    for t, token in enumerate(tokens):
        for e in token:
            count[e] += 2 ** (-(now - t) / HALF_LIFE)
    followed, alike = [0.0] * experts, 0.0
    first = max(0, len(tokens) - MEMORY)
    for s in range(first, now):
        pairs = [(s - lag, now - lag) for lag in range(3) if s - lag >= first and now - lag >= first]
        common = sum((3 - (now - t)) * len(set(tokens[u]) & set(tokens[t])) for u, t in pairs)
        weight = min(64, max(0, common - 6)) ** 4
        alike += weight
        for later in range(1, min(8, now - s) + 1):
            for e in tokens[s + later]:
                followed[e] += weight * 0.8**later
    return [c + 25 * f / alike if alike else c for c, f in zip(count, followed, strict=True)]


@given(tokens_of(9, 3, 700))
@settings(deadline=None, max_examples=60)
def test_recall_adds_what_followed_similar_tokens(tokens: list[list[int]]) -> None:
    policy = Recall(9)
    tokens = tokens[len(tokens) % HALF_LIFE == 0 :]  # not where counts have just been halved
    for token in tokens:
        policy.see(token, 3)
    found = [score / STEPS[policy.token - 1] for score in policy.scores()]
    np.testing.assert_allclose(found, recalled(tokens, 9) if tokens else [0] * 9, rtol=5e-3, atol=1e-2)


def test_recall_keeps_what_comes_next_in_a_cycle() -> None:
    """Pairs of experts in turns, more than there are slots: the optimum keeps all but one pair, LRU misses always."""
    cycle: list[Call] = [np.array([[2 * (t % 5), 2 * (t % 5) + 1]]) for t in range(300)]
    assert replay(LRU(), cycle, 8).hits == 0
    assert replay(Recall(10), cycle, 8).hits > 0.9 * belady(cycle, 8).hits


@given(tokens_of(8, 3, 90), st.data())
@settings(deadline=None)
def test_recall_of_many_tokens_is_that_of_one_by_one(tokens: list[list[int]], data: Any) -> None:
    single, several = Recall(8), Recall(8)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("squizd.runtime.policy.MEMORY", 20)
        for token in tokens:
            single.see(token, 3)
        while tokens:
            cut = data.draw(st.integers(1, len(tokens)))
            several.see(np.array([e for token in tokens[:cut] for e in token]), 3)
            tokens = tokens[cut:]
        assert several.state() == single.state()
        assert several.scores() == single.scores()


def test_a_state_can_be_handed_over() -> None:
    rng = np.random.default_rng(1)
    one, two = Recall(6), Recall(6)
    two.restore(list(one), one.state())
    for _ in range(MEMORY + 50):
        token = rng.permutation(6)[:2].tolist()
        one.see(token, 2)
        for expert in token:
            one.use(expert)
    two.restore(list(one), one.state())
    assert list(two) == list(one)
    two.see([3, 4], 2)
    one.see([3, 4], 2)
    assert two.state() == one.state()
    assert [one.evict(()) for _ in range(6)] == [two.evict(()) for _ in range(6)]


# -- the optimum, and replays ----------------------------------------------------------------------------


def most_hits(calls: list[list[int]], slots: int) -> int:
    """By trying every set of victims at every call; each call needs at most as many experts as there are slots."""

    @cache
    def best(index: int, held: frozenset[int]) -> int:
        if index == len(calls):
            return 0
        needed = frozenset(calls[index])
        everything = held | needed
        surplus = max(0, len(everything) - slots)
        rest = (best(index + 1, everything - set(gone)) for gone in combinations(sorted(everything - needed), surplus))
        return len(held & needed) + max(rest)

    return best(0, frozenset())


@given(tokens_of(5, 2, 9), st.integers(2, 4))
@settings(deadline=None, max_examples=150)
def test_belady_is_the_best_of_all(tokens: list[list[int]], slots: int) -> None:
    calls = [np.array([token]) for token in tokens]
    tally = belady(calls, slots)
    assert tally.hits == most_hits(tokens, slots)
    assert tally.hits + tally.misses == 2 * len(tokens)
    for policy in (LRU(), Fading(5), Recall(5)):
        assert replay(policy, calls, slots).hits <= tally.hits


@given(st.lists(tokens_of(9, 2, 5, least=1), max_size=12), st.integers(2, 8))
@settings(deadline=None)
def test_no_policy_beats_belady_with_prompts(prompts: list[list[list[int]]], slots: int) -> None:
    calls = [np.array(tokens) for tokens in prompts]
    best = belady(calls, slots)
    for policy in (LRU(), Fading(9), Recall(9)):
        tally = replay(policy, calls, slots)
        assert tally.hits <= best.hits
        assert tally.hits + tally.misses == best.hits + best.misses == sum(len(np.unique(c)) for c in calls)


def test_curves_end_with_every_expert() -> None:
    calls: list[Call] = decode_calls(np.random.default_rng(0).integers(0, 8, (50, 1)))
    points = curve(LRU, calls, 1, 8, points=4)
    assert [slots for slots, _ in points] == [1, 2, 5, 8]
    assert points[-1][1] == 50 - len({int(c[0, 0]) for c in calls})
    assert curve(LRU, calls, 9, 8) == [points[-1]]


# -- the real thing --------------------------------------------------------------------------------------


def paged(model: Any) -> list[PagedSwitch]:
    found = dict(model.named_modules())
    return [found[layer.path] for layer in state(model).file.moe_layers]


@pytest.mark.parametrize("make", [LRU, None], ids=["LRU", "default"])
@pytest.mark.parametrize("share", ["50%", "25%", "0%"])
def test_replays_count_what_the_pager_counts(
    tiny_file: Callable[..., Path], share: str, make: Callable[[], Policy] | None
) -> None:
    """A prompt, then single tokens: with the kernels those are replayed by native shelves."""
    ids = np.random.default_rng(5).integers(0, 2000, 140).tolist()
    whole = load_model(tiny_file(), context=256)
    routing = join(next(iter(trace(whole, [ids]))))
    model = load_model(tiny_file(), resident=share, context=256)
    if make is None:
        run(model, ids)
    else:
        for switch in paged(model):
            switch.slots.policy = make()
        with kernel_replay.paused():  # native shelves were made for the policy that was there
            run(model, ids)
    slots, hits, misses = state(model).budget.slots, 0, 0
    for experts, count in zip(routing.experts, slots, strict=True):
        calls = [experts[:40], *decode_calls(experts[40:])]
        if make is None and not kernels.missing():
            calls.insert(1, calls[1])  # the first token that could be replayed is: to compare bits
        tally = replay(make() if make is not None else Recall(32), calls, count)
        hits, misses = hits + tally.hits, misses + tally.misses
    stats = state(model).stats
    assert (stats.hits, stats.misses) == (hits, misses)


def run(model: Any, ids: list[int]) -> None:
    cache_ = make_prompt_cache(model)
    mx.eval(model(mx.array([ids[:40]]), cache=cache_))
    for token in ids[40:]:
        mx.eval(model(mx.array([[token]]), cache=cache_))


@pytest.fixture
def two_layers(tiny_file: Callable[..., Path]) -> Iterator[Callable[..., Any]]:
    """`two_layers(policy)`: the slots of one layer, those of it in another load, and a native shelf over these."""
    native = kernels.native()
    if native is None:
        pytest.skip(kernels.missing())
    models = [load_model(tiny_file(), resident="25%", context=64) for _ in range(2)]

    def make(policy: Callable[[], Policy]) -> Any:
        found = []
        for model in models:
            slots = paged(model)[0].slots
            slots.policy = policy()
            found.append(slots)
        return found[0], found[1], make_shelf(native, found[1])

    yield make
    for model in models:
        state(model).close()


@given(tokens_of(32, 4, 80), st.lists(st.integers(0, 79), max_size=4))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_native_shelves_do_what_python_does(
    two_layers: Callable[..., Any], tokens: list[list[int]], handovers: list[int]
) -> None:
    """Any trace, with handovers to Python and back after some tokens."""
    python, lent, shelf = two_layers(lambda: Recall(32, range(32)))
    python.restore([], python.policy.state())
    lent.restore([], lent.policy.state())
    shelf.take_counts()
    shelf.arrange(lent.order(), *lent.state())
    python.pager.stats.hits = python.pager.stats.misses = python.pager.stats.evictions = 0
    for step, token in enumerate(tokens):
        python.policy.see(token, 4)
        python.acquire(token)
        rows = shelf.place(token)
        assert len(set(rows)) == 4
        assert [expert for expert, _ in shelf.order()] == list(python.policy)
        assert shelf.state() == python.policy.state()
        for expert, slot in shelf.order():  # bytes, too
            if expert in token:
                mine = [bank[python.slot_of[expert]].tobytes() for bank in python.banks]
                assert [bank[slot].tobytes() for bank in lent.banks] == mine
        if step in handovers:
            lent.restore(shelf.order(), shelf.state())
            shelf.arrange(lent.order(), *lent.state())
    stats = python.pager.stats
    assert shelf.take_counts()[:3] == (stats.hits, stats.misses, stats.evictions)


def test_native_shelves_forget_what_python_forgets(two_layers: Callable[..., Any]) -> None:
    """More tokens than are remembered, and more than there is room for."""
    python, lent, shelf = two_layers(lambda: Recall(32))
    python.restore([], python.policy.state())
    shelf.arrange([], *lent.state())
    rng = np.random.default_rng(2)
    for step in range(5 * MEMORY):
        token = (rng.permutation(8)[:4] + 4 * int(rng.integers(0, 7))).tolist()
        python.policy.see(token, 4)
        python.acquire(token)
        shelf.place(token)
        if step % 97 == 0:
            assert [expert for expert, _ in shelf.order()] == list(python.policy)
    assert shelf.state() == python.policy.state()


# -- slots by need ---------------------------------------------------------------------------------------


def falling(draw: Any) -> tuple[tuple[int, int], ...]:
    """A concave curve from 1 to 5 slots."""
    gains = sorted(draw(st.lists(st.integers(0, 30), min_size=5, max_size=5)), reverse=True)
    return tuple((i + 1, sum(gains[: i + 1])) for i in range(5))


@given(st.data(), st.integers(3, 15))
@settings(deadline=None)
def test_slots_by_need_have_the_most_hits(data: Any, room: int) -> None:
    layers = [LayerDemand(5, 1, 10, falling(data.draw)) for _ in range(3)]
    slots = spread(layers, 10 * room)
    assert sum(slots) == min(room, 15)
    hits = lambda split: sum(dict(x.hits)[n] for x, n in zip(layers, split, strict=True))  # noqa: E731
    assert hits(slots) == max(hits(s) for s in product(range(1, 6), repeat=3) if sum(s) <= room)


def test_a_small_gain_is_no_reason_for_uneven_slots() -> None:
    steep, flat = ((1, 0), (2, 100), (4, 100)), ((1, 0), (2, 1), (3, 2), (4, 3))
    assert by_need([LayerDemand(4, 1, 5, steep), LayerDemand(4, 1, 5, flat)], (3, 1), 20) == (2, 2)
    noise = ((1, 0), (2, 100), (3, 190), (4, 271)), ((1, 0), (2, 100), (3, 189), (4, 270))
    layers = [LayerDemand(4, 1, 5, curve_) for curve_ in noise]
    assert spread(layers, 25) == (3, 2)
    assert by_need(layers, (2, 3), 25) == (2, 3)
    assert by_need([], (), 25) == ()


@given(st.data(), st.integers(0, 400))
@settings(deadline=None)
def test_any_curves_are_spread_within_the_room(data: Any, room: int) -> None:
    points = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 50)), max_size=6, unique_by=lambda p: p[0])
    layers = [LayerDemand(9, k, size, tuple(sorted(data.draw(points)))) for k, size in ((1, 7), (2, 11), (3, 5))]
    slots = spread(layers, room)
    assert all(x.top_k <= n <= x.experts for x, n in zip(layers, slots, strict=True))
    least = sum(x.top_k * x.slot_bytes for x in layers)
    used = sum(n * x.slot_bytes for x, n in zip(layers, slots, strict=True))
    assert used <= max(room, least)
    assert all(n == 9 or used + x.slot_bytes > room for x, n in zip(layers, slots, strict=True))
