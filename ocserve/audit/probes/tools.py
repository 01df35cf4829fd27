"""Probes of tool calls: each returned call is parsed, looked up and validated here."""

from __future__ import annotations

from typing import Any

import msgspec

from ocserve.audit.json_schema import mismatch
from ocserve.audit.server import Reply, Stream, dig
from ocserve.audit.subject import Subject, named, supported
from ocserve.audit.verdict import Fault, Unproven, clean, expect

_ROOM = 300
_TRIES = 8  # at most; many a small model never makes two calls
_WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
_CLOCK = {
    "type": "object",
    "properties": {"zone": {"type": "string", "maxLength": 20}},
    "required": ["zone"],
    "additionalProperties": False,
}
_SCHEMAS = {"get_weather": _WEATHER, "get_time": _CLOCK}
_TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"{name} of a place", "parameters": schema}}
    for name, schema in _SCHEMAS.items()
]
_ASK = "What is the weather in Paris in degrees Celsius?"
_ASKS = (_ASK, "What is the weather in Rome in degrees Celsius?", "What is the weather in Oslo in Celsius?")
_BOTH = "Call get_weather for Paris and for Rome, and get_time for Paris. Make all three calls now."


def _named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _checked(calls: list[Any]) -> list[str]:
    """The names of valid calls; raises `Fault` for an invalid one."""
    names = []
    for call in calls:
        name, arguments = dig(call, "function", "name"), dig(call, "function", "arguments")
        expect(isinstance(dig(call, "id"), str) and call["id"], "a call has no id")
        expect(dig(call, "type") == "function", "a call's type is not `function`")
        expect(name in _SCHEMAS, "a call names a tool that was not given")
        expect(isinstance(arguments, str), "the arguments are not a text")
        try:
            value = msgspec.json.decode(arguments)
        except msgspec.DecodeError:
            raise Fault("the arguments of a call are not JSON") from None
        if where := mismatch(value, _SCHEMAS[name]):
            raise Fault(f"the arguments of a call do not validate at {clean(where, 60)}")
        names.append(name)
    expect(len({call["id"] for call in calls}) == len(calls), "two calls have one id")
    return names


def _ended(names: list[str], finish: Any) -> None:
    if names:
        expect(finish == "tool_calls", f"an answer with calls ended with `{clean(finish, 20)}`")


async def _called(subject: Subject, choice: Any, content: str = _ASK, **given: Any) -> tuple[Reply, list[str]]:
    """An answer and the names of its calls, which are valid; of an answer cut by its limit all but the last."""
    fields = {"temperature": 0, "max_tokens": _ROOM, "tools": _TOOLS, "tool_choice": choice, **given}
    reply = await supported(subject.chat(content, **fields))
    if choice != "auto":
        expect(reply.calls or not reply.text, "there is text instead of a call")
    if reply.finish == "length":
        return reply, _checked(reply.calls[:-1])
    names = _checked(reply.calls)
    _ended(names, reply.finish)
    return reply, names


async def tools_required(subject: Subject) -> str:
    """With `required` there is a call, of a given tool, whose arguments validate."""
    for question in _ASKS:
        reply, names = await _called(subject, "required", content=question)
        if reply.finish != "length":
            expect(names, "there is no call")
            return f"{', '.join(names)}, finish reason {reply.finish}"
    raise Unproven(f"the calls of {len(_ASKS)} answers were cut by their limit")


async def tools_named(subject: Subject) -> str:
    """A tool that is named is the one that is called."""
    for name in _SCHEMAS:
        reply, names = await _called(subject, _named(name))
        if reply.finish == "length":
            raise Unproven("the call was cut by its limit")
        expect(set(names) == {name}, "the call is not of the tool that was named")
    return f"each of {len(_SCHEMAS)} tools when named"


async def tools_none(subject: Subject) -> str:
    """With `none` there is text and no call."""
    reply = await supported(subject.chat(_ASK, tools=_TOOLS, tool_choice="none", max_tokens=24))
    expect(not reply.calls, "there is a call")
    expect(reply.finish != "tool_calls", "the finish reason is `tool_calls`")
    return f"finish reason {reply.finish}"


async def tools_auto(subject: Subject) -> str:
    """With `auto` the model decides; what it calls is valid."""
    made = 0
    for question in (_ASK, "Say hello.", "What time is it in the zone CET?"):
        reply, names = await _called(subject, "auto", content=question)
        expect(names or reply.text or reply.finish == "length", "there is neither text nor a call")
        made += bool(names)
    return f"{made} of 3 answers hold calls, all of them valid"


async def tools_stream(subject: Subject) -> str:
    """Streamed calls come as deltas that join to valid calls: index always, id and name once."""
    for question in _ASKS:
        stream = await subject.chat_stream(
            question, temperature=0, max_tokens=_ROOM, tools=_TOOLS, tool_choice="required"
        )
        calls = _joined(stream)
        if stream.finishes == ["length"]:
            continue
        names = _checked(calls)
        expect(names, "the stream has no call")
        _ended(names, stream.finishes[0] if stream.finishes else None)
        return f"{', '.join(names)} from {len(stream.chunks)} chunks"
    raise Unproven(f"the calls of {len(_ASKS)} streams were cut by their limit")


def _joined(stream: Stream) -> list[Any]:
    """The calls of a stream, put together as clients do."""
    calls: list[Any] = []
    for chunk in stream.chunks:
        for delta in dig(chunk, "choices", 0, "delta", "tool_calls") or []:
            index = dig(delta, "index")
            expect(isinstance(index, int) and 0 <= index <= len(calls), "a call's index is missing or skips one")
            if index == len(calls):
                expect(isinstance(dig(delta, "id"), str), "a call's first delta has no id")
                expect(isinstance(dig(delta, "function", "name"), str), "a call's first delta has no name")
                calls.append({"id": delta["id"], "type": dig(delta, "type"), "function": dict(delta["function"])})
                calls[index]["function"].setdefault("arguments", "")
                continue
            expect(dig(delta, "id") is None and dig(delta, "function", "name") is None, "an id or name is repeated")
            calls[index]["function"]["arguments"] += str(dig(delta, "function", "arguments") or "")
    return calls


async def tools_stream_equals_whole(subject: Subject) -> str:
    """A greedy call is the same streamed and whole."""
    given: dict[str, Any] = {
        "temperature": 0,
        "max_tokens": _ROOM,
        "tools": _TOOLS,
        "tool_choice": _named("get_weather"),
    }
    for question in _ASKS:  # a quantised model may tip between the two
        whole = await supported(subject.chat(question, **given))
        stream = await subject.chat_stream(question, **given)
        if _spoken(_joined(stream)) == _spoken(whole.calls):
            expect(whole.calls, "there is no call")
            return f"{len(whole.calls)} calls in both forms"
    raise Fault("the calls differ between stream and whole answer")


def _spoken(calls: list[Any]) -> list[tuple[Any, Any]]:
    return [(dig(call, "function", "name"), dig(call, "function", "arguments")) for call in calls]


async def tools_parallel(subject: Subject) -> str:
    """One answer may hold several calls; with parallel_tool_calls false it holds one."""
    most = 0
    for seed in range(_TRIES):
        given = {"temperature": 0.7 if seed else 0, "seed": seed, "max_tokens": 2 * _ROOM}
        _, names = await _called(subject, "required", content=_BOTH, parallel_tool_calls=True, **given)
        most = max(most, len(names))
        if most > 1:
            break
    _, alone = await _called(subject, "required", content=_BOTH, parallel_tool_calls=False)
    expect(len(alone) <= 1, "parallel_tool_calls false gave several calls")
    if most < 2:
        raise Unproven(f"the model never made two calls in one of {_TRIES} answers")
    return f"{most} calls in one answer; one with parallel_tool_calls false"


async def tools_parallel_stream(subject: Subject) -> str:
    """Several calls of one streamed answer have their own indices and join to valid calls."""
    for seed in range(_TRIES):
        stream = await subject.chat_stream(
            _BOTH, temperature=0.7 if seed else 0, seed=seed, max_tokens=2 * _ROOM, tools=_TOOLS,
            tool_choice="required", parallel_tool_calls=True,
        )  # fmt: skip
        calls = _joined(stream)
        expect(calls or not stream.text, "there is text instead of a call")
        calls = calls[:-1] if stream.finishes == ["length"] else calls
        if len(calls) > 1:
            return f"{', '.join(_checked(calls))} in one stream"
    raise Unproven(f"the model never made two calls in one of {_TRIES} streams")


async def tools_results(subject: Subject) -> str:
    """The results of several calls are taken as messages, and answered."""
    calls = [
        {"id": f"call_{i}", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
        for i, arguments in enumerate(('{"city":"Paris","unit":"C"}', '{"city":"Rome","unit":"C"}'))
    ]
    asked = [{"role": "user", "content": "What is the weather in Paris and Rome?"}]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": '{"degrees": 21}'} for call in calls]
    messages = [*asked, {"role": "assistant", "content": None, "tool_calls": calls}, *results]
    bare = await subject.chat(messages=asked, tools=_TOOLS, tool_choice="none", max_tokens=8)
    reply = await supported(subject.chat(messages=messages, tools=_TOOLS, tool_choice="none", max_tokens=8))
    grown = reply.used("prompt_tokens") - bare.used("prompt_tokens")
    expect(grown > 20, "calls and results were dropped: the prompt's count hardly grew")
    return f"two calls and their results, {grown} tokens of the prompt"


async def tools_refused(subject: Subject) -> str:
    """Tools and choices that are none are a 400."""
    wrong: tuple[dict[str, Any], ...] = (
        {"tools": _TOOLS, "tool_choice": "sometimes"},
        {"tools": _TOOLS, "tool_choice": _named("no_such_tool")},
        {"tools": [{"type": "function"}]},
        {"tools": "get_weather"},
    )
    for fields in wrong:
        reply = await subject.refused(_ASK, **fields)
        expect(reply.status in (400, 422), f"a wrong tool or choice is answered with status {reply.status}")
    return f"{len(wrong)} wrong requests"


async def tools_count(subject: Subject) -> str:
    """Tools count as part of the prompt: they are not dropped."""
    bare = await subject.chat(_ASK, max_tokens=1)
    told = await supported(subject.chat(_ASK, max_tokens=1, tools=_TOOLS, tool_choice="none"))
    auto = await supported(subject.chat(_ASK, max_tokens=1, tools=_TOOLS))
    counts = [reply.used("prompt_tokens") for reply in (bare, told, auto)]
    expect(max(counts[1:]) > counts[0], "tools do not change the prompt's count")
    return f"{counts[0]} tokens without, {max(counts[1:])} with two tools"


PROBES = named(
    tools_required, tools_named, tools_none, tools_auto, tools_stream, tools_stream_equals_whole, tools_parallel,
    tools_parallel_stream, tools_results, tools_refused, tools_count,
)  # fmt: skip
