"""The real Anthropic client against the real server: messages whole and streamed, a tool loop, thinking, errors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic.types import TextBlock, ThinkingBlock, ToolUseBlock

from ocserve.generation import ChatPrompt, EncodeRequest, GenerateRequest, Message, ReasoningDelta, ToolCallDelta
from tests.http.harness import KEY, Served, serving
from tests.scripted import Script, ScriptedEngine

BASE: dict[str, Any] = {"model": "tiny", "max_tokens": 100, "messages": [{"role": "user", "content": "Hi"}]}
WEATHER: Any = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALLS = Script(
    tokens=(
        ReasoningDelta(text="Two cities.", tokens=3),
        "I ask.",
        ToolCallDelta(call=0, name="weather", tokens=1),
        ToolCallDelta(call=0, arguments='{"city": ', tokens=2),
        ToolCallDelta(call=0, arguments='"Bern"}', tokens=2),
        ToolCallDelta(call=1, name="weather", arguments='{"city": "Rome"}', tokens=4),
    ),
    reason="tool_calls",
    prompt_tokens=20,
    cached_tokens=8,
    reasoning_tokens=3,
)


def client(served: Served, key: str = "any") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.url, api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def agent() -> Iterator[Served]:
    """A server that asks for the weather, and says something once it has been told."""

    def script(request: GenerateRequest) -> Script:
        prompt = request.prompt
        return Script() if any(turn.role == "tool" for turn in prompt.messages) else CALLS  # type: ignore[union-attr]

    with serving(lambda: ScriptedEngine(script)) as server:
        yield server


def test_a_message_whole_and_streamed(served: Served) -> None:
    with client(served) as api:
        whole = api.messages.create(**BASE, system="Be terse.", extra_body={"temperature": 0.5, "top_k": 5})
        (block,) = whole.content
        assert isinstance(block, TextBlock)
        assert (block.text, whole.stop_reason, whole.role, whole.model) == (
            "Hello, world!",
            "end_turn",
            "assistant",
            "tiny",
        )
        assert (whole.usage.input_tokens, whole.usage.output_tokens) == (7, 4)
        assert whole._request_id
        with api.messages.stream(**BASE) as stream:
            assert "".join(stream.text_stream) == "Hello, world!"
            final = stream.get_final_message()
        assert [part.to_dict()["text"] for part in final.content] == ["Hello, world!"]
        assert final.usage.output_tokens == 4
        cut = api.messages.create(**{**BASE, "max_tokens": 2})
        assert cut.stop_reason == "max_tokens"


def test_the_bytes_of_a_stream(served: Served) -> None:
    answer = served.request("POST", "/v1/messages", {**BASE, "stream": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    assert re.fullmatch(rb"(event: (\w+)\ndata: \{\"type\":\"\2\"[^\n]*\n\n)+", answer.body)
    names = re.findall(rb"event: (\w+)", answer.body)
    assert [name.decode() for name in names] == [
        "message_start", "ping", "content_block_start", *["content_block_delta"] * 4, "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_loop(agent: Served, streamed: bool) -> None:
    asked: dict[str, Any] = {**BASE, "tools": [WEATHER], "thinking": {"type": "adaptive"}}
    with client(agent) as api:
        if streamed:
            with api.messages.stream(**asked) as stream:
                answer: Any = stream.get_final_message()
        else:
            answer = api.messages.create(**asked)
        thought, text, *calls = answer.content
        assert isinstance(thought, ThinkingBlock)
        assert (thought.thinking, bool(thought.signature)) == ("Two cities.", True)
        assert text.text == "I ask."
        assert all(isinstance(call, ToolUseBlock) for call in calls)
        assert [(call.name, call.input) for call in calls] == [
            ("weather", {"city": "Bern"}),
            ("weather", {"city": "Rome"}),
        ]
        assert len({call.id for call in calls}) == 2
        assert answer.stop_reason == "tool_use"
        assert (answer.usage.input_tokens, answer.usage.cache_read_input_tokens) == (12, 8)
        results = [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"} for call in calls]
        turns = [
            *BASE["messages"],
            {"role": "assistant", "content": answer.content},
            {"role": "user", "content": results},
        ]
        final = api.messages.create(**{**asked, "messages": turns})
        assert final.content[0].text == "Hello, world!"
    run = list(agent.engine.runs.values())[-1]
    messages = run.request.prompt.messages  # type: ignore[union-attr]
    assert messages[1].reasoning == "Two cities."
    assert [(call.name, json.loads(call.arguments)) for call in messages[1].tool_calls] == [
        ("weather", {"city": "Bern"}), ("weather", {"city": "Rome"}),
    ]  # fmt: skip
    assert messages[2:] == tuple(
        Message(role="tool", content="sunny", tool_call_id=call.id, name="weather") for call in messages[1].tool_calls
    )


def test_a_stop_sequence_is_named() -> None:
    with serving(lambda: ScriptedEngine(Script(stop_sequence="END"))) as served, client(served) as api:
        whole = api.messages.create(**BASE, stop_sequences=["END"])
        assert (whole.stop_reason, whole.stop_sequence) == ("stop_sequence", "END")
        with api.messages.stream(**BASE, stop_sequences=["END"]) as stream:
            assert stream.get_final_message().stop_sequence == "END"


def test_a_silent_stream_pings() -> None:
    with serving(lambda: ScriptedEngine(Script(prefill_s=0.5)), stream_heartbeat_s=0.1) as served:
        answer = served.request("POST", "/v1/messages", {**BASE, "stream": True})
        assert answer.body.count(b'event: ping\ndata: {"type":"ping"}\n\n') >= 4
        with client(served) as api, api.messages.stream(**BASE) as stream:
            assert "".join(stream.text_stream) == "Hello, world!"


def test_errors_reach_the_client_as_its_own() -> None:
    with serving(lambda: ScriptedEngine(Script(crash_at=1)), key=KEY) as served:
        with client(served, KEY) as api:
            with pytest.raises(anthropic.NotFoundError) as missing:
                api.messages.create(**{**BASE, "model": "nope"})
            assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
            assert missing.value.request_id
            with pytest.raises(anthropic.BadRequestError) as bad:
                api.messages.create(**BASE, extra_body={"temperature": 1.5})
            assert bad.value.body["error"]["param"] == "temperature"  # type: ignore[index]
            with pytest.raises(anthropic.APIStatusError, match="died"), api.messages.stream(**BASE) as stream:
                stream.get_final_message()
        with client(served, "wrong") as api, pytest.raises(anthropic.AuthenticationError) as refused:
            api.messages.create(**BASE)
        assert refused.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]


def test_a_prompt_that_is_too_long_says_so_in_the_vendors_words() -> None:
    with (
        serving(lambda: ScriptedEngine(Script(prompt_tokens=9000))) as served,
        client(served) as api,
        pytest.raises(anthropic.BadRequestError, match="prompt is too long: 9000 tokens > 8191 maximum"),
    ):
        api.messages.create(**BASE)


def test_what_agents_send_beside_the_request_is_tolerated(served: Served) -> None:
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "interleaved-thinking-2025-05-14"}
    body = {**BASE, "model": "claude-sonnet-4-8", "context_management": {"edits": []}, "cache_control": None}
    answer = served.request("POST", "/v1/messages?beta=true", body, headers)
    assert answer.status == 200
    assert answer.json["model"] == "tiny"
    assert answer.headers["x-ocserve-ignored"] == "beta, context_management, model"


def test_the_models_in_the_vendors_shape(served: Served) -> None:
    with client(served) as api:
        (model,) = api.models.list()
        assert (model.id, model.display_name, model.max_input_tokens, model.max_tokens) == ("tiny", "Tiny", 8192, 4096)
        assert api.models.retrieve("tiny") == model
        with pytest.raises(anthropic.NotFoundError) as missing:
            api.models.retrieve("nope")
        assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    assert served.request("GET", "/v1/models").json["object"] == "list"


def test_a_count_of_tokens(served: Served) -> None:
    with client(served) as api:
        count = api.messages.count_tokens(
            model="tiny", messages=BASE["messages"], system="Be terse.", tools=[WEATHER], tool_choice={"type": "any"}
        )
        assert count.input_tokens > 0
        question = served.engine.asked[-1]
        assert isinstance(question, EncodeRequest)
        assert isinstance(question.prompt, ChatPrompt)
        assert [tool.name for tool in question.prompt.tools] == ["weather"]
        with pytest.raises(anthropic.BadRequestError) as bad:
            api.messages.count_tokens(model="tiny", messages=[])
        assert bad.value.body["error"]["param"] == "messages"  # type: ignore[index]
