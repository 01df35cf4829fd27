"""Invalid requests, made from an oracle of what each parameter may be that is written here by hand.

The oracle is independent of the dialects' own tables on purpose; `test_fields.py` proves that it has the same names.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Valid = Callable[[Any], bool]


def number(low: float, high: float, above: bool = False) -> Valid:
    return lambda v: type(v) in (int, float) and math.isfinite(v) and (low < v if above else low <= v) and v <= high


def integer(low: int, high: int) -> Valid:
    return lambda v: type(v) is int and low <= v <= high


def text(most: int, least: int = 0) -> Valid:
    return lambda v: isinstance(v, str) and least <= len(v.encode("utf-8", "surrogatepass")) <= most


def only(*values: Any) -> Valid:
    return lambda v: any(type(v) is type(value) and v == value for value in values)


def boolean(v: Any) -> bool:
    return isinstance(v, bool)


def mapping(most: int) -> Valid:
    return lambda v: isinstance(v, dict) and len(v) <= most


def stop(v: Any) -> bool:
    one = text(256, 1)
    return one(v) or (isinstance(v, list) and len(v) <= 4 and all(map(one, v)))


def biases(v: Any) -> bool:
    return (
        isinstance(v, dict)
        and len(v) <= 1024
        and all(key.isdigit() and int(key) < 2**24 and number(-100, 100)(bias) for key, bias in v.items())
    )


def strings(most: int, bytes_each: int, least: int = 0) -> Valid:
    one = text(bytes_each, 1)
    return lambda v: isinstance(v, list) and least <= len(v) <= most and all(map(one, v))


GRAMMAR = text(64 * 1024, 1)


def schema(v: Any) -> bool:
    return isinstance(v, dict | bool)


def structured(v: Any) -> bool:
    return isinstance(v, bool) or v == {}


GUIDED: dict[str, Valid] = {
    "guided_json": lambda v: schema(v) or isinstance(v, str),
    "guided_regex": GRAMMAR,
    "guided_choice": strings(256, 64 * 1024, 1),
    "guided_grammar": GRAMMAR,
    "structured_outputs": structured,
    "response_format": only({"type": "text"}, {"type": "json_object"}),
}
INT = 2**31 - 1
SHARED: dict[str, Valid] = {
    "model": lambda v: v == "tiny",
    "stream": boolean,
    "stream_options": lambda v: False,  # never valid without "stream": true
    "temperature": number(0, 2),
    "top_p": number(0, 1, above=True),
    "top_k": integer(0, 2**31 - 1),
    "min_p": number(0, 1),
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "repetition_penalty": number(0.01, 2),
    "seed": integer(-(2**63), 2**63 - 1),
    "logit_bias": biases,
    "stop": stop,
    "user": text(1024),
    "metadata": mapping(16),
    "safety_identifier": text(1024),
    "session_id": text(1024),
    "prompt_cache_key": text(1024),
    "prompt_cache_options": mapping(8),
    "prompt_cache_retention": text(64),
    "cache_control": mapping(8),
    "usage": mapping(8),
    "service_tier": only("auto", "default"),
    "store": only(False),
    "n": integer(1, 16),
    "top_a": number(0, 1),
    "repeat_last_n": integer(-1, INT),
    "typical_p": number(0, 1, above=True),
    "top_n_sigma": number(-1, 100),
    "dynatemp_range": number(0, 2),
    "dynatemp_exponent": number(0, 100),
    "dry_multiplier": number(0, 100),
    "dry_base": number(1, 100),
    "dry_allowed_length": integer(0, INT),
    "dry_penalty_last_n": integer(-1, INT),
    "dry_sequence_breakers": strings(32, 256),
    "xtc_probability": number(0, 1),
    "xtc_threshold": number(0, 1),
    "mirostat": integer(0, 2),
    "mirostat_tau": number(0, 100),
    "mirostat_eta": number(0, 1),
    **GUIDED,
}
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
CHAT: dict[str, Valid] = {
    **SHARED,
    "messages": lambda v: False,  # nothing of the pool is a conversation
    "max_tokens": integer(1, 4096),
    "max_completion_tokens": integer(1, 4096),
    "logprobs": boolean,
    "top_logprobs": only(0),  # more of them need "logprobs": true
    "tools": only([]),
    "tool_choice": only("none", "auto"),
    "parallel_tool_calls": boolean,
    "functions": only([]),
    "function_call": only("none", "auto"),
    "modalities": only(["text"]),
    "audio": only(),
    "prediction": only(),
    "include_reasoning": boolean,
    "reasoning": only({}),
    "reasoning_effort": only("none"),  # this model does not reason
    "chat_template_kwargs": only({}),
    "verbosity": only("low", "medium", "high", "xhigh", "max"),
    "web_search_options": only(),
    "moderation": only(),
}


def ids(v: Any) -> bool:
    return isinstance(v, list) and len(v) > 0 and all(integer(0, 2**24)(token) for token in v)


def several(v: Any) -> bool:
    return isinstance(v, list) and len(v) > 0 and (all(isinstance(p, str) for p in v) or all(map(ids, v)))


COMPLETION: dict[str, Valid] = {
    **SHARED,
    "prompt": lambda v: isinstance(v, str) or ids(v) or several(v),
    "max_tokens": integer(0, 4096),
    "logprobs": integer(0, 5),
    "echo": boolean,
    "best_of": integer(0, 20),
    "suffix": text(2**26),
}

# JSON texts that Python's reader takes, as the oracle needs; `WHOLE` is what must be refused whatever field it is in.
POOL = (
    "true",
    "false",
    '"1"',
    '""',
    '"none"',
    '"\\u0000"',
    '"x y"',
    "[]",
    "{}",
    "[1]",
    "[null]",
    '["a"]',
    '["a","b","c","d","e"]',
    '[""]',
    "[[]]",
    "[[[1]]]",
    '{"a":1}',
    '{"type":"json_object"}',
    '{"5":101}',
    '{"-1":1}',
    '{"1.5":1}',
    '{"16777216":1}',
    '{"5":"1"}',
    '{"5":true}',
    "0",
    "-0.0",
    "1",
    "-1",
    "2",
    "3",
    "100",
    "101",
    "0.5",
    "1.5",
    "-0.5",
    "2.0000001",
    "-2.0000001",
    "4097",
    "2147483647",
    "2147483648",
    "4294967296",
    "9007199254740993",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775809",
    "99999999999999999999999999",
    "1e308",
    "1e400",
    "-1e400",
    "1e-400",
    json.dumps("x" * 300),
    json.dumps("x" * 1100),
    json.dumps({str(i): 0 for i in range(1025)}),
    json.dumps(list(range(200))),
    json.dumps({f"k{i}": i for i in range(20)}),
)
WHOLE = (
    "NaN",
    "Infinity",
    "-Infinity",
    '"\\ud800"',
    '"\\udc00x"',
    '{"a":1,"a":2}',
    "9" * 40,
    "1" * 5000,
    "01",
    "+1",
    ".5",
    "1.",
    "0x10",
    "nan",
    "True",
    "'a'",
    "[1,]",
    '{"a":1,}',
    "{a:1}",
    '"\n"',
    '"\\x41"',
    '"',
    "[",
    "{",
    '{"a"}',
    "undefined",
    "[" * 100 + "]" * 100,
    '{"a":' * 100 + "1" + "}" * 100,
    "1 2",
    "",
    "/*x*/1",
)


FUNCTION = {"name": "f", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
IMAGE = {"url": "data:image/png;base64,iVBORw0K"}
_HERE = "<value>"
NEVER: Valid = lambda v: False  # noqa: E731
TEXT = text(2**26)
NAME = text(256, 1)
WORD = text(64)


@dataclass(frozen=True)
class Table:
    """The parameters of an object inside a chat request: at `path`, in `base` when they are all well."""

    path: str
    base: dict[str, Any]
    oracle: dict[str, Valid]


# Every object inside a chat request. A model that sees and reasons is asked.
TABLES = (
    Table(
        "stream_options",
        {"stream": True, "stream_options": {}},
        {"include_usage": boolean, "include_obfuscation": boolean},
    ),
    Table(
        "response_format",
        {"response_format": {"type": "text"}},
        {"type": only("text", "json_object"), "json_schema": NEVER, "grammar": NEVER, "syntax": NEVER},
    ),
    Table(
        "response_format",
        {"response_format": {"type": "grammar", "grammar": "start: A"}},
        {"type": only("grammar"), "grammar": GRAMMAR, "syntax": only("lark", "regex")},
    ),
    Table(
        "response_format.json_schema",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
        {
            "name": lambda v: isinstance(v, str) and 0 < len(v) <= 64 and v.isascii() and v.replace("_", "").isalnum(),
            "schema": schema,
            "strict": boolean,
            "description": text(64 * 1024),
        },
    ),
    Table("tools[0]", {"tools": TOOLS}, {"type": only("function"), "function": NEVER, "cache_control": mapping(8)}),
    Table(
        "tools[0].function",
        {"tools": TOOLS},
        {
            "name": lambda v: isinstance(v, str) and 0 < len(v) <= 128 and v.isascii() and v.isalnum(),
            "description": text(64 * 1024),
            "parameters": lambda v: isinstance(v, dict) and v.get("type", "object") == "object",
            "strict": boolean,
        },
    ),
    Table(
        "tool_choice",
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"type": only("function"), "function": NEVER},
    ),
    Table(
        "tool_choice.function",
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"name": only("f")},
    ),
    Table(
        "tool_choice.allowed_tools",
        {
            "tools": TOOLS,
            "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": TOOLS[:0]}},
        },
        {"mode": NEVER, "tools": NEVER},
    ),
    Table(
        "reasoning",
        {"reasoning": {}},
        {
            "effort": only(*EFFORTS),
            "max_tokens": integer(0, INT),
            "enabled": boolean,
            "exclude": boolean,
            "summary": only("auto", "concise", "detailed"),
        },
    ),
    Table(
        "chat_template_kwargs",
        {"chat_template_kwargs": {}},
        {"enable_thinking": boolean, "thinking": boolean, "reasoning_effort": only(*EFFORTS)},
    ),
    Table(
        "prediction",
        {"prediction": {"type": "content", "content": "x"}},
        {"type": only("content"), "content": lambda v: isinstance(v, str)},
    ),
    Table(
        "prediction.content[0]",
        {"prediction": {"type": "content", "content": [{"type": "text", "text": "x"}]}},
        {"type": only("text"), "text": TEXT},
    ),
    Table(
        "structured_outputs",
        {"structured_outputs": {}},
        {name: GUIDED[f"guided_{name}"] for name in ("json", "regex", "choice", "grammar")},
    ),
    Table(
        "messages[0]",
        {"messages": [{"role": "assistant", "content": "x"}]},
        {
            "role": only("system", "developer", "user", "assistant"),
            "content": lambda v: isinstance(v, str),
            "name": NAME,
            "tool_call_id": NEVER,
            "tool_calls": only([]),
            "reasoning_content": TEXT,
            "reasoning": TEXT,
            "reasoning_details": lambda v: v == [] or v == [{"a": 1}],
            "refusal": TEXT,
            "annotations": lambda v: isinstance(v, list),
            "parsed": lambda v: True,
            "cache_control": mapping(8),
            "audio": NEVER,
            "function_call": NEVER,
        },
    ),
    Table(
        "messages[0].content[0]",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
        {"type": only("text"), "text": TEXT, "cache_control": mapping(8)},
    ),
    Table(
        "messages[0].content[0]",
        {"messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "x"}]}]},
        {"type": only("refusal"), "refusal": TEXT},
    ),
    Table(
        "messages[0].content[0]",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": IMAGE}]}]},
        {"type": only("image_url"), "image_url": NEVER, "cache_control": mapping(8)},
    ),
    Table(
        "messages[0].content[0].image_url",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": IMAGE}]}]},
        {"url": NEVER, "detail": only("auto", "low", "high", "original")},
    ),
    Table(
        "messages[0].tool_calls[0]",
        {"messages": [{"role": "assistant", "tool_calls": [CALL]}]},
        {"id": NAME, "type": only("function"), "function": NEVER, "index": integer(0, 128)},
    ),
    Table(
        "messages[0].tool_calls[0].function",
        {"messages": [{"role": "assistant", "tool_calls": [CALL]}]},
        {"name": NAME, "arguments": TEXT, "parsed_arguments": lambda v: True},
    ),
)


@dataclass(frozen=True)
class Case:
    """One invalid body; `param` is what the error must name, `...` if it may name anything."""

    path: str
    body: bytes
    param: Any


def bodies(path: str, base: dict[str, Any], oracle: dict[str, Valid]) -> Iterator[Case]:
    """Every field with everything that it may not be."""
    for name, valid in oracle.items():
        rest = {key: value for key, value in base.items() if key != name}
        head = json.dumps(rest)[:-1] + (", " if rest else "")
        for value in POOL:
            if not valid(json.loads(value)):
                yield Case(path, f'{head}"{name}": {value}}}'.encode(), name)
        for value in WHOLE:
            yield Case(path, f'{head}"{name}": {value}}}'.encode(), ...)


def reach(request: Any, path: str) -> Any:
    """What stands at `path` in a request."""
    for name, index in re.findall(r"([a-z_]+)|\[(\d+)\]", path):
        request = request[name] if name else request[int(index)]
    return request


def nested(table: Table, base: dict[str, Any], *, valid: bool) -> Iterator[tuple[str, Case]]:
    """Every parameter of the object with everything of the pool that it may (not) be, and one that nobody knows."""
    for name, allowed in [*table.oracle.items(), ("unheard_of", NEVER)]:
        where = f"{table.path}.{name}"
        request = copy.deepcopy({**base, **table.base})
        reach(request, table.path)[name] = _HERE
        body = json.dumps(request)
        for value in POOL:
            if allowed(json.loads(value)) == valid:
                yield where, Case("/v1/chat/completions", body.replace(json.dumps(_HERE), value).encode(), where)


def message_cases(path: str) -> Iterator[Case]:
    """Everything that can be wrong inside `messages`, with its exact path."""
    good = {"role": "user", "content": "Hi"}
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}

    def turn(**fields: Any) -> dict[str, Any]:
        return {**good, **fields}

    def calls(**fields: Any) -> dict[str, Any]:
        return {"role": "assistant", "content": None, "tool_calls": [{**call, **fields}]}

    wrong: list[tuple[Any, str]] = [
        ([], "messages"),
        ([good] * 2049, "messages"),
        ([None], "messages[0]"),
        ([good, "x"], "messages[1]"),
        ([good, []], "messages[1]"),
        ([{"content": "x"}], "messages[0].role"),
        ([turn(role=1)], "messages[0].role"),
        ([turn(role="wizard")], "messages[0].role"),
        ([turn(role="function")], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "messages[0].content"),
        ([turn(reasoning="x")], "messages[0].reasoning"),
        ([turn(refusal="No.")], "messages[0].refusal"),
        ([turn(role="assistant", reasoning_details=[1])], "messages[0].reasoning_details[0]"),
        ([turn(role="assistant", reasoning_details=[{"text": 1}])], "messages[0].reasoning_details[0].text"),
        ([turn(content=[{"type": "refusal", "refusal": "x"}])], "messages[0].content[0].type"),
        ([good, turn(content=5)], "messages[1].content"),
        ([good, turn(content={"type": "text"})], "messages[1].content"),
        ([turn(content=[])], "messages[0].content"),
        ([turn(content=["x"])], "messages[0].content[0]"),
        ([turn(content=[{}])], "messages[0].content[0].type"),
        ([turn(content=[{"type": 1}])], "messages[0].content[0].type"),
        ([turn(content=[{"type": "poem"}])], "messages[0].content[0].type"),
        ([turn(content=[{"type": "text"}])], "messages[0].content[0].text"),
        ([turn(content=[{"type": "text", "text": "a"}, {"type": "text", "text": 1}])], "messages[0].content[1].text"),
        ([turn(content=[{"type": "text", "text": "a", "bold": 1}])], "messages[0].content[0].bold"),
        ([turn(content=[{"type": "image_url", "image_url": {"url": "x"}}])], "messages[0].content[0].type"),
        ([turn(content=[{"type": "input_audio"}])], "messages[0].content[0].type"),
        ([turn(content=[{"type": "file"}])], "messages[0].content[0].type"),
        ([turn(name=1)], "messages[0].name"),
        ([turn(name="")], "messages[0].name"),
        ([turn(name="x" * 300)], "messages[0].name"),
        ([turn(color="red")], "messages[0].color"),
        ([turn(tool_call_id="c1")], "messages[0].tool_call_id"),
        ([turn(tool_calls=[call])], "messages[0].tool_calls"),
        ([turn(role="tool")], "messages[0].tool_call_id"),
        ([turn(role="tool", tool_call_id=1)], "messages[0].tool_call_id"),
        ([turn(role="tool", tool_call_id="c")], "messages[0].tool_call_id"),  # which nobody called
        ([turn(role="assistant", audio={"id": "a"})], "messages[0].audio"),
        ([turn(role="assistant", function_call={"name": "f"})], "messages[0].function_call"),
        ([good, turn(role="assistant", tool_calls={})], "messages[1].tool_calls"),
        ([calls(id=None)], "messages[0].tool_calls[0].id"),
        ([calls(id=7)], "messages[0].tool_calls[0].id"),
        ([calls(type="custom")], "messages[0].tool_calls[0].type"),
        ([calls(function=None)], "messages[0].tool_calls[0].function"),
        ([calls(function=[])], "messages[0].tool_calls[0].function"),
        ([calls(function={"arguments": "{}"})], "messages[0].tool_calls[0].function.name"),
        ([calls(function={"name": "f"})], "messages[0].tool_calls[0].function.arguments"),
        ([calls(function={"name": "f", "arguments": {}})], "messages[0].tool_calls[0].function.arguments"),
        ([calls(extra=1)], "messages[0].tool_calls[0].extra"),
    ]
    for messages, param in wrong:
        yield Case(path, json.dumps({"model": "tiny", "messages": messages}).encode(), param)
