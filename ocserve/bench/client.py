"""One streamed chat completion over HTTP: sent, timed as its bytes arrive, and told apart from every kind of failure.

Nothing is computed while an answer streams except splitting its events; what must not distort the measure is done
before or after. Several events that arrive in one piece have one arrival time.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import msgspec

from ocserve import peer
from ocserve.bench.exchange import Exchange, ExchangeFailed


class Message(msgspec.Struct, frozen=True):
    """A message of a conversation."""

    role: str
    content: str


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen of one request; no text of it.

    `began_s` is seconds on the session's clock: when the request was due, so that an open loop counts what a late
    start costs. `visible_s` are arrival times of visible deltas and `ended_s` the end, both in seconds after that.
    `digest` is a hash of the answer's text, `counted` whether the server reported its usage; without it
    `completion_tokens` are deltas. `cached_tokens` is None if it was not reported. `known_tokens` is how much of the
    prompt the server had computed in earlier turns of the conversation: their prompt and answer.
    """

    phase: str
    group: str
    began_s: float
    visible_s: tuple[float, ...] = ()
    ended_s: float
    prompt_tokens: int = 0
    cached_tokens: int | None = 0
    completion_tokens: int = 0
    known_tokens: int = 0
    counted: bool = True
    digest: str = ""
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first visible delta."""
        return self.visible_s[0] if self.visible_s else None


@dataclass(frozen=True, slots=True)
class Target:
    """A server: `url` ends before `/chat/completions`. `bias` is sent as logit_bias (to keep answers from ending)."""

    label: str
    url: str
    model: str
    key: str | None = None
    bias: tuple[int, ...] = ()
    timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A request's sample and its text, which a conversation needs to go on."""

    sample: Sample
    text: str


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Cached(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Cached | None = None


class _Error(msgspec.Struct):
    code: str | int | None = None
    type: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


class _Refusal(msgspec.Struct):
    error: _Error


_CHUNK = msgspec.json.Decoder(_Chunk)


def body(target: Target, messages: tuple[Message, ...], max_tokens: int, schema: dict[str, Any] | None = None) -> bytes:
    """The request's JSON: greedy, streamed, with usage."""
    fields: dict[str, Any] = {
        "model": target.model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if target.bias:
        fields["logit_bias"] = {str(token): -100 for token in target.bias}
    if schema is not None:
        fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return msgspec.json.encode(fields)


class _Stream:
    """Collects the events of one answer."""

    def __init__(self) -> None:
        self.visible: list[float] = []
        self.pieces: list[str] = []
        self.usage: _Usage | None = None
        self.error: str | None = None
        self.finished = self.done = False
        self._lines = peer.EventLines()

    def feed(self, data: bytes, now: float) -> None:
        """Take the bytes that arrived at `now`. Raises `msgspec.MsgspecError` for what is no chunk."""
        for line in self._lines.feed(data):
            payload = peer.payload(line)
            if payload is None:
                continue
            if payload == b"[DONE]":
                self.done = True
                continue
            chunk = _CHUNK.decode(payload)
            if chunk.error is not None:
                self.error = f"stream: {chunk.error.code or chunk.error.type}"
            self.usage = chunk.usage or self.usage
            for choice in chunk.choices:
                self.finished = self.finished or choice.finish_reason is not None
                content = choice.delta and (choice.delta.content or choice.delta.reasoning_content)
                if content:
                    self.visible.append(now)
                if choice.delta and choice.delta.content:
                    self.pieces.append(choice.delta.content)


async def ask(
    exchange: Exchange,
    request: bytes,
    *,
    phase: str,
    group: str,
    origin: float,
    due: float | None = None,
) -> Answer:
    """Send one request and time its answer; a failure is a sample with an `error`, never an exception.

    `origin` and `due` are `time.perf_counter()` values: the session's beginning and when the request was to be sent.
    """
    began = due if due is not None else time.perf_counter()
    stream = _Stream()
    error = await _receive(exchange, request, stream)
    ended = time.perf_counter()
    if error is None and stream.error is None and not (stream.done and stream.finished):
        error = "cut off"
    text, usage = "".join(stream.pieces), stream.usage
    cached = usage.prompt_tokens_details.cached_tokens if usage and usage.prompt_tokens_details else None
    sample = Sample(
        phase=phase,
        group=group,
        began_s=began - origin,
        visible_s=tuple(at - began for at in stream.visible),
        ended_s=ended - began,
        prompt_tokens=usage.prompt_tokens if usage else 0,
        cached_tokens=cached,
        completion_tokens=usage.completion_tokens if usage else len(stream.visible),
        counted=usage is not None,
        digest=hashlib.sha256(text.encode()).hexdigest()[:16],
        error=stream.error or error,
    )
    return Answer(sample, text)


async def _receive(exchange: Exchange, request: bytes, stream: _Stream) -> str | None:
    """Feed the answer to `stream`; the kind of failure, or None."""
    try:
        status, rest = await exchange.post(
            "/chat/completions", request, lambda data: stream.feed(data, time.perf_counter())
        )
    except ExchangeFailed as failure:
        return str(failure)
    except msgspec.MsgspecError:
        return "not a chat completion stream"
    return None if status == 200 else _refusal(status, rest)


def _refusal(status: int, answer: bytes) -> str:
    """The status and, from an error in the usual shape, its code."""
    try:
        error = msgspec.json.decode(answer, type=_Refusal).error
    except msgspec.MsgspecError:
        return f"status {status}"
    return f"status {status} {error.code or error.type}"
