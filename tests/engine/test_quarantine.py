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
    now = 0.0

    def __call__(self) -> float:
        return self.now


def refused(known: Quarantine, mark: Mark) -> bool:
    try:
        known.check(mark)
    except RequestQuarantined:
        return True
    return False


def crash(known: Quarantine, *marks: Mark) -> list[Mark]:
    """Who is refused after a crash under these."""
    known.crashed(marks)
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


def test_the_second_crash_under_a_suspect_refuses_it_and_time_forgives() -> None:
    clock = Clock()
    known = Quarantine(clock)
    mark = known.mark(REQUEST)
    assert not known.suspects(mark)
    assert crash(known, mark) == []
    assert known.suspects(mark)
    assert crash(known, mark) == [mark]
    with pytest.raises(RequestQuarantined) as refusal:
        known.check(mark)
    assert "poison" not in refusal.value.message
    clock.now += quarantine.FORGET_AFTER_S + 1
    known.check(mark)
    assert crash(known, mark) == []


def test_of_several_suspects_only_the_one_at_the_second_crash_is_refused() -> None:
    known = Quarantine()
    poison, first, second, fresh = map(named, ("poison", "first", "second", "fresh"))
    crash(known, poison, first, second)
    assert all(map(known.suspects, (poison, first, second)))
    known.completed(first)
    assert crash(known, poison, first, fresh) == [poison]
    assert [known.suspects(mark) for mark in (poison, first, second, fresh)] == [False, False, True, False]
    assert not any(refused(known, mark) for mark in (first, second, fresh))


def test_a_suspicion_is_forgotten() -> None:
    clock = Clock()
    known = Quarantine(clock)
    crash(known, named("a"), named("b"))
    clock.now += quarantine.FORGET_AFTER_S + 1
    assert not known.suspects(named("a"))
    assert crash(known, named("a")) == []


def test_completing_clears() -> None:
    known = Quarantine()
    mark = known.mark(REQUEST)
    crash(known, mark)
    known.completed(mark)
    assert not known.suspects(mark)
    assert crash(known, mark) == []


def test_the_prompts_of_one_request_are_refused_together() -> None:
    known = Quarantine()
    parts = named("part 1"), named("part 2")
    crash(known, *parts, named("other"))
    assert crash(known, *parts, named("fresh")) == list(parts)


def test_what_one_key_may_not_send_another_may_until_several_have_sent_it() -> None:
    clock = Clock()
    known = Quarantine(clock)
    one, two, three = (named("poison", tenant) for tenant in ("one", "two", "three"))
    for mark in (one, one, two):
        crash(known, mark)
    assert [refused(known, mark) for mark in (one, two, three)] == [True, False, False]
    clock.now += 10
    crash(known, two)
    assert [refused(known, mark) for mark in (one, two, three)] == [True, True, True]
    clock.now += quarantine.FORGET_AFTER_S - 5
    assert [refused(known, mark) for mark in (one, two, three)] == [False, True, False]


def test_memory_is_bounded() -> None:
    known = Quarantine()
    many = [named(str(index)) for index in range(quarantine.CAPACITY + 100)]
    known.crashed(many)
    assert len(known._suspects) == quarantine.CAPACITY
    assert known.suspects(many[-1])
    for mark in many:
        known.crashed([mark])
        known.crashed([mark])
    assert len(known._refused) == quarantine.CAPACITY
    assert refused(known, many[-1])
