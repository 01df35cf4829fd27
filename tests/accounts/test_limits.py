"""Limits are exact, refusals are promises that hold, and nothing a clock does creates capacity."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import to_builtins

from ocserve import config
from ocserve.accounts.buckets import DAY, Bucket, LimitState
from ocserve.accounts.keystore import OwnLimits
from ocserve.accounts.limits import Lease, Limiter
from ocserve.errors import InvalidRequest, RateLimited

KEY = "key-1"


class Clock:
    """A clock that stands still unless told to move."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def limiter(clock: Clock, **limits: int) -> Limiter:
    return Limiter(config.Limits(**limits), clock)


def admitted(act: Callable[[], Lease]) -> bool:
    try:
        act().settle(0)
    except RateLimited:
        return False
    return True


def test_without_limits_everything_passes_and_there_is_nothing_to_tell() -> None:
    limits = limiter(Clock())
    leases = [limits.admit(KEY, retry=0) for _ in range(1000)]
    leases[0].reserve(10**9)
    leases[0].settle(10**9)
    assert limits.snapshot(KEY) == LimitState(None, None)


def test_exactly_one_minutes_worth_passes_at_once() -> None:
    limits = limiter(Clock(), requests_per_minute=37)
    assert [admitted(lambda: limits.admit(KEY, retry=0)) for _ in range(50)] == [True] * 37 + [False] * 13


def test_the_next_request_passes_exactly_when_its_unit_is_there() -> None:
    clock = Clock()
    limits = limiter(clock, requests_per_minute=60)
    for _ in range(60):
        limits.admit(KEY, retry=0).settle(0)
    clock.now += 0.999999
    assert limits.snapshot(KEY).requests.remaining == 0  # type: ignore[union-attr]
    clock.now += 0.000001
    limits.admit(KEY, retry=0).settle(0)


def test_keys_do_not_share_limits() -> None:
    limits = limiter(Clock(), requests_per_minute=1)
    assert admitted(lambda: limits.admit("a", retry=0))
    assert not admitted(lambda: limits.admit("a", retry=0))
    assert admitted(lambda: limits.admit("b", retry=0))


def test_unused_tokens_come_back_exactly_and_once() -> None:
    limits = limiter(Clock(), tokens_per_minute=1000)
    lease = limits.admit(KEY, retry=0)
    lease.reserve(700)
    assert limits.snapshot(KEY).tokens.remaining == 300  # type: ignore[union-attr]
    lease.settle(123)
    lease.settle(0)
    assert limits.snapshot(KEY).tokens.remaining == 877  # type: ignore[union-attr]


def test_a_refused_reservation_counts_nothing() -> None:
    limits = limiter(Clock(), tokens_per_minute=1000, requests_per_minute=10, concurrent_requests=2)
    first = limits.admit(KEY, retry=0)
    first.reserve(900)
    second = limits.admit(KEY, retry=None)
    with pytest.raises(RateLimited) as refusal:
        second.reserve(200)
    assert refusal.value.type == "tokens"
    assert refusal.value.code == "rate_limit_exceeded"
    assert refusal.value.retry_after_s == pytest.approx(6.0, abs=0.002)
    second.settle(200)  # what a `finally` does
    first.settle(0)
    state = limits.snapshot(KEY)
    assert state.tokens is not None
    assert state.requests is not None
    assert state.tokens.remaining == 1000 - 200  # the promise to the refused client
    assert state.requests.remaining == 10 - 1 - 1  # the first request, and the promise


def test_a_request_that_can_never_pass_is_a_400_that_names_the_limit() -> None:
    limits = limiter(Clock(), tokens_per_minute=1000, requests_per_minute=5)
    lease = limits.admit(KEY, retry=0)
    with pytest.raises(InvalidRequest, match=r"1001 tokens .* 1000 tokens per minute") as refusal:
        lease.reserve(1001)
    assert refusal.value.status == 400
    assert limits.snapshot(KEY).requests.remaining == 5  # type: ignore[union-attr]


def test_requests_at_the_same_time_are_bounded() -> None:
    clock = Clock()
    limits = limiter(clock, concurrent_requests=2)
    first, _ = limits.admit(KEY, retry=0), limits.admit(KEY, retry=0)
    with pytest.raises(RateLimited) as refusal:
        limits.admit(KEY, retry=0)
    assert refusal.value.type == "requests"
    first.settle(0)
    clock.now += refusal.value.retry_after_s or 0
    limits.admit(KEY, retry=1)
    with pytest.raises(RateLimited):
        limits.admit(KEY, retry=1)


def test_each_refusal_is_told_its_own_later_time() -> None:
    clock = Clock()
    limits = limiter(clock, requests_per_minute=60)
    told = []
    for _ in range(100):
        try:
            limits.admit(KEY, retry=0).settle(0)
        except RateLimited as refusal:
            told.append(refusal.retry_after_s)
    assert told == pytest.approx([1.0 * place for place in range(1, 41)], abs=0.002)


@pytest.mark.parametrize("retry", [0, None])
def test_whoever_waits_as_told_passes(retry: int | None) -> None:
    clock = Clock()
    limits = limiter(clock, requests_per_minute=10)
    for _ in range(10):
        limits.admit(KEY, retry=retry).settle(0)
    for _ in range(20):
        with pytest.raises(RateLimited) as refusal:
            limits.admit(KEY, retry=retry)
        clock.now += refusal.value.retry_after_s or 0
        limits.admit(KEY, retry=None if retry is None else 1).settle(0)


def test_a_newcomer_does_not_take_what_was_promised() -> None:
    clock = Clock()
    limits = limiter(clock, requests_per_minute=60)
    for _ in range(60):
        limits.admit(KEY, retry=0).settle(0)
    with pytest.raises(RateLimited):
        limits.admit(KEY, retry=0)
    clock.now += 1.5
    assert not admitted(lambda: limits.admit(KEY, retry=0))
    assert admitted(lambda: limits.admit(KEY, retry=1))


def test_who_counts_and_begins_anew_is_known_by_the_same_request() -> None:
    """A client whose own retries are off says 0 each time. Others with another request do not take its turn."""
    clock = Clock()
    limits = limiter(clock, requests_per_minute=10)
    for _ in range(10):
        limits.admit(KEY, retry=0, body=7).settle(0)
    for _ in range(20):
        with pytest.raises(RateLimited) as refusal:
            limits.admit(KEY, retry=0, body=7)
        clock.now += refusal.value.retry_after_s or 0
        limits.admit(KEY, retry=0, body=7).settle(0)
    with pytest.raises(RateLimited) as refusal:
        limits.admit(KEY, retry=0, body=7)
    clock.now += refusal.value.retry_after_s or 0
    assert not admitted(lambda: limits.admit(KEY, retry=0, body=8))
    assert admitted(lambda: limits.admit(KEY, retry=0, body=7))


def test_where_the_same_request_is_numbered_a_newcomer_with_it_waits() -> None:
    clock = Clock()
    limits = limiter(clock, requests_per_minute=10)
    for _ in range(10):
        limits.admit(KEY, retry=0, body=7).settle(0)
    for _ in range(5):
        with pytest.raises(RateLimited) as refusal:
            limits.admit(KEY, retry=0, body=7)
        clock.now += refusal.value.retry_after_s or 0
        limits.admit(KEY, retry=1, body=7).settle(0)
    with pytest.raises(RateLimited) as refusal:
        limits.admit(KEY, retry=0, body=7)
    clock.now += refusal.value.retry_after_s or 0
    assert not admitted(lambda: limits.admit(KEY, retry=0, body=7))
    assert admitted(lambda: limits.admit(KEY, retry=1, body=7))


def test_who_begins_anew_after_the_usual_retries_has_what_was_promised_to_the_last() -> None:
    clock = Clock()
    limits = limiter(clock, requests_per_minute=1)
    limits.admit(KEY, retry=0, body=7).settle(0)
    with pytest.raises(RateLimited) as refusal:
        limits.admit(KEY, retry=2, body=7)
    clock.now += refusal.value.retry_after_s or 0
    assert not admitted(lambda: limits.admit(KEY, retry=0, body=8))
    assert admitted(lambda: limits.admit(KEY, retry=0, body=7))


def test_an_impatient_client_does_not_lock_itself_out() -> None:
    """Who asks again and again while a slot is taken, without counting, has it as soon as it is free."""
    clock = Clock()
    limits = limiter(clock, concurrent_requests=1)
    for _ in range(20):
        lease = limits.admit(KEY)
        for _ in range(10):
            clock.now += 1.0
            with pytest.raises(RateLimited):
                limits.admit(KEY)
        lease.settle(0)


@pytest.mark.parametrize("retry", [0, None])
def test_a_key_is_not_refused_for_long_because_of_who_does_not_come_back(retry: int | None) -> None:
    """One request at a time of a client that takes a refusal for final, after one refusal: its slot is idle."""
    clock = Clock()
    limits = limiter(clock, concurrent_requests=1)
    first = limits.admit(KEY, retry=retry, body=0)
    with pytest.raises(RateLimited):
        limits.admit(KEY, retry=retry, body=1)
    first.settle(0)
    refusals = []
    for body in range(2, 242):
        clock.now += 0.25
        try:
            limits.admit(KEY, retry=retry, body=body).settle(0)
        except RateLimited as refusal:
            refusals.append((clock.now - 1000, refusal.retry_after_s))
    assert len(refusals) <= 12, refusals


@pytest.mark.parametrize("limit", [{"requests_per_minute": 60}, {"concurrent_requests": 4}])
def test_clients_that_never_come_back_cost_no_capacity(limit: dict[str, int]) -> None:
    """A client without retries at twice the limit gets the limit."""
    clock = Clock()
    limits = limiter(clock, **limit)
    running: list[tuple[float, Lease]] = []
    passed = 0
    for _ in range(8 * 300):  # 300 s, eight requests a second
        clock.now += 0.125
        while running and running[0][0] <= clock.now:
            running.pop(0)[1].settle(0)
        try:
            lease = limits.admit(KEY, retry=0)
        except RateLimited:
            continue
        passed += 1
        running.append((clock.now + 1.0, lease))
    capacity = 60 + 300 if "requests_per_minute" in limit else 4 * 300
    assert passed <= capacity
    assert passed >= 0.9 * capacity


# ---------------------------------------------------------------------------------------------------------------------
# The clients that people have: they wait as told up to 120 s and try three times. Virtual time, so nothing sleeps.


class Crowd:
    """Clients of one key with the retry algorithm of the usual SDK, in virtual time."""

    def __init__(self, limits: config.Limits, *, seed: int, seconds: Callable[[random.Random], float], tokens: int):
        self.clock = Clock()
        self.limiter = Limiter(limits, self.clock)
        self.random = random.Random(seed)
        self.seconds = seconds
        self.tokens = tokens
        self.finished = 0
        self.failed: list[str] = []
        self.running = 0
        self.most_running = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.clock.now + delay, next(self._order), action))

    def attempt(self, retries: int) -> None:
        try:
            lease = self.limiter.admit(KEY, retry=retries)
            lease.reserve(self.tokens)
        except RateLimited as refusal:
            self.refused(retries, refusal.retry_after_s or 0.0)
            return
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        self.at(self.seconds(self.random), lambda: self.end(lease))

    def refused(self, retries: int, told_s: float) -> None:
        if retries == 2 or not 0 < told_s <= 120:
            self.failed.append(f"attempt {retries} told {told_s} s at {self.clock.now - 1000:.1f} s")
        else:
            self.at(told_s + self.random.uniform(0, 0.05), lambda: self.attempt(retries + 1))

    def end(self, lease: Lease) -> None:
        self.running -= 1
        self.finished += 1
        lease.settle(self.tokens // 2)

    def run(self, clients: int, spread: float = 0.0) -> None:
        for _ in range(clients):
            self.at(self.random.uniform(0, spread), lambda: self.attempt(0))
        while self._events:
            self.clock.now, _, action = heapq.heappop(self._events)
            action()


def one_second(_: random.Random) -> float:
    return 1.0


def uneven(source: random.Random) -> float:
    return source.lognormvariate(0.0, 0.8)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spread", [0.0, 10.0])
@pytest.mark.parametrize(
    "limits",
    [
        config.Limits(requests_per_minute=60),
        config.Limits(requests_per_minute=25),  # the last one's turn comes after 180 s: two waits
        config.Limits(requests_per_minute=600),
        config.Limits(tokens_per_minute=3000),
        config.Limits(requests_per_minute=60, tokens_per_minute=6000),
        config.Limits(requests_per_minute=40, tokens_per_minute=4500),
        config.Limits(concurrent_requests=4),
        config.Limits(concurrent_requests=8),
        config.Limits(concurrent_requests=16),
        config.Limits(requests_per_minute=60, tokens_per_minute=5000, concurrent_requests=8),
    ],
    ids=str,
)
@pytest.mark.parametrize("seconds", [one_second, uneven])
def test_a_hundred_clients_of_one_key_all_finish(
    limits: config.Limits, seconds: Callable[[random.Random], float], spread: float, seed: int
) -> None:
    crowd = Crowd(limits, seed=seed, seconds=seconds, tokens=100)
    crowd.run(100, spread)
    # With few slots and uneven durations some find no slot at their last attempt: a promise of a time is a guess there.
    lost = 5 if limits.concurrent_requests == 4 and seconds is uneven else 0
    assert len(crowd.failed) <= lost, crowd.failed
    assert crowd.finished == 100 - len(crowd.failed)
    assert crowd.most_running <= (limits.concurrent_requests or 100)


@pytest.mark.parametrize(("slots", "most_lost"), [(2, 15), (4, 5), (8, 0)])
def test_few_slots_and_uneven_durations_lose_few_clients_in_any_order(slots: int, most_lost: int) -> None:
    """When slots become free can only be guessed; measured are at most 12, 3 and 0 of 100 over these runs.

    A wrong guess must not cost more than its client: slots kept for those who gave up would have everyone refused.
    """
    for seed in range(40):
        crowd = Crowd(config.Limits(concurrent_requests=slots), seed=seed, seconds=uneven, tokens=100)
        crowd.run(100)
        assert len(crowd.failed) <= most_lost, (seed, crowd.failed)


@pytest.mark.parametrize(("slots", "seconds"), [(1, 0.02), (4, 0.02), (4, 0.3), (8, 3.0), (16, 3.0)])
def test_a_hundred_clients_finish_before_anything_is_known_of_durations(slots: int, seconds: float) -> None:
    crowd = Crowd(config.Limits(concurrent_requests=slots), seed=1, seconds=lambda _: seconds, tokens=100)
    crowd.run(100)
    assert crowd.failed == []


# ---------------------------------------------------------------------------------------------------------------------
# Nothing creates capacity: any sequence of calls, under any clock, against a reference kept in fractions.

YEAR = 365 * 86_400.0
KEYS, MODELS = ("one", "two"), (None, "big", "small")

ADMIT = st.tuples(
    st.just("admit"),
    st.tuples(st.sampled_from(KEYS), st.sampled_from(MODELS), st.sampled_from([None, 0, 0, 1, 2]), st.integers(0, 400)),
)
STEPS = st.one_of(
    *[ADMIT] * 6,  # so often that limits are reached
    st.tuples(st.just("sleep"), st.floats(0, 5)),
    st.tuples(st.just("sleep"), st.sampled_from([30.0, 90.0, 7200.0, 86_400.0])),
    st.tuples(st.just("jump"), st.sampled_from([-YEAR, -YEAR, YEAR, -3600.0, -0.5])),
    st.tuples(st.just("return"), st.tuples(st.integers(0, 50), st.integers(0, 400))),
    st.tuples(st.just("settle"), st.tuples(st.integers(0, 50), st.floats(0, 1))),
)
SMALL = st.one_of(st.none(), st.integers(1, 8))
MANY = st.one_of(st.none(), st.integers(400, 900))
RATES: dict[str, st.SearchStrategy[int | None]] = {
    "requests_per_minute": SMALL,
    "tokens_per_minute": MANY,
    "requests_per_day": SMALL,
    "tokens_per_day": MANY,
}
ALLOWANCES = st.fixed_dictionaries({**RATES, "concurrent_requests": st.one_of(st.none(), st.integers(1, 5))})
STEPS = st.one_of(
    STEPS, st.tuples(st.just("change"), st.tuples(st.sampled_from([0, 1, 2]), st.fixed_dictionaries(RATES)))
)


@dataclass
class Use:
    """What has been used of one limit and is not refilled: that which counts now, and that above a lowered limit.

    `widest` is the limit that allowed it all; without a limit the least that would have.
    """

    limit: int | None
    used: Fraction = Fraction(0)
    above: Fraction = Fraction(0)
    widest: int = 0

    def settled(self) -> None:
        if self.limit is None:
            self.widest = max(self.widest, math.ceil(self.used)) if self.used else 0
        elif not self.above:
            self.widest = self.limit

    def change(self, limit: int | None) -> None:
        self.settled()
        whole = self.used + self.above
        self.limit, self.widest = limit, max(self.widest if whole else 0, limit or 0)
        self.used = whole if limit is None else min(whole, Fraction(limit))
        self.above = whole - self.used

    def pass_time(self, periods: Fraction) -> None:
        if not periods:
            return
        self.settled()
        rate = self.widest if self.limit is None else self.limit
        self.used = max(Fraction(0), self.used - rate * periods)
        self.above = max(Fraction(0), self.above - (self.widest - rate) * periods)
        if not self.used + self.above:
            self.widest = self.limit or 0

    def take(self, units: int) -> None:
        whole = max(Fraction(0), self.used + self.above + units)
        self.used = max(Fraction(0), self.used + units)
        self.above = min(self.above, whole)


class Reference:
    """The limits as anybody would write them down: the use of each key, model, unit and period, and who runs."""

    def __init__(self, default: dict[str, int | None], own: OwnLimits, of_model: dict[str, int | None]) -> None:
        self._limits = self._all(default, own, of_model)
        self.uses = {
            (key, model, name): Use(limit)
            for (key, model), limits in self._limits.items()
            for name, limit in limits.items()
            if name != "concurrent_requests"
        }
        self.running: list[tuple[Lease, str, str | None, int]] = []

    @staticmethod
    def _all(
        default: dict[str, int | None], own: OwnLimits, of_model: dict[str, int | None]
    ) -> dict[tuple[str, str], dict[str, int | None]]:
        return {
            ("one", ""): default,
            ("two", ""): to_builtins(own.over(config.Allowance(**default))),
            **{(key, "big"): of_model for key in KEYS},
        }

    def change(self, default: dict[str, int | None], own: OwnLimits, of_model: dict[str, int | None]) -> None:
        self._limits = self._all(default, own, of_model)
        for (key, model, name), use in self.uses.items():
            if use.limit != self._limits[key, model][name]:
                use.change(self._limits[key, model][name])

    def pass_time(self, nanoseconds: int) -> None:
        for (_, _, name), use in self.uses.items():
            use.pass_time(Fraction(nanoseconds, 60 * 10**9 if name.endswith("minute") else 86_400 * 10**9))

    def take(self, key: str, model: str | None, requests: int, tokens: int) -> None:
        for (other, of_model, name), use in self.uses.items():
            if other == key and of_model in ("", model):
                use.take(requests if name.startswith("requests") else tokens)

    def check(self, limits: Limiter) -> None:
        """Nothing is overdrawn, and the limiter counts the same use to the last nanosecond's worth of a unit."""
        assert all(use.limit is None or use.used <= use.limit for use in self.uses.values())
        for key, model in self._limits:
            slots = self._limits[key, model]["concurrent_requests"]
            own = [each for each in self.running if each[1] == key and model in ("", each[2])]
            assert slots is None or len(own) <= slots
        for (key, model), line in limits._lines.items():
            for quota, unit in ((line.requests, "requests"), (line.tokens, "tokens")):
                for bucket, period in zip(quota._buckets, ("minute", "day"), strict=True):
                    use = self.uses[key, model, f"{unit}_per_{period}"]
                    assert bucket.limit == use.limit
                    assert Fraction(bucket._used, bucket.period_ns) == use.used
                    assert Fraction(bucket._beyond, bucket.period_ns) == use.above


@pytest.mark.timeout(900)
def test_never_more_than_burst_and_rate_times_elapsed(full: bool) -> None:
    """Whatever the history: no limit is overdrawn, refunds are exact, and refusals name a time to come."""

    @settings(max_examples=10_000 if full else 150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(steps=st.lists(STEPS, min_size=20, max_size=60), default=ALLOWANCES, own=ALLOWANCES, of_model=ALLOWANCES)
    def history(
        steps: list[tuple[str, Any]],
        default: dict[str, int | None],
        own: dict[str, int | None],
        of_model: dict[str, int | None],
    ) -> None:
        follow(steps, default, OwnLimits(**own), of_model)

    history()


def follow(
    steps: list[tuple[str, Any]],
    default: dict[str, int | None],
    own: OwnLimits,
    of_model: dict[str, int | None],
) -> None:
    """Play one history on the limiter and on the reference."""
    clock = Clock(now=1e8)
    limits = Limiter(config.Limits(**default, models=(config.ModelLimits(model="big", **of_model),)), clock)
    known = Reference(default, own, of_model)
    refused: list[tuple[str, str | None, int | None, float]] = []

    def sleep(seconds: float) -> None:
        before = round(clock.now * 1e9)
        clock.now += seconds
        known.pass_time(max(0, round(clock.now * 1e9) - before))

    for kind, value in steps:
        if kind == "return" and refused:  # as told, with perhaps more to ask for
            key, model, retry, told_s = refused.pop(value[0] % len(refused))
            sleep(told_s)
            kind, value = "admit", (key, model, None if retry is None else retry + 1, value[1])
        if kind in ("sleep", "jump"):
            sleep(value)
        elif kind == "change":
            which, rates = value
            if which == 0:
                default = {**default, **rates}
            elif which == 1:
                own = OwnLimits(**{**to_builtins(own), **rates})
            else:
                of_model = {**of_model, **rates}
            limits.reset(config.Limits(**default, models=(config.ModelLimits(model="big", **of_model),)))
            known.change(default, own, of_model)
        elif kind == "admit":
            key, model, retry, size = value
            try:
                lease = limits.admit(
                    key, retry=retry, own=own if key == "two" else OwnLimits(), model=model, body=size % 3
                )
                lease.reserve(size)
            except RateLimited as refusal:
                told_s = refusal.retry_after_s or 0.0
                refused.append((key, model, retry, told_s))
            else:
                told_s = 1.0
                known.take(key, model, 1, size)
                known.running.append((lease, key, model, size))
            assert told_s > 0
        elif kind == "settle" and known.running:
            index, share = value
            lease, key, model, size = known.running.pop(index % len(known.running))
            used = int(size * share)
            lease.settle(used)
            known.take(key, model, 0, used - size)
        for key in KEYS:  # whoever asks brings a key's levels up to date
            limits.snapshot(key, own if key == "two" else OwnLimits(), "big")
        known.check(limits)


def test_raising_and_lowering_a_limit_keeps_what_was_used() -> None:
    limits = limiter(Clock(), requests_per_minute=60, tokens_per_minute=1000)
    held = limits.admit(KEY, retry=0)
    held.reserve(300)
    for requests, tokens, left in (
        (10, 2000, (9, 1700)),
        (100, 500, (99, 200)),
        (0, 0, (None, None)),
        (5, 400, (4, 100)),
    ):
        state = limits.snapshot(KEY, OwnLimits(requests_per_minute=requests, tokens_per_minute=tokens))
        assert tuple(each and each.remaining for each in (state.requests, state.tokens)) == left
    held.settle(100)
    state = limits.snapshot(KEY, OwnLimits(requests_per_minute=5, tokens_per_minute=400))
    assert state.tokens is not None
    assert state.tokens.remaining == 300


def used_up(limits: Limiter, requests_per_day: int, most: int = 1000) -> int:
    """How many requests pass before one is refused."""
    own = OwnLimits(requests_per_day=requests_per_day)
    passing = iter(lambda: admitted(lambda: limits.admit(KEY, retry=0, own=own)), False)
    return sum(itertools.islice(passing, most))


def test_no_way_through_other_limits_gives_a_fresh_allowance() -> None:
    limits = limiter(Clock())
    assert [used_up(limits, 4), used_up(limits, 1), used_up(limits, 4)] == [4, 0, 0]
    assert [used_up(limits, 10), used_up(limits, 0, most=1), used_up(limits, 10), used_up(limits, 12)] == [6, 1, 0, 1]
    assert [used_up(limits, 0, most=50), used_up(limits, 10), used_up(limits, 62)] == [50, 0, 0]


def test_what_is_used_above_a_lowered_limit_is_not_owed_and_fades_as_it_would_have() -> None:
    clock = Clock()
    limits = limiter(clock)
    assert [used_up(limits, 100), used_up(limits, 4)] == [100, 0]
    clock.now += 43_200.0
    assert [used_up(limits, 4), used_up(limits, 100)] == [2, 48]
    clock.now += 86_400.0
    assert [used_up(limits, 4), used_up(limits, 100)] == [4, 96]


def test_a_models_limit_that_was_taken_away_counts_until_it_is_back() -> None:
    clock = Clock()
    big = config.Limits(models=(config.ModelLimits(model="big", requests_per_day=10),))
    limits = Limiter(big, clock)
    limits.admit(KEY, model="big").settle(0)
    limits.reset(config.Limits())
    for _ in range(5):
        limits.admit(KEY, model="big").settle(0)
    limits.reset(big)
    state = limits.snapshot(KEY, model="big")
    assert state.requests is not None
    assert state.requests.remaining == 4


@given(
    wide=st.integers(1, 50),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("take"), st.integers(1, 20)),
            st.tuples(st.just("sleep"), st.integers(0, DAY // 2)),
            st.tuples(st.just("resize"), st.one_of(st.none(), st.integers(1, 50))),
        ),
        max_size=30,
    ),
)
def test_no_way_through_other_limits_leaves_more_than_the_widest(wide: int, steps: list[tuple[str, Any]]) -> None:
    bucket, plain = Bucket(wide, DAY), Bucket(wide, DAY)
    for kind, value in [*steps, ("resize", wide)]:
        if kind == "resize":
            bucket.resize(value and min(value, wide))
        elif kind == "sleep":
            bucket.refill(value)
            plain.refill(value)
        elif not bucket.wait_ns(value) and not plain.wait_ns(value):
            bucket.take(value)
            plain.take(value)
    assert bucket.wait_ns(wide) >= plain.wait_ns(wide)


def test_a_models_limits_bind_that_model_only() -> None:
    clock = Clock()
    limits = Limiter(
        config.Limits(requests_per_minute=4, models=(config.ModelLimits(model="big", requests_per_minute=1),)), clock
    )
    limits.admit(KEY, retry=0, model="big").settle(0)
    with pytest.raises(RateLimited, match="this key for the model big is 1 requests per minute") as refusal:
        limits.admit(KEY, retry=0, model="big")
    limits.admit(KEY, retry=0, model="small").settle(0)
    assert limits.snapshot(KEY, model="big").requests.remaining == 0  # type: ignore[union-attr]
    assert limits.snapshot(KEY, model="small").requests.remaining == 4 - 2 - 1  # type: ignore[union-attr]
    clock.now += refusal.value.retry_after_s or 0
    limits.admit(KEY, retry=1, model="big").settle(0)


@given(jump=st.floats(-3.2e7, 3.2e7))
def test_a_jump_of_the_clock_grants_at_most_a_burst(jump: float) -> None:
    clock = Clock(now=1e8)
    limits = limiter(clock, requests_per_minute=5)
    for _ in range(5):
        limits.admit(KEY, retry=0).settle(0)
    clock.now += jump
    assert sum(admitted(lambda: limits.admit(KEY, retry=0)) for _ in range(20)) <= 5
    if jump <= 0:
        assert limits.snapshot(KEY).requests.remaining == 0  # type: ignore[union-attr]
        clock.now += 1000.0
        assert limits.snapshot(KEY).requests.remaining == 5  # type: ignore[union-attr]


def test_idle_keys_are_forgotten() -> None:
    clock = Clock()
    limits = limiter(clock, requests_per_minute=5, tokens_per_minute=100)
    for number in range(1000):
        limits.admit(f"key-{number}", retry=0).settle(0)
    held = limits.admit("busy", retry=0)
    clock.now += 86_400.0  # so long it counts what they would have used of a day's limit
    limits.admit("last", retry=0).settle(0)
    assert len(limits) == 2
    held.settle(0)


def test_tickets_of_one_key_are_bounded() -> None:
    limits = limiter(Clock(), requests_per_minute=60_000)
    told = []
    for _ in range(65_000):
        try:
            limits.admit(KEY, retry=0).settle(0)
        except RateLimited as refusal:
            told.append(refusal.retry_after_s)
    assert len(told) == 5000
    assert max(told) < 1.1


def test_remaining_never_rises_while_requests_are_taken() -> None:
    limits = limiter(Clock(), requests_per_minute=30)
    seen = []
    for _ in range(40):
        with contextlib.suppress(RateLimited):
            limits.admit(KEY, retry=0).settle(0)
        seen.append(limits.snapshot(KEY).requests.remaining)  # type: ignore[union-attr]
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == 0
