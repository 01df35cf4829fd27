"""An engine that plays a script: what it emits, how fast and how it fails is written in the test.

It counts steps as the real loop does, so a test can say how many were computed after a client had gone.
"""

from __future__ import annotations

import asyncio
import itertools
import struct
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from msgspec.structs import replace

from ocserve import config
from ocserve.accounts.billing import Billing
from ocserve.accounts.keys import KeyRing
from ocserve.accounts.limits import Limiter
from ocserve.accounts.past import NO_PAST, Past
from ocserve.engine.fleet import Fleet, LoadableEngine
from ocserve.engine.handle import LoadError
from ocserve.engine.residency import Memory, Rules
from ocserve.engine.wire import EngineFacts, EngineSpec, EngineStats, Prepared
from ocserve.errors import ApiError, ContextLengthExceeded, EngineCrashed, ErrorInfo
from ocserve.generation import (
    Answer,
    ChatPrompt,
    Embedded,
    EmbedRequest,
    Encoded,
    EncodeRequest,
    Failed,
    FillPrompt,
    Finished,
    FinishReason,
    GenerateEvent,
    GenerateRequest,
    PromptLogprobs,
    Question,
    ReasoningDelta,
    Scored,
    ScoreRequest,
    Started,
    TextDelta,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
    ToolCallDelta,
    Usage,
)
from ocserve.modelcard import ServedModel
from ocserve.policy.judge import Judge
from ocserve.service import Service

# A scripted engine as a process behind the real handle.
SCRIPT = (sys.executable, str(Path(__file__).with_name("engine") / "scripted_worker.py"))
SPEC = EngineSpec(
    path="scripted",
    context=1000,
    parallel=8,
    pool_tokens=8000,
    gpu_layers=0,
    require_gpu=False,
    threads_decode=None,
    threads_prefill=None,
    batch_tokens=256,
)

Delta = TextDelta | ReasoningDelta | ToolCallDelta


@dataclass(frozen=True)
class Script:
    """One generation. Delays are seconds; `crash_at` is the token at which the engine dies.

    Choice i says `others[i - 1]` where there is one, else `tokens`; all choices take a token in each step. A token is
    text, or an event of its own (its index is set to the choice's). `prompt` is what is told of the prompt's
    tokens where that is asked for.
    """

    tokens: tuple[str | Delta, ...] = ("Hello", ",", " world", "!")
    others: tuple[tuple[str | Delta, ...], ...] = ()
    prompt: tuple[TokenLogprob, ...] = ()
    prompt_tokens: int = 7
    cached_tokens: int = 0
    reason: FinishReason = "stop"
    stop_sequence: str | None = None
    reasoning_tokens: int = 0
    prepare_s: float = 0.0
    prefill_s: float = 0.0
    step_s: float = 0.0
    crash_at: int | None = None
    refuse: ApiError | None = None
    accepted_draft_tokens: int = 0
    rejected_draft_tokens: int = 0

    def choice(self, index: int) -> tuple[str | Delta, ...]:
        return self.others[index - 1] if 0 < index <= len(self.others) else self.tokens


@dataclass
class Run:
    """What happened to one request in the engine."""

    request: GenerateRequest
    script: Script
    phase: str = "prepared"
    steps: int = 0
    completion: list[int] = field(default_factory=list)  # tokens of each choice
    unfinished: set[int] = field(default_factory=set)
    steps_at_cancel: int | None = None
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    error: ErrorInfo | None = None
    events: asyncio.Queue[GenerateEvent] = field(default_factory=asyncio.Queue)
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.completion = [0] * self.request.choices
        self.unfinished = set(range(self.request.choices))

    def usage(self, completion: int) -> Usage:
        return Usage(
            prompt_tokens=self.script.prompt_tokens,
            cached_tokens=self.script.cached_tokens,
            completion_tokens=completion,
            reasoning_tokens=self.script.reasoning_tokens,
            accepted_draft_tokens=self.script.accepted_draft_tokens,
            rejected_draft_tokens=self.script.rejected_draft_tokens,
        )

    def finish(self, index: int, reason: FinishReason) -> None:
        self.unfinished.discard(index)
        stop = self.script.stop_sequence if reason == "stop" else None
        usage = self.usage(self.completion[index])
        self.events.put_nowait(Finished(reason=reason, usage=usage, stop_sequence=stop, index=index))

    def end(self) -> None:
        """End what goes on, as it was asked to."""
        if self.error is not None:
            self.events.put_nowait(Failed(error=self.error, usage=self.usage(sum(self.completion))))
            return
        for index in sorted(self.unfinished):
            self.finish(index, "cancelled")


def told(question: Question) -> Answer:
    """What a scripted engine answers: each byte is a token, a vector is a text's length, a score how short it is."""
    match question:
        case EmbedRequest(inputs=inputs):
            sizes = [len(each.tokens if isinstance(each, TokenPrompt) else each.text.encode()) for each in inputs]
            vectors = () if question.count_only else tuple(struct.pack("<2f", size, 1.0) for size in sizes)
            return Embedded(vectors=vectors, tokens=tuple(sizes))
        case ScoreRequest(documents=documents):
            sizes = [len(text.encode()) for text in documents]
            scores = () if question.count_only else tuple(1 / (1 + size) for size in sizes)
            return Scored(scores=scores, tokens=tuple(sizes))
        case EncodeRequest(prompt=TokenPrompt(tokens=tokens)):
            data = bytes(token % 256 for token in tokens)
        case EncodeRequest(prompt=ChatPrompt(messages=messages)):
            data = "".join(f"<{message.role}>{message.content}" for message in messages).encode()
        case EncodeRequest(prompt=TextPrompt(text=text)):
            data = text.encode()
        case EncodeRequest(prompt=FillPrompt(prefix=prefix, suffix=suffix)):
            data = (prefix + suffix).encode()
    pieces = tuple(bytes([byte]) for byte in data)
    return Encoded(count=len(data), tokens=tuple(data), pieces=pieces, text=data.decode(errors="replace"))


class ScriptedEngine:
    """An `engine.fleet.LoadableEngine` without an engine. Loading takes `load_s`, or fails with `load_error`.

    `answer` answers questions, or raises.
    """

    def __init__(
        self,
        script: Script | Callable[[GenerateRequest], Script] = Script(),
        *,
        parallel: int = 8,
        context: int = 8192,
        load_s: float = 0.0,
    ) -> None:
        self.script = script
        self.ready = True
        self.load_s = load_s
        self.load_error: LoadError | None = None
        self.facts_known = True
        self.loads = 0
        self.loaded = False
        self.restarts = 0
        self.pid: int | None = None
        self.context = context
        self.steps = 0
        self.answer: Callable[[Question], Answer] = told
        self.asked: list[Question] = []
        self.runs: dict[str, Run] = {}
        self._slots = asyncio.Semaphore(parallel)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def taking(self) -> bool:
        return self.ready

    @property
    def facts(self) -> EngineFacts | None:
        return self._facts() if self.facts_known else None

    def _facts(self) -> EngineFacts:
        return EngineFacts(
            architecture="llama",
            description="scripted",
            context=self.context,
            trained_context=self.context,
            parallel=8,
            pool_tokens=self.context,
            vocabulary=49152,
            parameters=1,
            threads_decode=1,
            threads_prefill=1,
            gpu_layers=0,
            devices=(),
            llama_cpp="scripted",
            has_chat_template=True,
            load_s=0.0,
        )

    @property
    def stats(self) -> EngineStats:
        return EngineStats(steps=self.steps)

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return sum(run.phase in ("prefill", "decode") for run in self.runs.values())

    async def open(self) -> EngineFacts:
        assert not self.loaded, "two loads of one model"
        self.loads += 1
        await asyncio.sleep(self.load_s)
        if self.load_error is not None:
            raise self.load_error
        self.loaded = True
        return self._facts()

    async def close(self) -> None:
        assert not self.running, "a busy model was unloaded"
        await asyncio.sleep(0)
        self.loaded = False

    async def prepare(self, request: GenerateRequest) -> Prepared:
        script = self.script if isinstance(self.script, Script) else self.script(request)
        run = Run(request, script, phase="preparing")
        self.runs[request.request_id] = run
        try:
            await asyncio.sleep(script.prepare_s)
        except asyncio.CancelledError:
            run.cancelled, run.phase = True, "gone"
            raise
        if script.refuse is not None:
            raise script.refuse
        if script.prompt_tokens >= self.context:
            raise ContextLengthExceeded(limit=self.context, prompt_tokens=script.prompt_tokens, param="messages")
        run.phase = "prepared"
        most = min(request.max_tokens, self.context - script.prompt_tokens)
        return Prepared(request_id=request.request_id, prompt_tokens=script.prompt_tokens, max_tokens=most)

    async def ask(self, question: Question) -> Answer:
        self.asked.append(question)
        await asyncio.sleep(0)
        return self.answer(question)

    def start(self, request_id: str) -> AsyncIterator[GenerateEvent]:
        run = self.runs[request_id]
        run.phase = "queued"
        task = asyncio.create_task(self._play(run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return _Events(run)

    def cancel(self, request_id: str) -> None:
        run = self.runs.get(request_id)
        if run is not None and run.phase != "done":
            run.cancelled = True
            if run.steps_at_cancel is None:
                run.steps_at_cancel = run.steps
            run.stopped.set()

    def fail_all(self, error: ApiError) -> None:
        for run in self.runs.values():
            if run.phase != "done":
                run.error = error.info
                run.stopped.set()

    async def _play(self, run: Run) -> None:
        try:
            if not await self._slot(run):
                return
            try:
                await self._decode(run)
            finally:
                self._slots.release()
        finally:
            run.phase = "done"

    async def _slot(self, run: Run) -> bool:
        """Wait for a slot; a request cancelled in the queue never gets one."""
        slot = asyncio.ensure_future(self._slots.acquire())
        stop = asyncio.ensure_future(run.stopped.wait())
        await asyncio.wait({slot, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if slot.done():
            return True
        slot.cancel()
        run.end()
        return False

    async def _decode(self, run: Run) -> None:
        run.phase = "prefill"
        script = run.script
        run.events.put_nowait(Started(prompt_tokens=script.prompt_tokens, cached_tokens=script.cached_tokens))
        if await self._stopped(run, script.prefill_s):
            run.end()
            return
        if run.request.prompt_logprobs is not None:
            run.events.put_nowait(PromptLogprobs(tokens=script.prompt))
        run.phase = "decode"
        for number in itertools.count():
            self._finish_complete(run, number)
            if not run.unfinished:
                return
            if await self._stopped(run, script.step_s):
                run.end()
                return
            if script.crash_at == number:
                run.events.put_nowait(Failed(error=EngineCrashed("The engine process died under this request.").info))
                return
            run.steps += 1
            self.steps += 1
            for index in sorted(run.unfinished):
                run.completion[index] += 1
                token = script.choice(index)[number]
                delta = TextDelta(text=token, tokens=1) if isinstance(token, str) else token
                run.events.put_nowait(replace(delta, index=index))

    def _finish_complete(self, run: Run, number: int) -> None:
        """End the choices that have no token `number`."""
        for index in sorted(run.unfinished):
            tokens = len(run.script.choice(index))
            if number >= min(tokens, run.request.max_tokens):
                run.finish(index, "length" if tokens > run.request.max_tokens else run.script.reason)

    async def _stopped(self, run: Run, seconds: float) -> bool:
        if seconds:
            try:
                await asyncio.wait_for(run.stopped.wait(), seconds)
            except TimeoutError:
                return False
        return run.stopped.is_set()


class _Events:
    def __init__(self, run: Run) -> None:
        self._run = run

    def __aiter__(self) -> _Events:
        return self

    async def __anext__(self) -> GenerateEvent:
        return await self._run.events.get()


def alone(
    engine: LoadableEngine,
    model: ServedModel,
    limits: config.Limits,
    billing: Billing | None = None,
    past: Past = NO_PAST,
    judge: Judge | None = None,
    keys: KeyRing | None = None,
) -> Service:
    """A service of one model, which the first request loads."""
    fleet = Fleet({model.id: engine}, Memory({model.id: (1,)}, (1,), lambda: 1), Rules())
    limiter = Limiter(limits, past=past)
    return Service(fleet, {model.id: lambda facts: model}, limiter, limits, billing=billing, judge=judge, keys=keys)
