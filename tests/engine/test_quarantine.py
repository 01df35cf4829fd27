"""Whom a crash makes suspect, who is refused after it, to whom and for how long."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from ocserve.engine import quarantine
from ocserve.engine.quarantine import Mark, Quarantine
from ocserve.errors import RequestQuarantined
from ocserve.generation import EmbedRequest, GenerateRequest, Sampling, TextPrompt

REQUEST = GenerateRequest(
    request_id="one",
    model="m",
    prompt=TextPrompt(text="poison"),
    sampling=Sampling(logit_bias={7: 1.0}),
    max_tokens=5,
    salt=b"key one",
)


class Clock:
    now = 1.0

    def __call__(self) -> float:
        return self.now


def refused(known: Quarantine, mark: Mark) -> bool:
    try:
        known.check(mark)
    except RequestQuarantined:
        return True
    return False


def crash(known: Quarantine, *marks: Mark, tried: tuple[Mark, ...] | None = None) -> list[Mark]:
    """Who is refused after a crash under these; where nothing is said of trials, they are one request's."""
    known.crashed(marks, marks if tried is None else tried)
    return [mark for mark in marks if refused(known, mark)]


def named(name: str, tenant: str = "one") -> Mark:
    return Mark(name.encode(), tenant.encode())


def test_a_retry_is_recognised_whatever_its_id_and_other_work_is_not() -> None:
    known = Quarantine()
    mark = known.mark(REQUEST)
    assert known.mark(replace(REQUEST, request_id="two")) == mark
    assert known.mark(replace(REQUEST, prompt=TextPrompt(text="benign"))).work != mark.work
    other = known.mark(replace(REQUEST, salt=b"key two"))
    assert (other.work, other.tenant == mark.tenant) == (mark.work, False)
    assert Quarantine().mark(REQUEST).work != mark.work
    assert Quarantine().mark(REQUEST).tenant != mark.tenant


def test_a_question_is_somebodys_too() -> None:
    known = Quarantine()
    question = EmbedRequest(request_id="q", model="m", inputs=(TextPrompt(text="a"),), salt=b"key one")
    assert known.mark(question).tenant == known.mark(REQUEST).tenant
    assert known.mark(question).tenant != known.mark(replace(question, salt=b"key two")).tenant


def test_a_crash_under_a_suspect_and_nothing_else_refuses_it_and_time_forgives() -> None:
    clock = Clock()
    known = Quarantine(clock)
    mark = known.mark(REQUEST)
    assert known.suspicion(mark) is None
    assert crash(known, mark) == []
    assert known.suspicion(mark)
    assert crash(known, mark) == [mark]
    with pytest.raises(RequestQuarantined) as refusal:
        known.check(mark)
    assert "poison" not in refusal.value.message
    clock.now += quarantine.REFUSE_S
    assert refused(known, mark)
    clock.now += 1
    known.check(mark)
    assert crash(known, mark) == []


def test_a_suspect_is_not_refused_for_what_was_beside_it() -> None:
    """Neither on trial nor past it: what was there too may never have come before, and never come again."""
    known = Quarantine()
    innocent, *worded_anew = map(named, ("innocent", "first", "second", "third"))
    for poison in worded_anew:
        assert crash(known, innocent, poison, tried=()) == []
        assert known.suspicion(poison)
    found = known.suspicion(innocent)
    assert found is not None
    assert (found.crashes, found.alone) == (3, False)
    assert crash(known, innocent, named("fourth"), tried=(innocent,)) == []


def test_a_suspect_at_whose_trial_the_engine_stops_is_alone_at_the_next() -> None:
    known = Quarantine()
    poison, other = named("poison"), named("other")
    assert crash(known, poison, other, tried=(poison,)) == []
    found = known.suspicion(poison)
    assert found is not None
    assert not found.alone, "it had been no suspect"
    assert crash(known, poison, other, tried=(poison,)) == []
    found, beside = known.suspicion(poison), known.suspicion(other)
    assert found is not None
    assert beside is not None
    assert (found.alone, beside.alone) == (True, False)
    crash(known, poison, other, tried=())
    found = known.suspicion(poison)
    assert found is not None
    assert found.alone, "whatever crashed beside it since"
    assert crash(known, poison) == [poison]


def test_a_suspicion_is_forgotten() -> None:
    clock = Clock()
    known = Quarantine(clock)
    crash(known, named("a"))
    clock.now += quarantine.SUSPECT_S
    assert known.suspicion(named("a"))
    clock.now += 1
    assert known.suspicion(named("a")) is None
    assert crash(known, named("a")) == []


def test_completing_clears() -> None:
    known = Quarantine()
    mark = known.mark(REQUEST)
    crash(known, mark)
    known.completed(mark)
    assert known.suspicion(mark) is None
    assert crash(known, mark) == []


def test_the_prompts_of_one_request_are_refused_together_unless_one_is_new() -> None:
    known = Quarantine()
    parts = named("part 1"), named("part 2")
    crash(known, *parts)
    assert crash(known, *parts, named("fresh")) == []
    assert crash(known, *parts) == list(parts)


def test_what_some_keys_may_not_send_others_may() -> None:
    """Two keys that send somebody's prompt together with a poison have it refused to nobody but themselves."""
    known = Quarantine()
    for tenant in ("one", "two"):
        for _ in range(2):
            crash(known, named("Hi", tenant), named("poison", tenant))
    assert [refused(known, named("Hi", tenant)) for tenant in ("one", "two", "three")] == [True, True, False]


def test_each_crash_suspects_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as after the first, and whoever has not been there for longest is forgotten first."""
    monkeypatch.setattr(quarantine, "CAPACITY", 2)
    clock = Clock()
    known = Quarantine(clock)
    a, b, c = map(named, "abc")
    known.crashed([a])
    known.crashed([b])
    clock.now += quarantine.SUSPECT_S - 1
    known.crashed([a])
    known.crashed([c])
    clock.now += 2
    found = [known.suspicion(mark) for mark in (a, b, c)]
    assert [each and each.crashes for each in found] == [2, None, 1]


def test_each_refusal_is_for_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "CAPACITY", 2)
    clock = Clock()
    known = Quarantine(clock)
    for name in ("a", "b", "a", "c"):
        clock.now += quarantine.REFUSE_S / 2 + 1
        crash(known, named(name))
        crash(known, named(name))
    assert [refused(known, named(name)) for name in "abc"] == [True, False, True]


def test_memory_is_bounded() -> None:
    known = Quarantine()
    many = [named(str(index)) for index in range(quarantine.CAPACITY + 100)]
    known.crashed(many)
    assert len(known._suspects) == quarantine.CAPACITY
    assert known.suspicion(many[-1])
    for mark in many:
        crash(known, mark)
        crash(known, mark)
    assert len(known._refused) == quarantine.CAPACITY
    assert refused(known, many[-1])
