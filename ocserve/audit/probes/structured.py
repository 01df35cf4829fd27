"""Probes of structured output: a small corpus of schemas, each answer parsed and validated here."""

from __future__ import annotations

from typing import Any

import msgspec

from ocserve.audit.json_schema import mismatch
from ocserve.audit.server import dig
from ocserve.audit.subject import Subject, named, supported
from ocserve.audit.verdict import Fault, Refused, Unproven, clean, expect

_ASK = "Describe a ship as JSON."
_ROOM = 300  # tokens; every schema here is satisfied by far fewer


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_WORD = {"type": "string", "maxLength": 12}
_SMALL = {"type": "integer", "minimum": 0, "maximum": 99}
_FLAT: dict[str, Any] = {
    "strings and numbers": _object(name=_WORD, length=_SMALL, sunk={"type": "boolean"}),
    "enum and const": _object(kind={"enum": ["sail", "steam"]}, unit={"const": "m"}),
    "nullable": _object(owner={"type": ["string", "null"], "maxLength": 12}),
    "list": _object(masts={"type": "array", "items": _SMALL, "minItems": 2, "maxItems": 3}),
    "pattern": _object(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
}
_NESTED: dict[str, Any] = {
    "objects in objects": _object(ship=_object(engine=_object(power=_SMALL, fuel=_WORD), crew=_SMALL), port=_WORD),
    "list of objects": _object(
        crew={"type": "array", "items": _object(name=_WORD, age=_SMALL), "minItems": 1, "maxItems": 2}
    ),
    "anyOf": _object(cargo={"anyOf": [_object(tons=_SMALL), _object(people=_SMALL)]}),
    "definitions": {**_object(home={"$ref": "#/$defs/port"}), "$defs": {"port": _object(name=_WORD, depth=_SMALL)}},
    "recursion": {
        "$defs": {
            "part": {
                "type": "object",
                "properties": {"id": _SMALL, "parts": {"type": "array", "items": {"$ref": "#/$defs/leaf"}}},
                "required": ["id"],
                "additionalProperties": False,
            },
            "leaf": _object(id=_SMALL),
        },
        "$ref": "#/$defs/part",
    },
}


def _format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def _valid(text: str, finish: Any, schema: dict[str, Any], kind: str) -> bool:
    """Whether a finished answer is valid; one cut by its limit is no proof. Raises `Fault` for an invalid one."""
    expect(text.lstrip()[:1] == "{", f"the answer to the schema with {kind} does not begin as an object")
    if finish == "length":
        return False
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        raise Fault(f"the answer to the schema with {kind} is not JSON") from None
    if where := mismatch(value, schema):
        raise Fault(f"the answer to the schema with {kind} is not valid at {clean(where, 80)}")
    return True


async def _hold(subject: Subject, corpus: dict[str, Any], *, streamed: bool) -> str:
    complete = 0
    for kind, schema in corpus.items():
        given: dict[str, Any] = {"temperature": 0, "max_tokens": _ROOM, "response_format": _format(schema)}
        if streamed:
            stream = await subject.chat_stream(_ASK, **given)
            text, finish = stream.text, stream.finishes[0] if stream.finishes else None
        else:
            reply = await supported(subject.chat(_ASK, **given))
            text, finish = reply.text, reply.finish
        complete += _valid(text, finish, schema, kind)
    if 2 * complete < len(corpus):
        raise Unproven(f"{len(corpus) - complete} of {len(corpus)} answers were cut by their limit")
    return f"{complete} of {len(corpus)} answers finished, all of them valid"


async def schema_flat(subject: Subject) -> str:
    """Answers to flat schemas are JSON that validates."""
    return await _hold(subject, _FLAT, streamed=False)


async def schema_nested(subject: Subject) -> str:
    """Answers to nested schemas, with unions and references, are JSON that validates."""
    return await _hold(subject, _NESTED, streamed=False)


async def schema_stream(subject: Subject) -> str:
    """Streamed answers validate too."""
    return await _hold(subject, _FLAT, streamed=True)


async def schema_hot(subject: Subject) -> str:
    """Answers validate at a high temperature as well: the schema is enforced, not suggested."""
    schema = _FLAT["enum and const"]
    for seed in range(6):
        given = {"temperature": 2, "seed": seed, "max_tokens": _ROOM}
        reply = await supported(subject.chat("Write a poem.", response_format=_format(schema), **given))
        expect(_valid(reply.text, reply.finish, schema, "enum and const"), "a closed schema was not finished")
    return "6 answers at temperature 2 to a request for a poem, all valid"


async def schema_refused(subject: Subject) -> str:
    """A schema that is none is a 400, not ignored."""
    wrong: tuple[Any, ...] = ({"type": "no-such-type"}, {"type": "object", "properties": 5}, {"$ref": "#/$defs/none"})
    for schema in wrong:
        reply = await subject.refused(_ASK, response_format=_format(schema))
        expect(reply.status in (400, 422), f"a schema that is none is answered with status {reply.status}")
    reply = await subject.refused(_ASK, response_format={"type": "json_schema"})
    expect(reply.status in (400, 422), f"json_schema without a schema is answered with status {reply.status}")
    return f"{len(wrong) + 1} wrong schemas refused"


async def schema_limit(subject: Subject) -> str:
    """An object that its limit cuts is said to be cut."""
    schema = _object(text={"type": "string", "minLength": 60})
    reply = await supported(subject.chat(_ASK, temperature=0, max_tokens=8, response_format=_format(schema)))
    expect(reply.finish == "length", f"an object cut at 8 tokens ended with `{clean(reply.finish, 20)}`")
    return "finish reason `length`"


async def json_mode(subject: Subject) -> str:
    """`json_object` gives a JSON object."""
    finished = 0
    for thing in ("ship", "house", "tree"):
        # An example, so that small models come to an end.
        messages = [
            {"role": "user", "content": "A JSON object with the colour of the sky?"},
            {"role": "assistant", "content": '{"sky": "blue"}'},
            {"role": "user", "content": f"A JSON object with the colour of a {thing}?"},
        ]
        given = {"max_tokens": _ROOM, "temperature": 0, "response_format": {"type": "json_object"}}
        reply = await supported(subject.chat(messages=messages, **given))
        if reply.finish == "length":
            expect(reply.text.lstrip().startswith("{"), "the answer does not begin as an object")
            continue
        try:
            value = msgspec.json.decode(reply.text)
        except msgspec.DecodeError:
            raise Fault("the answer is not JSON") from None
        expect(isinstance(value, dict), "the answer is not an object")
        finished += 1
    if not finished:
        raise Unproven("all answers were cut by their limit")
    return f"{finished} of 3 answers finished, all of them objects"


async def structured_outputs(subject: Subject) -> str:
    """The flag `structured_outputs` is taken, or the listing names schemas among the model's features."""
    places = ("supported_parameters", "supported_features", "capabilities")
    listed = [name for place in places for name in (dig(subject.entry, place) or [])]
    if {"structured_outputs", "response_format"} & set(listed):
        return "named in the listing"
    schema = _FLAT["enum and const"]
    try:
        reply = await subject.chat(_ASK, response_format=_format(schema), structured_outputs=True, max_tokens=_ROOM)
    except Refused as refused:
        raise Fault(f"not supported: {refused}") from None
    _valid(reply.text, reply.finish, schema, "enum and const")
    return "the flag is taken"


PROBES = named(
    schema_flat, schema_nested, schema_stream, schema_hot, schema_refused, schema_limit, json_mode, structured_outputs
)
