"""The real Google client against the real server: contents whole and streamed, a tool loop, thoughts, errors."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from google import genai
from google.genai import errors, types
from msgspec.structs import replace

from ocserve.generation import (
    GenerateRequest,
    Message,
    ReasoningDelta,
    TextDelta,
    TokenChance,
    TokenLogprob,
    ToolCallDelta,
)
from tests.http.harness import KEY, MODEL, Served, serving
from tests.scripted import Script, ScriptedEngine

BASE: dict[str, Any] = {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]}

STREAM = "/v1beta/models/tiny:streamGenerateContent"
WEATHER = types.Tool(
    function_declarations=[
        types.FunctionDeclaration(
            name="weather",
            description="The weather of a city.",
            parameters=types.Schema(
                type=types.Type.OBJECT,
                properties={"city": types.Schema(type=types.Type.STRING, min_length=1)},
                required=["city"],
            ),
        )
    ]
)
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


def client(served: Served, key: str = "any") -> genai.Client:
    return genai.Client(api_key=key, http_options=types.HttpOptions(base_url=served.url))


@pytest.fixture(scope="module")
def agent() -> Iterator[Served]:
    """A server that asks for the weather, and says something once it has been told."""

    def script(request: GenerateRequest) -> Script:
        prompt = request.prompt
        return Script() if any(turn.role == "tool" for turn in prompt.messages) else CALLS  # type: ignore[union-attr]

    with serving(lambda: ScriptedEngine(script)) as server:
        yield server


def test_contents_whole_and_streamed(served: Served) -> None:
    config = types.GenerateContentConfig(
        system_instruction="Be terse.", temperature=0.5, top_k=5, top_p=0.9, seed=3, max_output_tokens=50,
        stop_sequences=["END"], safety_settings=[],
    )  # fmt: skip
    with client(served) as api:
        answer = api.models.generate_content(model="tiny", contents="Hi", config=config)
        assert answer.text == "Hello, world!"
        assert answer.candidates is not None
        assert answer.candidates[0].finish_reason == types.FinishReason.STOP
        assert (answer.model_version, bool(answer.response_id)) == ("tiny", True)
        usage = answer.usage_metadata
        assert usage is not None
        assert (usage.prompt_token_count, usage.candidates_token_count, usage.total_token_count) == (7, 4, 11)
        chunks = list(api.models.generate_content_stream(model="org/tiny:135m", contents="Hi", config=config))
        assert "".join(chunk.text or "" for chunk in chunks) == "Hello, world!"
        assert chunks[-1].usage_metadata == usage
        cut = api.models.generate_content(model="tiny", contents="Hi", config={"max_output_tokens": 2})
        assert cut.candidates is not None
        assert cut.candidates[0].finish_reason == types.FinishReason.MAX_TOKENS
    prompt: Any = list(served.engine.runs.values())[-2].request.prompt
    assert prompt.messages[0] == Message(role="system", content="Be terse.")


def test_the_bytes_of_a_stream(served: Served) -> None:
    events = served.request("POST", f"{STREAM}?alt=sse", BASE)
    assert events.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert re.fullmatch(rb"(data: \{[^\n]+\}\n\n)+", events.body)
    array = served.request("POST", STREAM, BASE)
    assert array.headers["content-type"] == "application/json"
    records = [json.loads(event) for event in events.events]
    assert [record["candidates"] for record in array.json] == [record["candidates"] for record in records]
    refused = served.request("POST", f"{STREAM}?alt=proto", BASE)
    assert (refused.status, refused.json["error"]["status"]) == (400, "INVALID_ARGUMENT")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_loop(agent: Served, streamed: bool) -> None:
    config = types.GenerateContentConfig(
        tools=[WEATHER],
        thinking_config=types.ThinkingConfig(include_thoughts=True),
        automatic_function_calling=types.AutomaticFunctionCallingConfig(disable=True),
    )
    asked = types.Content(role="user", parts=[types.Part(text="Hi")])
    with client(agent) as api:
        if streamed:
            chunks = list(api.models.generate_content_stream(model="tiny", contents=[asked], config=config))
        else:
            chunks = [api.models.generate_content(model="tiny", contents=[asked], config=config)]
        parts = [part for chunk in chunks for part in chunk.candidates[0].content.parts]  # type: ignore[index, union-attr]
        assert [(part.text, part.thought) for part in parts if part.text] == [("Two cities.", True), ("I ask.", None)]
        calls = [part.function_call for part in parts if part.function_call]
        assert [(call.name, call.args) for call in calls] == [
            ("weather", {"city": "Bern"}),
            ("weather", {"city": "Rome"}),
        ]
        usage = chunks[-1].usage_metadata
        assert usage is not None
        assert (usage.cached_content_token_count, usage.thoughts_token_count) == (8, 3)
        said = types.Content(role="model", parts=[part for part in parts if part.text or part.function_call])
        told = types.Content(
            role="user",
            parts=[types.Part.from_function_response(name="weather", response={"output": "sunny"}) for _ in calls],
        )
        final = api.models.generate_content(model="tiny", contents=[asked, said, told], config=config)
        assert final.text == "Hello, world!"
    prompt: Any = list(agent.engine.runs.values())[-1].request.prompt
    assert prompt.tools[0].parameters == (
        '{"properties": {"city": {"minLength": 1, "type": "string"}}, "required": ["city"], "type": "object"}'
    )
    assert prompt.messages[1].reasoning == "Two cities."
    assert [(call.name, json.loads(call.arguments)) for call in prompt.messages[1].tool_calls] == [
        ("weather", {"city": "Bern"}), ("weather", {"city": "Rome"}),
    ]  # fmt: skip
    assert prompt.messages[2:] == tuple(
        Message(role="tool", content='{"output": "sunny"}', tool_call_id=call.id, name="weather")
        for call in prompt.messages[1].tool_calls
    )


def test_the_client_calls_a_function_by_itself(agent: Served) -> None:
    heard: list[str] = []

    def weather(city: str) -> str:
        """The weather of a city."""
        heard.append(city)
        return "sunny"

    with client(agent) as api:
        answer = api.models.generate_content(model="tiny", contents="Hi", config={"tools": [weather]})
    assert answer.text == "Hello, world!"
    assert heard == ["Bern", "Rome"]


def test_several_candidates_and_log_probabilities() -> None:
    token = TokenLogprob(
        chosen=TokenChance(5, b"a", -0.5), top=(TokenChance(5, b"a", -0.5), TokenChance(6, b"b", -1.0))
    )
    script = Script(tokens=(TextDelta(text="a", tokens=1, logprobs=(token,)),), others=(("b", "c"),))
    config = {"candidate_count": 2, "response_logprobs": True, "logprobs": 2}
    with serving(lambda: ScriptedEngine(script)) as served, client(served) as api:
        answer = api.models.generate_content(model="tiny", contents="Hi", config=config)  # type: ignore[arg-type]
        first, second = answer.candidates  # type: ignore[misc]
        assert (first.content.parts[0].text, second.content.parts[0].text) == ("a", "bc")  # type: ignore[index, union-attr]
        assert first.avg_logprobs == -0.5
        result: Any = first.logprobs_result
        assert (result.chosen_candidates[0].token, result.chosen_candidates[0].token_id) == ("a", 5)
        assert [chance.token for chance in result.top_candidates[0].candidates] == ["a", "b"]
        assert served.engine.runs.popitem()[1].request.logprobs == 2
        chunks = list(api.models.generate_content_stream(model="tiny", contents="Hi", config=config))  # type: ignore[arg-type]
        texts = {0: "", 1: ""}
        for chunk in chunks:
            for candidate in chunk.candidates or ():
                texts[candidate.index or 0] += candidate.content.parts[0].text or ""  # type: ignore[index, union-attr, operator]
        assert texts == {0: "a", 1: "bc"}


def test_silence_is_nothing_that_the_client_must_parse() -> None:
    with serving(lambda: ScriptedEngine(Script(prefill_s=2)), stream_heartbeat_s=0.1) as served:
        begun = time.monotonic()
        with served.connect() as peer:
            peer.sendall(served.compose("POST", f"{STREAM}?alt=sse", BASE))
            assert peer.recv(4096)
            assert time.monotonic() - begun < 1.5, "nothing was heard during the prefill"
        assert served.request("POST", STREAM, BASE).json
        with client(served) as api:
            chunks = list(api.models.generate_content_stream(model="tiny", contents="Hi"))
        assert "".join(chunk.text or "" for chunk in chunks) == "Hello, world!"


def test_errors_reach_the_client_as_its_own() -> None:
    with serving(lambda: ScriptedEngine(Script(crash_at=1)), key=KEY) as served:
        with client(served, KEY) as api:
            with pytest.raises(errors.ClientError) as missing:
                api.models.generate_content(model="nope", contents="Hi")
            assert (missing.value.code, missing.value.status) == (404, "NOT_FOUND")
            with pytest.raises(errors.ClientError) as bad:
                api.models.generate_content(model="tiny", contents="Hi", config={"temperature": 3})
            assert (bad.value.code, bad.value.status) == (400, "INVALID_ARGUMENT")
            violations = bad.value.details["error"]["details"][1]["fieldViolations"]  # type: ignore[index]
            assert violations[0]["field"] == "generationConfig.temperature"
            with pytest.raises(errors.ServerError) as died:
                list(api.models.generate_content_stream(model="tiny", contents="Hi"))
            assert (died.value.code, died.value.status) == (500, "INTERNAL")
        with client(served, "wrong") as api, pytest.raises(errors.ClientError) as refused:
            api.models.generate_content(model="tiny", contents="Hi")
        assert (refused.value.code, refused.value.status) == (401, "UNAUTHENTICATED")
        assert "API_KEY_INVALID" in str(refused.value.details)


def test_an_unknown_method_is_refused(served: Served) -> None:
    """What stands behind the colon may be part of a model's id, which can be read; nothing can be posted there."""
    for path in ("/v1beta/models/tiny:paint", "/v1beta/models/tiny"):
        answer = served.request("POST", path, BASE)
        assert (answer.status, answer.json["error"]["code"]) == (405, 405)


def test_the_models(served: Served) -> None:
    with client(served) as api:
        (model,) = api.models.list()
        assert (model.name, model.input_token_limit, model.output_token_limit) == ("models/tiny", 8192, 4096)
        assert "generateContent" in (model.supported_actions or [])
        assert api.models.get(model="org/tiny:135m") == model
        with pytest.raises(errors.ClientError) as missing:
            api.models.get(model="nope")
        assert missing.value.status == "NOT_FOUND"


def test_a_count_of_tokens(served: Served) -> None:
    with client(served) as api:
        assert (api.models.count_tokens(model="tiny", contents="Hi").total_tokens or 0) > 0
        with pytest.raises(errors.ClientError) as missing:
            api.models.count_tokens(model="nope", contents="Hi")
        assert missing.value.status == "NOT_FOUND"


def test_embeddings() -> None:
    embedding = replace(MODEL, capabilities=("embedding",), dimensions=2)
    with serving(model=embedding) as served, client(served) as api:
        found = api.models.embed_content(model="tiny", contents=["abc", "de"])
        assert [one.values for one in found.embeddings or ()] == [[3.0, 1.0], [2.0, 1.0]]  # what a scripted engine says
        assert api.models.get(model="tiny").supported_actions == ["embedContent", "batchEmbedContents"]
        single = served.request("POST", "/v1beta/models/tiny:embedContent", {"content": {"parts": [{"text": "abcd"}]}})
        assert single.json["embedding"] == {"values": [4.0, 1.0]}
        with pytest.raises(errors.ClientError) as refused:
            api.models.embed_content(model="tiny", contents="a", config={"output_dimensionality": 1})
        assert refused.value.status == "INVALID_ARGUMENT"
