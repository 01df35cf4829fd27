"""Overload: whoever waits as told is served, who goes elsewhere costs nothing, and it ends with what caused it."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable

import pytest

from ocserve import config
from ocserve.accounts.crowd import Room
from ocserve.accounts.limits import Lease, Limiter
from ocserve.errors import Overloaded, RateLimited

SLOTS = 8
Seconds = Callable[[random.Random], float]


class Overload:
    """Callers at random moments, `factor` times as many as can be served, of whom a share waits as told and returns.

    In virtual time; those who return do so at most twice, as the usual SDK does. `queue` of those who are let in may
    wait for a slot: places for who returns.
    """

    def __init__(self, *, factor: float, waiting: float, seconds: Seconds, seed: int, queue: int = 0) -> None:
        self.now = 0.0
        self.limiter = Limiter(config.Limits(), lambda: self.now)
        self.random = random.Random(seed)
        self.waiting = waiting
        self.seconds = seconds
        self.rate = factor * SLOTS / (sum(seconds(random.Random(index)) for index in range(500)) / 500)
        self.queue = queue
        self.running = 0
        self.queued: list[tuple[Lease, float]] = []
        self.waits: list[float] = []
        self.busy_s = 0.0
        self.returned = self.served_on_return = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, moment: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (moment, next(self._order), action))

    def enter(self, retry: int) -> Lease:
        lease = self.limiter.admit("key", retry=retry)
        lease.enter(Room("model", SLOTS + self.queue, self.queue), "key")
        return lease

    def begin(self, lease: Lease, came: float) -> None:
        """Answer, for as long as it takes, whoever is next."""
        lasts = self.seconds(self.random)
        self.running += 1
        self.waits.append(self.now - came)
        self.busy_s += lasts
        self.at(self.now + lasts, lambda: self.settle(lease))

    def settle(self, lease: Lease) -> None:
        lease.settle(0)
        self.running -= 1
        if self.queued:
            self.begin(*self.queued.pop(0))

    def attempt(self, retry: int) -> None:
        waits = retry > 0 or self.random.random() < self.waiting
        self.returned += retry > 0
        try:
            lease = self.enter(retry)
        except Overloaded as refusal:
            told_s = refusal.retry_after_s or 0.0
            if waits and retry < 2 and told_s <= 120:
                self.at(self.now + told_s + self.random.uniform(0, 0.05), lambda: self.attempt(retry + 1))
            return
        self.served_on_return += retry > 0
        if self.running < SLOTS:
            self.begin(lease, self.now)
        else:
            self.queued.append((lease, self.now))

    def run(self, seconds: float) -> None:
        for _ in range(20):  # what an unloaded server has learnt
            lease = self.enter(0)
            self.now += self.seconds(self.random)
            lease.settle(0)
        moment, end = self.now, self.now + seconds
        while moment < end:
            moment += self.random.expovariate(self.rate)
            self.at(moment, lambda: self.attempt(0))
        while self._events and self._events[0][0] <= end:
            self.now, _, action = heapq.heappop(self._events)
            action()

    def recovery_s(self) -> float:
        """How long after the last caller a new one is served without having to wait; nobody comes back any more."""
        ended, begun = self.now, self.now
        while True:
            self.now += 0.25
            while self._events and self._events[0][0] <= self.now:
                action = heapq.heappop(self._events)[2]
                if "settle" in action.__code__.co_names:
                    action()
            try:
                self.enter(0).settle(0)
            except Overloaded:
                assert self.now < begun + 120
                continue
            return self.now - ended


def steady(_: random.Random) -> float:
    return 0.75


def uneven(source: random.Random) -> float:
    return source.lognormvariate(-0.5, 0.6)


@pytest.mark.parametrize("seconds", [steady, uneven])
@pytest.mark.parametrize(("factor", "waiting"), [(2, 0.0), (2, 0.5), (10, 0.0), (10, 0.3), (10, 1.0)])
def test_an_overload_is_served_at_full_pace_and_honestly(
    factor: float, waiting: float, seconds: Seconds, full: bool
) -> None:
    seconds_long = 60.0 if full else 30.0
    runs = [Overload(factor=factor, waiting=waiting, seconds=seconds, seed=seed) for seed in range(10 if full else 1)]
    for each in runs:
        each.run(seconds_long)
    used = sum(each.busy_s for each in runs) / len(runs) / seconds_long / SLOTS
    returned = sum(each.returned for each in runs)
    honest = sum(each.served_on_return for each in runs) / max(1, returned)
    recovery_s = max(each.recovery_s() for each in runs)
    print(f"{used:.2f} of the slots, {honest:.3f} of {returned} served on return, recovery {recovery_s:.2f} s")
    assert used > 0.5
    assert honest > 0.95 or not returned
    assert recovery_s < 5.0


@pytest.mark.parametrize("waiting", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seconds", [steady, uneven])
def test_where_who_returns_may_wait_a_moment_no_slot_is_idle(waiting: float, seconds: Seconds, full: bool) -> None:
    runs = [
        Overload(factor=10, waiting=waiting, seconds=seconds, seed=seed, queue=2) for seed in range(8 if full else 2)
    ]
    for each in runs:
        each.run(60.0)
    used = sum(each.busy_s for each in runs) / len(runs) / 60.0 / SLOTS
    returned = sum(each.returned for each in runs)
    honest = sum(each.served_on_return for each in runs) / max(1, returned)
    waits = sorted(wait for each in runs for wait in each.waits)
    p99_s = waits[len(waits) * 99 // 100]
    print(f"{used:.3f} of the slots, {honest:.3f} of {returned} served on return, waits p99 {p99_s:.2f} s")
    assert used > 0.95
    assert honest > 0.95 or not returned
    assert p99_s < 0.75  # what an answer takes


def test_a_client_that_counts_from_anew_is_known_by_the_same_request() -> None:
    now = 0.0
    limiter = Limiter(config.Limits(), lambda: now)

    def enter(body: int) -> Lease:
        lease = limiter.admit("key", retry=0, body=body)
        lease.enter(Room("model", 2, returning=1), "key")
        return lease

    enter(7)
    with pytest.raises(Overloaded) as refusal:
        enter(7)
    now += refusal.value.retry_after_s or 0
    with pytest.raises(Overloaded):
        enter(8)
    enter(7).settle(0)


def test_what_is_spare_is_for_who_asks_for_little() -> None:
    limiter = Limiter(config.Limits(), lambda: 0.0)

    def entered(key: str, width: int = 1) -> bool:
        try:
            limiter.admit(key, retry=0).enter(Room("model", 16, spare=1, width=width), key)
        except Overloaded:
            return False
        return True

    assert sum(entered("much") for _ in range(50)) == 14  # an eighth of all is spare
    assert [entered("little", 3), entered("little", 2), entered("little"), entered("other")] == [
        False,
        True,
        False,
        False,
    ]


def test_a_request_for_all_that_may_be_passes_when_nobody_is_there() -> None:
    limiter = Limiter(config.Limits(), lambda: 0.0)
    room = Room("model", 16, returning=2, spare=1, width=16)
    first = limiter.admit("key", retry=0)
    first.enter(room, "key")
    with pytest.raises(Overloaded):
        limiter.admit("other", retry=0).enter(Room("model", 16), "other")
    first.settle(0)
    limiter.admit("key", retry=0).enter(room, "key")


def test_a_refusal_for_want_of_room_uses_nothing_of_the_keys_limits() -> None:
    limiter = Limiter(config.Limits(requests_per_minute=5, concurrent_requests=3), lambda: 0.0)
    first = limiter.admit("key", retry=0)
    first.enter(Room("model", 1), "key")
    for _ in range(3):
        with pytest.raises(Overloaded) as refusal:
            limiter.admit("key", retry=0).enter(Room("model", 1), "key")
        assert refusal.value.retry_after_s
    state = limiter.snapshot("key").requests
    assert state is not None
    assert state.remaining == 4
    first.settle(0)
    [limiter.admit("key", retry=0).settle(0) for _ in range(4)]
    with pytest.raises(RateLimited):
        limiter.admit("key", retry=0)


def test_a_request_that_is_refused_its_tokens_teaches_nothing_of_how_long_requests_take() -> None:
    """Else one key without tokens would have all others told to come back at once."""
    now = 0.0
    limiter = Limiter(config.Limits(tokens_per_minute=10), lambda: now)
    room = Room("model", 1)
    for key in ("first", "second"):
        lease = limiter.admit(key, retry=0)
        lease.enter(room, key)
        now += 10.0
        lease.settle(0)
    limiter.admit("poor", retry=0).reserve(10)
    before = limiter.crowds["model"]._mean_ns(limiter.now_ns)
    for _ in range(50):
        lease = limiter.admit("poor", retry=0)
        lease.enter(room, "poor")
        with pytest.raises(RateLimited):
            lease.reserve(5)
    assert limiter.crowds["model"]._mean_ns(limiter.now_ns) == before
