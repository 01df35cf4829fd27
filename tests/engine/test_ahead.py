"""Steps without a plan: the same answers, told while the next step is computed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ocserve.engine import ahead, llama, slots
from ocserve.engine.context import DecodeStatus, Row
from ocserve.engine.duty import EngineBroken
from ocserve.engine.wire import Step
from ocserve.generation import Failed, Finished, Sampling, TextDelta
from tests.engine.schedules import NO_END, Engine, FixedCosts

PROMPTS = {"short": range(40, 60), "long": range(10, 110), "repeats": [*range(60, 80)] * 3}
TOKENS = {"short": 50, "long": 80, "repeats": 70}


@pytest.fixture
def engine(model: llama.Model) -> Iterator[Engine]:
    made = Engine(Path(), model=model, pool_tokens=1024, costs=FixedCosts(teaching=1000))
    yield made
    made.context.close()


def planned_steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each step that is planned."""
    planned: list[int] = []
    compose = engine.loop._composer.compose
    monkeypatch.setattr(engine.loop._composer, "compose", lambda *facts: planned.append(1) or compose(*facts))
    return planned


def answers(model: llama.Model, sampling: Sampling, *, goes_ahead: bool) -> dict[str, tuple[object, ...]]:
    engine = Engine(Path(), model=model, pool_tokens=1024, costs=FixedCosts(teaching=7))
    asked = {
        name: engine.submit(name, prompt, TOKENS[name], sampling=sampling, speculates=name == "repeats")
        for name, prompt in PROMPTS.items()
    }
    engine.run(goes_ahead=goes_ahead)
    stats = engine.loop.stats()
    assert stats.running == stats.waiting == 0
    assert stats.cells_used == stats.cells_kept
    engine.context.close()
    return {name: told(engine, sequence) for name, sequence in asked.items()}


def told(engine: Engine, sequence: slots.Sequence) -> tuple[object, ...]:
    end = engine.end(sequence.id)
    assert isinstance(end, Finished)
    return sequence.generated, engine.text(sequence.id), end.reason, end.usage


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0, logit_bias=NO_END),
        Sampling(temperature=1.0, seed=5, logit_bias=NO_END),
        Sampling(temperature=1.5, seed=6, logit_bias={0: 5.0}),  # ends soon
    ],
    ids=["greedy", "drawn", "ending"],
)
def test_answers_are_those_of_planned_steps(model: llama.Model, sampling: Sampling) -> None:
    assert answers(model, sampling, goes_ahead=True) == answers(model, sampling, goes_ahead=False)


def test_hardly_any_step_of_a_plain_answer_is_planned(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead.Teller, "behind", False)  # a step of this model may take less than telling of one
    planned = planned_steps(engine, monkeypatch)
    engine.submit("plain", range(40, 60), 100)
    engine.run(goes_ahead=True)
    assert len(planned) <= 4
    assert engine.loop.stats().steps == 100
    deltas = [event for event in engine.events["plain"] if isinstance(event, TextDelta)]
    assert sum(delta.tokens for delta in deltas) == 100


@pytest.mark.parametrize("asked", [{"stop": ("nothing",)}, {"logprobs": 0}])
def test_what_is_looked_at_between_steps_is_planned(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, asked: dict[str, object]
) -> None:
    planned = planned_steps(engine, monkeypatch)
    engine.submit("looked at", range(40, 60), 30, **asked)
    engine.run(goes_ahead=True)
    assert len(planned) == 30


def test_a_step_is_told_while_the_next_is_computed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Telling waits for the next batch to begin here: on the loop's own thread it would wait for ever."""
    computing, emit = threading.Event(), engine.loop._emitter._emit
    waited: list[bool] = []

    def emit_late(step: Step) -> None:
        if threading.current_thread().name == "tell":
            waited.append(computing.wait(10))
            computing.clear()
        emit(step)

    decode = engine.context.decode

    def decode_seen(rows: Sequence[Row]) -> DecodeStatus:
        computing.set()
        time.sleep(0.002)
        return decode(rows)

    monkeypatch.setattr(engine.loop._emitter, "_emit", emit_late)
    monkeypatch.setattr(engine.context, "decode", decode_seen)
    engine.submit("one", range(40, 60), 20)
    engine.run(goes_ahead=True)
    assert len(waited) > 10
    assert all(waited)


def test_a_cancelled_answer_ends_within_a_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_after: list[int] = []
    decode, cancelled = engine.context.decode, threading.Event()

    def decode_counted(rows: Sequence[Row]) -> DecodeStatus:
        if cancelled.is_set():
            steps_after.append(1)
        if len(sequence.generated) >= 30 and not cancelled.is_set():
            engine.loop.cancel("one")
            cancelled.set()
        return decode(rows)

    sequence = engine.submit("one", range(40, 60), 100)
    monkeypatch.setattr(engine.context, "decode", decode_counted)
    engine.run(goes_ahead=True)
    assert isinstance(end := engine.end("one"), Finished)
    assert end.reason == "cancelled"
    assert len(steps_after) <= 1


def test_an_arrival_ends_the_steps_ahead(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    decode = engine.context.decode

    def decode_seen(rows: Sequence[Row]) -> DecodeStatus:
        widths.append(len(rows))
        if len(widths) == 20:
            engine.submit("second", range(70, 90), 10)
        return decode(rows)

    first = engine.submit("first", range(40, 60), 100)
    monkeypatch.setattr(engine.context, "decode", decode_seen)
    engine.run(goes_ahead=True)
    events = [event for event in engine.events["second"] if isinstance(event, TextDelta)]
    assert sum(event.tokens for event in events) == 10
    assert len(first.generated) == 100
    assert max(widths[20:22]) >= 10  # its prompt is begun at once


def test_an_unusable_distribution_ends_one_answer_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    good = engine.submit("good", range(40, 60), 60)
    bad = engine.submit("bad", range(70, 90), 60)
    usable = engine.context.usable

    def broken(row: int) -> bool:
        return usable(row) and not (row == 1 and len(bad.generated) >= 20)

    monkeypatch.setattr(engine.context, "usable", broken)
    engine.run(goes_ahead=True)
    assert isinstance(engine.end("bad"), Failed)
    assert isinstance(engine.end("good"), Finished)
    assert len(good.generated) == 60


def test_a_batch_that_finds_no_room_is_planned_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead.Teller, "behind", False)  # the 25th batch is one of the steps ahead
    sequence = engine.submit("one", range(40, 60), 60)
    decode, called = engine.context.decode, []

    def full(rows: Sequence[Row]) -> DecodeStatus:
        called.append(1)
        return DecodeStatus.NO_SLOT if len(called) == 25 else decode(rows)

    monkeypatch.setattr(engine.context, "decode", full)
    engine.run(goes_ahead=True)
    assert len(called) == 61
    assert len(sequence.generated) == 60


def test_a_fatal_batch_ends_the_process(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = engine.submit("one", range(40, 60), 60)
    decode = engine.context.decode
    monkeypatch.setattr(
        engine.context, "decode", lambda rows: DecodeStatus.FATAL if len(sequence.generated) >= 20 else decode(rows)
    )
    with pytest.raises(EngineBroken):
        engine.run(goes_ahead=True)


def test_what_goes_wrong_in_telling_is_not_lost(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = engine.submit("one", range(40, 60), 60)
    take = engine.loop._emitter.take

    def wrong(*facts: object) -> object:
        if len(sequence.generated) >= 20:
            raise ZeroDivisionError
        return take(*facts)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.loop._emitter, "take", wrong)
    with pytest.raises(ZeroDivisionError):
        engine.run(goes_ahead=True)


def test_tokens_are_told_soon_after_they_were_drawn(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that computes faster than is told."""
    behind: list[int] = []
    decode, take = engine.context.decode, engine.loop._emitter.take
    drawn = 0

    def decode_counted(rows: Sequence[Row]) -> DecodeStatus:
        nonlocal drawn
        drawn += 1
        behind.append(drawn - len(sequence.generated))
        return decode(rows)

    def slow(*facts: object) -> object:
        time.sleep(0.005)
        return take(*facts)  # type: ignore[arg-type]

    sequence = engine.submit("one", range(40, 60), 60)
    monkeypatch.setattr(engine.context, "decode", decode_counted)
    monkeypatch.setattr(engine.loop._emitter, "take", slow)
    engine.run(goes_ahead=True)
    assert len(sequence.generated) == 60
    assert 2 < max(behind) < 10
