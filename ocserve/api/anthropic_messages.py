"""Anthropic's `system` and `messages`: from content blocks to the vocabulary's turns, with the exact path of what is
wrong.

A user turn may hold the results of several tools and text: each result becomes a turn of its own, in the order given.
"""

from __future__ import annotations

import json
import re

from ocserve.api import fields, images, tools, turns
from ocserve.api.fields import Field, Reader, Values
from ocserve.api.turns import Content
from ocserve.errors import InvalidRequest
from ocserve.generation import Image, Message, Role, ToolCall
from ocserve.modelcard import ServedModel

MAX_MESSAGES = 8192
_MAX_BLOCKS = 1024
_MAX_ID = 256
_TEXT = 64 * 1024 * 1024  # the body's own limit is far below

# Claude Code's first system block is a line for its own vendor's accounts, with a number that changes from request to
# request: kept, it would make every prompt new from its first token on.
NONCE = re.compile(r"x-anthropic-billing-header:[^\n]*\n?")
NONCE_NAME = "x-anthropic-billing-header"

_USER = ("text", "image", "tool_result")
_ASSISTANT = ("text", "thinking", "redacted_thinking", "tool_use")
_RESULT = ("text", "image")
_REFUSED = (
    "document", "search_result", "container_upload", "server_tool_use", "web_search_tool_result",
    "web_fetch_tool_result", "code_execution_tool_result", "bash_code_execution_tool_result",
    "text_editor_code_execution_tool_result", "tool_search_tool_result", "tool_reference", "browser_state",
    "mcp_tool_use", "mcp_tool_result", "compaction",
)  # fmt: skip

_TYPE = Field("type", "effective", fields.string(64), required=True)
_CACHE = Field("cache_control", "advisory", fields.pairs(8))

_ROLE: Reader[Role] = fields.word("user", "assistant", "system")
MESSAGE = fields.table(
    Field("role", "effective", _ROLE, required=True),
    Field("content", "effective", required=True, shape={"anyOf": [{"type": "string"}, {"type": "array"}]}),
    _CACHE,
)
TEXT = fields.table(
    _TYPE,
    Field("text", "effective", fields.string(_TEXT), required=True),
    Field("citations", "advisory", fields.items(_MAX_BLOCKS)),
    _CACHE,
)
SOURCE = fields.table(
    Field("type", "effective", fields.word("base64", "url", "file"), required=True),
    Field("media_type", "effective", fields.word(*images.MEDIA_TYPES)),
    Field("data", "effective", fields.string(_TEXT, empty=False)),
    Field("url", "unsupported", fields.string(_TEXT)),
    Field("file_id", "unsupported", fields.string(_MAX_ID)),
)
IMAGE = fields.table(
    _TYPE,
    Field("source", "effective", fields.pairs(8), required=True, of=SOURCE),
    Field("transformations", "advisory", fields.pairs(16)),
    _CACHE,
)
TOOL_USE = fields.table(
    _TYPE,
    Field("id", "effective", fields.string(_MAX_ID, empty=False), required=True),
    Field("name", "effective", fields.string(_MAX_ID, empty=False), required=True),
    Field("input", "effective", fields.mapping, required=True, shape={"type": "object"}),
    Field("caller", "advisory", fields.pairs(8)),
    _CACHE,
)
TOOL_RESULT = fields.table(
    _TYPE,
    Field("tool_use_id", "effective", fields.string(_MAX_ID, empty=False), required=True),
    Field("content", "effective", shape={"anyOf": [{"type": "string"}, {"type": "array"}]}),
    Field("is_error", "effective", fields.boolean()),
    Field("toolset_name", "advisory", fields.string(_MAX_ID)),
    _CACHE,
)
THINKING = fields.table(
    _TYPE,
    Field("thinking", "effective", fields.string(_TEXT), required=True),
    Field("signature", "effective", fields.string(_TEXT)),  # ours is a digest: nothing follows from a wrong one
    _CACHE,
)
REDACTED = fields.table(_TYPE, Field("data", "effective", fields.string(_TEXT), required=True))


class MessageReader:
    """Reads one request's conversation and gathers the names of what it ignored in it."""

    def __init__(self, model: ServedModel, *, refuse_unknown: bool) -> None:
        self._model = model
        self._refuse_unknown = refuse_unknown
        self._names: dict[str, str] = {}  # of the tool that a call's id called
        self.ignored: list[str] = []

    def system(self, value: object) -> tuple[Message, ...]:
        """The turn that `value`, the request's `system`, makes; none without text."""
        if value is None:
            return ()
        if isinstance(value, str):
            texts = [value]
        elif isinstance(value, list):
            texts = [
                self._text(block, f"system[{index}]")
                for index, block in enumerate(fields.array(value, "system", 0, _MAX_BLOCKS))
                if tools.kind(block, f"system[{index}]", ("text",))
            ]
        else:
            raise fields.wrong_type("system", "a string or an array of text blocks", value)
        if texts and (nonce := NONCE.match(texts[0])):
            texts[0] = texts[0][nonce.end() :]
            self.ignored.append(NONCE_NAME)
        content = "".join(texts)
        return (Message(role="system", content=content),) if content else ()

    def messages(self, value: object) -> tuple[Message, ...]:
        """The turns of `value`, the request's `messages`; consecutive ones of one side are one."""
        return turns.merged(
            turn
            for index, item in enumerate(fields.array(value, "messages", 1, MAX_MESSAGES))
            for turn in self._turns(item, f"messages[{index}]")
        )

    def _read(self, value: object, table: dict[str, Field], path: str) -> Values:
        values = fields.read(fields.mapping(value, path), table, refuse_unknown=self._refuse_unknown, path=path)
        self.ignored += values.ignored
        return values

    def _turns(self, value: object, path: str) -> list[Message]:
        values = self._read(value, MESSAGE, path)
        role, content = values.made("role", _ROLE), values.get("content", object)
        assert role is not None
        path = f"{path}.content"
        if isinstance(content, str):
            return [Message(role=role, content=content)]
        if not isinstance(content, list):
            raise fields.wrong_type(path, "a string or an array of content blocks", content)
        blocks = [
            (block, f"{path}[{index}]") for index, block in enumerate(fields.array(content, path, 0, _MAX_BLOCKS))
        ]
        if role == "assistant":
            return [self._assistant(blocks)]
        if role == "system":
            known = ("text",)
            texts = [self._text(block, where) for block, where in blocks if tools.kind(block, where, known)]
            return [Message(role="system", content="".join(texts))]
        return self._user(blocks)

    def _user(self, blocks: list[tuple[object, str]]) -> list[Message]:
        found: list[Message] = []
        said = Content()
        for block, where in blocks:
            kind = tools.kind(block, where, _USER, refused=_REFUSED)
            if kind == "tool_result":
                if said:
                    found.append(said.message("user"))
                    said = Content()
                found.append(self._result(block, where))
            else:
                self._add(said, kind, block, where)
        return [*found, said.message("user")] if said or not found else found

    def _add(self, content: Content, kind: str, block: object, where: str) -> None:
        """Put one block of text, or an image, behind what `content` has."""
        if kind == "text":
            content.add_text(self._text(block, where))
        else:
            content.add_image(self._image(block, where))

    def _text(self, block: object, where: str) -> str:
        return self._read(block, TEXT, where).get("text", str) or ""

    def _image(self, block: object, where: str) -> Image:
        images.require_vision(self._model, f"{where}.type")
        given = self._read(block, IMAGE, where).get("source", dict)
        where = f"{where}.source"
        source = self._read(given, SOURCE, where)
        if source.get("type", str) != "base64":
            raise fields.unsupported(f"{where}.type", "images are taken from base64 only; nothing is fetched.")
        if "media_type" not in source:
            raise fields.missing(f"{where}.media_type")
        if (data := source.get("data", str)) is None:
            raise fields.missing(f"{where}.data")
        return images.of_base64(data, f"{where}.data")

    def _result(self, block: object, where: str) -> Message:
        values = self._read(block, TOOL_RESULT, where)
        call = values.get("tool_use_id", str)
        given = values.get("content", object)
        content = Content("Error: " if values.get("is_error", bool) else "")  # templates have no other place for it
        if isinstance(given, str):
            content.add_text(given)
        elif isinstance(given, list):
            for index, part in enumerate(fields.array(given, f"{where}.content", 0, _MAX_BLOCKS)):
                at = f"{where}.content[{index}]"
                self._add(content, tools.kind(part, at, _RESULT, refused=_REFUSED), part, at)
        elif given is not None:
            raise fields.wrong_type(f"{where}.content", "a string or an array of content blocks", given)
        assert call is not None
        return content.message("tool", tool_call_id=call, name=self._names.get(call))

    def _assistant(self, blocks: list[tuple[object, str]]) -> Message:
        text, reasoning = "", ""
        calls: list[ToolCall] = []
        for block, where in blocks:
            match tools.kind(block, where, _ASSISTANT, refused=_REFUSED):
                case "text":
                    text += self._text(block, where)
                case "thinking":
                    reasoning += self._read(block, THINKING, where).get("thinking", str) or ""
                case "redacted_thinking":
                    self._read(block, REDACTED, where)
                    self.ignored.append(where)  # another server's secret: there is nothing to read in it
                case _:
                    calls.append(self._call(block, where))
        return Message(role="assistant", content=text, reasoning=reasoning, tool_calls=tuple(calls))

    def _call(self, block: object, where: str) -> ToolCall:
        values = self._read(block, TOOL_USE, where)
        name, call = values.get("name", str), values.get("id", str)
        assert name is not None
        assert call is not None
        if call in self._names:
            raise InvalidRequest(f"Invalid '{where}.id': two calls have this id.", param=f"{where}.id")
        self._names[call] = name
        return ToolCall(id=call, name=name, arguments=json.dumps(values.get("input", dict), ensure_ascii=False))
