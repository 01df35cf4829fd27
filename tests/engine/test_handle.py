"""The front's side of an engine, against a real process that speaks the real wire from a script."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from msgspec.structs import replace

from ocserve.engine import flights, wire
from ocserve.engine import handle as handle_module
from ocserve.engine.connection import Connection
from ocserve.engine.handle import EngineHandle, LoadError, Supervision
from ocserve.engine.process import Spare
from ocserve.engine.quarantine import Mark
from ocserve.engine.wire import EngineFacts, EngineSpec
from ocserve.errors import (
    ApiError,
    EngineCrashed,
    EngineUnavailable,
    InvalidRequest,
    PayloadTooLarge,
    RequestQuarantined,
)
from ocserve.generation import (
    Encoded,
    EncodeRequest,
    Failed,
    Finished,
    GenerateEvent,
    GenerateRequest,
    Sampling,
    Started,
    TextDelta,
    TextPrompt,
)
from tests.scripted import SCRIPT, SPEC


@asynccontextmanager
async def handle(
    heartbeat_timeout_s: float = 5.0,
    told: list[str] | None = None,
    path: str = "scripted",
    restart_wait_s: float = 20.0,
) -> AsyncIterator[EngineHandle]:
    events = told if told is not None else []
    engine = EngineHandle(
        EngineSpec(**{name: getattr(SPEC, name) for name in SPEC.__struct_fields__} | {"path": path}),
        dict(os.environ),
        Supervision(
            heartbeat_timeout_s=heartbeat_timeout_s,
            restart_wait_s=restart_wait_s,
            on_event=lambda name, **facts: events.append(name),
        ),
        argv=SCRIPT,
    )
    await engine.open()
    try:
        yield engine
    finally:
        await engine.close()


_count = 0


def request(text: str) -> GenerateRequest:
    global _count
    _count += 1
    return GenerateRequest(
        request_id=f"req_{_count}", model="m", prompt=TextPrompt(text=text), sampling=Sampling(), max_tokens=500
    )


async def run(engine: EngineHandle, asked: GenerateRequest) -> list[GenerateEvent]:
    """All events; an error while preparing counts as one, since a busy machine may not have come further."""
    try:
        await engine.prepare(asked)
    except RequestQuarantined:
        raise
    except ApiError as error:
        return [Failed(error=error.info)]
    return [event async for event in engine.start(asked.request_id)]


async def test_a_generation_arrives_in_order() -> None:
    async with handle() as engine:
        events = await run(engine, request("emit 5"))
    assert isinstance(events[0], Started)
    assert [type(event) for event in events[1:-1]] == [TextDelta] * 5
    assert isinstance(events[-1], Finished)
    assert events[-1].usage.completion_tokens == 5


async def test_a_spare_process_is_the_first_engine_and_no_other() -> None:
    spare = await Spare.start(dict(os.environ), SCRIPT)
    engine = EngineHandle(SPEC, dict(os.environ), argv=SCRIPT, spare=spare)
    first = psutil.Process().children()
    await engine.open()
    try:
        assert [child.pid for child in first] == [engine.pid]
        await spare.close()  # it is the handle's now
        assert first[0].is_running()
        os.kill(first[0].pid, signal.SIGKILL)
        while engine.restarts == 0 or not engine.ready:
            await asyncio.sleep(0.01)
        assert engine.pid != first[0].pid
    finally:
        await engine.close()


async def test_a_spare_process_that_died_fails_the_load_and_not_the_next() -> None:
    spare = await Spare.start(dict(os.environ), (sys.executable, "-c", "import no_such_module"))
    engine = EngineHandle(SPEC, dict(os.environ), argv=SCRIPT, spare=spare)
    with pytest.raises(LoadError, match="ended while loading"):
        await engine.open()
    await engine.open()
    await engine.close()


async def test_a_spare_process_that_nobody_took_is_ended() -> None:
    spare = await Spare.start(dict(os.environ), SCRIPT)
    (child,) = psutil.Process().children()
    await spare.close()
    assert not child.is_running()


async def test_a_generation_ends_when_every_choice_has() -> None:
    async with handle() as engine:
        asked = replace(request("emit 3"), choices=3)
        events = await run(engine, asked)
        assert [event.index for event in events if isinstance(event, Finished)] == [0, 1, 2]
        assert sum(isinstance(event, TextDelta) for event in events) == 9
        assert not engine._flights


async def test_cancel_ends_every_choice() -> None:
    async with handle() as engine:
        asked = replace(request("emit 100000"), choices=2)
        await engine.prepare(asked)
        events = engine.start(asked.request_id)
        await anext(events)
        engine.cancel(asked.request_id)
        ends = [event for event in [event async for event in events] if isinstance(event, Finished)]
        assert [(event.index, event.reason) for event in ends] == [(0, "cancelled"), (1, "cancelled")]


async def test_a_crash_ends_all_choices_with_one_error() -> None:
    async with handle() as engine:
        events = await run(engine, replace(request("emit 2 crash"), choices=3))
        assert [type(event) for event in events if isinstance(event, Finished | Failed)] == [Failed]


async def test_a_refusal_is_raised_and_leaves_nothing() -> None:
    async with handle() as engine:
        with pytest.raises(ApiError) as refusal:
            await engine.prepare(request("refuse"))
        assert (refusal.value.status, refusal.value.param) == (400, "prompt")
        assert not engine._flights


async def test_a_failed_load_says_why() -> None:
    with pytest.raises(LoadError, match="no such model"):
        async with handle(path="load-fails"):
            pass


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
async def test_every_stream_in_flight_ends_with_a_structured_error_when_the_engine_dies(number: int) -> None:
    async with handle() as engine:
        streams = [asyncio.create_task(run(engine, request(f"emit 100000 {index}"))) for index in range(16)]
        await asyncio.sleep(0.2)
        assert engine.pid is not None
        os.kill(engine.pid, number)
        killed = time.monotonic()
        for events in await asyncio.gather(*streams):
            assert isinstance(events[-1], Failed)
            assert events[-1].error.code == "engine_crashed"
        assert time.monotonic() - killed < 2
        assert isinstance((await run(engine, request("emit 3")))[-1], Finished)
        assert engine.restarts == 1


async def test_a_stopped_engine_is_noticed_by_its_missing_heartbeat_and_replaced() -> None:
    told: list[str] = []
    async with handle(heartbeat_timeout_s=1.0, told=told) as engine:
        stream = asyncio.create_task(run(engine, request("emit 100000")))
        await asyncio.sleep(0.2)
        assert engine.pid is not None
        stopped = engine.pid
        os.kill(stopped, signal.SIGSTOP)
        begun = time.monotonic()
        assert isinstance((await stream)[-1], Failed)
        assert time.monotonic() - begun < 2.5
        assert isinstance((await run(engine, request("emit 3")))[-1], Finished)
        assert not psutil.pid_exists(stopped)
    assert told[:2] == ["engine_died", "engine_restarted"]


async def test_a_request_that_arrives_while_the_engine_restarts_waits_and_succeeds() -> None:
    async with handle() as engine:
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        while engine.ready:
            await asyncio.sleep(0.01)
        assert engine.taking
        assert isinstance((await run(engine, request("emit 1")))[-1], Finished)


async def test_an_engine_whose_restart_takes_long_takes_nothing_until_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with handle(restart_wait_s=0.2) as engine:
        launch = engine._launch

        async def slow() -> tuple[Connection, EngineFacts]:
            await asyncio.sleep(1)
            return await launch()

        monkeypatch.setattr(engine, "_launch", slow)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        while engine.taking:
            await asyncio.sleep(0.01)
        assert not engine.ready
        with pytest.raises(EngineUnavailable, match="not ready in time"):
            await engine.prepare(request("emit 1"))
        while not engine.ready:
            await asyncio.sleep(0.05)
        assert engine.taking


async def test_a_poison_request_crashes_the_engine_twice_and_is_then_refused() -> None:
    async with handle() as engine:
        for _ in range(2):
            assert isinstance((await run(engine, request("emit 2 crash")))[-1], Failed)
        with pytest.raises(RequestQuarantined):
            await engine.prepare(request("emit 2 crash"))
        assert engine.restarts == 2
        assert isinstance((await run(engine, request("emit 2")))[-1], Finished)


async def test_a_crash_while_preparing_is_a_structured_error_too() -> None:
    async with handle() as engine:
        with pytest.raises(EngineCrashed):
            await engine.prepare(request("crash-in-prepare"))


async def test_a_bystander_of_two_crashes_that_completes_in_between_is_not_refused() -> None:
    async with handle() as engine:
        for _ in range(2):
            bystander = asyncio.create_task(run(engine, request("emit 300")))
            await asyncio.sleep(0.05)
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGSEGV)
            assert isinstance((await bystander)[-1], Failed)
            assert isinstance((await run(engine, request("emit 300")))[-1], Finished)


async def persistent(engine: EngineHandle, text: str, salt: bytes = b"one") -> int:
    """Ask as a client that tries again after a crash; the number of attempts."""
    for attempt in range(1, 10):
        if isinstance((await run(engine, replace(request(text), salt=salt)))[-1], Finished):
            return attempt
        await asyncio.sleep(0.05)
    raise AssertionError("it never succeeded")


async def test_a_poison_is_named_at_its_second_crash_and_its_bystanders_all_succeed() -> None:
    """All of them come again together: whoever was there at the first crash would be there at the second."""
    async with handle() as engine:
        others = [
            asyncio.create_task(persistent(engine, f"emit 150 {number}", salt))
            for salt in (b"one", b"two")
            for number in range(4)
        ]
        await asyncio.sleep(0.05)
        with pytest.raises(RequestQuarantined):
            await persistent(engine, "emit 50 crash")
        attempts = await asyncio.gather(*others)
        assert max(attempts) > 1
        assert engine.restarts == 2
        other = replace(request("emit 50 crash"), salt=b"two")  # the same, of a key that has not sent it yet
        assert isinstance((await run(engine, other))[-1], Failed)


def suspect(engine: EngineHandle, *texts: str) -> None:
    """As a crash under all of these would leave them."""
    engine._quarantine.crashed([engine._quarantine.mark(request(text)) for text in texts])


async def in_flight(engine: EngineHandle) -> str:
    """The id of what is in the engine, once something is."""
    while not engine._flights:
        await asyncio.sleep(0.01)
    return next(iter(engine._flights))


async def nothing_in_flight(engine: EngineHandle) -> None:
    deadline = time.monotonic() + 10
    while engine._flights:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_suspects_come_one_at_a_time_and_do_not_wait_for_each_others_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flights, "_FRESH_WAIT_S", 60.0)
    monkeypatch.setattr(flights, "_SETTLING_S", 60.0)
    texts = [f"emit 100000 {index}" for index in range(3)]
    async with handle() as engine:
        suspect(engine, *texts)
        trials = [asyncio.create_task(run(engine, request(text))) for text in texts]
        await in_flight(engine)
        assert len(engine._flights) == 1
        async with asyncio.timeout(30):  # it waits for the trials, not longer
            assert isinstance((await run(engine, request("emit 5")))[-1], Finished)
        came = [flight.begun for flight in engine._flights.values()]
        assert len(came) == 3
        assert all(later - earlier >= flights.TRIAL_S for earlier, later in itertools.pairwise(came))
        assert {flight.mark for flight in engine._flights.values()} == {
            engine._quarantine.mark(request(text)) for text in texts
        }
        engine.fail_all(InvalidRequest("enough"))
        await asyncio.gather(*trials)


async def test_work_that_is_no_suspect_waits_for_trials_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flights, "_FRESH_WAIT_S", 0.2)
    monkeypatch.setattr(flights, "TRIAL_S", 60.0)
    async with handle() as engine:
        suspect(engine, "emit 100000")
        trial = asyncio.create_task(run(engine, request("emit 100000")))
        await in_flight(engine)
        begun = time.monotonic()
        assert isinstance((await run(engine, request("emit 5")))[-1], Finished)
        assert 0.2 <= time.monotonic() - begun < 30
        engine.fail_all(InvalidRequest("enough"))
        await trial


async def test_a_poison_that_is_worded_anew_condemns_nobody() -> None:
    async with handle() as engine:
        for number in range(3):
            bystander = asyncio.create_task(run(engine, request("emit 300 every 0.01")))
            await in_flight(engine)
            poison = request(f"emit {number + 2} crash")
            assert isinstance((await run(engine, poison))[-1], Failed)
            assert isinstance((await bystander)[-1], Failed)
            assert engine._quarantine.suspicion(engine._quarantine.mark(poison))
        engine._quarantine.check(engine._quarantine.mark(request("emit 300 every 0.01")))


@pytest.mark.parametrize("asks", [False, True])
async def test_what_is_left_while_it_is_prepared_is_suspected_of_what_it_does(asks: bool) -> None:
    async with handle() as engine:
        for number in range(2):
            work = engine.ask(question("slow-crash")) if asks else engine.prepare(request("slow-crash-in-prepare"))
            poison = asyncio.create_task(work)
            await in_flight(engine)
            poison.cancel()
            while engine.restarts == number or not engine.ready:
                await asyncio.sleep(0.01)
        with pytest.raises(RequestQuarantined):
            await (engine.ask(question("slow-crash")) if asks else engine.prepare(request("slow-crash-in-prepare")))


async def test_what_is_left_while_it_is_prepared_is_in_flight_until_it_is_prepared() -> None:
    async with handle() as engine:
        left = asyncio.create_task(engine.prepare(request("slow-prepare")))
        await in_flight(engine)
        left.cancel()
        await asyncio.wait([left])
        assert engine._flights
        await nothing_in_flight(engine)
        assert not engine._turns._queue


async def test_the_engine_forgets_what_was_left_in_the_moment_of_its_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits is cancelled first and runs later: meanwhile the reply may come."""
    async with handle() as engine:
        asked = request("slow-prepare")
        left = asyncio.create_task(engine.prepare(asked))
        await in_flight(engine)
        assert engine._connection is not None
        sent: list[wire.FrontMessage] = []
        monkeypatch.setattr(engine._connection, "send", sent.append)
        left.cancel()
        engine._answer(engine._connection, wire.Prepared(request_id=asked.request_id, prompt_tokens=1, max_tokens=1))
        await asyncio.wait([left])
        assert sent == [wire.Cancel(request_id=asked.request_id)]
        assert not engine._flights


async def test_a_reply_to_what_was_left_leaves_nothing_and_disturbs_nobody() -> None:
    async with handle() as engine:
        stream = asyncio.create_task(run(engine, request("emit 100000")))
        name = await in_flight(engine)
        for work in (engine.prepare(request("slow-prepare")), engine.ask(question("never"))):
            left = asyncio.create_task(work)
            while len(engine._flights) < 2:
                await asyncio.sleep(0.01)
            left.cancel()
            await asyncio.wait([left])
            async with asyncio.timeout(10):
                while list(engine._flights) != [name]:
                    await asyncio.sleep(0.01)
            assert isinstance((await run(engine, request("emit 3")))[-1], Finished)
        engine.cancel(name)
        assert isinstance((await stream)[-1], Finished)
        failed = asyncio.create_task(engine.prepare(request("slow-prepare")))
        await in_flight(engine)
        engine.fail_all(InvalidRequest("enough"))
        with pytest.raises(InvalidRequest, match="enough"):
            await failed
        later = request("slow-prepare")
        await asyncio.wait_for(engine.prepare(later), 20)  # the reply to the failed one came before this
        engine.cancel(later.request_id)
        assert engine.restarts == 0
        assert engine._supervisor is not None
        assert not engine._supervisor.done()
        assert not engine._flights


async def test_a_suspect_that_has_to_be_alone_waits_for_an_empty_engine_and_keeps_nobody_waiting() -> None:
    async with handle() as engine:
        mark = engine._quarantine.mark(request("emit 20"))
        for _ in range(2):
            engine._quarantine.crashed([mark, Mark(b"", b"")], tried=[mark])
        long = asyncio.create_task(run(engine, request("emit 100000")))
        name = await in_flight(engine)
        alone = asyncio.create_task(run(engine, request("emit 20")))
        assert isinstance((await run(engine, request("emit 5")))[-1], Finished)
        assert list(engine._flights) == [name]
        engine.cancel(name)
        assert isinstance((await alone)[-1], Finished)
        await long


async def test_the_prompts_of_one_request_do_not_wait_for_each_other() -> None:
    async with handle() as engine:

        async def both(name: str) -> list[list[GenerateEvent]]:
            parts = [replace(request(f"emit 100 {index}"), request_id=f"{name}.{index}") for index in range(2)]
            for part in parts:
                await engine.prepare(part)
            return [[event async for event in engine.start(part.request_id)] for part in parts]

        first = asyncio.create_task(both("a"))
        while not any(flight.started for flight in engine._flights.values()):
            await asyncio.sleep(0.01)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        assert all(isinstance(events[-1], Failed) for events in await first)
        assert all(isinstance(events[-1], Finished) for events in await asyncio.wait_for(both("b"), 10))


async def test_a_suspect_whose_turn_does_not_come_is_told_when_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flights, "TRIAL_S", 60.0)
    monkeypatch.setattr(flights, "LONGEST_TRIAL_S", 60.0)
    monkeypatch.setattr(flights, "_SETTLING_S", 60.0)
    async with handle(restart_wait_s=0.5) as engine:
        suspect(engine, "emit 100000", "emit 50000")
        long = asyncio.create_task(run(engine, request("emit 100000")))
        await in_flight(engine)
        with pytest.raises(EngineUnavailable, match="one after another") as told:
            await engine.prepare(request("emit 50000"))
        assert told.value.retry_after_s == pytest.approx(60 + 2 * 60.0)
        engine.fail_all(InvalidRequest("enough"))
        await long


async def test_cancel_ends_a_stream_and_forgets_a_prepared_request() -> None:
    async with handle() as engine:
        asked = request("emit 100000")
        await engine.prepare(asked)
        events = engine.start(asked.request_id)
        await anext(events)
        engine.cancel(asked.request_id)
        *_, last = [event async for event in events]
        assert isinstance(last, Finished)
        assert last.reason == "cancelled"
        waiting = request("emit 1")
        await engine.prepare(waiting)
        engine.cancel(waiting.request_id)
        assert not engine._flights


async def test_fail_all_ends_every_request_with_the_given_error() -> None:
    async with handle() as engine:
        streams = [asyncio.create_task(run(engine, request(f"emit 100000 {index}"))) for index in range(4)]
        await asyncio.sleep(0.1)
        engine.fail_all(InvalidRequest("enough"))
        assert {events[-1].error.message for events in await asyncio.gather(*streams)} == {"enough"}


async def test_closing_leaves_no_process() -> None:
    async with handle() as engine:
        pid = engine.pid
    assert pid is not None
    assert not psutil.pid_exists(pid)


def test_an_engine_ends_when_its_front_is_killed(tmp_path: Path) -> None:
    """No orphan, even when the front dies without a chance to clean up."""
    front = tmp_path / "front.py"
    front.write_text(
        "import asyncio, os, sys\n"
        "from ocserve.engine.handle import EngineHandle\n"
        "from tests.scripted import SCRIPT, SPEC\n"
        "async def main():\n"
        "    engine = EngineHandle(SPEC, dict(os.environ), argv=SCRIPT)\n"
        "    await engine.open()\n"
        "    print(engine.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    import subprocess

    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(front)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the engine outlived its front"
        time.sleep(0.02)


async def test_a_cancelled_wait_loses_no_event_and_the_usage_is_exact() -> None:
    """A client that leaves cancels the task that waits for the next event; the events after it must still be read."""
    async with handle() as engine:
        asked = request("emit 100000")
        await engine.prepare(asked)
        events = engine.start(asked.request_id)
        seen = 0

        async def consume() -> None:
            nonlocal seen
            async for event in events:
                seen += isinstance(event, TextDelta)

        consumer = asyncio.create_task(consume())
        await asyncio.sleep(0.2)
        consumer.cancel()
        await asyncio.wait([consumer])
        engine.cancel(asked.request_id)
        rest = [event async for event in events]
        assert isinstance(rest[-1], Finished)
        assert rest[-1].reason == "cancelled"
        assert rest[-1].usage.completion_tokens >= seen > 10


async def test_many_slow_preparations_are_not_a_hang() -> None:
    async with handle() as engine:
        asked = [request(f"slow-prepare {index}") for index in range(10)]
        await asyncio.gather(*(engine.prepare(each) for each in asked))
        assert engine.restarts == 0


async def test_one_stuck_preparation_is_blamed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle_module, "_LONGEST_PREPARATION_S", 0.5)
    async with handle() as engine:
        for _ in range(2):
            bystander = asyncio.create_task(run(engine, request("emit 100000")))
            await in_flight(engine)
            with pytest.raises(EngineCrashed, match="could not be prepared"):
                await engine.prepare(request("stuck-in-prepare"))
            assert isinstance((await bystander)[-1], Failed)
        with pytest.raises(RequestQuarantined):
            await engine.prepare(request("stuck-in-prepare"))
        await engine.prepare(request("emit 100000"))  # the bystander's work was there both times and is not refused


def question(text: str) -> EncodeRequest:
    return EncodeRequest(request_id=f"q_{text}", model="m", prompt=TextPrompt(text=text))


async def test_questions_are_answered_beside_generations() -> None:
    async with handle() as engine:
        generation = asyncio.create_task(run(engine, request("emit 50")))
        answer = await engine.ask(question("how many words"))
        assert isinstance(answer, Encoded)
        assert len(answer.tokens) == 3
        with pytest.raises(ApiError) as refusal:
            await engine.ask(question("refuse"))
        assert refusal.value.param == "prompt"
        assert isinstance((await generation)[-1], Finished)


async def test_a_question_that_kills_the_engine_is_answered_and_remembered() -> None:
    async with handle() as engine:
        for _ in range(2):
            with pytest.raises(EngineCrashed):
                await engine.ask(question("crash"))
        with pytest.raises(RequestQuarantined):
            await engine.ask(question("crash"))
        assert isinstance(await engine.ask(question("fine")), Encoded)


async def test_a_question_that_nobody_waits_for_any_more_is_forgotten() -> None:
    async with handle() as engine:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.ask(question("never")), 0.2)
        await nothing_in_flight(engine)


async def test_what_no_message_can_hold_is_too_large_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async with handle() as engine:
        monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 10_000)
        with pytest.raises(PayloadTooLarge) as caught:
            await engine.prepare(request("a " * 10_000))
        assert caught.value.status == 413
        assert (await engine.prepare(request("a b"))).prompt_tokens
        assert engine.restarts == 0
