"""Tool calls of a real small model through the real client: its template knows no tools, and the calls hold."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

from tests.e2e.alike import alike

PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Tells the weather of a city.", "parameters": PLACE},
}
TIME: Any = {"type": "function", "function": {"name": "now", "description": "Tells the time."}}
QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


def ask(client: openai.OpenAI, **rest: Any) -> Any:
    given = {"messages": QUESTION, "tools": [WEATHER, TIME], "max_tokens": 200, "temperature": 0, "seed": 1, **rest}
    return client.chat.completions.create(model="default", **given)


def test_a_required_call_names_a_tool_and_validates(client: openai.OpenAI) -> None:
    choice = ask(client, tool_choice="required", parallel_tool_calls=False).choices[0]
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    assert call.id
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        jsonschema.validate(arguments, PLACE)
    else:
        assert (call.function.name, arguments) == ("now", {})
    assert not choice.message.content


def test_a_named_tool_is_called(client: openai.OpenAI) -> None:
    for name in ("get_weather", "now"):
        named = {"type": "function", "function": {"name": name}}
        choice = ask(client, tool_choice=named, parallel_tool_calls=False).choices[0]
        assert [call.function.name for call in choice.message.tool_calls] == [name]


@pytest.mark.parametrize("logprobs", [False, True])
def test_streamed_deltas_reassemble_to_the_whole(client: openai.OpenAI, logprobs: bool) -> None:
    rest = {"tool_choice": "required", "parallel_tool_calls": False, **({"logprobs": True} if logprobs else {})}
    whole = ask(client, **rest).choices[0]
    name, arguments, ids, reasons = "", "", [], []
    for chunk in ask(client, stream=True, **rest):
        for choice in chunk.choices:
            reasons += [choice.finish_reason] if choice.finish_reason else []
            for delta in choice.delta.tool_calls or []:
                ids += [delta.id] if delta.id else []
                name += delta.function.name or ""
                arguments += delta.function.arguments or ""
    [call] = whole.message.tool_calls
    assert alike(f"{name} {arguments}", f"{call.function.name} {call.function.arguments}")
    assert reasons == ["tool_calls"] == [whole.finish_reason]
    assert isinstance(json.loads(arguments), dict)
    assert len(ids) == 1


def test_without_a_choice_of_tools_the_model_may_answer_in_words(client: openai.OpenAI) -> None:
    for rest in ({"tool_choice": "none"}, {"tools": []}):
        choice = ask(client, max_tokens=20, **rest).choices[0]
        assert choice.message.content
        assert not choice.message.tool_calls


def test_a_conversation_with_calls_and_results_is_answered(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    history: Any = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "It is sunny in Paris, 21 degrees."},
    ]
    with_history = ask(client, messages=history, max_tokens=40)
    assert with_history.choices[0].message.content or with_history.choices[0].message.tool_calls
    assert with_history.usage.prompt_tokens > ask(client, max_tokens=1).usage.prompt_tokens + 20


def test_tools_beside_a_response_schema(client: openai.OpenAI) -> None:
    properties = {"ok": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["ok"], "additionalProperties": False}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    message = ask(client, response_format=wanted).choices[0].message
    if not message.tool_calls:
        jsonschema.validate(json.loads(message.content), schema)


def test_a_schema_that_cannot_be_held_to_is_refused_by_its_place(client: openai.OpenAI) -> None:
    bad: Any = {"type": "function", "function": {"name": "bad", "parameters": {"type": "object", "not": {}}}}
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(client, tools=[WEATHER, bad])
    assert refusal.value.param == "tools[1].function.parameters"
    assert "not" in refusal.value.message
