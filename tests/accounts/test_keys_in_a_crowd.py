"""Overload with several keys: none shuts out another, and what one limit promised another keeps."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable

import pytest

from ocserve import config
from ocserve.accounts import crowd
from ocserve.accounts.crowd import Room
from ocserve.accounts.keystore import OwnLimits
from ocserve.accounts.limits import Lease, Limiter
from ocserve.errors import Overloaded, RateLimited

SLOTS = 8


class Keys:
    """Clients of several keys at a model of eight slots and two places for who returns, in virtual time."""

    def __init__(self, own: dict[str, OwnLimits] | None = None) -> None:
        self.now = 0.0
        self.limiter = Limiter(config.Limits(), lambda: self.now)
        self.own = own or {}
        self.random = random.Random(1)
        self.slots: list[tuple[float, Lease]] = []  # when each is free again
        self.asked: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.sent_away: Counter[str] = Counter()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), action))

    def attempt(self, key: str, retry: int | None, body: int, width: int = 1) -> float:
        """The seconds after which to come again; 0 where it is served, which takes a second and a wait for a slot."""
        try:
            lease = self.limiter.admit(key, retry=retry, body=body, own=self.own.get(key, OwnLimits()))
            lease.enter(Room("model", SLOTS + 2, returning=2, spare=1, width=width), key)
        except (Overloaded, RateLimited) as refusal:
            return refusal.retry_after_s or 0.0
        running = sorted(end for end, _ in self.slots)
        waits = running[len(running) + width - SLOTS - 1] - self.now if len(running) + width > SLOTS else 0.0
        end = self.now + waits + self.random.uniform(0.6, 1.8)
        self.slots += [(end, lease)] * width
        self.after(end - self.now, lambda: self._end(lease))
        self.served[key] += width
        return 0.0

    def _end(self, lease: Lease) -> None:
        self.slots = [each for each in self.slots if each[1] is not lease]
        lease.settle(0)

    def patient(self, key: str, width: int = 1) -> None:
        """Ask one question after another, and come as told."""
        self.asked[key] += 1
        self._come(key, 0, self.random.getrandbits(50), width)

    def _come(self, key: str, retry: int, body: int, width: int) -> None:
        told_s = self.attempt(key, retry, body, width)
        if not told_s:
            self.after(self.random.uniform(1.0, 2.0), lambda: self.patient(key, width))
        elif retry == 2 or told_s > 120:
            self.sent_away[key] += 1
            self.after(self.random.uniform(1.0, 2.0), lambda: self.patient(key, width))
        else:
            self.after(told_s + 0.002, lambda: self._come(key, retry + 1, body, width))

    def rude(self, key: str, each_s: float) -> None:
        """Ask all the time, whatever was told."""
        self.attempt(key, None, 7)
        self.after(each_s, lambda: self.rude(key, each_s))

    def run(self, seconds: float) -> None:
        while self._events and self._events[0][0] <= seconds:
            self.now, _, action = heapq.heappop(self._events)
            action()


@pytest.mark.parametrize("own", [OwnLimits(), OwnLimits(requests_per_minute=60)])
def test_a_key_that_asks_all_the_time_does_not_shut_out_who_comes_as_told(own: OwnLimits) -> None:
    keys = Keys({"rude": own})
    for _ in range(6):
        keys.patient("one")
        keys.patient("two")
    keys.rude("rude", 0.01)
    keys.run(120.0)
    print(keys.asked, keys.served, keys.sent_away)
    for key in ("one", "two"):
        assert keys.sent_away[key] <= 0.05 * keys.asked[key]
        assert keys.served[key] >= 0.5 * keys.served["rude"]


def test_who_needs_some_slots_at_once_gets_them_and_who_needs_most_is_promised_nothing() -> None:
    keys = Keys()
    for _ in range(12):
        keys.patient("one")
    keys.patient("half", 4)
    keys.run(120.0)
    print(keys.asked, keys.served, keys.sent_away)
    assert keys.served["half"] >= 4 * 0.9 * (keys.asked["half"] - 1)
    while not keys.attempt("one", 0, 1):
        pass
    assert keys.attempt("most", 0, 1, 6) > 120


def test_who_needs_most_slots_is_told_when_to_come_where_nobody_else_waits() -> None:
    keys = Keys()
    assert keys.attempt("one", 0, 1, 4) == 0
    told_s = keys.attempt("most", 0, 2, 8)
    assert 0 < told_s < 30
    keys.run(keys.now + told_s)
    keys.now = told_s
    assert keys.attempt("most", 1, 2, 8) == 0


def test_a_promise_of_a_keys_line_outlives_a_refusal_for_want_of_room() -> None:
    keys = Keys({"one": OwnLimits(requests_per_minute=1)})
    assert keys.attempt("one", 0, 1) == 0
    keys.run(30.0)
    keys.now = 30.0
    told_s = keys.attempt("one", 0, 2)
    assert 0 < told_s <= 30.01
    keys.now += told_s
    assert [keys.attempt(f"other {number}", 0, 3) for number in range(SLOTS + 2)] == [0] * (SLOTS + 2)
    again_s = keys.attempt("one", 1, 2)
    assert 0 < again_s < 10
    keys.run(keys.now + 2.0)
    keys.now += max(again_s, 2.0)  # when those others have ended
    assert keys.attempt("one", 0, 4) > 0, "its minute's request is promised"
    assert keys.attempt("one", 2, 2) == 0


def test_a_ticket_is_for_as_many_slots_as_were_asked_for() -> None:
    keys = Keys()
    assert keys.attempt("one", 0, 1, 4) == 0
    assert [keys.attempt(f"other {number}", 0, 2) for number in range(SLOTS - 2)] == [0] * (SLOTS - 2)
    told_s = keys.attempt("one", 0, 3)
    assert 0 < told_s < 60
    for number in range(20):
        keys.attempt(f"late {number}", 0, 4)
    keys.run(told_s)
    keys.now = told_s
    keys.attempt("one", 1, 5, 5)
    waiting = keys.limiter.crowds["model"]._holders["one"].waiting
    assert waiting in (1, 6), "the ticket for one slot is still there, alone or beside one for five"


def test_one_key_never_has_most_of_the_tickets_however_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowd, "_MOST_TICKETS", 40)
    limiter = Limiter(config.Limits(tokens_per_minute=100), lambda: 0.0)
    held = limiter.admit("one")
    held.enter(Room("model", SLOTS), "one")
    held.reserve(95)
    for _ in range(30):
        lease = limiter.admit("one")
        lease.enter(Room("model", SLOTS), "one")
        with pytest.raises(RateLimited):
            lease.reserve(10)
    assert len(limiter.crowds["model"]._tickets) == 10
