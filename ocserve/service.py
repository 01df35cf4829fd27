"""The life of one generation, top to bottom, whatever the dialect.

    admit (limits, queue) → load the model if need be → prepare (engine: template, tokens) → reserve tokens → have the
    prompt judged (where there is a content policy) → start → stream, or hold until it is judged → settle

Every refusal happens before `Service.generation` yields, so the HTTP layer can still answer with a real status. The one
`finally` frees the slot, settles the limiter and completes the trace, however the request ended.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from msgspec.structs import replace

from ocserve import config
from ocserve.accounts.billing import Bill, Billing
from ocserve.accounts.crowd import Room
from ocserve.accounts.keys import Caller, KeyRing
from ocserve.accounts.limits import Lease, Limiter
from ocserve.accounts.line import UNKNOWN, Attempt
from ocserve.accounts.offer import Offer
from ocserve.doors import Doors, drained, shutting_down
from ocserve.engine.desk import Describe, Desk
from ocserve.engine.fleet import Fleet
from ocserve.engine.handle import Engine, LoadError
from ocserve.engine.residency import Phase
from ocserve.engine.sizes import check_chances, image_count, most_tokens, queued_bytes
from ocserve.engine.wire import Prepared
from ocserve.errors import ApiError, Conflict, EngineUnavailable, InternalError, ModelNotFound, Overloaded
from ocserve.generation import (
    Answer,
    ChatPrompt,
    EmbedRequest,
    Encoded,
    EncodeRequest,
    Failed,
    GenerateRequest,
    Question,
    ScoreRequest,
    Started,
)
from ocserve.modelcard import ServedModel
from ocserve.policy.hearing import Hearing
from ocserve.policy.judge import Judge
from ocserve.policy.protocol import Asker
from ocserve.telling import Generation
from ocserve.trace import Trace

# How long a cancelled generation may take to report its exact usage: it needs one decode step.
_CANCEL_WAIT_S = 2.0

Fetch = Callable[[ChatPrompt, str], Awaitable[ChatPrompt]]
Prompted = TypeVar("Prompted", GenerateRequest, EncodeRequest)


async def _as_it_was() -> None:
    """For a server whose models never change."""


class Service:
    """The models served and the way to have them generate. The first of `models` is the default, and stays."""

    def __init__(
        self,
        fleet: Fleet,
        models: Mapping[str, Describe],
        limiter: Limiter,
        limits: config.Limits,
        fetch: Fetch | None = None,
        billing: Billing | None = None,
        doors: Doors | None = None,
        look: Callable[[], Awaitable[None]] = _as_it_was,
        judge: Judge | None = None,
        keys: KeyRing | None = None,
    ) -> None:
        """`fetch` gets the images of a prompt that it names by their addresses only, for a key's id.

        `look` notices which models have come or gone, and has them offered.
        """
        self.judge = judge
        self.billing = billing or Billing()
        self.keys = keys or KeyRing(None, config.Auth())
        self.limiter = limiter
        self.fleet = fleet
        self._fetch = fetch
        self.limits = limits
        self.doors = doors or Doors()
        self.started = time.time()
        self.look = look
        self._desks: dict[str, Desk] = {}
        self.offer(models)
        self._default = next(iter(models))
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def offer(self, models: Mapping[str, Describe]) -> None:
        """Serve these models from now on; the fleet has them. What is asked of others already goes on."""
        desks = {}
        for name, describe in models.items():
            engine, desk = self.fleet.engines[name], self._desks.get(name)
            if desk is None or desk.engine is not engine:
                desk = Desk(engine, describe, self.limits.queue)
            desk.describe(describe)
            desks[name] = desk
        self._desks = desks

    def limit(self, limits: config.Limits) -> None:
        """Go by other limits from now on."""
        self.limits = limits
        self.limiter.reset(limits)
        for desk in self._desks.values():
            desk.queue_limit = limits.queue

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """Every model served, loaded or not, the default first."""
        return tuple(self.billing.priced(desk.model) for desk in self._desks.values())

    @property
    def ready(self) -> bool:
        """Whether a request for the default model that arrives now would be taken, and no drain has begun.

        False until that model has been loaded once; its unloading for want of requests does not change it.
        """
        return self.doors.open and self.billing.ready and self.keys.ready and self.fleet.can_serve(self._default)

    @property
    def engine(self) -> Engine:
        """The default model's engine, for its facts and counters."""
        return self.fleet.engines[self._default]

    @property
    def active(self) -> int:
        """Requests that have been admitted and have not been settled."""
        return self._active

    @property
    def default(self) -> str:
        """The id of the default model."""
        return self._default

    def state(self, name: str) -> str:
        """Where a model is: `cold`, `loading`, `ready` or `unloading`."""
        return self.fleet.phase(name).value if name in self.fleet.engines else Phase.COLD.value

    async def load(self, name: str) -> None:
        """Load a model now, for an administrator: a failure says why. Raises `ApiError`."""
        if name not in self._desks:
            raise ModelNotFound("The model has just been removed.", param="model")
        try:
            await self.fleet.open(name)
        except LoadError as error:
            raise EngineUnavailable(f"The model could not be loaded: {error}", code="model_load_failed") from None

    async def unload(self, name: str, wait_s: float) -> None:
        """Unload a model; raises `Conflict` where it is still used, or loads, after `wait_s` seconds."""
        if not await self.fleet.unload(name, wait_s):
            raise Conflict(
                "Requests use the model at present, or it is being loaded.", param="model", code="model_busy"
            )

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
        attempt: Attempt = UNKNOWN,
        more: tuple[GenerateRequest, ...] = (),
    ) -> AsyncIterator[Generation]:
        """Admit `request` and yield it once it holds a slot; leaving the block settles it, whatever happened.

        `attempt` is what the client tells of earlier tries. `more` are further prompts for the same model: with
        `request` they are one request to the limiter, admitted together or not at all.
        """
        desk = self._desk(request.model, trace)
        choices = sum(each.choices for each in (request, *more))
        desk.check_size(choices, "prompt" if more else "n")
        trace.bill = await self._bill(trace, caller)
        lease = self._admit(caller, desk, attempt)
        async with self._admitted(lease, caller, trace):
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
                    generation = await _start(engine, stamped, lease, trace, self._hearing(engine, trace))
                    begun = time.monotonic()
                    try:
                        yield generation
                    finally:
                        if choices > 1 or not generation.ended:  # one answer's failure ends the others
                            _cancel(engine, stamped)
                        if not generation.ended:
                            with suppress(TimeoutError):
                                await asyncio.wait_for(generation.cancelled(), _CANCEL_WAIT_S)
                        desk.learn(time.monotonic() - begun)

    async def ask(self, question: Question, caller: Caller, trace: Trace, *, attempt: Attempt = UNKNOWN) -> Answer:
        """Have a model answer `question`, loading it if need be; raises `ApiError`, also when its deadline has passed.

        What only tokenises has a queue of its own and takes no tokens of the caller's limits. `attempt` is as in
        `generation`.
        """
        desk = self._desk(question.model, trace)
        question = replace(question, salt=caller.salt)
        if isinstance(question, EncodeRequest):
            lease = self._admit(caller, desk, attempt)
            return await self._asked(desk, question, caller, lease, trace)
        trace.bill = await self._bill(trace, caller)
        lease = self._admit(caller, desk, attempt)
        lease.enter(Room(question.model, desk.most_owed, desk.returning, self._spare(caller)), caller.key_id)
        begun = time.monotonic()
        try:
            return await self._asked(desk, question, caller, lease, trace)
        finally:
            desk.learn(time.monotonic() - begun)

    async def _asked(self, desk: Desk, question: Question, caller: Caller, lease: Lease, trace: Trace) -> Answer:
        """The answer to an admitted question."""
        async with self._admitted(lease, caller, trace):
            try:
                async with asyncio.timeout(question.deadline_s):
                    if isinstance(question, EncodeRequest):
                        question = await self._fetched(question, caller)
                        place = desk.encoding(queued_bytes(question.prompt))
                    else:
                        place = desk.place()
                    with place:
                        async with self.fleet.lease(question.model) as engine:
                            if lease.by_token and not isinstance(question, EncodeRequest):
                                await _reserve(engine, question, lease, desk.model.context_length)
                            hearing = self._hearing(engine, trace)
                            if hearing and not isinstance(question, EncodeRequest):
                                await hearing.inputs(question)
                            if trace.bill and not isinstance(question, EncodeRequest):
                                with lease.given_back_unless_paid():
                                    await trace.bill.open(most_tokens(question, desk.model.context_length))
                            answer = await engine.ask(replace(question, request_id=secrets.token_hex(12)))
            except TimeoutError:
                raise Overloaded("The request waited as long as it was allowed to run.") from None
            trace.told(answer)
        return answer

    @asynccontextmanager
    async def _admitted(self, lease: Lease, caller: Caller, trace: Trace) -> AsyncIterator[None]:
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
            served = lease.settle(trace.usage.total_tokens)
            if served and lease.by_day and not (trace.bill and trace.bill.opened):
                assert trace.model is not None
                self.billing.count(caller.key_id, trace.model)  # its limits count it, though nothing is charged
            await trace.settle()

    async def _fetched(self, request: Prompted, caller: Caller) -> Prompted:
        """The request with its images; raises `InvalidRequest`, and `Overloaded` where too many are fetched."""
        if self._fetch is None or not isinstance(request.prompt, ChatPrompt):
            return request
        return replace(request, prompt=await self._fetch(request.prompt, caller.key_id))

    def _desk(self, name: str, trace: Trace) -> Desk:
        """The desk of a model that is asked for something."""
        self.doors.check()
        if (desk := self._desks.get(name)) is None:
            raise ModelNotFound("The model named in the request has just been removed.", param="model")
        trace.model = name
        return desk

    async def _bill(self, trace: Trace, caller: Caller) -> Bill:
        assert trace.model is not None
        bill = await self.billing.admit(
            trace.request_id, caller.key_id, trace.model, trace.route, caller.price, caller.account
        )
        self.doors.check()  # they may have been closed meanwhile
        return bill

    def _admit(self, caller: Caller, desk: Desk, attempt: Attempt) -> Lease:
        return self.limiter.admit(
            caller.key_id, retry=attempt.number, own=caller.limits, model=desk.model.id, body=attempt.body
        )

    def _spare(self, caller: Caller) -> int:
        """Slots of each model that no key alone may fill."""
        return int(caller.among_others) if self.limits.spare_slots is None else self.limits.spare_slots

    async def stop(self, deadline_s: float) -> None:
        """Take nothing more, for good, and let what was accepted finish as `drain` does."""
        self.doors.stop()
        await self.drain(deadline_s)
        self.fleet.refuse_waiting(shutting_down())  # of administrators, who are no requests

    def _hearing(self, engine: Engine, trace: Trace) -> Hearing | None:
        """A request before the judge, if there is one."""
        if self.judge is None or trace.model is None:
            return None
        return Hearing(self.judge, Asker(trace.request_id, trace.key_id, trace.model), engine.ask)

    async def drain(self, deadline_s: float) -> None:
        """Take nothing more; let what was accepted finish. At the deadline the rest ends with an error event.

        If the doors are opened again before, or another drain is begun, nothing is ended.
        """
        number = self.doors.drain()
        try:
            await asyncio.wait_for(self._idle.wait(), deadline_s)
        except TimeoutError:
            if not self.doors.drained_by(number):
                return
            why = shutting_down if self.doors.stopping else drained
            self.fleet.refuse_waiting(why())
            if self.judge:
                self.judge.refuse_waiting(why())
            for desk in self._desks.values():
                desk.shares.refuse_waiting(why())
            for engine in self.fleet.engines.values():  # those that are to go have requests too
                engine.fail_all(why())
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), 1.0)


async def _start(
    engine: Engine, requests: Sequence[GenerateRequest], lease: Lease, trace: Trace, hearing: Hearing | None
) -> Generation:
    """Prepare, reserve, judge, start and wait for the first slot. A failure leaves nothing behind in the engine."""
    try:
        prepared = [await _prepared(engine, requests, index) for index in range(len(requests))]
        check_chances(requests, prepared)
        prompt_tokens = sum(found.prompt_tokens for found in prepared)
        completion_tokens = sum(
            request.choices * found.max_tokens for found, request in zip(prepared, requests, strict=True)
        )
        lease.reserve(prompt_tokens + completion_tokens)
        if hearing:
            await hearing.prompts([request.prompt for request in requests])
        if trace.bill:
            images = sum(image_count(request.prompt) for request in requests)
            choices = sum(request.choices for request in requests)
            with lease.given_back_unless_paid():
                await trace.bill.open(prompt_tokens, completion_tokens, choices=choices, images=images)
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
    ignored = tuple(dict.fromkeys(name for found in prepared for name in found.ignored))
    choices = sum(request.choices for request in requests)
    review = None if hearing is None else hearing.review(choices, streamed=trace.stream)
    return Generation(trace, requests, streams, ignored, review)


async def _reserve(engine: Engine, question: EmbedRequest | ScoreRequest, lease: Lease, context: int) -> None:
    """Hold the tokens of a question before it is judged or computed; raises what `Lease.reserve` and the engine raise.

    By the bytes of its texts it may be six times as much as is there, or as may ever be, and still fit: then its tokens
    are counted, which costs a second tokenising and no computing. Where the most is there, it is held instead.
    """
    tokens = most_tokens(question, context)
    if not lease.has_room(tokens):
        answer = await engine.ask(replace(question, request_id=secrets.token_hex(12), count_only=True))
        assert not isinstance(answer, Encoded)
        tokens = sum(answer.tokens)
    lease.reserve(tokens, "documents" if isinstance(question, ScoreRequest) else "input")


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
