"""What leaves on Ollama's surface: lines of JSON, errors, durations, and the reply that chat and generate share.

Durations are nanoseconds. A stream's are measured between its events; of a whole answer only the total is known, and
the others are left out rather than guessed.
"""

from __future__ import annotations

import datetime
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from ocserve.api import charge
from ocserve.api.blocks import Block, blocks
from ocserve.api.dialect import Frame, Framing, Reply
from ocserve.api.json_body import dumps as dumps
from ocserve.errors import ErrorInfo
from ocserve.generation import (
    Failed,
    Finished,
    FinishReason,
    GenerateEvent,
    ReasoningDelta,
    TextDelta,
    TokenChance,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

# Clients parse every line, so a silent stream has nothing to say.
LINES = Framing(media_type="application/x-ndjson", prefix=b"", suffix=b"\n", keep_alive=b"")
# A tool call ends with `stop` here; a cancelled generation has no reader left.
DONE_REASONS: dict[FinishReason, str] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "stop",
    "content_filter": "content_filter",
    "cancelled": "stop",
}
Clock = Callable[[], int]


def error_body(info: ErrorInfo) -> bytes:
    """The error: a string, and beside it what is wrong, for clients that look."""
    body = {"error": info.message, "param": info.param, "code": info.code}
    return dumps(body | ({"category": info.category} if info.category else {}))


def timestamp(seconds: int) -> str:
    """Unix time as Ollama writes times."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat().replace("+00:00", "Z")


class ReplyEncoder(ABC):
    """One reply as lines or as a whole. Tool calls leave complete: their arguments are objects, not text."""

    def __init__(self, reply: Reply, *, clock: Clock = time.perf_counter_ns) -> None:
        self._reply = reply
        self._clock = clock
        self._begun = clock()
        self._first: int | None = None  # when the prompt was computed
        self._call: list[GenerateEvent] = []
        self._untold: list[TokenLogprob] = []  # of tokens whose line has not left
        self._reason = "stop"

    @abstractmethod
    def _said(self, text: str, thinking: str, calls: Sequence[Block]) -> dict[str, object]:
        """The part of a line that holds text, thought and complete tool calls."""

    def open(self) -> Sequence[Frame]:
        """Nothing: the first line is the first text."""
        return ()

    def event(self, event: GenerateEvent) -> Sequence[Frame]:
        """The lines of one event."""
        if isinstance(event, TextDelta | ReasoningDelta | ToolCallDelta) and self._first is None:
            self._first = self._clock()
        match event:
            case ToolCallDelta(name=name):
                before = self._called() if name is not None else ()
                self._call.append(event)
                self._untold += event.logprobs
                return before
            case TextDelta(text=text):
                return self._more(text, "", event.logprobs)
            case ReasoningDelta(text=text) if self._reply.show_reasoning:
                return self._more("", text, event.logprobs)
            case Finished(reason=reason):
                self._reason = DONE_REASONS[reason]
                return self._called()
            case Failed(error=error):
                return (Frame(error_body(error)),)
            case _:
                return ()

    def close(self, counts: Usage) -> Sequence[Frame]:
        """The last line, with the counts."""
        now = self._clock()
        first = self._first or now
        spans = {"prompt_eval_duration": first - self._begun, "eval_duration": now - first}
        line = {**self._head(), **self._said("", "", ()), **_chances(self._untold), **self._done(counts, now), **spans}
        return (Frame(dumps(line)),)

    def complete(self, events: Sequence[GenerateEvent], counts: Usage) -> bytes:
        """The whole answer."""
        last = events[-1]
        assert isinstance(last, Finished)
        self._reason = DONE_REASONS[last.reason]
        found = blocks(events)
        said = {kind: "".join(block.text for block in found if block.kind == kind) for kind in ("text", "reasoning")}
        calls = [block for block in found if block.kind == "call" and block.arguments is not None]
        thinking = said["reasoning"] if self._reply.show_reasoning else ""
        shown = TextDelta | ToolCallDelta | (ReasoningDelta if self._reply.show_reasoning else TextDelta)
        deltas = (event for event in events if isinstance(event, shown))
        logprobs = [chosen for delta in deltas for chosen in delta.logprobs]
        body = {**self._head(), **self._said(said["text"], thinking, calls), **_chances(logprobs)}
        return dumps({**body, **self._done(counts, self._clock())})

    def _called(self) -> Sequence[Frame]:
        """The line of the tool call that has been gathered, if there is one and it is complete."""
        gathered = [block for block in blocks(self._call) if block.arguments is not None]
        self._call.clear()
        return (self._line(self._said("", "", gathered)),) if gathered else ()

    def _more(self, text: str, thinking: str, logprobs: Sequence[TokenLogprob]) -> Sequence[Frame]:
        """The line of more text, behind that of a call before it."""
        before = self._called() if text or thinking else ()
        self._untold += logprobs
        return (*before, self._line(self._said(text, thinking, ()))) if text or thinking else ()

    def _line(self, said: dict[str, object]) -> Frame:
        chances, self._untold = _chances(self._untold), []
        return Frame(dumps({**self._head(), **said, **chances, "done": False}))

    def _head(self) -> dict[str, object]:
        return {"model": self._reply.model, "created_at": timestamp(self._reply.created)}

    def _done(self, counts: Usage, now: int) -> dict[str, object]:
        return {
            "done": True,
            "done_reason": self._reason,
            "total_duration": now - self._begun,
            "load_duration": 0,
            "prompt_eval_count": counts.prompt_tokens,
            "eval_count": counts.completion_tokens,
            **charge.cost(counts.cost),
        }


def _chances(logprobs: Sequence[TokenLogprob]) -> dict[str, object]:
    if not logprobs:
        return {}
    return {
        "logprobs": [
            {**_chance(each.chosen), "top_logprobs": [_chance(other) for other in each.top]} for each in logprobs
        ]
    }


def _chance(chance: TokenChance) -> dict[str, object]:
    piece = chance.piece
    return {"token": piece.decode(errors="replace"), "logprob": chance.logprob, "bytes": list(piece)}
