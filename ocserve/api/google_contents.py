"""Google's `contents` and `systemInstruction`: from parts to the vocabulary's turns, with the exact path of what is
wrong.

Calls may come without ids; the answers to them then belong to the first call of the same function that has none.
"""

from __future__ import annotations

import json

from ocserve.api import fields, images, protojson, turns
from ocserve.api.fields import Field, Values
from ocserve.api.turns import Content
from ocserve.errors import InvalidRequest
from ocserve.generation import Image, Message, ToolCall
from ocserve.modelcard import ServedModel

MAX_CONTENTS = 8192
_MAX_PARTS = 1024
_MAX_NAME = 256
_TEXT = 64 * 1024 * 1024  # the body's own limit is far below

BLOB = protojson.table(
    Field("mimeType", "effective", fields.word(*images.MEDIA_TYPES), required=True),
    Field("data", "effective", fields.string(_TEXT, empty=False), required=True),
    Field("displayName", "advisory", fields.string(_MAX_NAME)),
)
CALL = protojson.table(
    Field("id", "effective", fields.string(_MAX_NAME)),
    Field("name", "effective", fields.string(_MAX_NAME, empty=False), required=True),
    Field("args", "effective", fields.mapping, shape={"type": "object"}),
)
RESPONSE = protojson.table(
    Field("id", "effective", fields.string(_MAX_NAME)),
    Field("name", "effective", fields.string(_MAX_NAME, empty=False), required=True),
    Field("response", "effective", fields.mapping, required=True, shape={"type": "object"}),
    Field("parts", "unsupported", fields.items(_MAX_PARTS), neutral=([],)),
    Field("willContinue", "unsupported", fields.boolean(), neutral=(False,)),
    Field("scheduling", "advisory", fields.string(64)),
)
# What a part may hold, one of these at a time.
_DATA = (
    Field("text", "effective", fields.string(_TEXT)),
    Field("inlineData", "effective", fields.pairs(8), of=BLOB),
    Field("functionCall", "effective", fields.pairs(8), of=CALL),
    Field("functionResponse", "effective", fields.pairs(8), of=RESPONSE),
)
_REFUSED = tuple(
    Field(name, "unsupported")
    for name in ("fileData", "executableCode", "codeExecutionResult", "toolCall", "toolResponse", "videoMetadata")
)
PART = protojson.table(
    *_DATA,
    *_REFUSED,
    Field("thought", "effective", fields.boolean()),
    Field("thoughtSignature", "effective", fields.string(_TEXT)),  # opaque, and none is ever ours
    Field("mediaResolution", "advisory", fields.pairs(8)),
    Field("partMetadata", "advisory", fields.pairs(64)),
)
CONTENT = protojson.table(
    Field("role", "effective", fields.word("user", "model", "function")),
    Field("parts", "effective", fields.items(_MAX_PARTS), required=True, of=PART),
)
TEXT = protojson.table(
    Field("role", "advisory", fields.string(64)),
    Field("parts", "effective", fields.items(_MAX_PARTS), required=True, of=PART),
)


class ContentReader:
    """Reads one request's conversation and gathers the names of what it ignored in it.

    `at` stands before all paths: a request may be part of another.
    """

    def __init__(self, model: ServedModel, at: str = "", *, refuse_unknown: bool) -> None:
        self._model = model
        self._at = at
        self._refuse_unknown = refuse_unknown
        self._calls = 0
        self._unanswered: list[ToolCall] = []
        self.ignored: list[str] = []
        self.labels: dict[str, str] = {}  # fields that the engine may have no use for, and what they are here

    def system(self, value: dict[str, object] | None) -> tuple[Message, ...]:
        """The turn that `systemInstruction` makes; none without text."""
        text = "" if value is None else self.text(value, f"{self._at}systemInstruction")
        return (Message(role="system", content=text),) if text else ()

    def text(self, value: object, where: str) -> str:
        """All that a content says which may only be text."""
        text = ""
        for values, at in self._parts(self._read(value, TEXT, where), where):
            if "text" not in values:
                raise InvalidRequest(f"'{at}' must be text.", param=at)
            text += values.get("text", str) or ""
        return text

    def contents(self, value: object) -> tuple[Message, ...]:
        """The turns of `contents`; consecutive ones of one side are one."""
        return turns.merged(
            turn
            for index, item in enumerate(fields.array(value, "contents", 1, MAX_CONTENTS))
            for turn in self._turns(item, f"{self._at}contents[{index}]")
        )

    def _read(self, value: object, table: dict[str, Field], path: str) -> Values:
        values = fields.read(fields.mapping(value, path), table, refuse_unknown=self._refuse_unknown, path=path)
        self.ignored += values.ignored
        return values

    def _turns(self, value: object, path: str) -> list[Message]:
        values = self._read(value, CONTENT, path)
        parts = self._parts(values, path)
        return [self._model_turn(parts)] if values.get("role", str) == "model" else self._user_turns(parts)

    def _parts(self, content: Values, path: str) -> list[tuple[Values, str]]:
        """Every part of a content, with its path; each holds one thing."""
        found = []
        for index, part in enumerate(content.get("parts", list) or []):
            where = f"{path}.parts[{index}]"
            values = self._read(part, PART, where)
            if sum(field.name in values for field in _DATA) != 1:
                names = ", ".join(field.name for field in _DATA)
                raise InvalidRequest(f"'{where}' must have exactly one of {names}.", param=where)
            found.append((values, where))
        return found

    def _user_turns(self, parts: list[tuple[Values, str]]) -> list[Message]:
        found: list[Message] = []
        said = Content()
        for values, where in parts:
            if values.get("thought", bool) or "functionCall" in values:
                name = "thought" if "thought" in values else "functionCall"
                raise InvalidRequest(f"'{where}.{name}' belongs to role 'model'.", param=f"{where}.{name}")
            if (answer := values.get("functionResponse", dict)) is not None:
                if said:
                    found.append(said.message("user"))
                    said = Content()
                found.append(self._answer(answer, f"{where}.functionResponse"))
            elif (blob := values.get("inlineData", dict)) is not None:
                said.add_image(self._image(blob, f"{where}.inlineData"))
            else:
                said.add_text(values.get("text", str) or "")
        return [*found, said.message("user")] if said or not found else found

    def _model_turn(self, parts: list[tuple[Values, str]]) -> Message:
        text, reasoning = "", ""
        calls: list[ToolCall] = []
        for values, where in parts:
            if (call := values.get("functionCall", dict)) is not None:
                calls.append(self._call(call, f"{where}.functionCall"))
            elif "text" not in values:
                name = "inlineData" if "inlineData" in values else "functionResponse"
                raise InvalidRequest(f"'{where}.{name}' belongs to role 'user'.", param=f"{where}.{name}")
            elif values.get("thought", bool):
                reasoning += values.get("text", str) or ""
            else:
                text += values.get("text", str) or ""
        self._unanswered += calls
        return Message(role="assistant", content=text, reasoning=reasoning, tool_calls=tuple(calls))

    def _image(self, value: object, where: str) -> Image:
        images.require_vision(self._model, where)
        return images.of_base64(self._read(value, BLOB, where).get("data", str) or "", f"{where}.data")

    def _call(self, value: object, where: str) -> ToolCall:
        values = self._read(value, CALL, where)
        self._calls += 1
        return ToolCall(
            id=values.get("id", str) or f"call_{self._calls}",
            name=values.get("name", str) or "",
            arguments=json.dumps(values.get("args", dict) or {}, ensure_ascii=False),
        )

    def _answer(self, value: object, where: str) -> Message:
        values = self._read(value, RESPONSE, where)
        name, given = values.get("name", str), values.get("id", str)
        if given:
            self.labels["tool_call_id"] = f"{self._at}contents[].parts[].functionResponse.id"
        for call in self._unanswered:
            if call.id == given if given else call.name == name:
                self._unanswered.remove(call)
                given = call.id
                break
        else:
            self._calls += 1  # the call is not in this conversation any more
        return Message(
            role="tool",
            name=name,
            tool_call_id=given or f"call_{self._calls}",
            content=json.dumps(values.get("response", dict), ensure_ascii=False),
        )
