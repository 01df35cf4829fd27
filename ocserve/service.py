"""The life of one generation, top to bottom, whatever the dialect.

    admit (limits, queue) → load the model if need be → prepare (engine: template, tokens) → reserve tokens → start →
    stream → settle

Every refusal happens before `Service.generation` yields, so the HTTP layer can still answer with a real status. The one
`finally` frees the slot, settles the limiter and completes the trace, however the request ended.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import accumulate
from typing import TypeVar

from msgspec.structs import replace

from ocserve import config
from ocserve.accounts.billing import Bill, Billing
from ocserve.accounts.crowd import Room
from ocserve.accounts.keys import Caller
from ocserve.accounts.limits import Lease, Limiter
from ocserve.accounts.offer import Offer
from ocserve.engine.desk import Describe, Desk
from ocserve.engine.fleet import Fleet
from ocserve.engine.flights import numbered, unfinished
from ocserve.engine.handle import Engine
from ocserve.engine.sizes import check_chances, image_count, least_tokens, queued_bytes
from ocserve.engine.wire import Prepared
from ocserve.errors import ApiError, EngineUnavailable, InternalError, Overloaded
from ocserve.generation import (
    Answer,
    ChatPrompt,
    EncodeRequest,
    Failed,
    GenerateEvent,
    GenerateRequest,
    Question,
    ScoreRequest,
    Started,
)
from ocserve.modelcard import ServedModel
from ocserve.trace import Trace

# How long a cancelled generation may take to report its exact usage: it needs one decode step.
_CANCEL_WAIT_S = 2.0

Fetch = Callable[[ChatPrompt, str], Awaitable[ChatPrompt]]
Prompted = TypeVar("Prompted", GenerateRequest, EncodeRequest)


class Generation:
    """An admitted request that holds its slot: iterate for its events, up to the last `Finished` or to a `Failed`.

    The answers to several prompts are generated together and told one after the other, their choices numbered on.
    """

    def __init__(
        self,
        trace: Trace,
        requests: Sequence[GenerateRequest],
        streams: Sequence[AsyncIterator[GenerateEvent]],
        ignored: tuple[str, ...],
    ) -> None:
        self.ignored = ignored  # fields of the request that this model has no use for
        self._unfinished = [request.choices for request in requests]
        self._first = [0, *accumulate(self._unfinished)]  # the number of each prompt's first choice
        self._trace = trace
        self._streams = streams
        self._wanted = True

    @property
    def ended(self) -> bool:
        """Whether every choice has ended, well or not."""
        return not any(self._unfinished)

    async def __aiter__(self) -> AsyncIterator[GenerateEvent]:
        for prompt, stream in enumerate(self._streams):
            while self._unfinished[prompt]:
                event = await anext(stream)
                left = self._unfinished[prompt] = unfinished(self._unfinished[prompt], event)
                if isinstance(event, Failed):
                    self._unfinished = [0 for _ in self._unfinished]
                told = numbered(event, self._first[prompt])
                self._trace.observe(told, prompt, self._first[prompt])
                if not left and self.ended and self._wanted:
                    await self._trace.settle()
                yield told

    async def cancelled(self) -> None:
        """Read on to the end of a cancelled generation, so that its usage is exact; nobody is told of it."""
        self._wanted = False
        async for _ in self:
            pass


class Service:
    """The models served and the way to have them generate. The first of `models` is the default."""

    def __init__(
        self,
        fleet: Fleet,
        models: Mapping[str, Describe],
        limiter: Limiter,
        limits: config.Limits,
        fetch: Fetch | None = None,
        billing: Billing | None = None,
    ) -> None:
        """`fetch` gets the images of a prompt that it names by their addresses only, for a key's id."""
        self.billing = billing or Billing()
        self.limiter = limiter
        self.fleet = fleet
        self._fetch = fetch
        self.limits = limits
        self._desks = {name: Desk(fleet.engines[name], describe, limits.queue) for name, describe in models.items()}
        self._default = next(iter(models))
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """Every model served, loaded or not, the default first."""
        return tuple(self.billing.priced(desk.model) for desk in self._desks.values())

    @property
    def ready(self) -> bool:
        """Whether a request for the default model that arrives now would be taken, and no drain has begun.

        False until that model has been loaded once; its unloading for want of requests does not change it.
        """
        return not self._draining and self.billing.ready and self.fleet.can_serve(self._default)

    @property
    def engine(self) -> Engine:
        """The default model's engine, for its facts and counters."""
        return self.fleet.engines[self._default]

    @property
    def active(self) -> int:
        """Requests that have been admitted and have not been settled."""
        return self._active

    def owed(self, name: str) -> int:
        """Answers of one model that are being generated or waited for."""
        return self._desks[name].owed

    def open_to(self, caller: Caller) -> Offer:
        """The models that a caller may use."""
        return Offer(caller, tuple(self.billing.priced(desk.model, caller.price) for desk in self._desks.values()))

    @asynccontextmanager
    async def generation(
        self,
        request: GenerateRequest,
        caller: Caller,
        trace: Trace,
        *,
        attempt: int | None = None,
        more: tuple[GenerateRequest, ...] = (),
    ) -> AsyncIterator[Generation]:
        """Admit `request` and yield it once it holds a slot; leaving the block settles it, whatever happened.

        `attempt` is how often the client says it has tried before, None if it does not say. `more` are further prompts
        for the same model: with `request` they are one request to the limiter, admitted together or not at all.
        """
        desk = self._desk(request.model, trace)
        choices = sum(each.choices for each in (request, *more))
        desk.check_size(choices, "prompt" if more else "n")
        trace.bill = self._bill(trace, caller)
        lease = self._admit(caller, desk, attempt)
        async with self._admitted(lease, trace):
            # The engine's id is ours: clients choose theirs, and two of them may choose the same.
            name = secrets.token_hex(12)
            stamped = [
                replace(each, request_id=f"{name}.{index}", salt=caller.salt)
                for index, each in enumerate((request, *more))
            ]
            stamped = [await self._fetched(each, caller) for each in stamped]
            spare = self._spare(caller)
            lease.enter(Room(request.model, desk.most_owed, desk.returning, spare, choices), caller.key_id)
            share = desk.shares.share(caller.key_id, choices, desk.most_slots(spare), request.deadline_s)
            with desk.place(choices, sum(queued_bytes(each.prompt) for each in stamped)):
                async with share, self.fleet.lease(request.model) as engine:
                    generation = await _start(engine, stamped, lease, trace)
                    begun = time.monotonic()
                    try:
                        yield generation
                    finally:
                        if more or not generation.ended:  # one prompt's failure ends the others
                            _cancel(engine, stamped)
                        if not generation.ended:
                            with suppress(TimeoutError):
                                await asyncio.wait_for(generation.cancelled(), _CANCEL_WAIT_S)
                        desk.learn(time.monotonic() - begun)

    async def ask(self, question: Question, caller: Caller, trace: Trace, *, attempt: int | None = None) -> Answer:
        """Have a model answer `question`, loading it if need be; raises `ApiError`, also when its deadline has passed.

        What only tokenises has a queue of its own and takes no tokens of the caller's limits. `attempt` is as in
        `generation`.
        """
        desk = self._desk(question.model, trace)
        question = replace(question, salt=caller.salt)
        if isinstance(question, EncodeRequest):
            lease = self._admit(caller, desk, attempt)
            return await self._asked(desk, question, caller, lease, trace)
        trace.bill = self._bill(trace, caller)
        lease = self._admit(caller, desk, attempt)
        lease.enter(Room(question.model, desk.most_owed, desk.returning, self._spare(caller)), caller.key_id)
        lease.reserve(least_tokens(question), "documents" if isinstance(question, ScoreRequest) else "input")
        begun = time.monotonic()
        try:
            return await self._asked(desk, question, caller, lease, trace)
        finally:
            desk.learn(time.monotonic() - begun)

    async def _asked(self, desk: Desk, question: Question, caller: Caller, lease: Lease, trace: Trace) -> Answer:
        """The answer to an admitted question."""
        async with self._admitted(lease, trace):
            try:
                async with asyncio.timeout(question.deadline_s):
                    if isinstance(question, EncodeRequest):
                        question = await self._fetched(question, caller)
                        place = desk.encoding(queued_bytes(question.prompt))
                    else:
                        place = desk.place()
                    with place:
                        async with self.fleet.lease(question.model) as engine:
                            if trace.bill:
                                trace.bill.open()
                            answer = await engine.ask(replace(question, request_id=secrets.token_hex(12)))
            except TimeoutError:
                raise Overloaded("The request waited as long as it was allowed to run.") from None
            trace.told(answer)
        return answer

    @asynccontextmanager
    async def _admitted(self, lease: Lease, trace: Trace) -> AsyncIterator[None]:
        """Count a request among the active ones, and settle it however it ends."""
        self._active += 1
        self._idle.clear()
        try:
            yield
        except Exception as error:  # whatever it is, who settles must know that the request failed
            failed = error.code if isinstance(error, ApiError) else InternalError.code
            trace.error_code = trace.error_code or failed
            raise
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()
            lease.settle(trace.usage.total_tokens)
            await trace.settle()

    async def _fetched(self, request: Prompted, caller: Caller) -> Prompted:
        """The request with its images; raises `InvalidRequest`, and `Overloaded` where too many are fetched."""
        if self._fetch is None or not isinstance(request.prompt, ChatPrompt):
            return request
        return replace(request, prompt=await self._fetch(request.prompt, caller.key_id))

    def _desk(self, name: str, trace: Trace) -> Desk:
        """The desk of a model that is asked for something."""
        if self._draining:
            raise _shutting_down()
        trace.model = name
        return self._desks[name]

    def _bill(self, trace: Trace, caller: Caller) -> Bill:
        assert trace.model is not None
        return self.billing.admit(trace.request_id, caller.key_id, trace.model, trace.route, caller.price)

    def _admit(self, caller: Caller, desk: Desk, attempt: int | None) -> Lease:
        return self.limiter.admit(caller.key_id, retry=attempt, own=caller.limits, model=desk.model.id)

    def _spare(self, caller: Caller) -> int:
        """Slots of each model that no key alone may fill."""
        return int(caller.among_others) if self.limits.spare_slots is None else self.limits.spare_slots

    async def drain(self, deadline_s: float) -> None:
        """Take nothing more; let what was accepted finish. At the deadline the rest ends with an error event."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), deadline_s)
        except TimeoutError:
            self.fleet.refuse_waiting(_shutting_down())
            for desk in self._desks.values():
                desk.shares.refuse_waiting(_shutting_down())
                desk.engine.fail_all(_shutting_down())
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), 1.0)


async def _start(engine: Engine, requests: Sequence[GenerateRequest], lease: Lease, trace: Trace) -> Generation:
    """Prepare, reserve, start and wait for the first slot. Any failure leaves nothing behind in the engine."""
    try:
        prepared = [await _prepared(engine, requests, index) for index in range(len(requests))]
        check_chances(requests, prepared)
        lease.reserve(
            sum(
                found.prompt_tokens + request.choices * found.max_tokens
                for found, request in zip(prepared, requests, strict=True)
            )
        )
        if trace.bill:
            trace.bill.open(sum(image_count(request.prompt) for request in requests))
        streams = [engine.start(request.request_id) for request in requests]
        first = await anext(streams[0])
    except BaseException:
        _cancel(engine, requests)
        raise
    trace.observe(first)
    if isinstance(first, Failed):
        _cancel(engine, requests[1:])
        raise ApiError.from_info(first.error)
    assert isinstance(first, Started)
    return Generation(
        trace, requests, streams, tuple(dict.fromkeys(name for found in prepared for name in found.ignored))
    )


async def _prepared(engine: Engine, requests: Sequence[GenerateRequest], index: int) -> Prepared:
    """One of the prompts prepared; what is refused of one of several is named with its place among them."""
    try:
        return await engine.prepare(requests[index])
    except ApiError as error:
        if len(requests) > 1 and error.param and error.param.startswith("prompt"):
            error.param = f"prompt[{index}]{error.param.removeprefix('prompt')}"
        raise


def _cancel(engine: Engine, requests: Sequence[GenerateRequest]) -> None:
    for request in requests:
        engine.cancel(request.request_id)


def _shutting_down() -> EngineUnavailable:
    return EngineUnavailable("The server is shutting down.", code="shutting_down", retry_after_s=5.0)
