"""OpenAI's `messages` array: from JSON to the vocabulary's turns, with the exact path of whatever is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from msgspec.structs import replace

from ocserve.api import fields, images, tools
from ocserve.api.fields import Field, Values
from ocserve.errors import InvalidRequest
from ocserve.generation import Image, Message, Role, ToolCall
from ocserve.modelcard import ServedModel

MAX_MESSAGES = 2048
MAX_IMAGES = 64
_MAX_PARTS = 1024
_MAX_CALLS = 128
_MAX_NAME = 256
_TEXT = 64 * 1024 * 1024  # the body's own limit is far below

_ROLES = get_args(Role)
_CACHE = Field("cache_control", "advisory", fields.pairs(8))

FUNCTION = fields.table(
    Field("name", "effective", fields.string(_MAX_NAME, empty=False), required=True),
    Field("arguments", "effective", fields.string(_TEXT), required=True),
    Field("parsed_arguments", "advisory"),  # what OpenAI's SDK made of them
)
CALL = fields.table(
    Field("id", "effective", fields.string(_MAX_NAME, empty=False), required=True),
    Field("type", "effective", fields.string(64)),
    Field("function", "effective", fields.pairs(8), required=True, of=FUNCTION),
    Field("index", "advisory", fields.integer(0, _MAX_CALLS)),
)
MESSAGE = fields.table(
    Field("role", "effective", fields.string(64), required=True, shape={"enum": list(_ROLES)}),
    Field("content", "effective", shape={"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1}]}),
    Field("name", "effective", fields.string(_MAX_NAME, empty=False)),
    Field("tool_call_id", "effective", fields.string(_MAX_NAME, empty=False)),
    Field("tool_calls", "effective", fields.items(_MAX_CALLS), of=CALL),
    Field("reasoning_content", "effective", fields.string(_TEXT)),
    Field("reasoning", "effective", fields.string(_TEXT)),
    Field("reasoning_details", "effective", fields.items(_MAX_PARTS)),
    Field("refusal", "effective", fields.string(_TEXT)),
    Field("annotations", "advisory", fields.items(_MAX_PARTS)),
    Field("parsed", "advisory"),  # what OpenAI's SDK made of the content
    _CACHE,
    Field("audio", "unsupported"),
    Field("function_call", "unsupported"),
)
_TYPE = Field("type", "effective", fields.string(64), required=True)
TEXT_PART = fields.table(_TYPE, Field("text", "effective", fields.string(_TEXT), required=True), _CACHE)
REFUSAL_PART = fields.table(_TYPE, Field("refusal", "effective", fields.string(_TEXT), required=True), _CACHE)
IMAGE_URL = fields.table(
    Field("url", "effective", fields.string(_TEXT, empty=False), required=True),
    Field("detail", "advisory", fields.word("auto", "low", "high", "original")),
)
IMAGE_PART = fields.table(_TYPE, Field("image_url", "effective", fields.pairs(8), required=True, of=IMAGE_URL), _CACHE)
_PARTS = {"text": TEXT_PART, "refusal": REFUSAL_PART, "image_url": IMAGE_PART}
_REFUSED_PARTS = ("input_audio", "file", "video_url", "input_video")
# Whose words may hold parts of other types than text.
_SHOWN_BY = {"image_url": ("user", "tool"), "refusal": ("assistant",)}


@dataclass(slots=True)
class _Content:
    """A message's content while its parts are read."""

    text: str = ""
    images: tuple[Image, ...] = ()


# Fields that only one role's messages have.
_OWNERS = {
    "tool_call_id": "tool",
    "tool_calls": "assistant",
    "reasoning_content": "assistant",
    "reasoning": "assistant",
    "reasoning_details": "assistant",
    "refusal": "assistant",
}


class MessageReader:
    """Reads one request's messages and gathers the names of what it ignored in them."""

    def __init__(self, model: ServedModel, *, refuse_unknown: bool) -> None:
        self._model = model
        self._refuse_unknown = refuse_unknown
        self._images = 0
        self.ignored: list[str] = []

    def read(self, value: object) -> tuple[Message, ...]:
        """The turns of `value`, the request's `messages`."""
        turns: list[Message] = []
        called: set[str] = set()
        for index, item in enumerate(fields.array(value, "messages", 1, MAX_MESSAGES)):
            turn = self._message(item, f"messages[{index}]")
            if turn.role == "tool" and turn.tool_call_id not in called:
                where = f"messages[{index}].tool_call_id"
                raise InvalidRequest(f"'{where}' answers no call of an earlier message.", param=where)
            called.update(call.id for call in turn.tool_calls)
            turns.append(turn)
        return tuple(turns)

    def _fields(self, value: object, table: dict[str, Field], path: str) -> Values:
        values = fields.read(fields.mapping(value, path), table, refuse_unknown=self._refuse_unknown, path=path)
        self.ignored += values.ignored
        return values

    def _message(self, value: object, path: str) -> Message:
        values = self._fields(value, MESSAGE, path)
        role = self._role(values, path)
        calls = self._tool_calls(values, path)
        call_id = values.get("tool_call_id", str)
        if role == "tool" and call_id is None:
            raise fields.missing(f"{path}.tool_call_id")
        reasoning = self._reasoning(values, path)
        content = values.get("content", object)
        if content is None:
            content = values.get("refusal", str)  # what the assistant said instead
        if content is None and not calls and not reasoning:
            raise fields.missing(f"{path}.content")
        said = _Content() if content is None else self._content(content, role, f"{path}.content")
        return Message(
            role=role,
            content=said.text,
            images=said.images,
            reasoning=reasoning,
            name=values.get("name", str),
            tool_call_id=call_id,
            tool_calls=calls,
        )

    def _role(self, values: Values, path: str) -> Role:
        """The message's role, after checking that it may have the fields it has."""
        given_role = values.get("role", str)
        if given_role == "function":
            raise fields.unsupported(
                f"{path}.role", "the role 'function' is deprecated; use 'tool' with 'tool_call_id'."
            )
        role: Role | None = next((known for known in _ROLES if known == given_role), None)
        if role is None:
            raise InvalidRequest(
                f"Invalid value for '{path}.role'. Supported values are: {', '.join(_ROLES)}.", param=f"{path}.role"
            )
        for name, owner in _OWNERS.items():
            given: object = values.get(name, object)
            if role != owner and given:
                raise InvalidRequest(f"'{path}.{name}' belongs to role '{owner}'.", param=f"{path}.{name}")
        return role

    def _reasoning(self, values: Values, path: str) -> str:
        """What the assistant thought, under whichever of its three names the client sends it back."""
        plain = values.get("reasoning_content", str) or values.get("reasoning", str)
        details: list[object] = values.get("reasoning_details", list) or []
        texts = [self._thought(item, f"{path}.reasoning_details[{index}]") for index, item in enumerate(details)]
        return plain if plain else "".join(texts)

    def _thought(self, value: object, path: str) -> str:
        """The text of one of `reasoning_details`; other vendors' signatures and ciphers say nothing to this model."""
        detail = fields.mapping(value, path)
        name = "summary" if detail.get("type") == "reasoning.summary" else "text"
        text = detail.get(name)
        if text is None:
            self.ignored.append(path)
            return ""
        return fields.string(_TEXT)(text, f"{path}.{name}")

    def _content(self, value: object, role: str, path: str) -> _Content:
        if isinstance(value, str):
            return _Content(value)
        if not isinstance(value, list):
            raise fields.wrong_type(path, "a string or an array of parts", value)
        texts: list[str] = []
        shown: list[Image] = []
        length = 0
        for index, item in enumerate(fields.array(value, path, 1, _MAX_PARTS)):
            part = self._part(item, role, f"{path}[{index}]")
            if isinstance(part, str):
                texts.append(part)
                length += len(part)
            else:
                shown.append(replace(part, at=length))
        return _Content("".join(texts), tuple(shown))

    def _part(self, value: object, role: str, path: str) -> str | Image:
        """A part's text, or its image."""
        kind = tools.kind(value, path, tuple(_PARTS), refused=_REFUSED_PARTS)
        if role not in _SHOWN_BY.get(kind, _ROLES):
            raise InvalidRequest(f"'{path}': a message of role '{role}' has no '{kind}'.", param=f"{path}.type")
        if kind == "image_url":
            images.require_vision(self._model, f"{path}.type")
        values = self._fields(value, _PARTS[kind], path)
        if kind != "image_url":
            return values.get(kind, str) or ""
        where = f"{path}.image_url"
        url = self._fields(values.get("image_url", dict), IMAGE_URL, where).get("url", str)
        assert url is not None
        self._images += 1
        if self._images > MAX_IMAGES:
            raise InvalidRequest(f"A request has at most {MAX_IMAGES} images.", param=path)
        return images.of_url(url, self._model, f"{where}.url")

    def _tool_calls(self, values: Values, path: str) -> tuple[ToolCall, ...]:
        given: list[object] = values.get("tool_calls", list) or []
        return tuple(self._tool_call(item, f"{path}.tool_calls[{index}]") for index, item in enumerate(given))

    def _tool_call(self, value: object, path: str) -> ToolCall:
        values = self._fields(value, CALL, path)
        if values.get("type", str) not in (None, "function"):
            raise fields.unsupported(f"{path}.type", "only calls of type 'function' are supported.")
        function = self._fields(values.get("function", dict), FUNCTION, f"{path}.function")
        call_id, name, arguments = values.get("id", str), function.get("name", str), function.get("arguments", str)
        assert call_id is not None
        assert name is not None
        assert arguments is not None
        return ToolCall(id=call_id, name=name, arguments=arguments)
