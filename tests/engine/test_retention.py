"""What is kept: worth by time to compute again, by use and by age, against the plain order of last use."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ocserve.engine.retention import Kept, Retention


def growing_with_position(tokens: int, position: int) -> float:
    """Attention reads all positions before: later tokens cost more."""
    return tokens * 0.001 + 1e-6 * tokens * (position + tokens / 2)


def retention(*holders: int) -> Retention:
    policy = Retention(growing_with_position)
    for holder in holders:
        policy.keep(holder)
    return policy


def test_cells_far_back_are_worth_more() -> None:
    policy = retention(1, 2)
    assert policy.give_up([Kept(1, cells=4000, private=100), Kept(2, cells=100, private=100)]) == 2


def test_a_used_prefix_outlives_an_unused_one() -> None:
    policy = retention(1, 2)
    policy.hit(1)
    assert policy.hits(1) == 1
    assert policy.give_up([Kept(1, 100, 100), Kept(2, 100, 100)]) == 2


def test_hits_pass_to_the_holder_that_stands_in() -> None:
    policy = retention(1)
    policy.keep(2, hits=3)
    assert policy.hits(2) == 3
    assert policy.give_up([Kept(1, 100, 100), Kept(2, 100, 100)]) == 1


def test_what_is_not_used_again_ages_out() -> None:
    policy = retention(0)
    for _ in range(5):
        policy.hit(0)
    dear = Kept(0, 100, 100)
    for newcomer in range(1, 50):
        policy.keep(newcomer)
        if policy.give_up([dear, Kept(newcomer, 100, 100)]) == 0:
            break
    assert newcomer == 6  # each newcomer raises the clock by its own worth


def test_equal_worth_frees_the_most() -> None:
    policy = Retention(lambda tokens, position: tokens * 0.001)
    policy.keep(1)
    policy.keep(2)
    assert policy.give_up([Kept(1, 100, 100), Kept(2, 900, 900)]) == 2


def test_what_frees_nothing_is_not_given_up() -> None:
    policy = retention(1)
    assert policy.value(Kept(1, 100, 0)) == float("inf")
    assert policy.give_up([Kept(1, 100, 0)]) is None
    assert policy.give_up([]) is None
    assert policy.hits(1) == 0


def test_a_hit_on_a_running_holder_counts_for_nothing() -> None:
    policy = retention(1)
    policy.hit(7)
    policy.forget(1)
    policy.forget(7)
    with pytest.raises(KeyError):
        policy.hits(1)


@given(
    kept=st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 1)), min_size=1, max_size=40),
    hits=st.lists(st.integers(0, 39), max_size=60),
    protected=st.sets(st.integers(0, 39)),
)
def test_the_least_valuable_goes_and_never_a_protected_one(
    kept: list[tuple[int, float]], hits: list[int], protected: set[int]
) -> None:
    policy = retention(*range(len(kept)))
    for holder in hits:
        policy.hit(holder)
    candidates = [Kept(holder, cells, int(cells * share)) for holder, (cells, share) in enumerate(kept)]
    clock_s = 0.0
    while candidates:
        values = {each.holder: policy.value(each) for each in candidates}
        given_up = policy.give_up(candidates, protected)
        if given_up is None:
            assert all(each.holder in protected or not each.private for each in candidates)
            return
        assert given_up not in protected
        assert values[given_up] == min(values[each.holder] for each in candidates if each.holder not in protected)
        assert values[given_up] >= clock_s
        clock_s = values[given_up]
        candidates = [each for each in candidates if each.holder != given_up]


def recomputed_s(trace: list[tuple[int, int]], pool_cells: int, policy: str) -> float:
    """Seconds spent on prompts of (prefix, cells) with a pool of `pool_cells`, giving up by `policy`."""
    held: OrderedDict[int, int] = OrderedDict()  # prefix: cells, least recently used first
    worth = Retention(growing_with_position)
    spent_s = 0.0
    for prefix, cells in trace:
        if prefix in held:
            held.move_to_end(prefix)
            worth.hit(prefix)
            continue
        spent_s += growing_with_position(cells, 0)
        while sum(held.values()) + cells > pool_cells:
            if policy == "lru":
                held.popitem(last=False)
            else:
                given_up = worth.give_up([Kept(each, size, size) for each, size in held.items()])
                assert given_up is not None
                del held[given_up]
        held[prefix] = cells
        worth.keep(prefix)
    return spent_s


def test_a_few_popular_prefixes_among_passers_by_beat_last_use() -> None:
    # System prompts of popular applications among chats that come once: those flush a cache ordered by last use.
    chance = random.Random(1)
    trace = [
        (chance.randrange(8), 1000) if chance.random() < 0.4 else (1000 + index, chance.randrange(200, 1500))
        for index in range(1000)
    ]
    assert recomputed_s(trace, 12_000, "gdsf") < 0.9 * recomputed_s(trace, 12_000, "lru")
