"""Who is loaded and who goes, against independent bookkeeping and random histories."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ocserve.engine.residency import (
    RETRY_FIRST_S,
    RETRY_LAST_S,
    TRANSITIONS,
    Action,
    IllegalMove,
    Memory,
    Move,
    Phase,
    Residency,
    Rules,
)

NEED = {"a": 3, "b": 4, "c": 5, "huge": 14}
GPU_NEED = {"a": 4, "b": 2, "c": 4, "huge": 5}
PLACES = {name: (NEED[name], GPU_NEED[name]) for name in NEED}
CAPACITY, GPU_CAPACITY = 10, 7
IDLE_S = 100.0


class History(RuleBasedStateMachine):
    """Requests and models come and go, loads and unloads end, other programs take memory, time passes: in any order."""

    most_loaded: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.others = 0  # bytes that other programs have taken since the start
        self.resident: set[str] = set()
        self.under_way: dict[str, Move] = {}
        self.leases: Counter[str] = Counter()
        self.used_at: dict[str, float] = {}
        self.retired: set[str] = set()
        self.gone: set[str] = set()
        memory = Memory(PLACES, (CAPACITY, GPU_CAPACITY), self.available)
        self.residency = Residency(memory, Rules(idle_s=IDLE_S, most_loaded=self.most_loaded))

    def available(self) -> int:
        return CAPACITY - self.others - sum(NEED[name] for name in self.resident)

    def plan(self) -> None:
        wanted = {name for name in NEED if self.leases[name] and name not in self.resident}
        for action in self.residency.plan(self.now):
            assert action.model not in self.under_way
            if action.move is Move.LOAD:
                self.check_load(action)
            else:
                self.check_unload(action, wanted)
            self.under_way[action.model] = action.move
        for name in self.residency.gone():
            assert name in self.retired - self.resident, "it is in memory, or was to stay"
            assert not self.leases[name], "somebody uses it"
            self.gone.add(name)

    def check_load(self, action: Action) -> None:
        assert action.model not in self.resident, "two loads of one model"
        assert not self.under_way, "loads run alone"
        assert self.leases[action.model], "nobody wants it"
        if self.resident:
            assert NEED[action.model] <= self.available()
            assert self.most_loaded is None or len(self.resident) < self.most_loaded
        self.resident.add(action.model)

    def check_unload(self, action: Action, wanted: set[str]) -> None:
        assert not self.leases[action.model], "a busy model is never unloaded"
        if action.model in self.retired:
            return
        assert self.now - self.used_at[action.model] >= IDLE_S or wanted, "nobody needs the room"
        idle = {name for name in self.resident if not self.leases[name] and name not in self.under_way}
        assert self.used_at[action.model] == min(self.used_at[name] for name in idle), "the least recently used first"

    @rule(name=st.sampled_from(sorted(NEED)))
    def acquire(self, name: str) -> None:
        if name in self.retired or self.residency.retry_in_s(name, self.now):
            return
        self.leases[name] += 1
        self.used_at[name] = self.now
        self.residency.acquire(name, self.now)
        self.plan()

    @precondition(lambda self: self.leases.total())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.leases.elements())))
        self.leases[name] -= 1
        self.used_at[name] = self.now
        self.residency.release(name, self.now)
        self.plan()

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), fails=st.booleans())
    def complete(self, data: st.DataObject, fails: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.under_way)))
        loading = self.under_way.pop(name) is Move.LOAD
        end = (Move.FAILED if fails else Move.LOADED) if loading else Move.UNLOADED
        if end is Move.LOADED:
            self.used_at[name] = self.now
        else:
            self.resident.discard(name)
        self.residency.done(name, end, self.now)
        if end is Move.FAILED:  # those who waited are told, and go
            for _ in range(self.leases.pop(name, 0)):
                self.residency.release(name, self.now)
        self.plan()

    @rule(name=st.sampled_from(sorted(NEED)))
    def retire(self, name: str) -> None:
        if name not in self.retired:
            self.retired.add(name)
            self.residency.retire(name)
            self.plan()

    @precondition(lambda self: self.retired)
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.retired)))
        self.retired.remove(name)
        if name in self.gone:
            self.gone.remove(name)
            self.residency.add(name, PLACES[name])
        else:
            self.residency.restore(name)
        self.plan()

    @rule(seconds=st.sampled_from([0.5, 20.0, IDLE_S]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.plan()

    @rule(taken=st.integers(0, 5))
    def other_programs(self, taken: int) -> None:
        self.others = taken

    @invariant()
    def what_is_loaded_fits(self) -> None:
        if len(self.resident) > 1:
            assert sum(NEED[name] for name in self.resident) <= CAPACITY
            assert sum(GPU_NEED[name] for name in self.resident) <= GPU_CAPACITY
        assert self.most_loaded is None or len(self.resident) <= self.most_loaded

    @invariant()
    def phases_agree(self) -> None:
        for name in NEED.keys() - self.gone:
            phase = self.residency.phase(name)
            assert (phase is not Phase.COLD) == (name in self.resident)
            assert {Phase.LOADING: Move.LOAD, Phase.UNLOADING: Move.UNLOAD}.get(phase) == self.under_way.get(name)

    @invariant()
    def nobody_waits_while_everybody_else_is_idle(self) -> None:
        wanted = [name for name in NEED if self.leases[name] and name not in self.resident]
        if wanted and not any(self.leases[name] for name in self.resident):
            assert self.under_way

    @invariant()
    def a_retired_model_that_nobody_uses_goes(self) -> None:
        for name in self.retired - self.gone:
            assert self.leases[name] or name in self.under_way

    @invariant()
    def an_idle_model_has_a_time_to_go(self) -> None:
        idle = [name for name in self.resident if not self.leases[name] and name not in self.under_way]
        due = self.residency.next_due()
        assert due == min((self.used_at[name] + IDLE_S for name in idle), default=None)


class HistoryOfTwo(History):
    most_loaded = 2


TestHistory = History.TestCase
TestHistoryOfTwo = HistoryOfTwo.TestCase
TestHistory.settings = TestHistoryOfTwo.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def residency(available: int = CAPACITY, **rules: float | int) -> Residency:
    return Residency(Memory(PLACES, (CAPACITY, GPU_CAPACITY), lambda: available), Rules(**rules))  # type: ignore[arg-type]


def load(made: Residency, *names: str) -> None:
    """Load these, one after another, and leave them idle."""
    for at, name in enumerate(names):
        made.acquire(name, at)
        assert made.plan(at) == [Action(Move.LOAD, name)]
        made.done(name, Move.LOADED, at)
        made.release(name, at)


@pytest.mark.parametrize(("phase", "move"), list(itertools.product(Phase, Move)))
def test_every_pair_leads_where_the_table_says_or_raises(phase: Phase, move: Move) -> None:
    made = residency()
    made._models["a"].phase = phase
    if (phase, move) in TRANSITIONS:
        made.done("a", move, 0.0)
        assert made.phase("a") is TRANSITIONS[phase, move]
    else:
        with pytest.raises(IllegalMove):
            made.done("a", move, 0.0)
        assert made.phase("a") is phase


def test_a_leased_model_cannot_be_unloaded() -> None:
    made = residency()
    load(made, "a")
    made.acquire("a", 1)
    with pytest.raises(IllegalMove):
        made.done("a", Move.UNLOAD, 1)
    assert made.phase("a") is Phase.READY


def test_a_gpu_that_is_too_small_for_both_makes_room_too() -> None:
    made = Residency(Memory({"a": (1, 5), "b": (1, 5)}, (100, 8), lambda: 100), Rules())
    load(made, "a")
    made.acquire("b", 1)
    assert made.plan(1) == [Action(Move.UNLOAD, "a")]


def test_nobody_is_unloaded_in_vain() -> None:
    """The huge one needs more room than the idle model leaves beside the busy one: it waits, and the idle one stays."""
    made = residency()
    load(made, "a")
    load(made, "b")
    made.acquire("b", 5)
    made.acquire("huge", 6)
    assert made.plan(6) == []
    assert made.phase("a") is Phase.READY


def test_a_model_that_fits_need_not_wait_for_one_that_does_not() -> None:
    made = residency()
    load(made, "b")
    made.acquire("b", 5)
    made.acquire("huge", 6)
    made.acquire("a", 7)
    assert made.plan(7) == [Action(Move.LOAD, "a")]


def test_the_room_that_comes_free_is_for_the_one_that_waited() -> None:
    made = residency()
    load(made, "a", "b")
    made.acquire("c", 6)
    assert made.plan(6) == [Action(Move.UNLOAD, "a")]
    made.acquire("a", 7)
    assert made.plan(7) == []
    made.done("a", Move.UNLOADED, 8)
    assert made.plan(8) == [Action(Move.LOAD, "c")]


def test_a_failed_load_is_tried_again_later_and_later_up_to_a_minute() -> None:
    made = residency()
    now, waits = 0.0, []
    for _ in range(9):
        made.acquire("a", now)
        assert made.plan(now) == [Action(Move.LOAD, "a")]
        made.done("a", Move.FAILED, now)
        assert made.plan(now) == []
        made.release("a", now)
        waits.append(made.retry_in_s("a", now))
        now += waits[-1]
    assert waits[:3] == [RETRY_FIRST_S, 2 * RETRY_FIRST_S, 4 * RETRY_FIRST_S]
    assert waits[-1] == RETRY_LAST_S
