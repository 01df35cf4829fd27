"""What an answer must be: OpenAI's `response_format`, and the names that vLLM has for the same.

A schema is only looked at for its JSON type, a grammar for its length; what they say is for the engine's grammar
compiler to judge.
"""

from __future__ import annotations

import json
import re
from typing import Literal

from ocserve.api import fields
from ocserve.api.fields import Field, Reader, Values
from ocserve.errors import InvalidRequest
from ocserve.generation import Constraint, GrammarConstraint, JsonConstraint

# What the engine's compilers call what they refuse, whatever the client called it.
SCHEMA = "response_format.json_schema.schema"
GRAMMAR = "response_format.grammar"

Syntax = Literal["lark", "regex"]
_PATH = "response_format"
_TYPES = ("text", "json_object", "json_schema", "grammar")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MAX_DESCRIPTION = 64 * 1024
_MAX_GRAMMAR = 64 * 1024
_MAX_CHOICES = 256


def _schema() -> Reader[object]:
    def reader(value: object, where: str) -> object:
        return value if isinstance(value, bool) else fields.mapping(value, where)

    return Reader(reader, {"anyOf": [{"type": "object"}, {"type": "boolean"}]})


# The answer follows the schema with and without `strict`. OpenAI shows `name` and `description` to the model; here the
# prompt is what the messages say, so `description` is reported as ignored.
JSON_SCHEMA = fields.table(
    Field("name", "effective", fields.string(64, empty=False), required=True),
    Field("schema", "effective", _schema()),
    Field("strict", "effective", fields.boolean()),
    Field("description", "advisory", fields.string(_MAX_DESCRIPTION)),
)
_SYNTAX: Reader[Syntax] = fields.word("lark", "regex")
FORMAT = fields.table(
    Field("type", "effective", fields.word(*_TYPES), required=True),
    Field("json_schema", "effective", fields.pairs(8), of=JSON_SCHEMA),
    Field("grammar", "effective", fields.string(_MAX_GRAMMAR, empty=False)),
    Field("syntax", "effective", _SYNTAX),
)


def constraint(value: dict[str, object] | None, *, refuse_unknown: bool) -> tuple[Constraint | None, tuple[str, ...]]:
    """What the answer must be, None for text, and the paths of what was ignored."""
    if value is None:
        return None, ()
    form = fields.read(value, FORMAT, refuse_unknown=refuse_unknown, path=_PATH)
    kind = form.get("type", str)
    for name, owner in (("json_schema", "json_schema"), ("grammar", "grammar"), ("syntax", "grammar")):
        if name in form and kind != owner:
            where = f"{_PATH}.{name}"
            raise InvalidRequest(f"'{where}' is only allowed where '{_PATH}.type' is '{owner}'.", param=where)
    if kind == "json_schema":
        where = f"{_PATH}.json_schema"
        given = form.get("json_schema", dict)
        if given is None:
            raise fields.missing(where)
        body = fields.read(given, JSON_SCHEMA, refuse_unknown=refuse_unknown, path=where)
        return of_schema(body, where), (*form.ignored, *body.ignored)
    if kind == "grammar":
        text = form.get("grammar", str)
        if text is None:
            raise fields.missing(GRAMMAR)
        syntax = form.made("syntax", _SYNTAX) or "lark"
        return GrammarConstraint(text=text, syntax=syntax), form.ignored
    return (None if kind == "text" else JsonConstraint()), form.ignored


def of_schema(body: Values, where: str) -> JsonConstraint:
    """The constraint of what was read by `JSON_SCHEMA` at `where`."""
    name = body.get("name", str)
    if name is None:
        raise fields.missing(f"{where}.name")
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"Invalid '{where}.name': expected 1 to 64 letters, digits, underscores and dashes.", param=f"{where}.name"
        )
    # OpenAI lets the schema be absent; what remains is "a JSON object".
    schema = body.get("schema", object)
    return JsonConstraint(schema=None if schema is None else json.dumps(schema, ensure_ascii=False))


def _json_schema() -> Reader[JsonConstraint]:
    """A schema as an object, a boolean, or JSON text of one."""

    def reader(value: object, where: str) -> JsonConstraint:
        if isinstance(value, str):
            return JsonConstraint(schema=value)
        return JsonConstraint(schema=json.dumps(_schema()(value, where), ensure_ascii=False))

    return Reader(reader, {"anyOf": [{"type": "object"}, {"type": "boolean"}, {"type": "string"}]})


def _grammar(syntax: Syntax) -> Reader[GrammarConstraint]:
    text = fields.string(_MAX_GRAMMAR, empty=False)

    def reader(value: object, where: str) -> GrammarConstraint:
        return GrammarConstraint(text=text(value, where), syntax=syntax)

    return Reader(reader, text.schema)


def _one_of_several() -> Reader[GrammarConstraint]:
    """A few texts, of which the answer is one."""
    text = fields.string(_MAX_GRAMMAR, empty=False)

    def reader(value: object, where: str) -> GrammarConstraint:
        given = fields.array(value, where, 1, _MAX_CHOICES)
        texts = [text(item, f"{where}[{index}]") for index, item in enumerate(given)]
        return GrammarConstraint(text="|".join(map(_quoted, texts)), syntax="regex")

    return Reader(reader, {"type": "array", "items": text.schema, "minItems": 1, "maxItems": _MAX_CHOICES})


def _quoted(text: str) -> str:
    """A regular expression for `text` and nothing else; every sign that could mean something is escaped."""
    return "".join(rf"\x{{{ord(sign):x}}}" if sign.isascii() and not sign.isalnum() else sign for sign in text)


_READERS: dict[str, Reader[Constraint]] = {
    "json": _json_schema(),
    "regex": _grammar("regex"),
    "choice": _one_of_several(),
    "grammar": _grammar("lark"),
}
STRUCTURED = fields.table(*(Field(name, "effective", reader) for name, reader in _READERS.items()))


def _structured() -> Reader[object]:
    """OpenRouter's flag, which every answer here fulfils, or vLLM's object."""

    def reader(value: object, where: str) -> object:
        return value if isinstance(value, bool) else fields.mapping(value, where)

    inner = {name: {"anyOf": [reader.schema, {"type": "null"}]} for name, reader in _READERS.items()}
    flag_or_object = [{"type": "boolean"}, {"type": "object", "properties": inner, "additionalProperties": False}]
    return Reader(reader, {"anyOf": flag_or_object})


GUIDED: tuple[Field, ...] = (
    *(Field(f"guided_{name}", "effective", field.reader) for name, field in STRUCTURED.items()),
    Field("structured_outputs", "effective", _structured()),
)


def asked(values: Values, *, refuse_unknown: bool) -> tuple[Constraint | None, dict[str, str], tuple[str, ...]]:
    """The constraint of a request, under whichever name it stands: with it what the engine's names for it are to be
    read as, and the paths of what was ignored. Two of them are one too many."""
    made, ignored = constraint(values.get("response_format", dict), refuse_unknown=refuse_unknown)
    found: dict[str, Constraint] = {} if made is None else {_PATH: made}
    for name, reader in _READERS.items():
        if (one := values.made(f"guided_{name}", reader)) is not None:
            found[f"guided_{name}"] = one
    structured = values.get("structured_outputs", object)
    if isinstance(structured, dict):
        path = "structured_outputs"
        inner = fields.read(structured, STRUCTURED, refuse_unknown=refuse_unknown, path=path)
        for name, reader in _READERS.items():
            if (one := inner.made(name, reader)) is not None:
                found[f"{path}.{name}"] = one
    if len(found) > 1:
        first, second = list(found)[:2]
        raise InvalidRequest(f"'{second}' and '{first}' both say what the answer must be.", param=second)
    if not found or _PATH in found:
        return made, {}, ignored
    ((path, only),) = found.items()
    return only, {SCHEMA: path, GRAMMAR: path}, ignored
