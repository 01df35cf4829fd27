"""Plays a scenario or a trace against one target: closed loops, open loops and bursts on one event loop."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from ocserve import peer
from ocserve.bench import arrivals, client
from ocserve.bench.arrivals import Arrival
from ocserve.bench.client import Message, Sample, Target
from ocserve.bench.exchange import Exchange, ExchangeFailed
from ocserve.bench.scenario import Group, Phase, Scenario
from ocserve.bench.text import Scale, Texts

_FEW_WORDS, _MANY_WORDS = 40, 240
_NICE = 10

Result = TypeVar("Result")


class TargetUnusable(Exception):
    """A target cannot be measured; the text says what it answered."""


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def run(playing: Coroutine[Any, Any, Result]) -> Result:
    """Run it to its end on a thread that gives way to others: the load generator must not take cores from the server.

    Otherwise, on few cores, every token that arrives interrupts the computing of the next one.
    """

    def gently() -> Result:
        if sys.platform == "linux":  # elsewhere the whole process would give way, and what it starts later
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        return asyncio.run(playing)

    with ThreadPoolExecutor(1, "load") as thread:
        return thread.submit(gently).result()


async def first_model(url: str, key: str | None) -> str:
    """The id that the server lists first. Raises `TargetUnusable`."""
    import httpx2

    try:
        async with peer.connection(key, 30.0) as http:
            answer = await http.get(f"{url}/models")
            if answer.status_code != 200:
                raise TargetUnusable(f"{url}/models answers with status {answer.status_code}")
            models = msgspec.json.decode(answer.content, type=_Models).data
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise TargetUnusable(f"{url} does not answer ({type(error).__name__})") from None
    except msgspec.MsgspecError:
        raise TargetUnusable(f"{url}/models is not a list of models") from None
    if not models:
        raise TargetUnusable(f"{url} lists no model")
    return models[0].id


async def calibrate(target: Target, seed: str) -> Scale:
    """What a word is worth in the target's tokens, from the usage of two short answers. Raises `TargetUnusable`."""
    measured = []
    try:
        exchanging = Exchange(target.url, target.key, target.timeout_s)
    except ExchangeFailed as failure:
        raise TargetUnusable(f"{target.url}: {failure}") from None
    async with exchanging as exchange:
        for words in (_FEW_WORDS, _MANY_WORDS):
            text = Texts(seed).words(f"calibration/{words}", words)
            request = client.body(target, (Message("user", text),), 1)
            sample = (await client.ask(exchange, request, phase="", group="", origin=0.0)).sample
            if sample.error is not None or not sample.counted:
                raise TargetUnusable(f"{target.url}: {sample.error or 'answers report no usage'}")
            measured.append((words, sample.prompt_tokens))
    try:
        return Scale.fitted(*measured)
    except ValueError as error:
        raise TargetUnusable(f"{target.url}: {error}") from None


@dataclass(frozen=True, slots=True)
class _Conversation:
    """What was said, and how many tokens of it the server has computed."""

    messages: tuple[Message, ...] = ()
    tokens: int = 0


@dataclass
class Load:
    """One pass over a scenario. `origin` is the session's beginning by `time.perf_counter()`.

    `restart` restarts the target and returns when it is ready; `on_sample` hears of each request that ended.
    """

    target: Target
    texts: Texts
    origin: float
    restart: Callable[[], None]
    on_sample: Callable[[Sample], None]
    samples: list[Sample] = field(default_factory=list)
    _conversations: dict[str, list[_Conversation]] = field(default_factory=dict)

    async def scenario(self, scenario: Scenario) -> tuple[Sample, ...]:
        """Every phase in its order; the samples in the order in which requests ended."""
        for phase in scenario.phases:
            if phase.restart:
                await asyncio.to_thread(self.restart)
            async with Exchange(self.target.url, self.target.key, self.target.timeout_s) as exchange:
                await asyncio.gather(*(self._group(exchange, phase, group) for group in phase.groups))
        return tuple(self.samples)

    async def trace(self, trace: Sequence[Arrival]) -> tuple[Sample, ...]:
        """Each request of a trace at its offset, whatever has become of those before."""
        async with Exchange(self.target.url, self.target.key, self.target.timeout_s) as exchange:

            async def one(number: int, due: float) -> None:
                arrival = trace[number]
                prompt = Message("user", self.texts.prose(f"trace/{number}", arrival.prompt_tokens))
                request = client.body(self.target, (prompt,), arrival.output_tokens)
                await self._ask(exchange, request, "trace", "trace", due)

            await _at([arrival.offset_s for arrival in trace], one)
        return tuple(self.samples)

    async def _group(self, exchange: Exchange, phase: Phase, group: Group) -> None:
        earlier = self._conversations.get(group.continues) if group.continues else None
        conversations = list(earlier) if earlier else [self._opening(group)] * group.conversations
        self._conversations[group.name] = conversations

        async def converse(index: int, due: float | None = None) -> None:
            for turn in range(group.turns):
                so_far = conversations[index]
                messages = (*so_far.messages, self._question(phase, group, index, turn))
                request = client.body(self.target, messages, group.output_tokens, group.schema)
                began = due if turn == 0 else None
                answer = await self._ask(exchange, request, phase.name, group.name, began, so_far.tokens)
                if answer.sample.error is not None:
                    for _ in range(turn + 1, group.turns):  # what cannot be asked any more is not dropped silently
                        self._add(_skipped(phase, group, time.perf_counter() - self.origin))
                    return
                computed = answer.sample.prompt_tokens + answer.sample.completion_tokens
                conversations[index] = _Conversation((*messages, Message("assistant", answer.text)), computed)

        await asyncio.sleep(group.delay_s)
        if group.rate is not None:
            seed = f"{self.texts.seed}/{phase.name}/{group.name}"
            await _at(arrivals.poisson(group.rate, group.conversations, seed), converse)
            return
        waiting = iter(range(group.conversations))

        async def worker() -> None:
            for index in waiting:
                await converse(index)

        workers = min(group.concurrency or group.conversations, group.conversations)
        await asyncio.gather(*(worker() for _ in range(workers)))

    def _opening(self, group: Group) -> _Conversation:
        if not group.shared_tokens:
            return _Conversation()
        return _Conversation((Message("system", self.texts.prose(f"shared/{group.name}", group.shared_tokens)),))

    def _question(self, phase: Phase, group: Group, index: int, turn: int) -> Message:
        tokens = group.turn_tokens if turn or group.continues else group.prompt_tokens
        make = self.texts.code if group.code else self.texts.prose
        return Message("user", make(f"{phase.name}/{group.name}/{index}/{turn}", tokens))

    async def _ask(
        self, exchange: Exchange, request: bytes, phase: str, group: str, due: float | None, known: int = 0
    ) -> client.Answer:
        answer = await client.ask(exchange, request, phase=phase, group=group, origin=self.origin, due=due)
        sample = msgspec.structs.replace(answer.sample, known_tokens=min(known, answer.sample.prompt_tokens))
        self._add(sample)
        return client.Answer(sample, answer.text)

    def _add(self, sample: Sample) -> None:
        self.samples.append(sample)
        self.on_sample(sample)


def _skipped(phase: Phase, group: Group, began_s: float) -> Sample:
    return Sample(
        phase=phase.name, group=group.name, began_s=began_s, ended_s=0.0, error="not sent: an earlier turn failed"
    )


async def _at(offsets: Sequence[float], one: Callable[[int, float], Awaitable[None]]) -> None:
    """Begin `one(number, due)` at each offset from now, in ascending order; all may go on at once."""
    begun = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for number, offset in enumerate(offsets):
            await asyncio.sleep(max(0.0, begun + offset - time.perf_counter()))
            tasks.create_task(_awaited(one(number, begun + offset)))


async def _awaited(work: Awaitable[None]) -> None:
    await work
