"""What OpenAI's endpoints share on the wire: error and usage objects, finish reasons, the frames of a reply."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import msgspec

from ocserve.api.dialect import Frame, Reply
from ocserve.errors import ErrorInfo
from ocserve.generation import Failed, Finished, FinishReason, GenerateEvent, TextDelta, Usage

# A cancelled generation has no reader left; its answer is never sent, and `stop` keeps the mapping total.
FINISH_REASONS: dict[FinishReason, str] = {"stop": "stop", "length": "length", "cancelled": "stop"}

DONE = b"[DONE]"


def dumps(value: object) -> bytes:
    """JSON as it goes out: compact, UTF-8."""
    return msgspec.json.encode(value)


def error_body(info: ErrorInfo) -> bytes:
    """The error object; all four keys are always present."""
    return dumps({"error": {"message": info.message, "type": info.type, "param": info.param, "code": info.code}})


def usage(counts: Usage) -> dict[str, object]:
    """The usage object; clients read the details unconditionally, so they are always present."""
    return {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "total_tokens": counts.total_tokens,
        "prompt_tokens_details": {"cached_tokens": counts.cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": counts.reasoning_tokens,
            "accepted_prediction_tokens": counts.accepted_draft_tokens,
            "rejected_prediction_tokens": counts.rejected_draft_tokens,
        },
    }


class ReplyEncoder(ABC):
    """One reply as frames or as a whole: each choice's pieces and finish reason, the usage with no choices, `[DONE]`.

    Nothing follows an error. Endpoints differ in the names below and in how a choice holds its text.
    """

    id_prefix: ClassVar[str]
    chunk_object: ClassVar[str]
    whole_object: ClassVar[str]

    def __init__(self, reply: Reply) -> None:
        self._head: dict[str, object] = {
            "id": f"{self.id_prefix}-{reply.id}",
            "object": self.chunk_object,
            "created": reply.created,
            "model": reply.model,
        }
        self._tail: dict[str, object] = {"usage": None} if reply.include_usage else {}
        self._choices = range(reply.choices)

    @abstractmethod
    def open(self) -> Sequence[Frame]:
        """What leaves before the first text."""

    @abstractmethod
    def _piece(self, text: str) -> dict[str, object]:
        """The part of a chunk's choice that holds `text`, which is empty in the last one."""

    @abstractmethod
    def _whole(self, text: str) -> dict[str, object]:
        """The part of a whole answer's choice that holds `text`."""

    def event(self, event: GenerateEvent) -> Sequence[Frame]:
        """The chunks of one event."""
        match event:
            case TextDelta(text=text) if text:
                return (self._chunk(self._piece(text), None, event.index),)
            case Finished(reason=reason, index=index):
                return (self._chunk(self._piece(""), FINISH_REASONS[reason], index),)
            case Failed(error=error):
                return (Frame(error_body(error)),)
            case _:
                return ()

    def close(self, counts: Usage) -> Sequence[Frame]:
        """The chunk with the usage and no choices, then the end mark."""
        return Frame(dumps({**self._head, "choices": [], "usage": usage(counts)})), Frame(DONE)

    def complete(self, events: Sequence[GenerateEvent], counts: Usage) -> bytes:
        """The whole answer, its choices in the order of their indices."""
        texts: list[list[str]] = [[] for _ in self._choices]
        reasons: dict[int, str] = {}
        for event in events:
            if isinstance(event, TextDelta):
                texts[event.index].append(event.text)
            elif isinstance(event, Finished):
                reasons[event.index] = FINISH_REASONS[event.reason]
        choices = [_choice(index, self._whole("".join(texts[index])), reasons[index]) for index in self._choices]
        return dumps({**self._head, "object": self.whole_object, "choices": choices, "usage": usage(counts)})

    def _chunk(self, part: dict[str, object], finish_reason: str | None, index: int) -> Frame:
        return Frame(dumps({**self._head, "choices": [_choice(index, part, finish_reason)], **self._tail}))


def _choice(index: int, part: dict[str, object], finish_reason: str | None) -> dict[str, object]:
    return {"index": index, **part, "logprobs": None, "finish_reason": finish_reason}
