"""The front's side of an engine: the only way to reach one.

`EngineHandle` owns the engine process: it starts it, routes its events to the requests in flight, notices when it dies
or hangs, answers those requests with a structured error, and starts another with back-off. All of it runs on one event
loop; nothing is locked.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from msgspec.structs import replace

from ocserve.config import Images
from ocserve.engine import wire
from ocserve.engine.connection import Connection
from ocserve.engine.flights import Events, Flight, Turn, Turns, unfinished
from ocserve.engine.process import WORKER, Spare, spawn
from ocserve.engine.quarantine import Mark, Quarantine
from ocserve.errors import ApiError, EngineCrashed, EngineUnavailable, PayloadTooLarge
from ocserve.generation import Answer, Failed, Finished, GenerateEvent, GenerateRequest, Question, Started

_LONGEST_STEP_S = 120.0  # a single step that takes longer is a hang, even on a slow machine
_LONGEST_PREPARATION_S = 30.0  # rendering and tokenising one request, not the time behind others
_BACKOFF_FIRST_S, _BACKOFF_LAST_S = 0.25, 30.0


class Engine(Protocol):
    """What the service asks of an engine. `EngineHandle` is the real one; tests script another."""

    @property
    def ready(self) -> bool:
        """Whether the model is loaded and has been warmed up."""

    @property
    def taking(self) -> bool:
        """Whether a request that comes now may count on it: it is ready, or restarts and has not for long."""

    @property
    def facts(self) -> wire.EngineFacts | None:
        """What the engine said of itself when it was last started; None before the first time."""

    @property
    def stats(self) -> wire.EngineStats:
        """The engine's counters, at most about a second old."""

    @property
    def restarts(self) -> int:
        """How often the engine process was replaced since the server started."""

    @property
    def pid(self) -> int | None:
        """The engine's process id while there is one."""

    async def prepare(self, request: GenerateRequest) -> wire.Prepared:
        """Render and tokenise; raises `ApiError` for a request that can't run. Waits for a restarting engine.

        The prompts of one request have ids that differ after a dot only.
        """

    async def ask(self, question: Question) -> Answer:
        """Answer a question; raises `ApiError` for one that has no answer. Waits for a restarting engine."""

    def start(self, request_id: str) -> AsyncIterator[GenerateEvent]:
        """Queue a prepared request; its events: `Started`, each choice's deltas and `Finished`, or a last `Failed`."""

    def cancel(self, request_id: str) -> None:
        """Forget the request in whatever phase; unknown ids are ignored. Each started choice ends with `Finished`."""

    def fail_all(self, error: ApiError) -> None:
        """End every request in flight with `error` and cancel it in the engine."""


class LoadError(Exception):
    """The model could not be loaded; the text is for the operator."""


@dataclass(frozen=True, slots=True)
class Supervision:
    """The supervisor's limits, seconds. `on_event` is told of life-cycle facts by name (for the log)."""

    heartbeat_timeout_s: float = 10.0
    load_timeout_s: float = 600.0
    restart_wait_s: float = 30.0
    on_event: Callable[..., None] = lambda name, **facts: None


class EngineHandle:
    """Keeps one engine process running and speaks to it."""

    def __init__(
        self,
        spec: wire.EngineSpec,
        environment: Mapping[str, str],
        supervision: Supervision | None = None,
        argv: tuple[str, ...] = WORKER,
        spare: Spare | None = None,
    ) -> None:
        """`spare`: a process that was started with this environment, for the first load."""
        self._spec = spec
        self._environment = environment
        self._limits = supervision or Supervision()
        self._argv = argv
        self._spare = spare
        self._connection: Connection | None = None
        self._facts: wire.EngineFacts | None = None
        self._stats = wire.EngineStats()
        self._flights: dict[str, Flight] = {}
        self._quarantine = Quarantine()
        self._turns = Turns(self._flights, self._quarantine)
        self._ready = asyncio.Event()
        self._restarts = 0
        self._died: float | None = None  # since when a restart has been awaited, if one is
        self._victims = False  # whether those in flight at the coming crash are known not to be its cause
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        return self._ready.is_set()

    @property
    def taking(self) -> bool:
        waited = None if self._died is None else time.monotonic() - self._died
        return self.ready or (waited is not None and waited < self._limits.restart_wait_s)

    @property
    def facts(self) -> wire.EngineFacts | None:
        return self._facts

    @property
    def stats(self) -> wire.EngineStats:
        return self._stats

    @property
    def restarts(self) -> int:
        return self._restarts

    @property
    def pid(self) -> int | None:
        return self._connection.process.pid if self._connection else None

    # --- life -------------------------------------------------------------------------------------------------------

    async def open(self) -> wire.EngineFacts:
        """Start the engine and wait until it is warm; raises `LoadError` if the first load fails."""
        connection, facts = await self._launch()
        self._supervisor = asyncio.create_task(self._supervise(connection), name="engine-supervisor")
        return facts

    async def close(self) -> None:
        """End the engine process; nothing is left behind, and `open` may start another."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
            self._supervisor = None
        if self._connection is not None:
            await self._connection.end()
            self._connection = None
        self._ready.clear()
        self._died = None
        self._stats = wire.EngineStats()

    def obey(self, images: Images) -> None:
        """Have requests held to these limits of images from now on, and by every later process."""
        if images == self._spec.images:
            return
        self._spec = replace(self._spec, images=images)
        if self.ready and self._connection is not None and not self._connection.writer.is_closing():
            self._connection.send(wire.Obey(images=images))

    async def _launch(self) -> tuple[Connection, wire.EngineFacts]:
        spare = self._spare.take() if self._spare is not None else None
        process, ours = spare or await spawn(self._argv, self._environment)
        reader, writer = await asyncio.open_connection(sock=ours)
        connection = Connection(process, reader, writer)
        tail = asyncio.create_task(connection.keep_stderr_tail(), name="engine-stderr")
        tail.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._connection = connection
        connection.send(wire.Load(spec=self._spec))
        try:
            first = await asyncio.wait_for(anext(connection.messages, None), self._limits.load_timeout_s)
        except TimeoutError:
            await connection.kill()
            raise LoadError(f"the model did not load within {self._limits.load_timeout_s:.0f} s") from None
        match first:
            case wire.Ready(facts=facts):
                self._facts = facts
                self._stats = wire.EngineStats(
                    steps_by_sequences=(0,) * (facts.parallel + 1), cells_total=facts.pool_tokens
                )
                self._died = None
                self._ready.set()
                return connection, facts
            case wire.LoadFailed(error=error):
                await connection.end()
                raise LoadError(error.message)
            case _:
                status = await connection.kill()
                raise LoadError(f"the engine process ended while loading (status {status}) {connection.last_words()}")

    async def _supervise(self, connection: Connection) -> None:
        """Run engines one after another for ever."""
        backoff_s = 0.0
        while True:
            reason = await self._run(connection)
            self._died = time.monotonic()
            self._ready.clear()
            status = await connection.kill()
            connection.writer.close()
            self._crashed()
            self._restarts += 1
            self._limits.on_event(
                "engine_died", level="error", status=status, reason=reason, detail=connection.last_words()
            )
            backoff_s = 0.0 if connection.completed else min(_BACKOFF_LAST_S, max(_BACKOFF_FIRST_S, 2 * backoff_s))
            connection, backoff_s = await self._relaunch(backoff_s)

    async def _relaunch(self, backoff_s: float) -> tuple[Connection, float]:
        """Start engines until one becomes ready."""
        while True:
            await asyncio.sleep(backoff_s)
            try:
                connection, facts = await self._launch()
            except (LoadError, OSError) as error:
                backoff_s = min(_BACKOFF_LAST_S, max(_BACKOFF_FIRST_S, 2 * backoff_s))
                reason = str(error) if isinstance(error, LoadError) else type(error).__name__
                self._limits.on_event("engine_load_failed", level="error", reason=reason, retry_s=backoff_s)
                continue
            self._limits.on_event("engine_restarted", load_s=round(facts.load_s, 2))
            return connection, backoff_s

    async def _run(self, connection: Connection) -> str:
        """Serve until the engine dies or hangs; returns which."""
        dispatch = asyncio.create_task(self._dispatch(connection), name="engine-dispatch")
        watch = asyncio.create_task(self._watch(connection), name="engine-watch")
        try:
            done, _ = await asyncio.wait((dispatch, watch), return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            dispatch.cancel()
            watch.cancel()

    async def _watch(self, connection: Connection) -> str:
        """Returns when the engine has not been heard for too long."""
        limit = self._limits.heartbeat_timeout_s
        while True:
            silent = time.monotonic() - connection.last_heard
            if silent >= limit:
                return "no heartbeat"
            due = time.monotonic() + limit - silent
            await asyncio.sleep(limit - silent)
            if time.monotonic() - due > limit / 2:
                # It was this process that stood still (suspended, stopped): the heartbeats are waiting to be read.
                connection.last_heard = time.monotonic()

    async def _dispatch(self, connection: Connection) -> str:
        try:
            async for message in connection.messages:
                match message:
                    case wire.Step(events=events):
                        for request_id, event in events:
                            self._deliver(connection, request_id, event)
                    case wire.Prepared() | wire.Told() | wire.Refused():
                        self._answer(connection, message)
                    case wire.Heartbeat(stats=stats, step_age_s=age):
                        self._stats = stats
                        if age > _LONGEST_STEP_S:
                            return "a step did not end"
                        if message.prepare_age_s > _LONGEST_PREPARATION_S:
                            self._blame(message.preparing)
                            return "a prompt could not be prepared in time"
                    case wire.Ready() | wire.LoadFailed():
                        return "an unexpected message"
        except wire.FrameError:
            return "a broken frame"
        return "the process ended"

    # --- requests ---------------------------------------------------------------------------------------------------

    async def prepare(self, request: GenerateRequest) -> wire.Prepared:
        prepared = await self._reply(wire.Prepare(request=request), request, request.choices)
        assert isinstance(prepared, wire.Prepared)
        return prepared

    async def ask(self, question: Question) -> Answer:
        told = await self._reply(wire.Ask(question=question), question, 0)
        assert isinstance(told, wire.Told)
        return told.answer

    async def _reply(
        self, message: wire.Prepare | wire.Ask, work: GenerateRequest | Question, choices: int
    ) -> wire.Prepared | wire.Told:
        turn = self._turns.come(self._quarantine.mark(work), _request(work.request_id))
        try:
            connection = await self._let_in(turn)
            _tell(connection, message)
            flight = self._turns.flight(turn, asyncio.get_running_loop().create_future(), choices)
            self._flights[work.request_id] = flight
        finally:
            self._turns.leave(turn)
        try:
            return await flight.reply
        except BaseException:
            self.cancel(work.request_id)
            raise

    async def _let_in(self, turn: Turn) -> Connection:
        """The engine, once it is ready and it is this one's turn."""
        try:
            async with asyncio.timeout(self._limits.restart_wait_s):
                while True:
                    self._quarantine.check(turn.mark)
                    if not self._ready.is_set():
                        await self._ready.wait()
                    elif delay_s := self._turns.delay(turn):
                        await self._turns.change(delay_s)
                    else:
                        break
        except TimeoutError:
            if not self._ready.is_set():
                raise EngineUnavailable(
                    "The engine is restarting and was not ready in time.", retry_after_s=self._limits.restart_wait_s
                ) from None
            if self._quarantine.suspicion(turn.mark):
                raise EngineUnavailable(
                    "The engine stopped while this request and others were in it. They run one after another now, to "
                    "find out which of them stopped it, and this one's turn did not come in time.",
                    retry_after_s=self._turns.expected_s,
                ) from None
        assert self._connection is not None
        return self._connection

    def start(self, request_id: str) -> AsyncIterator[GenerateEvent]:
        flight = self._flights.get(request_id)
        if flight is None or self._connection is None:
            flight = Flight("", Mark(b"", b""), asyncio.get_running_loop().create_future(), choices=1, unfinished=1)
            flight.events.put_nowait(Failed(error=_crash_error().info))
        else:
            flight.started = True
            self._connection.send(wire.Start(request_id=request_id))
        return Events(flight)

    def cancel(self, request_id: str) -> None:
        flight = self._flights.get(request_id)
        if flight is None:
            return
        if flight.answered and not flight.started:
            self._land(request_id)
        if self._connection is not None and not self._connection.writer.is_closing():
            self._connection.send(wire.Cancel(request_id=request_id))

    def fail_all(self, error: ApiError) -> None:
        for request_id, flight in list(self._flights.items()):
            self.cancel(request_id)
            self._land(request_id)
            self._fail(flight, error)

    def _land(self, *request_ids: str) -> list[Flight]:
        """Those of these that were in flight, and are no more; whoever waits for a turn looks again."""
        landed = [self._flights.pop(request_id) for request_id in request_ids if request_id in self._flights]
        self._turns.changed()
        return landed

    def _deliver(self, connection: Connection, request_id: str, event: GenerateEvent) -> None:
        flight = self._flights.get(request_id)
        if flight is None:
            return
        flight.events.put_nowait(event)
        if not isinstance(event, Started):
            self._turns.generates(flight)
        flight.unfinished = unfinished(flight.unfinished, event)
        if not flight.unfinished:
            self._land(request_id)
            if isinstance(event, Finished) and event.reason != "cancelled":
                self._completed(connection, flight)

    def _answer(self, connection: Connection, message: wire.Prepared | wire.Told | wire.Refused) -> None:
        flight = self._flights.get(message.request_id)
        if flight is None:
            return
        flight.answered = True
        abandoned = flight.reply.done()
        if abandoned or not isinstance(message, wire.Prepared):
            self._land(message.request_id)
        if isinstance(message, wire.Told):
            self._completed(connection, flight)
        if abandoned:
            if isinstance(message, wire.Prepared):  # who left cannot say so any more: it would wait for ever
                connection.send(wire.Cancel(request_id=message.request_id))
            return
        if isinstance(message, wire.Refused):
            flight.reply.set_exception(ApiError.from_info(message.error))
        else:
            flight.reply.set_result(message)

    def _completed(self, connection: Connection, flight: Flight) -> None:
        """Its work ran to its end: neither the engine nor the work is suspect."""
        connection.completed += 1
        self._quarantine.completed(flight.mark)

    def _blame(self, request_id: str | None) -> None:
        """One request is known to be the cause: it fails and is remembered, the others are only victims."""
        for flight in self._land(*([] if request_id is None else [request_id])):
            self._quarantine.crashed([flight.mark], tried=[flight.mark])
            self._fail(flight, EngineCrashed("The prompt could not be prepared in time."))
        self._victims = True

    def _crashed(self) -> None:
        """Answer everything that was in flight, and remember it unless the cause is known."""
        if not self._victims:
            self._turns.crashed()
        self._victims = False
        for flight in self._land(*self._flights):
            self._fail(flight, _crash_error())

    @staticmethod
    def _fail(flight: Flight, error: ApiError) -> None:
        if not flight.reply.done():
            flight.reply.set_exception(error)
        else:
            flight.events.put_nowait(Failed(error=error.info))


def _tell(connection: Connection, message: wire.FrontMessage) -> None:
    try:
        connection.send(message)
    except wire.FrameError:
        raise PayloadTooLarge(
            f"The request with its images exceeds the {wire.MAX_FRAME_BYTES} bytes that an engine can be told."
        ) from None


def _crash_error() -> EngineCrashed:
    return EngineCrashed("The engine stopped while it worked on this request. It is being restarted; please retry.")


def _request(prompt_id: str) -> str:
    """The request that a prompt is of: what stands before the dot in its id, if it is one of several."""
    return prompt_id.partition(".")[0]
