"""The order of prompts: fair between tenants, short before long within bounds, first come first served among equals."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from ocserve.engine.fairness import FairOrder
from ocserve.engine.slots import Sequence
from tests.engine.test_scheduler import sequence


class Order(FairOrder):
    """All tenants of what is sorted are active."""

    def sort(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        listed = list(sequences)
        self.activate({each.tenant for each in listed})
        return super().sort(listed)


def order() -> FairOrder:
    return Order(lambda: 0.01)


def names(sequences: list[Sequence]) -> list[str]:
    return [each.id for each in sequences]


def at(name: str, prompt: int, *, arrived: float, tenant: str = "a") -> Sequence:
    made = sequence(name, prompt, tenant=tenant)
    made.arrived = arrived
    return made


def test_equal_prompts_keep_their_order_of_arrival() -> None:
    waiting = [at(str(index), 128, arrived=index / 1000) for index in range(8)]
    assert names(order().sort(reversed(waiting))) == [str(index) for index in range(8)]


def test_a_short_prompt_passes_a_long_one_that_arrived_within_its_own_time() -> None:
    long, soon, late = at("long", 1000, arrived=0), at("soon", 10, arrived=5), at("late", 10, arrived=20)
    assert names(order().sort([long, soon, late])) == ["soon", "long", "late"]


def test_one_prompt_of_a_tenant_does_not_wait_for_the_many_of_another() -> None:
    many = [at(f"a{index}", 100, arrived=0) for index in range(50)]
    one = at("b", 100, arrived=1, tenant="b")
    fair = order()
    assert names(fair.sort([*many, one])).index("b") <= 1
    for _ in range(10):
        fair.charge(b"a", 100)
    assert names(fair.sort([*many[10:], one]))[0] == "b"


def test_who_was_idle_has_saved_nothing_up() -> None:
    fair = order()
    fair.sort([at("a", 100, arrived=0)])
    fair.charge(b"a", 100_000)
    both = [at("a", 100, arrived=0), at("b1", 100, arrived=0, tenant="b"), at("b2", 100, arrived=0, tenant="b")]
    assert names(fair.sort(both)) in (["a", "b1", "b2"], ["b1", "a", "b2"])


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 500), st.floats(0, 20)), min_size=1, max_size=40))
def test_everybody_is_served_and_no_tenant_gets_more_than_its_share(jobs: list[tuple[str, int, float]]) -> None:
    """While two tenants both have prompts, what they were served differs by at most their longest prompts."""
    fair = order()
    waiting = [at(str(i), size, arrived=when, tenant=who) for i, (who, size, when) in enumerate(jobs)]
    longest = max(size for _, size, _ in jobs) / 100
    served = dict.fromkeys("abc", 0.0)
    backlogged = {who for who, _, _ in jobs}
    while waiting and {each.tenant.decode() for each in waiting} == backlogged:
        first = fair.sort(waiting)[0]
        waiting.remove(first)
        seconds = len(first.prompt) / 100
        fair.charge(first.tenant, len(first.prompt))
        served[first.tenant.decode()] += seconds
        shares = [served[who] for who in backlogged]
        assert max(shares) - min(shares) <= 2 * longest + 1e-9


def test_a_long_prompt_is_not_passed_for_ever_by_another_tenants_short_ones() -> None:
    """Steps that look at some of the prompts only, or at none, do not make the order forget who was served."""
    fair = FairOrder(lambda: 0.01)
    long = at("long", 1000, arrived=0)
    for turn in range(30):
        short = at(f"short{turn}", 100, arrived=turn, tenant="b")
        fair.activate({b"a", b"b"})
        fair.sort([short])
        fair.sort([])
        if fair.sort([long, short])[0] is long:
            break
        fair.charge(b"b", 100)
    assert turn <= 10
