"""Invalid requests, made from an oracle of what each parameter may be that is written here by hand.

The oracle is independent of the dialects' own tables on purpose; `test_fields.py` proves that it has the same names.
"""

from __future__ import annotations

import json
import math
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


SHARED: dict[str, Valid] = {
    "model": lambda v: v == "tiny",
    "stream": boolean,
    "stream_options": lambda v: False,  # never valid without "stream": true
    "max_tokens": integer(1, 4096),
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
    "top_a": only(0, 0.0),
}
CHAT: dict[str, Valid] = {
    **SHARED,
    "messages": lambda v: False,  # nothing of the pool is a conversation
    "max_completion_tokens": integer(1, 4096),
    "parallel_tool_calls": boolean,
    "include_reasoning": boolean,
    "logprobs": only(False),
    "top_logprobs": only(0),
    "tools": only([]),
    "tool_choice": only("none", "auto"),
    "functions": only([]),
    "function_call": only("none", "auto"),
    "response_format": only({"type": "text"}, {"type": "json_object"}),
    "structured_outputs": only(False),
    "modalities": only(["text"]),
    "audio": only(),
    "prediction": only(),
    "reasoning": only({}, {"enabled": False}, {"effort": "none"}),
    "reasoning_effort": only("none"),
    "verbosity": only("medium"),
    "web_search_options": only(),
    "moderation": only(),
}
COMPLETION: dict[str, Valid] = {
    **SHARED,
    "prompt": lambda v: (
        isinstance(v, str)
        or (
            isinstance(v, list)
            and len(v) > 0
            and (all(integer(0, 2**24)(t) for t in v) or (len(v) == 1 and isinstance(v[0], str)))
        )
    ),
    "logprobs": only(),
    "echo": only(False),
    "best_of": only(1),
    "suffix": only(""),
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
        ([turn(role="assistant", audio={"id": "a"})], "messages[0].audio"),
        ([turn(role="assistant", function_call={"name": "f"})], "messages[0].function_call"),
        ([turn(role="assistant", refusal="No.")], "messages[0].refusal"),
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
