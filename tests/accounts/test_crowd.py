"""Overload: whoever waits as told is served, who goes elsewhere costs nothing, and it ends with what caused it."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable

import pytest

from ocserve import config
from ocserve.accounts import crowd as module
from ocserve.accounts.buckets import SECOND
from ocserve.accounts.crowd import Crowd, Room, Stay
from ocserve.accounts.limits import Lease, Limiter
from ocserve.accounts.line import LONGEST_TOLD, Attempt
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


def test_an_overload_that_outlasts_what_clients_wait_stays_honest(full: bool) -> None:
    """Nobody is told to come within what clients wait whom no ticket expects."""
    seconds_long = 240.0
    runs = [Overload(factor=10, waiting=0.3, seconds=uneven, seed=seed, queue=2) for seed in range(6 if full else 1)]
    for each in runs:
        each.run(seconds_long)
    used = sum(each.busy_s for each in runs) / len(runs) / seconds_long / SLOTS
    returned = sum(each.returned for each in runs)
    honest = sum(each.served_on_return for each in runs) / returned
    print(f"{used:.3f} of the slots, {honest:.3f} of {returned} served on return")
    assert returned > 100 * len(runs)
    assert honest > 0.95
    assert used > 0.95


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


def test_clients_that_do_not_count_are_known_by_their_requests() -> None:
    now = 0.0
    limiter = Limiter(config.Limits(), lambda: now)

    def enter(body: int) -> Lease:
        lease = limiter.admit("key", body=body)
        lease.enter(Room("model", 2), "key")
        return lease

    first = enter(1)
    enter(1)
    with pytest.raises(Overloaded) as refusal:
        enter(2)
    first.settle(0)
    now += refusal.value.retry_after_s or 0
    with pytest.raises(Overloaded):
        enter(3)
    enter(2).settle(0)


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


def test_one_key_never_has_all_the_slots_however_many_are_spare() -> None:
    crowd, room = Crowd(), Room("model", 4, spare=9)
    entered = [isinstance(crowd.enter(room, holder, Attempt(0), 0), Stay) for holder in ("a", "a", "a", "a", "b")]
    assert entered == [True, True, True, False, True]


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


FOUR = Room("model", 4)
# One of four is free every quarter of a second that requests take at first; tickets are given out at the least pace,
# since twice two of them may be free by chance.
TURN = int(SECOND / 4 / 0.3)


class Full:
    """A crowd that has all slots of a room, as of its first moment, and those whom it told to come again."""

    def __init__(self, room: Room = FOUR, refusals: int = 1) -> None:
        self.room = room
        self.crowd = Crowd()
        self.stays = [found for _ in range(room.slots) if isinstance(found := self.enter("mine"), Stay)]
        assert len(self.stays) == room.slots
        self.told = [self.refused() for _ in range(refusals)]

    def enter(self, holder: str, number: int = 0, at: int = 0, room: Room | None = None) -> Stay | int:
        return self.crowd.enter(room or self.room, holder, Attempt(number), at)

    def refused(self, holder: str = "mine", number: int = 0, at: int = 0, room: Room | None = None) -> int:
        found = self.enter(holder, number, at, room)
        assert isinstance(found, int)
        return found

    def free(self, slots: int) -> None:
        for _ in range(slots):
            self.crowd.leave(self.stays.pop(), 0, served=False)


@pytest.mark.parametrize(
    ("holder", "number", "early", "passes"),
    [("mine", 1, 0, True), ("mine", 1, 1, False), ("mine", 0, 0, False), ("mine", 2, 0, False), ("other", 1, 0, False)],
)
def test_a_ticket_is_for_the_next_attempt_of_its_key_from_its_moment_on(
    holder: str, number: int, early: int, passes: bool
) -> None:
    full = Full()
    full.free(1)
    at = full.told[0] - early
    assert isinstance(full.enter(holder, number, at), Stay) is passes
    assert len(full.crowd._tickets) == (0 if passes else 2)


def test_a_ticket_is_used_once() -> None:
    full = Full(refusals=2)
    full.free(2)
    assert isinstance(full.enter("mine", 1, full.told[0]), Stay)
    full.refused("mine", 1, full.told[0])


def test_slots_are_left_for_those_whose_tickets_are_due_about_now_and_for_nobody_else() -> None:
    full = Full(refusals=3)
    assert full.told == pytest.approx([TURN, 2 * TURN, 3 * TURN], abs=10)
    full.free(2)
    at = TURN - SECOND // 2 + 1
    assert isinstance(full.enter("new", at=at), Stay), "one is due in half a request's time, and there are two slots"
    full.refused("new", at=at)


def test_one_slot_is_left_for_four_who_are_late() -> None:
    full = Full(refusals=3)
    at = full.told[-1] + 1
    full.free(2)
    assert isinstance(full.enter("new", at=at), Stay)
    full.refused("new", at=at)


def test_what_the_queue_holds_for_who_returns_is_kept_for_their_tickets_too() -> None:
    room = Room("model", 8, returning=2)
    full = Full(Room("model", 8))
    full.free(3)
    assert isinstance(full.enter("new", room=room), Stay)
    full.refused("new", room=room)


@pytest.mark.parametrize(
    ("slots", "turn_ns"), [(1, SECOND / 0.3), (4, TURN), (9, SECOND / 9 * 3), (16, SECOND / 16 * 2)]
)
def test_tickets_are_given_out_at_the_pace_at_which_slots_are_free(slots: int, turn_ns: float) -> None:
    full = Full(Room("model", slots), refusals=3)
    assert full.told == [pytest.approx(turn * turn_ns, abs=10) for turn in (1, 2, 3)]
    wide = Full(Room("model", 4))
    assert wide.refused(room=Room("model", 4, width=2)) == pytest.approx(3 * TURN, abs=10)


def test_who_came_as_told_and_finds_no_slot_is_before_all_others() -> None:
    full = Full(refusals=20)
    at = full.told[0]
    last = full.told[-1] - at
    wait = full.refused("mine", 1, at)
    assert wait < last / 2
    full.free(2)
    assert isinstance(full.enter("mine", 2, at + wait), Stay), "its ticket is found among the later ones"


def test_no_ticket_is_for_later_than_clients_wait_and_there_are_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Full(refusals=300)
    assert len(full.crowd._tickets) == LONGEST_TOLD // TURN
    assert full.told[-1] == full.told[-2] > 120 * SECOND, "longer than any client obeys"
    monkeypatch.setattr(module, "_MOST_TICKETS", 28)
    few = Full(refusals=20)
    assert len(few.crowd._tickets) == 7
    assert few.told[6] < LONGEST_TOLD < 120 * SECOND < few.told[7]


def test_a_ticket_lapses_after_a_while_and_the_share_that_is_used_is_learnt() -> None:
    full = Full(refusals=14)
    lapses = full.told[0] + module._GRACE
    full.free(1)
    full.crowd._forget_lapsed(lapses - 1)
    assert (len(full.crowd._tickets), full.crowd._holders["mine"].share_used) == (14, 1.0)
    full.crowd._forget_lapsed(lapses)
    assert (len(full.crowd._tickets), full.crowd._holders["mine"].share_used) == (13, 0.95)
    assert isinstance(full.enter("mine", 1, lapses), Stay)
    assert full.crowd._holders["mine"].share_used == pytest.approx(0.95 + 0.05 * 0.05)
    end = full.told[-1] + module._GRACE
    full.crowd._forget_lapsed(end)
    assert full.crowd._tickets == []
    assert full.crowd._holders["mine"].share_used == pytest.approx((0.95 + 0.05 * 0.05) * 0.95**12)
    full.crowd._forget_lapsed(end)
    assert full.crowd._holders["mine"].share_used == pytest.approx((0.95 + 0.05 * 0.05) * 0.95**12), (
        "nothing is learnt of nobody"
    )


def test_tickets_are_overbooked_and_fewer_slots_kept_where_few_come_back() -> None:
    full, turn = Full(Room("model", 9)), SECOND // 3
    full.crowd._holders["mine"].share_used = 0.5
    told = [full.refused() for _ in range(3)]
    assert [later - full.told[0] for later in told] == pytest.approx([turn // 2, turn, 3 * turn // 2], abs=10)
    full.free(2)
    assert isinstance(full.enter("new"), Stay), "of two who are due about now one comes"
    full.refused("new")


def test_the_share_that_is_used_is_never_learnt_to_be_none() -> None:
    full = Full(refusals=200)
    full.crowd._forget_lapsed(full.told[-1] + module._GRACE)
    assert full.crowd._holders["mine"].share_used == module._LEAST_SHARE


def test_who_leaves_makes_room_and_only_an_answer_teaches_how_long_one_takes() -> None:
    full = Full(refusals=0)
    stay = full.stays[0]
    full.crowd.leave(stay, 9 * SECOND, served=False)
    assert full.crowd._durations.mean_ns([]) == SECOND
    again = full.enter("new")
    assert isinstance(again, Stay)
    full.crowd.leave(again, 9 * SECOND, served=True)
    assert full.crowd._durations.mean_ns([]) > SECOND
