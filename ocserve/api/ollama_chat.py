"""Ollama's `/api/chat`: a conversation in, lines of one assistant message out."""

from __future__ import annotations

import json
from collections.abc import Sequence

from msgspec.structs import replace

from ocserve.api import fields, images, json_body, ollama_request
from ocserve.api.blocks import Block
from ocserve.api.dialect import Models, Parsed, Reply
from ocserve.api.fields import Field, Reader, Values
from ocserve.api.ollama_request import Load
from ocserve.api.ollama_wire import ReplyEncoder, dumps, error_body, timestamp
from ocserve.api.tools import NESTED, ToolReader
from ocserve.generation import ChatPrompt, Image, Message, Role, ToolCall
from ocserve.modelcard import ServedModel

__all__ = ["PARAMETERS", "encoder", "error_body", "load", "loaded", "parse"]

_MAX_MESSAGES = 8192
_MAX_CALLS = 128
_MAX_NAME = 256

FUNCTION = fields.table(
    Field("name", "effective", fields.string(_MAX_NAME, empty=False), required=True),
    Field("arguments", "effective", fields.pairs(1024), required=True),
    Field("index", "advisory", fields.integer(0, _MAX_CALLS)),
    Field("description", "advisory", fields.string(64 * 1024)),
)
CALL = fields.table(
    Field("function", "effective", fields.pairs(8), required=True, of=FUNCTION),
    Field("id", "effective", fields.string(_MAX_NAME)),
    Field("type", "advisory", fields.string(64)),
)
_ROLE: Reader[Role] = fields.word("system", "user", "assistant", "tool")
MESSAGE = fields.table(
    Field("role", "effective", _ROLE, required=True),
    Field("content", "effective", ollama_request.TEXT),
    Field("thinking", "effective", ollama_request.TEXT),
    Field("images", "effective", ollama_request.IMAGES),
    Field("tool_calls", "effective", fields.items(_MAX_CALLS), of=CALL),
    Field("tool_name", "effective", fields.string(_MAX_NAME)),
    Field("name", "effective", fields.string(_MAX_NAME)),
    Field("tool_call_id", "effective", fields.string(_MAX_NAME)),
)
PARAMETERS: tuple[Field, ...] = (
    Field("messages", "effective", fields.items(_MAX_MESSAGES), of=MESSAGE),
    Field("tools", "effective", fields.items(256), of=NESTED),
    *ollama_request.SHARED,
)
_TABLE = fields.table(*PARAMETERS)


def parse(body: bytes, models: Models, *, refuse_unknown: bool) -> Parsed:
    """The chat request in `body`."""
    values = fields.read(json_body.decode(body), _TABLE, refuse_unknown=refuse_unknown)
    model = ollama_request.model_of(values.get("model", str), models)
    messages = _Messages(model, refuse_unknown=refuse_unknown)
    turns = messages.read(fields.array(values.get("messages", list) or [], "messages", 1, _MAX_MESSAGES))
    reader = ToolReader(refuse_unknown=refuse_unknown, nested=True)
    tools = reader.tools(values.get("tools", list) or [])
    prompt = ChatPrompt(messages=turns, tools=tools, reasoning=ollama_request.reasoning(values))
    ignored = (*messages.ignored, *reader.ignored)
    return ollama_request.parsed(
        values, model, prompt, refuse_unknown=refuse_unknown, ignored=ignored, labels=messages.labels
    )


class _Messages:
    """Reads one request's messages. Calls of the history may have no ids: their results follow in the same order."""

    def __init__(self, model: ServedModel, *, refuse_unknown: bool) -> None:
        self._model = model
        self._refuse_unknown = refuse_unknown
        self._count = 0
        self._open: list[ToolCall] = []
        self.ignored: list[str] = []
        self.labels: dict[str, str] = {}  # fields that the engine may have no use for, and what they are here

    def read(self, given: Sequence[object]) -> tuple[Message, ...]:
        """The turns of `given`, the request's `messages`."""
        return tuple(self._message(item, f"messages[{index}]") for index, item in enumerate(given))

    def _fields(self, value: object, table: dict[str, Field], path: str) -> Values:
        values = fields.read(fields.mapping(value, path), table, refuse_unknown=self._refuse_unknown, path=path)
        self.ignored += values.ignored
        return values

    def _message(self, value: object, path: str) -> Message:
        values = self._fields(value, MESSAGE, path)
        role = values.made("role", _ROLE)
        assert role is not None
        calls = tuple(
            self._call(item, f"{path}.tool_calls[{index}]")
            for index, item in enumerate(values.get("tool_calls", list) or [])
        )
        if calls and role != "assistant":
            raise fields.unsupported(f"{path}.tool_calls", "only the assistant's messages have tool calls.")
        self._open += calls
        message = Message(
            role=role,
            content=values.get("content", str) or "",
            reasoning=values.get("thinking", str) or "",
            images=self.images(values, f"{path}.images"),
            tool_calls=calls,
        )
        return self._result(message, values) if role == "tool" else message

    def images(self, values: Values, path: str) -> tuple[Image, ...]:
        """A message's images: they stand before its text."""
        given = values.get("images", tuple) or ()
        if given:
            images.require_vision(self._model, path)
        return tuple(images.of_base64(text, f"{path}[{index}]") for index, text in enumerate(given))

    def _call(self, value: object, path: str) -> ToolCall:
        values = self._fields(value, CALL, path)
        inner = self._fields(values.get("function", dict), FUNCTION, f"{path}.function")
        self._count += 1
        return ToolCall(
            id=values.get("id", str) or f"call_{self._count}",
            name=inner.get("name", str) or "",
            arguments=json.dumps(inner.get("arguments", dict) or {}, ensure_ascii=False),
        )

    def _result(self, message: Message, values: Values) -> Message:
        """A tool's result, joined to the call that it answers: by id, by name, else the first that is still open."""
        given, name = values.get("tool_call_id", str), values.get("tool_name", str) or values.get("name", str)
        if given:
            self.labels["tool_call_id"] = "messages[].tool_call_id"
        for call in self._open:
            if (given or call.id) == call.id and (name or call.name) == call.name:
                self._open.remove(call)
                return replace(message, tool_call_id=call.id, name=call.name)
        return replace(message, tool_call_id=given or None, name=name or None)


class ChatEncoder(ReplyEncoder):
    """A chat reply."""

    _calls = 0  # that have left

    def _said(self, text: str, thinking: str, calls: Sequence[Block]) -> dict[str, object]:
        message: dict[str, object] = {"role": "assistant", "content": text}
        if thinking:
            message["thinking"] = thinking
        if calls:
            message["tool_calls"] = [
                {"function": {"index": index, "name": call.name, "arguments": call.arguments}}
                for index, call in enumerate(calls, self._calls)
            ]
            self._calls += len(calls)
        return {"message": message}


def encoder(reply: Reply) -> ChatEncoder:
    """A fresh encoder for one reply."""
    return ChatEncoder(reply)


def load(body: bytes, models: Models, *, refuse_unknown: bool) -> Load | None:
    """The load that `body` asks for if it has no messages."""

    def check(values: Values) -> None:
        ToolReader(refuse_unknown=refuse_unknown, nested=True).tools(values.get("tools", list) or [])

    return ollama_request.load(body, _TABLE, ("messages",), models, refuse_unknown=refuse_unknown, check=check)


def loaded(model: ServedModel, now: int) -> bytes:
    """The answer to a request without messages, which asks for the model to be loaded."""
    message = {"role": "assistant", "content": ""}
    head = {"model": model.id, "created_at": timestamp(now)}
    return dumps({**head, "message": message, "done": True, "done_reason": "load"})
