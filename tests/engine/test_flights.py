"""When work may join what is in the engine, by a clock that tests set."""

from __future__ import annotations

import asyncio
import math

import pytest

from ocserve.engine import flights, quarantine
from ocserve.engine.flights import Flight, Turn, Turns
from ocserve.engine.quarantine import Mark, Quarantine
from ocserve.errors import RequestQuarantined


def marked(work: str) -> Mark:
    return Mark(work.encode(), b"one")


class Gate:
    """An engine's flights and the turns of those who would join them. Requests are named as their work is."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.flights: dict[str, Flight] = {}
        self.quarantine = Quarantine(lambda: self.now)
        self.turns = Turns(self.flights, self.quarantine, lambda: self.now)

    def suspect(self, work: str, *, crashes: int = 1, alone: bool = False) -> None:
        """As crashes under it would leave it."""
        for _ in range(crashes):
            beside = marked("beside")
            self.quarantine.crashed([marked(work), beside], tried=[marked(work)] if alone else [])
            self.quarantine.completed(beside)

    def come(self, work: str, request: str | None = None) -> Turn:
        return self.turns.come(marked(work), request or work)

    def enter(self, turn: Turn) -> Flight:
        """Be let in, and leave the queue."""
        number = len(self.flights)
        reply = asyncio.get_running_loop().create_future()
        flight = self.flights[f"{turn.request}.{number}"] = self.turns.flight(turn, reply, 1)
        self.turns.leave(turn)
        return flight

    def runs(self, work: str) -> Flight:
        """In the engine for so long that it is new no more."""
        flight = self.enter(self.come(work))
        self.turns.generates(flight)
        self.now += flight.trial_s
        return flight

    def delays(self, *turns: Turn) -> list[float]:
        return [round(self.turns.delay(turn), 6) for turn in turns]


async def test_who_is_no_suspect_waits_for_nobody_who_is_none() -> None:
    gate = Gate()
    first = gate.come("first")
    assert gate.delays(first) == [0]
    gate.enter(first)
    assert gate.delays(gate.come("second")) == [0]


async def test_the_prompts_of_one_request_go_together_whatever_each_would_have_to_wait_for() -> None:
    gate = Gate()
    for part in ("trial", "queued", "second"):
        gate.suspect(part)
    gate.suspect("alone", crashes=2, alone=True)
    gate.enter(gate.come("trial", "other"))
    gate.come("queued")
    gate.enter(gate.come("first", "one"))
    assert gate.delays(*(gate.come(part, "one") for part in ("fresh", "second", "alone"))) == [0, 0, 0]
    assert 0 not in gate.delays(*(gate.come(part, "two") for part in ("fresh", "second", "alone")))


async def test_who_is_no_suspect_waits_for_a_trial_until_it_has_generated_for_a_while() -> None:
    gate = Gate()
    gate.suspect("suspect")
    flight = gate.enter(gate.come("suspect"))
    fresh = gate.come("fresh")
    assert gate.delays(fresh) == [10 * flights.TRIAL_S], "it may never generate"
    gate.now += 1.0
    gate.turns.generates(flight)
    assert gate.delays(fresh) == [flights.TRIAL_S]
    gate.now += flights.TRIAL_S
    assert gate.delays(fresh) == [0]


async def test_a_trial_that_begins_to_generate_late_is_not_longer_for_it() -> None:
    gate = Gate()
    gate.suspect("suspect")
    flight = gate.enter(gate.come("suspect"))
    fresh = gate.come("fresh")
    gate.now += 9.5 * flights.TRIAL_S
    gate.turns.generates(flight)
    assert gate.delays(fresh) == [pytest.approx(0.5 * flights.TRIAL_S)]


async def test_who_is_no_suspect_waits_while_suspects_do_and_some_seconds_at_most() -> None:
    gate = Gate()
    for work in ("first", "second"):
        gate.suspect(work)
    gate.runs("first")
    gate.come("second")
    fresh = gate.come("fresh")
    assert gate.delays(fresh) == [flights._FRESH_WAIT_S]
    gate.now += 2.0
    assert gate.delays(fresh) == [flights._FRESH_WAIT_S - 2.0]
    gate.now += flights._FRESH_WAIT_S - 2.0
    assert gate.delays(fresh) == [0]


async def test_suspects_are_first_come_first_served_and_one_at_a_time() -> None:
    gate = Gate()
    works = ("a", "b", "c")
    for work in works:
        gate.suspect(work)
    a, b, c = (gate.come(work) for work in works)
    assert gate.delays(c, b, a) == [math.inf, math.inf, 0]
    flight = gate.enter(a)
    gate.turns.generates(flight)
    assert gate.delays(c, b) == [math.inf, flights._EMPTYING_S / 2], "what waits has the wait in shares"
    gate.now += flights._EMPTYING_S / 2
    assert gate.delays(c, b) == [math.inf, 0]
    gate.enter(b)
    assert gate.delays(c) == [flights._SETTLING_S]


async def test_a_suspect_waits_for_an_empty_engine_for_a_moment_and_does_not_need_one() -> None:
    gate = Gate()
    gate.runs("long")
    gate.suspect("suspect")
    suspect = gate.come("suspect")
    assert gate.delays(suspect) == [flights._EMPTYING_S]
    gate.now += flights._EMPTYING_S / 2
    assert gate.delays(suspect) == [flights._EMPTYING_S / 2]
    (gone,) = gate.flights
    flight = gate.flights.pop(gone)
    assert gate.delays(suspect) == [0]
    gate.flights[gone] = flight
    gate.now += flights._EMPTYING_S / 2
    assert gate.delays(suspect) == [0]


async def test_a_suspect_waits_until_nothing_new_is_in_the_engine_for_seconds_at_most() -> None:
    gate = Gate()
    gate.suspect("suspect")
    suspect = gate.come("suspect")
    fresh = gate.enter(gate.come("fresh"))
    gate.turns.delay(suspect)
    gate.now += 2.5  # longer than for an empty engine
    gate.turns.generates(fresh)
    assert gate.delays(suspect) == [flights.TRIAL_S]
    gate.enter(gate.come("other"))
    assert gate.delays(suspect) == [flights._SETTLING_S - 2.5]
    gate.now += 0.5
    assert gate.delays(suspect) == [0]


@pytest.mark.parametrize(("crashes", "trial_s"), [(1, 0.3), (2, 0.6), (3, 1.2), (4, 2.4), (5, 2.4), (9, 2.4)])
async def test_a_trial_is_twice_as_long_after_each_crash(crashes: int, trial_s: float) -> None:
    gate = Gate()
    gate.suspect("suspect", crashes=crashes)
    flight = gate.enter(gate.come("suspect"))
    assert (flight.suspect, flight.trial_s) == (True, trial_s)
    fresh = gate.enter(gate.come("fresh"))
    assert (fresh.suspect, fresh.trial_s) == (False, flights.TRIAL_S)


async def test_who_must_be_alone_waits_for_an_empty_engine_and_keeps_nobody_waiting() -> None:
    gate = Gate()
    gate.suspect("alone", crashes=2, alone=True)
    gate.suspect("alone")  # at one more, by itself or not
    gate.suspect("suspect")
    alone = gate.come("alone")
    assert gate.delays(alone, gate.come("fresh")) == [0, 0]
    gate.runs("long")
    suspect = gate.come("suspect")
    gate.turns.delay(suspect)
    gate.now += 100
    assert gate.delays(alone, suspect) == [math.inf, 0]
    gate.turns.leave(suspect)
    assert gate.delays(gate.come("fresh")) == [0]


async def test_who_is_cleared_while_it_waits_stands_in_nobodys_way() -> None:
    gate = Gate()
    for work in ("first", "second"):
        gate.suspect(work)
    first, second = (gate.come(work) for work in ("first", "second"))
    gate.quarantine.completed(first.mark)
    assert gate.delays(first, second) == [flights._FRESH_WAIT_S, 0]


async def test_who_becomes_a_suspect_or_is_cleared_waits_from_then_on() -> None:
    gate = Gate()
    gate.suspect("suspect")
    gate.runs("long")
    gate.come("suspect")
    turn = gate.come("turn")
    assert gate.delays(turn) == [flights._FRESH_WAIT_S]
    gate.now += 4.0
    gate.suspect("turn")
    gate.turns.delay(turn)
    gate.turns._queue.reverse()  # as if it had come first
    assert gate.delays(turn) == [flights._EMPTYING_S / 2]
    gate.now += 0.5
    gate.quarantine.completed(turn.mark)
    assert gate.delays(turn) == [flights._FRESH_WAIT_S]


async def test_when_a_suspect_may_have_its_turn_is_told_by_how_many_wait() -> None:
    gate = Gate()
    told = [gate.turns.expected_s]
    for work in ("a", "b"):
        gate.suspect(work)
        gate.come(work)
        gate.come(f"fresh {work}")
        told.append(gate.turns.expected_s)
    assert told == [flights._SETTLING_S + 2 * flights.TRIAL_S * waiting for waiting in (0, 1, 2)]


async def test_whoever_waits_looks_again_when_one_goes_and_when_a_token_comes() -> None:
    gate = Gate()
    flight = gate.enter(gate.come("a"))
    turn = gate.come("b")
    for happens in (lambda: gate.turns.leave(turn), lambda: gate.turns.generates(flight)):
        waits = asyncio.create_task(gate.turns.change(math.inf))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        happens()
        await asyncio.wait_for(waits, 5)


async def test_the_only_request_that_is_new_at_a_crash_was_tried_whoever_is_beside_it() -> None:
    gate = Gate()
    gate.suspect("poison")
    gate.runs("long")
    for _ in range(2):  # it has two prompts
        gate.enter(gate.come("poison", "request"))
    gate.turns.crashed()
    found = [gate.quarantine.suspicion(marked(work)) for work in ("poison", "long")]
    assert [(each.crashes, each.alone) for each in found if each] == [(2, True), (1, False)]


async def test_where_two_requests_are_new_at_a_crash_neither_was_tried() -> None:
    gate = Gate()
    for work in ("poison", "other"):
        gate.suspect(work)
        gate.enter(gate.come(work))
    gate.turns.crashed()
    found = [gate.quarantine.suspicion(marked(work)) for work in ("poison", "other")]
    assert [(each.crashes, each.alone) for each in found if each] == [(2, False), (2, False)]


async def test_a_suspect_by_itself_is_proven_however_long_it_has_run() -> None:
    gate = Gate()
    gate.suspect("poison")
    gate.runs("poison")
    gate.turns.crashed()
    with pytest.raises(RequestQuarantined):
        gate.quarantine.check(marked("poison"))


async def test_a_suspicion_ends_while_its_work_waits() -> None:
    gate = Gate()
    gate.suspect("suspect")
    gate.runs("long")
    suspect, fresh = gate.come("suspect"), gate.come("fresh")
    assert 0 not in gate.delays(suspect, fresh)
    gate.now += quarantine.SUSPECT_S + 1
    assert gate.delays(suspect, fresh) == [0, 0]
