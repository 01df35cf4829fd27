"""The life of one generation, top to bottom, whatever the dialect.

    admit (limits, queue) → prepare (engine: template, tokens) → reserve tokens → start → stream → settle

Every refusal happens before `Service.generation` yields, so the HTTP layer can still answer with a real status. The one
`finally` frees the slot, settles the limiter and completes the trace, however the request ended.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from msgspec.structs import replace

from ocserve import config
from ocserve.accounts.keys import Caller
from ocserve.accounts.limits import Lease, Limiter
from ocserve.engine.handle import Engine
from ocserve.errors import ApiError, EngineUnavailable, ModelNotFound, Overloaded
from ocserve.generation import (
    Failed,
    Finished,
    GenerateEvent,
    GenerateRequest,
    RequestRecord,
    Started,
    TextDelta,
    Usage,
)
from ocserve.modelcard import ServedModel

# How long a cancelled generation may take to report its exact usage. It needs one decode step; a hung engine is the
# supervisor's business.
_CANCEL_WAIT_S = 2.0
_FIRST_GUESS_S = 1.0  # of a generation's duration while none has ended
_LONGEST_RETRY_S = 119.0  # the usual SDKs give up when told to wait more than 120 s


class Trace:
    """What is learnt of one HTTP request while it lives; `record` makes the immutable summary at its end."""

    def __init__(self, request_id: str, route: str) -> None:
        self.request_id = request_id
        self.route = route
        self.key_id = "-"
        self.model: str | None = None
        self.stream = False
        self.usage = Usage()
        self.finish_reason: str | None = None
        self.error_code: str | None = None
        self.queue_ms: float | None = None
        self.ttft_ms: float | None = None
        self._arrived = time.monotonic()

    def elapsed_ms(self) -> float:
        """Milliseconds since the request arrived."""
        return (time.monotonic() - self._arrived) * 1000

    def observe(self, event: GenerateEvent) -> None:
        """Take from an event what the summary needs."""
        match event:
            case Started(prompt_tokens=prompt, cached_tokens=cached):
                self.queue_ms = self.elapsed_ms()
                self.usage = Usage(prompt_tokens=prompt, cached_tokens=cached)
            case TextDelta(tokens=tokens):
                if self.ttft_ms is None:
                    self.ttft_ms = self.elapsed_ms()
                # What was delivered counts even if the engine never gets to say its own total.
                self.usage = replace(self.usage, completion_tokens=self.usage.completion_tokens + tokens)
            case Finished(reason=reason, usage=usage):
                self.finish_reason, self.usage = reason, usage
            case Failed(error=error, usage=usage):
                self.finish_reason, self.error_code = "error", error.code
                if usage.prompt_tokens:  # else the engine died and could not say what it had used
                    self.usage = usage

    def record(self, status: int) -> RequestRecord:
        """The summary; `status` is the HTTP status that was sent."""
        return RequestRecord(
            request_id=self.request_id,
            route=self.route,
            key_id=self.key_id,
            model=self.model,
            status=status,
            stream=self.stream,
            usage=self.usage,
            finish_reason=self.finish_reason,
            error_code=self.error_code,
            queue_ms=self.queue_ms,
            ttft_ms=self.ttft_ms,
            total_ms=self.elapsed_ms(),
        )


class Generation:
    """An admitted generation that holds its slot: iterate for its events, up to `Finished` or `Failed`."""

    def __init__(
        self, trace: Trace, started: Started, events: AsyncIterator[GenerateEvent], ignored: tuple[str, ...]
    ) -> None:
        self.started = started
        self.ignored = ignored  # fields of the request that this model has no use for
        self.ended = False
        self._trace = trace
        self._events = events

    async def __aiter__(self) -> AsyncIterator[GenerateEvent]:
        async for event in self._events:
            self.ended = isinstance(event, Finished | Failed)
            self._trace.observe(event)
            yield event
            if self.ended:
                return

    async def cancelled(self) -> None:
        """Read on to the end of a cancelled generation, so that its usage is exact."""
        async for _ in self:
            pass


class Service:
    """The models served and the way to have them generate."""

    def __init__(
        self, engine: Engine, models: tuple[ServedModel, ...], limiter: Limiter, limits: config.Limits
    ) -> None:
        self.models = models
        self.limiter = limiter
        self._engine = engine
        self._queue_limit = limits.queue
        self._running: set[asyncio.Task[object]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._typical_s: float | None = None  # moving average of a generation's time in its slot
        self._promised = 0.0  # the last moment that an overloaded client was told, so that the next one is told a later

    @property
    def ready(self) -> bool:
        """Whether a request that arrives now would be taken: the engine is warm and no drain has begun."""
        return self._engine.ready and not self._draining

    @property
    def engine(self) -> Engine:
        """The engine, for its facts and counters."""
        return self._engine

    @property
    def active(self) -> int:
        """Generations that have been admitted and have not been settled."""
        return len(self._running)

    def model(self, name: str) -> ServedModel:
        """The model that answers to `name`; raises `ModelNotFound`."""
        for model in self.models:
            if model.answers_to(name):
                return model
        raise ModelNotFound(
            "The model named in the request does not exist here. GET /v1/models lists what is served; "
            f"`{self.models[0].id}` and `default` always work.",
            param="model",
        )

    @asynccontextmanager
    async def generation(
        self, request: GenerateRequest, caller: Caller, trace: Trace, *, attempt: int | None = None
    ) -> AsyncIterator[Generation]:
        """Admit `request` and yield it once it holds a slot; leaving the block settles it, whatever happened.

        `attempt` is how often the client says it has tried before, None if it does not say.
        """
        if self._draining:
            raise EngineUnavailable("The server is shutting down.", code="shutting_down", retry_after_s=5.0)
        task = asyncio.current_task()
        assert task is not None
        trace.model = request.model
        self._check_queue()
        lease = self.limiter.admit(caller.key_id, retry=attempt)
        self._enter(task)
        try:
            # The engine's id is ours: clients choose theirs, and two of them may choose the same.
            stamped = replace(request, request_id=secrets.token_hex(12), salt=caller.salt)
            generation = await self._start(stamped, lease, trace)
            begun = time.monotonic()
            try:
                yield generation
            finally:
                if not generation.ended:
                    self._engine.cancel(stamped.request_id)
                    with suppress(TimeoutError):
                        await asyncio.wait_for(generation.cancelled(), _CANCEL_WAIT_S)
                self._learn(time.monotonic() - begun)
        finally:
            self._leave(task)
            lease.settle(trace.usage.total_tokens)

    async def _start(self, request: GenerateRequest, lease: Lease, trace: Trace) -> Generation:
        """Prepare, reserve, start and wait for the slot. Any failure leaves nothing behind in the engine."""
        try:
            prepared = await self._engine.prepare(request)
            lease.reserve(prepared.prompt_tokens + prepared.max_tokens)
            events = self._engine.start(request.request_id)
            first = await anext(events)
        except BaseException:
            self._engine.cancel(request.request_id)
            raise
        trace.observe(first)
        if isinstance(first, Failed):
            raise ApiError.from_info(first.error)
        assert isinstance(first, Started)
        return Generation(trace, first, events, prepared.ignored)

    def _check_queue(self) -> None:
        """Refuse early instead of queueing without bound, each client with a moment of its own to come back."""
        slots = max(model.parallel for model in self.models)
        waiting = len(self._running) - slots
        if waiting < self._queue_limit:
            return
        turn_s = (self._typical_s or _FIRST_GUESS_S) / slots
        now = time.monotonic()
        self._promised = max(now + (waiting + 1) * turn_s, self._promised + turn_s)
        raise Overloaded(
            f"{waiting} requests are already waiting for {slots} slots.",
            retry_after_s=min(self._promised - now, _LONGEST_RETRY_S),
        )

    def _learn(self, seconds: float) -> None:
        """A generation held its slot for `seconds`."""
        self._typical_s = seconds if self._typical_s is None else self._typical_s + 0.1 * (seconds - self._typical_s)

    def _enter(self, task: asyncio.Task[object]) -> None:
        self._running.add(task)
        self._idle.clear()

    def _leave(self, task: asyncio.Task[object]) -> None:
        self._running.discard(task)
        if not self._running:
            self._idle.set()

    async def drain(self, deadline_s: float) -> None:
        """Take nothing more; let what was accepted finish. At the deadline the rest ends with an error event."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), deadline_s)
        except TimeoutError:
            self._engine.fail_all(
                EngineUnavailable("The server is shutting down.", code="shutting_down", retry_after_s=5.0)
            )
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), 1.0)
