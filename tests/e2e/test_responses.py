"""OpenAI's Responses on a real model, asked by the real `openai` client."""

from __future__ import annotations

import json

import openai
import pytest

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather at a place.",
    "parameters": {
        "type": "object",
        "properties": {"at": {"type": "string", "enum": ["Oslo", "Rome"]}},
        "required": ["at"],
        "additionalProperties": False,
    },
    "strict": True,
}


def test_a_stream_agrees_with_the_response_that_ends_it(client: openai.OpenAI) -> None:
    """With a whole answer it agrees on the scripted engine: a quantised model may round a second answer otherwise."""
    asked = {"model": "default", "input": "Name three colours.", "max_output_tokens": 24, "temperature": 0}
    whole = client.responses.create(**asked)  # type: ignore[call-overload]
    deltas, last = "", None
    for event in client.responses.create(**asked, stream=True):  # type: ignore[call-overload]
        deltas += event.delta if event.type == "response.output_text.delta" else ""
        last = event
    assert len(whole.output_text) > 10
    assert last is not None
    assert last.response.output_text == deltas
    assert len(deltas) > 10
    assert last.response.usage.input_tokens == whole.usage.input_tokens
    assert last.response.usage.output_tokens <= 24


def test_a_conversation_that_is_stored_goes_on(client: openai.OpenAI) -> None:
    first = client.responses.create(model="default", input="My name is Ada.", max_output_tokens=16, temperature=0)
    second = client.responses.create(
        model="default", input="What is my name?", previous_response_id=first.id, max_output_tokens=16, temperature=0
    )
    counted = client.responses.input_tokens.count(
        model="default", input="What is my name?", previous_response_id=first.id
    )
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens == counted.input_tokens
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    assert second.usage.input_tokens_details.cached_tokens > 0  # the first prompt at least


def test_a_call_that_is_demanded_is_made_and_its_result_is_read(client: openai.OpenAI) -> None:
    first = client.responses.create(
        model="default",
        input="What is the weather in Oslo?",
        tools=[WEATHER],  # type: ignore[list-item]
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=200,
        temperature=0,
    )
    [call] = [item for item in first.output if item.type == "function_call"]
    assert (first.status, call.name) == ("completed", "weather")
    assert json.loads(call.arguments)["at"] in ("Oslo", "Rome")
    second = client.responses.create(
        model="default",
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "rain"}],
        tools=[WEATHER],  # type: ignore[list-item]
        tool_choice="none",
        previous_response_id=first.id,
        max_output_tokens=24,
        temperature=0,
    )
    assert second.output_text


def test_an_answer_follows_its_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    answer = client.responses.create(
        model="default",
        input="Name a colour.",
        text={"format": {"type": "json_schema", "name": "colour", "schema": schema, "strict": True}},
        max_output_tokens=50,
    )
    assert json.loads(answer.output_text)["colour"] in ("red", "green", "blue")


@pytest.mark.filterwarnings("ignore:connect:DeprecationWarning")  # how the SDK uses its WebSocket library
def test_a_prompt_made_ready_on_a_websocket_is_not_computed_again(client: openai.OpenAI) -> None:
    rules = " ".join(f"Rule {number}: be kind to ship number {number}." for number in range(20))
    with client.responses.connect() as peer:

        def made(**fields: object) -> openai.types.responses.Response:
            peer.response.create(model="default", store=False, max_output_tokens=8, **fields)  # type: ignore[arg-type]
            for event in peer:
                if event.type in ("response.completed", "response.incomplete"):
                    return event.response
                assert event.type != "error", event
            raise AssertionError("the connection was closed")

        ready = made(generate=False, instructions=rules, input=[])
        assert (ready.status, ready.output) == ("completed", [])
        assert ready.usage is not None
        assert ready.usage.output_tokens == 0
        answer = made(previous_response_id=ready.id, instructions=rules, input="Hello!")
        assert answer.usage is not None
        assert answer.output_text
        assert answer.usage.input_tokens > answer.usage.input_tokens_details.cached_tokens > 150
