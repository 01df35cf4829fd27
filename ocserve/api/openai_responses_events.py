"""The answer side of OpenAI's Responses: generated events become output items, and those a sequence of named events.

An item is opened, grows and is closed before the next one opens; the whole answer is what the last event of a stream
carries. Knows nothing of requests beyond the fields that an answer repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from ocserve.api import charge, openai_wire
from ocserve.api.dialect import Frame, Reply
from ocserve.errors import ErrorInfo
from ocserve.generation import (
    Failed,
    Finished,
    FinishReason,
    GenerateEvent,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

Wire = dict[str, object]
_Said = Iterator[tuple[str, Wire]]

# What an ending makes of the response, and why it is incomplete if it is. A cancelled one has no reader left.
_ENDINGS: dict[FinishReason, tuple[str, str | None]] = {
    "stop": ("completed", None),
    "tool_calls": ("completed", None),
    "length": ("incomplete", "max_output_tokens"),
    "content_filter": ("incomplete", "content_filter"),
    "cancelled": ("cancelled", None),
}


class _Item(Protocol):
    """An output item that is being made. What it says are event types and the fields that are its own."""

    id: str

    def opened(self) -> _Said:
        """What announces it."""

    def closed(self, status: str) -> _Said:
        """What ends it."""

    def wire(self, status: str) -> Wire:
        """The item as it is now."""


class _Text:
    """A message of the assistant with one part of text."""

    def __init__(self, number: str) -> None:
        self.id = f"msg_{number}"
        self._pieces: list[str] = []
        self._logprobs: list[Wire] = []

    def opened(self) -> _Said:
        yield "response.output_item.added", {"item": {**self._head("in_progress"), "content": []}}
        yield "response.content_part.added", {"content_index": 0, "part": self._part()}

    def grown(self, text: str, logprobs: Sequence[TokenLogprob]) -> _Said:
        chances = [_logprob(token) for token in logprobs]
        self._pieces.append(text)
        self._logprobs += chances
        yield "response.output_text.delta", {"content_index": 0, "delta": text, "logprobs": chances}

    def closed(self, status: str) -> _Said:
        part = self._part()
        yield "response.output_text.done", {"content_index": 0, "text": part["text"], "logprobs": self._logprobs}
        yield "response.content_part.done", {"content_index": 0, "part": part}
        yield "response.output_item.done", {"item": self.wire(status)}

    def wire(self, status: str) -> Wire:
        return {**self._head(status), "content": [self._part()]}

    def _head(self, status: str) -> Wire:
        return {"id": self.id, "type": "message", "status": status, "role": "assistant"}

    def _part(self) -> Wire:
        return {"type": "output_text", "text": "".join(self._pieces), "annotations": [], "logprobs": self._logprobs}


class _Thought:
    """What the model thought. A client that asked for a summary gets all of it as one."""

    def __init__(self, number: str, *, summary: bool) -> None:
        self.id = f"rs_{number}"
        self._summary = summary
        self._pieces: list[str] = []
        # The names that differ between the two places, and the index of the only part in either.
        self._place, self._index = ("summary", "summary_index") if summary else ("content", "content_index")
        self._events = "response.reasoning_summary_part" if summary else "response.content_part"
        self._deltas = "response.reasoning_summary_text" if summary else "response.reasoning_text"

    def opened(self) -> _Said:
        yield "response.output_item.added", {"item": self._item("in_progress", [])}
        yield f"{self._events}.added", {self._index: 0, "part": self._part()}

    def grown(self, text: str) -> _Said:
        self._pieces.append(text)
        yield f"{self._deltas}.delta", {self._index: 0, "delta": text}

    def closed(self, status: str) -> _Said:
        part = self._part()
        yield f"{self._deltas}.done", {self._index: 0, "text": part["text"]}
        yield f"{self._events}.done", {self._index: 0, "part": part}
        yield "response.output_item.done", {"item": self.wire(status)}

    def wire(self, status: str) -> Wire:
        return self._item(status, [self._part()])

    def _item(self, status: str, parts: list[Wire]) -> Wire:
        return {"id": self.id, "type": "reasoning", "status": status, "summary": [], self._place: parts}

    def _part(self) -> Wire:
        return {"type": "summary_text" if self._summary else "reasoning_text", "text": "".join(self._pieces)}


class _Call:
    """A call of one of the request's functions; `call` is its number among the calls of the answer."""

    def __init__(self, number: str, call: int, call_id: str, name: str) -> None:
        self.id = f"fc_{number}"
        self.call = call
        self._call_id = call_id
        self._name = name
        self._pieces: list[str] = []

    def opened(self) -> _Said:
        yield "response.output_item.added", {"item": self.wire("in_progress")}

    def grown(self, arguments: str) -> _Said:
        self._pieces.append(arguments)
        yield "response.function_call_arguments.delta", {"delta": arguments}

    def closed(self, status: str) -> _Said:
        arguments = "".join(self._pieces)
        yield "response.function_call_arguments.done", {"name": self._name, "arguments": arguments}
        yield "response.output_item.done", {"item": self.wire(status)}

    def wire(self, status: str) -> Wire:
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "".join(self._pieces),
        }


class ResponseEncoder:
    """One response as a stream or as a whole.

    `echo` are the fields that repeat the request, `now` tells the time of its end (Unix time, seconds). `keep` is
    offered the finished response with the items of its output, and says whether it is stored. Without `generate` the
    response is one that says nothing.
    """

    def __init__(
        self,
        reply: Reply,
        echo: Wire,
        *,
        summary: bool,
        generate: bool = True,
        now: Callable[[], int],
        keep: Callable[[Wire, list[Wire]], bool],
    ) -> None:
        self._reply = reply
        self._echo = echo
        self._summary = summary
        self._generate = generate
        self._now = now
        self._keep = keep
        self._sequence = 0
        self._output: list[Wire] = []
        self._item: _Text | _Thought | _Call | None = None
        self._reason: FinishReason = "stop"

    def open(self) -> Sequence[Frame]:
        """The response as it begins."""
        response = self._response("in_progress")
        return self._frame("response.created", response=response), self._frame(
            "response.in_progress", response=response
        )

    def event(self, event: GenerateEvent) -> Sequence[Frame]:
        """The frames of one event."""
        match event:
            case TextDelta(text=text, logprobs=logprobs) if text or logprobs:
                return tuple(self._text(text, logprobs))
            case ReasoningDelta(text=text) if text:
                return tuple(self._thought(text))
            case ToolCallDelta(call=call, name=name, arguments=arguments):
                return tuple(self._call(call, name, arguments))
            case Finished(reason=reason):
                self._reason = reason
                return tuple(self._end())
            case Failed(error=error, usage=usage):
                return (*self._close("incomplete"), self._failed(error, usage))
            case _:
                return ()

    def close(self, usage: Usage) -> Sequence[Frame]:
        """The last event, with the whole response."""
        response = self._whole(usage)
        # The protocol has an event for a complete end and one for every other that is not a failure.
        name = "completed" if response["status"] == "completed" else "incomplete"
        return (self._frame(f"response.{name}", response=response),)

    def complete(self, events: Sequence[GenerateEvent], usage: Usage) -> bytes:
        """The whole response as the answer's body."""
        for event in events:
            self.event(event)
        return openai_wire.dumps(self._whole(usage))

    def _text(self, text: str, logprobs: Sequence[TokenLogprob]) -> Iterator[Frame]:
        item = self._item
        if not isinstance(item, _Text):
            item = _Text(self._number())
            yield from self._begin(item)
        yield from self._said(item, item.grown(text, logprobs))

    def _thought(self, text: str) -> Iterator[Frame]:
        item = self._item
        if not isinstance(item, _Thought):
            item = _Thought(self._number(), summary=self._summary)
            yield from self._begin(item)
        yield from self._said(item, item.grown(text))

    def _call(self, call: int, name: str | None, arguments: str) -> Iterator[Frame]:
        item = self._item
        if not isinstance(item, _Call) or item.call != call:
            assert name is not None, "a call begins with its name and ends before the next item"
            item = _Call(self._number(), call, f"call_{self._reply.call_id(0, call)}", name)
            yield from self._begin(item)
        if arguments:
            yield from self._said(item, item.grown(arguments))

    def _end(self) -> Iterator[Frame]:
        if not self._generate:
            self._reason = "stop"  # the limit that ended it is not the client's
            return
        if not self._output and self._item is None:  # clients look for an item even where nothing was said
            yield from self._begin(_Text(self._number()))
        status, _ = _ENDINGS[self._reason]
        yield from self._close("completed" if status == "completed" else "incomplete")

    def _begin(self, item: _Text | _Thought | _Call) -> Iterator[Frame]:
        yield from self._close("completed")
        self._item = item
        yield from self._said(item, item.opened())

    def _close(self, status: str) -> Iterator[Frame]:
        if self._item is not None:
            item, self._item = self._item, None
            yield from self._said(item, item.closed(status))
            self._output.append(item.wire(status))

    def _number(self) -> str:
        """What tells the next item's id from every other's. An item that is open will be one of the output."""
        return f"{self._reply.id}{len(self._output) + (self._item is not None):03x}"

    def _said(self, item: _Item, events: _Said) -> Iterator[Frame]:
        index = len(self._output)
        for name, fields in events:
            place: Wire = {"output_index": index} if "item" in fields else {"output_index": index, "item_id": item.id}
            yield self._frame(name, **place, **fields)

    def _frame(self, event: str, /, **fields: object) -> Frame:
        data = openai_wire.dumps({"type": event, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        return Frame(data, event)

    def _whole(self, usage: Usage) -> Wire:
        status, why = _ENDINGS[self._reason]
        response = self._response(status)
        response |= {
            "completed_at": self._now() if status == "completed" else None,
            "incomplete_details": {"reason": why} if why else None,
            "usage": _usage(usage),
        }
        # What a content policy refused may have been sent before it was judged; it is kept nowhere.
        response["store"] = self._reason != "content_filter" and self._keep(response, self._output)
        return response

    def _failed(self, error: ErrorInfo, usage: Usage) -> Frame:
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        failure = {"error": {"code": code, "message": error.message}, "usage": _usage(usage)}
        return self._frame("response.failed", response=self._response("failed") | failure)

    def _response(self, status: str) -> Wire:
        return {
            "id": f"resp_{self._reply.id}",
            "object": "response",
            "created_at": self._reply.created,
            "status": status,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "output": self._output,
            "usage": None,
            **self._echo,
        }


def _usage(counts: Usage) -> Wire:
    return {
        "input_tokens": counts.prompt_tokens,
        "input_tokens_details": {"cached_tokens": counts.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": counts.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning_tokens},
        "total_tokens": counts.total_tokens,
        **charge.cost(counts.cost),
    }


def _logprob(token: TokenLogprob) -> Wire:
    chances = [
        {"token": openai_wire.token_text(chance.piece), "logprob": chance.logprob, "bytes": list(chance.piece)}
        for chance in (token.chosen, *token.top)
    ]
    return {**chances[0], "top_logprobs": chances[1:]}
