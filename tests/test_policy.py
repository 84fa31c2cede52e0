"""LRU against a model that keeps the whole history."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squizd.runtime.policy import LRU

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
