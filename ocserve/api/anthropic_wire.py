"""What leaves on Anthropic's surface: error and usage objects, stop reasons, the events of a reply and its whole."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

from ocserve.api import blocks, charge
from ocserve.api.dialect import Frame, Framing, Reply
from ocserve.api.json_body import dumps as dumps
from ocserve.errors import ErrorInfo, InsufficientQuota
from ocserve.generation import (
    Failed,
    Finished,
    FinishReason,
    GenerateEvent,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    Usage,
)

# A cancelled generation has no reader left; `end_turn` keeps the mapping total.
STOP_REASONS: dict[FinishReason, str] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
    "cancelled": "end_turn",
}
_ERROR_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_PING = b'{"type":"ping"}'
# A ping where other dialects send a comment: the vendor's clients know it, and some take silence for a dead stream.
FRAMING = Framing(keep_alive=b"event: ping\ndata: %b\n\n" % _PING)


def error_body(info: ErrorInfo) -> bytes:
    """The error object. What follows its message is ours; clients that do not know it pass over it."""
    message = info.message
    if info.prompt_tokens is not None and info.context_length is not None:
        # Clients compact their conversation when they read these words. A prompt must leave room for one token.
        message = f"prompt is too long: {info.prompt_tokens} tokens > {info.context_length - 1} maximum"
    kind = _ERROR_TYPES.get(info.status, "invalid_request_error" if info.status < 500 else "api_error")
    if info.code == InsufficientQuota.code:
        kind = "billing_error"
    body = {"type": kind, "message": message, "param": info.param, "code": info.code}
    return dumps({"type": "error", "error": body | ({"category": info.category} if info.category else {})})


def usage(counts: Usage) -> dict[str, object]:
    """The usage object: the prompt's tokens are those that were computed and, apart from them, those that were kept."""
    return {
        "input_tokens": counts.prompt_tokens - counts.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counts.cached_tokens,
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
        "output_tokens": counts.completion_tokens,
        "output_tokens_details": {"thinking_tokens": counts.reasoning_tokens},
        "service_tier": "standard",
        **charge.cost(counts.cost),
    }


class MessageEncoder:
    """One message, as events or as a whole. Content blocks follow one another; at most one is open."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._index = -1  # of the last block that was begun
        self._open: blocks.Kind | None = None
        self._thought = hashlib.sha256()
        self._reason = ""
        self._stop_sequence: str | None = None

    def open(self) -> Sequence[Frame]:
        """The message without content, with what is known of the prompt."""
        message = self._message([], None, None, self._reply.prompt)
        return _frame("message_start", message=message), Frame(_PING, "ping")

    def event(self, event: GenerateEvent) -> Sequence[Frame]:
        """What a stream says about `event`."""
        match event:
            case TextDelta(text=text) if text:
                begin = self._begin("text", {"type": "text", "text": ""})
                return *begin, self._delta({"type": "text_delta", "text": text})
            case ReasoningDelta(text=text) if text:
                begin = self._begin("reasoning", {"type": "thinking", "thinking": "", "signature": ""})
                self._thought.update(text.encode())
                shown = (self._delta({"type": "thinking_delta", "thinking": text}),)
                return (*begin, *shown) if self._reply.show_reasoning else begin
            case ToolCallDelta(call=call, name=name, arguments=arguments):
                begin = () if name is None else self._begin_call(call, name)
                return *begin, self._delta({"type": "input_json_delta", "partial_json": arguments})
            case Finished(reason=reason, stop_sequence=sequence):
                self._reason, self._stop_sequence = _stop_reason(reason, sequence)
                return self._end()
            case Failed(error=error):
                return (Frame(error_body(error), "error"),)
            case _:
                return ()

    def close(self, counts: Usage) -> Sequence[Frame]:
        """Why the message ended and what it used, then its end."""
        delta = {"stop_reason": self._reason, "stop_sequence": self._stop_sequence}
        return _frame("message_delta", delta=delta, usage=usage(counts)), _frame("message_stop")

    def complete(self, events: Sequence[GenerateEvent], counts: Usage) -> bytes:
        """The whole message."""
        last = events[-1]
        assert isinstance(last, Finished)
        content: list[dict[str, object]] = []
        calls = 0
        for block in blocks.blocks(events):
            if block.kind == "text":
                content.append({"type": "text", "text": block.text})
            elif block.kind == "reasoning":
                thought = block.text if self._reply.show_reasoning else ""
                signature = _signature(hashlib.sha256(block.text.encode()))
                content.append({"type": "thinking", "thinking": thought, "signature": signature})
            elif (arguments := block.arguments) is not None:  # one that the limit cut off must not be run
                content.append({**self._call(calls, block.name), "input": arguments})
                calls += 1
        return dumps(self._message(content, *_stop_reason(last.reason, last.stop_sequence), counts))

    def _message(
        self, content: list[dict[str, object]], reason: str | None, sequence: str | None, counts: Usage
    ) -> dict[str, object]:
        return {
            "id": f"msg_{self._reply.id}",
            "type": "message",
            "role": "assistant",
            "model": self._reply.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": usage(counts),
        }

    def _begin(self, kind: blocks.Kind, block: dict[str, object]) -> Sequence[Frame]:
        """Go on with the open block if it is of this kind, else end it and begin another."""
        if self._open == kind != "call":
            return ()
        ended = self._end()
        self._index += 1
        self._open = kind
        return *ended, _frame("content_block_start", index=self._index, content_block=block)

    def _begin_call(self, call: int, name: str) -> Sequence[Frame]:
        return self._begin("call", self._call(call, name))

    def _call(self, call: int, name: str) -> dict[str, object]:
        return {"type": "tool_use", "id": f"toolu_{self._reply.call_id(0, call)}", "name": name, "input": {}}

    def _delta(self, delta: dict[str, object]) -> Frame:
        return _frame("content_block_delta", index=self._index, delta=delta)

    def _end(self) -> Sequence[Frame]:
        """End the open block, a thought with its signature."""
        if self._open is None:
            return ()
        signed: tuple[Frame, ...] = ()
        if self._open == "reasoning":
            signed = (self._delta({"type": "signature_delta", "signature": _signature(self._thought)}),)
            self._thought = hashlib.sha256()
        self._open = None
        return *signed, _frame("content_block_stop", index=self._index)


def _frame(name: str, **fields: object) -> Frame:
    return Frame(dumps({"type": name, **fields}), name)


def _stop_reason(reason: FinishReason, sequence: str | None) -> tuple[str, str | None]:
    """Why the message ended, and the stop sequence if that is why: calls before it are to be run all the same."""
    return ("stop_sequence", sequence) if reason == "stop" and sequence is not None else (STOP_REASONS[reason], None)


def _signature(digest: hashlib._Hash) -> str:
    """What clients want to find at a thought and send back with it; ours says that the text is whole."""
    return base64.b64encode(digest.digest()).decode()
