"""What OpenAI's endpoints share on the wire: error and usage objects, finish reasons, the frames of a reply."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ocserve import __version__
from ocserve.api import charge
from ocserve.api.dialect import Frame, Reply
from ocserve.api.json_body import dumps as dumps
from ocserve.errors import ErrorInfo
from ocserve.generation import (
    Failed,
    Finished,
    FinishReason,
    GenerateEvent,
    PromptLogprobs,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from ocserve.modelcard import ServedModel

# A cancelled generation has no reader left; its answer is never sent, and `stop` keeps the mapping total.
FINISH_REASONS: dict[FinishReason, str] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
    "cancelled": "stop",
}

DONE = b"[DONE]"


def error_body(info: ErrorInfo) -> bytes:
    """The body of an error answer."""
    return dumps({"error": error(info)})


def error(info: ErrorInfo) -> dict[str, object]:
    """The error object; all four keys are always present, and `category` beside them where a policy refused."""
    body: dict[str, object] = {"message": info.message, "type": info.type, "param": info.param, "code": info.code}
    return body | ({"category": info.category} if info.category else {})


def usage(counts: Usage) -> dict[str, object]:
    """The usage object; clients read the details unconditionally, so they are always present."""
    return {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "total_tokens": counts.total_tokens,
        "prompt_tokens_details": {
            "cached_tokens": counts.cached_tokens,
            "audio_tokens": 0,
            "image_tokens": counts.image_tokens,
        },
        "completion_tokens_details": {
            "reasoning_tokens": counts.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": counts.accepted_draft_tokens,
            "rejected_prediction_tokens": counts.rejected_draft_tokens,
        },
        **charge.cost(counts.cost),
    }


def fingerprint(model: ServedModel) -> str:
    """Names what computes the answers: with the same one, the same seed means the same answer."""
    what = (__version__, model.id, model.quantisation, model.created, model.context_length)
    return "fp_" + hashlib.blake2b(repr(what).encode(), digest_size=5).hexdigest()


def token_text(piece: bytes) -> str:
    """A token's bytes as a string; those that are no whole character are written as escapes."""
    return piece.decode("utf-8", "backslashreplace")


@dataclass(slots=True)
class Call:
    """A tool call of an answer."""

    name: str
    pieces: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> str:
        """JSON text."""
        return "".join(self.pieces)


@dataclass(slots=True)
class Answer:
    """Everything that one choice said. `prompt` is what was said of the tokens of its prompt.

    `finished` is the event that ended it.
    """

    said: list[str] = field(default_factory=list)
    thought: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt: PromptLogprobs | None = None
    finished: Finished = field(default_factory=lambda: Finished(reason="stop", usage=Usage()))

    @property
    def text(self) -> str:
        """The content."""
        return "".join(self.said)

    @property
    def reasoning(self) -> str:
        """What was thought before."""
        return "".join(self.thought)


def answers(events: Iterable[GenerateEvent], choices: int) -> list[Answer]:
    """What each choice said, from all its events."""
    found = [Answer() for _ in range(choices)]
    for event in events:
        match event:
            case TextDelta(text=text, index=index, logprobs=logprobs):
                found[index].said.append(text)
                found[index].logprobs += logprobs
            case ReasoningDelta(text=text, index=index):
                found[index].thought.append(text)
            case ToolCallDelta(call=call, name=name, arguments=arguments, index=index, logprobs=logprobs):
                if name is not None:
                    found[index].calls.append(Call(name))
                found[index].calls[call].pieces.append(arguments)
                found[index].logprobs += logprobs
            case PromptLogprobs(index=index):
                found[index].prompt = event
            case Finished(index=index):
                found[index].finished = event
            case _:
                pass
    return found


class ReplyEncoder(ABC):
    """One reply as frames or as a whole: each choice's pieces and finish reason, the usage with no choices, `[DONE]`.

    Nothing follows an error. Endpoints differ in the names below and in how a choice holds what it says.
    """

    id_prefix: ClassVar[str]
    chunk_object: ClassVar[str]
    whole_object: ClassVar[str]

    def __init__(self, reply: Reply, *, fingerprint: str | None = None, service_tier: str | None = None) -> None:
        self._reply = reply
        self._head: dict[str, object] = {
            "id": f"{self.id_prefix}-{reply.id}",
            "object": self.chunk_object,
            "created": reply.created,
            "model": reply.model,
        }
        if service_tier is not None:
            self._head["service_tier"] = service_tier
        if fingerprint is not None:
            self._head["system_fingerprint"] = fingerprint
        self._tail: dict[str, object] = {"usage": None} if reply.include_usage else {}

    @abstractmethod
    def open(self) -> Sequence[Frame]:
        """What leaves before the first text."""

    @abstractmethod
    def _said(self, event: GenerateEvent) -> Sequence[Frame]:
        """The chunks of an event that says something."""

    @abstractmethod
    def _ended(self, finished: Finished) -> Sequence[Frame]:
        """The chunks that end a choice."""

    @abstractmethod
    def _whole(self, found: list[Answer]) -> list[dict[str, object]]:
        """The choices of a whole answer, in order."""

    def event(self, event: GenerateEvent) -> Sequence[Frame]:
        """The chunks of one event."""
        match event:
            case Finished():
                return self._ended(event)
            case Failed(error=error):
                return (Frame(error_body(error)),)
            case _:
                return self._said(event)

    def close(self, counts: Usage) -> Sequence[Frame]:
        """The chunk with the usage and no choices, unless the client does without, then the end mark."""
        if self._reply.include_usage is False:
            return (Frame(DONE),)
        return Frame(dumps({**self._head, "choices": [], "usage": usage(counts)})), Frame(DONE)

    def complete(self, events: Sequence[GenerateEvent], counts: Usage) -> bytes:
        """The whole answer, its choices in the order of their indices."""
        choices = self._whole(answers(events, self._reply.choices))
        return dumps({**self._head, "object": self.whole_object, "choices": choices, "usage": usage(counts)})

    def _chunk(
        self, part: dict[str, object], index: int, *, reason: FinishReason | None = None, logprobs: object = None
    ) -> Frame:
        return Frame(dumps({**self._head, "choices": [choice(index, part, reason, logprobs)], **self._tail}))


def choice(
    index: int, part: dict[str, object], reason: FinishReason | None, logprobs: object = None
) -> dict[str, object]:
    """One choice of a chunk or of a whole answer; all its keys are always present."""
    finish_reason = None if reason is None else FINISH_REASONS[reason]
    return {"index": index, **part, "logprobs": logprobs, "finish_reason": finish_reason}
