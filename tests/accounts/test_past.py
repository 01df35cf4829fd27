"""A restart gives nobody a second day's worth: buckets go on from what the ledger knows, never with more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ocserve import config
from ocserve.accounts.balances import Hour
from ocserve.accounts.buckets import DAY, Bucket
from ocserve.accounts.ledger_schema import DAY_US, HOUR_US, RECENT_HOURS
from ocserve.accounts.limits import Limiter
from ocserve.accounts.past import Past
from ocserve.errors import RateLimited

NOW = 490_000 * HOUR_US + 17 * 60 * 1_000_000
LIMITS = config.Limits(requests_per_day=10, tokens_per_day=1000)


def used(hours_ago: int, requests: int, tokens: int, model: str = "tiny") -> Hour:
    hour = NOW // HOUR_US - hours_ago
    return Hour(key_id="key", hour=hour, model=model, requests=requests, tokens=tokens)


def limiter(*hours: Hour, limits: config.Limits = LIMITS) -> tuple[Limiter, list[float]]:
    clock = [1000.0]
    return Limiter(limits, lambda: clock[0], Past(hours, NOW)), clock


def left(limits: Limiter, model: str | None = None) -> tuple[int, int]:
    state = limits.snapshot("key", model=model)
    assert state.requests is not None
    assert state.tokens is not None
    return state.requests.remaining, state.tokens.remaining


def test_what_was_used_before_a_restart_is_used() -> None:
    limits, _ = limiter(used(0, 4, 300), used(1, 5, 200, "other"))
    assert left(limits) == (1, 511)  # since the full hour eleven tokens have been refilled
    limits.admit("key", retry=0).settle(0)
    with pytest.raises(RateLimited) as refused:
        limits.admit("key", retry=0)
    assert refused.value.limit == "requests_per_day"
    assert left(Limiter(LIMITS)) == (10, 1000)


def test_what_was_used_before_the_clock_was_set_back_is_used() -> None:
    limits, _ = limiter(used(-2, 4, 300))
    assert left(limits) == (6, 700)


def test_a_model_of_its_own_limits_has_a_past_of_its_own_and_other_keys_have_none() -> None:
    of_model = config.Limits(
        requests_per_day=100,
        tokens_per_day=10_000,
        models=(config.ModelLimits(model="tiny", requests_per_day=10, tokens_per_day=1000),),
    )
    limits, _ = limiter(used(0, 4, 300), used(0, 50, 200, "other"), limits=of_model)
    assert left(limits, "tiny") == (6, 700)
    assert left(limits) == (46, 9500)
    state = limits.snapshot("somebody else")
    assert state.requests is not None
    assert state.requests.remaining == 100


def test_it_is_handed_out_once_and_as_of_the_first_use() -> None:
    limits, clock = limiter(used(0, 10, 1000))
    clock[0] += 6 * 3600
    assert left(limits) == (2, 220)  # used at the end of its hour, as far as is known
    clock[0] += 2 * 86_400  # full again, and forgotten
    assert left(limits) == (10, 1000)
    clock[0] += 120
    assert len(limits) <= 1
    assert left(limits) == (10, 1000)


@given(
    st.lists(st.tuples(st.integers(0, 5 * 24 * 3600), st.integers(1, 400)), max_size=30),
    st.integers(1, 1000),
)
def test_it_is_never_more_than_without_the_restart(uses: list[tuple[int, int]], limit: int) -> None:
    """Against a bucket that runs on: uses are seconds before the restart and units, taken only if they are there."""
    bucket = Bucket(limit, DAY)
    hours: dict[int, int] = {}
    at_us = NOW - 5 * DAY_US
    for ago_s, units in sorted(uses, reverse=True):
        moment = NOW - ago_s * 1_000_000
        bucket.refill((moment - at_us) * 1000)
        at_us = moment
        if not bucket.wait_ns(units):
            bucket.take(units)
            hours[moment // HOUR_US] = hours.get(moment // HOUR_US, 0) + units
    bucket.refill((NOW - at_us) * 1000)
    known = [
        Hour(key_id="key", hour=hour, model="tiny", requests=0, tokens=units)
        for hour, units in hours.items()
        if hour >= NOW // HOUR_US - RECENT_HOURS
    ]
    resumed = Bucket(limit, DAY)
    if found := Past(known, NOW).taken("key", "", 0):
        resumed.resume([(each.lasted_ns, each.tokens) for each in found])
        without, after = bucket.state(0), resumed.state(0)
        assert without is not None
        assert after is not None
        assert after.remaining <= without.remaining
        if len(known) == 1 and len(hours) == 1:  # the bucket was full before: only within the hour it is not known when
            assert without.remaining - after.remaining <= -(-limit // 24) + 1
