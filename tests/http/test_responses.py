"""OpenAI's Responses over the wire: the real SDK, coming back to what is stored, and whose it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from msgspec.structs import replace

from ocserve import config
from ocserve.generation import GenerateRequest, Message, ReasoningDelta, ToolCall, ToolCallDelta
from tests.http.harness import KEY, MODEL, Served, serving, wait_for
from tests.scripted import Script, ScriptedEngine

WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"at": {"type": "string"}},
        "required": ["at"],
        "additionalProperties": False,
    },
    "strict": True,
}
CALLED = Script(
    tokens=(
        ReasoningDelta(text="Oslo it is.", tokens=1),
        ToolCallDelta(call=0, name="weather", tokens=1),
        ToolCallDelta(call=0, arguments='{"at":', tokens=1),
        ToolCallDelta(call=0, arguments='"Oslo"}', tokens=1),
    ),
    reasoning_tokens=1,
    reason="tool_calls",
)


def weather(request: GenerateRequest) -> Script:
    """A model that asks for the weather and repeats what it is told."""
    last = request.prompt.messages[-1]  # type: ignore[union-attr]
    return Script(tokens=("It ", "is ", last.content, ".")) if last.role == "tool" else CALLED


@pytest.fixture(scope="module")
def loop() -> Iterator[Served]:
    model = replace(MODEL, capabilities=("chat", "tools", "reasoning"))
    with serving(lambda: ScriptedEngine(weather), model=model) as server:
        yield server


def client(served: Served, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)


def post(served: Served, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    return served.request("POST", "/v1/responses", {"model": "tiny", "input": "Hi", **fields}, headers)


def test_the_sdk_reads_a_whole_answer(served: Served) -> None:
    with client(served) as sdk:
        answer = sdk.responses.create(model="tiny", input="Hi", metadata={"a": "b"})
    assert answer.output_text == "Hello, world!"
    assert answer.status == "completed"
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (7, 4, 11)
    assert answer.metadata == {"a": "b"}


def test_the_sdk_reads_a_stream(served: Served) -> None:
    with client(served) as sdk, sdk.responses.stream(model="tiny", input="Hi") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == "Hello, world!"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello, world!"
    assert [event.sequence_number for event in events] == list(range(len(events)))  # type: ignore[union-attr]


def test_a_stream_has_named_events_and_no_end_mark(served: Served) -> None:
    answer = post(served, stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = [block.split("\n") for block in answer.body.decode().strip().split("\n\n")]
    for name, data in blocks:
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    assert blocks[-1][0] == "event: response.completed"


def test_the_sdk_parses_an_answer_to_its_type() -> None:
    class Weather(pydantic.BaseModel):
        at: str
        degrees: int

    tokens = ('{"at":', '"Oslo",', '"degrees":', "3}")
    with serving(lambda: ScriptedEngine(Script(tokens=tokens))) as served, client(served) as sdk:
        answer = sdk.responses.parse(model="tiny", input="Hi", text_format=Weather)
        assert answer.output_parsed == Weather(at="Oslo", degrees=3)
        [run] = served.engine.runs.values()
        assert json.loads(run.request.constraint.schema)["required"] == ["at", "degrees"]  # type: ignore
        with sdk.responses.stream(model="tiny", input="Hi", text_format=Weather) as stream:
            assert stream.get_final_response().output_parsed == Weather(at="Oslo", degrees=3)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_sdks_tool_loop_with_what_is_stored(loop: Served, streamed: bool) -> None:
    def respond(sdk: openai.OpenAI, **fields: Any) -> Any:
        if not streamed:
            return sdk.responses.create(model="tiny", tools=[WEATHER], **fields)
        with sdk.responses.stream(model="tiny", tools=[WEATHER], **fields) as stream:
            return stream.get_final_response()

    with client(loop) as sdk:
        first = respond(sdk, input="What weather?", instructions="Be brief.")
        thought, call = first.output
        assert thought.content[0].text == "Oslo it is."
        assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"at": "Oslo"})
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "rainy"}
        second = respond(sdk, input=[result], previous_response_id=first.id)
    assert second.output_text == "It is rainy."
    assert second.previous_response_id == first.id
    prompt = list(loop.engine.runs.values())[-1].request.prompt
    assert prompt.messages == (  # type: ignore[union-attr]
        Message(role="user", content="What weather?"),
        Message(
            role="assistant",
            reasoning="Oslo it is.",
            tool_calls=(ToolCall(id=call.call_id, name="weather", arguments='{"at":"Oslo"}'),),
        ),
        Message(role="tool", content="rainy", tool_call_id=call.call_id, name="weather"),
    )


@pytest.mark.parametrize("dumped", [False, True])
def test_the_sdks_tool_loop_with_nothing_stored(loop: Served, dumped: bool) -> None:
    with client(loop) as sdk:
        asked: list[Any] = [{"role": "user", "content": "What weather?"}]
        first = sdk.responses.create(model="tiny", input=asked, tools=[WEATHER], store=False)  # type: ignore
        call = first.output[-1]
        asked += [item.model_dump() if dumped else item for item in first.output]
        asked.append({"type": "function_call_output", "call_id": call.call_id, "output": "rainy"})  # type: ignore
        second = sdk.responses.create(model="tiny", input=asked, tools=[WEATHER], store=False)  # type: ignore
        assert second.output_text == "It is rainy."
        with pytest.raises(openai.NotFoundError):
            sdk.responses.retrieve(first.id)


def test_a_stored_response_is_retrieved_listed_and_deleted(served: Served) -> None:
    with client(served) as sdk:
        first = sdk.responses.create(model="tiny", input="Hi")
        second = sdk.responses.create(model="tiny", input="And?", previous_response_id=first.id)
        assert sdk.responses.retrieve(first.id) == first
        texts = [item.content[0].text for item in sdk.responses.input_items.list(second.id)]  # type: ignore
        assert texts == ["And?", "Hello, world!", "Hi"]
        pages = [item.id for item in sdk.responses.input_items.list(second.id, order="asc", limit=1)]
        assert len(pages) == 3
        with pytest.raises(openai.BadRequestError) as refused:
            sdk.responses.cancel(first.id)
        assert refused.value.param == "response_id"
        sdk.responses.delete(first.id)
        for gone in (
            sdk.responses.retrieve,
            sdk.responses.delete,
            sdk.responses.cancel,
            sdk.responses.input_items.list,
        ):
            with pytest.raises(openai.NotFoundError):
                gone(first.id)
        # A conversation does not need the responses that it came from.
        third = sdk.responses.create(model="tiny", input="Still?", previous_response_id=second.id)
        assert third.status == "completed"


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ("", 200, None),
        ("?stream=false&include[]=reasoning.encrypted_content&include_obfuscation=false", 200, None),
        ("?stream=true", 400, "stream"),
        ("?stream=maybe", 400, "stream"),
        ("?starting_after=3", 400, "starting_after"),
        ("?frobnicate=1", 400, "frobnicate"),
        ("?%00=1", 400, None),
        ("/input_items?limit=1&order=asc&include=x", 200, None),
        ("/input_items?limit=0", 400, "limit"),
        ("/input_items?limit=101", 400, "limit"),
        ("/input_items?limit=one", 400, "limit"),
        ("/input_items?limit=", 400, "limit"),
        ("/input_items?limit=%EF%BC%91", 400, "limit"),
        ("/input_items?order=up", 400, "order"),
        ("/input_items?after=msg_nowhere", 400, "after"),
        ("/input_items?before=x", 400, "before"),
    ],
)
def test_what_is_asked_of_a_stored_response_is_honoured_or_refused(
    served: Served, query: str, status: int, param: str | None
) -> None:
    name = post(served).json["id"]
    answer = served.request("GET", f"/v1/responses/{name}{query}")
    assert answer.status == status
    if status == 400:
        assert answer.error["param"] == param


def test_an_input_item_is_listed_as_it_was_sent(served: Served) -> None:
    message = {"role": "user", "content": [{"type": "input_text", "text": "Hi"}], "type": "message", "id": "msg_mine"}
    name = post(served, input=[message]).json["id"]
    page = served.request("GET", f"/v1/responses/{name}/input_items").json
    assert page == {
        "object": "list",
        "data": [{**message, "status": "completed"}],
        "first_id": "msg_mine",
        "last_id": "msg_mine",
        "has_more": False,
    }
    after = served.request("GET", f"/v1/responses/{name}/input_items?after=msg_mine").json
    assert (after["data"], after["first_id"], after["has_more"]) == ([], None, False)


def test_a_key_sees_nothing_of_another() -> None:
    with serving(key=KEY) as served:
        mine = {"Authorization": f"Bearer {KEY}"}
        held = post(served, mine).json
        message = held["output"][0]["id"]
        for method, path in [
            ("GET", f"/v1/responses/{held['id']}"),
            ("DELETE", f"/v1/responses/{held['id']}"),
            ("GET", f"/v1/responses/{held['id']}/input_items"),
            ("POST", f"/v1/responses/{held['id']}/cancel"),
        ]:
            body = {} if method == "POST" else None
            foreign = served.request(method, path, body)  # anonymous on loopback is another caller
            assert foreign.status == 404
            never = served.request(method, path.replace(held["id"], "resp_never"), body)
            assert {**foreign.error} == {**never.error}
        assert post(served, previous_response_id=held["id"]).error["param"] == "previous_response_id"
        assert post(served, input=[{"type": "item_reference", "id": message}]).error["param"] == "input[0].id"
        assert served.request("GET", f"/v1/responses/{held['id']}", headers=mine).json == held


def test_what_is_stored_is_bounded_and_expires() -> None:
    with serving(stored_responses=2) as served:
        names = [post(served).json["id"] for _ in range(3)]
        found = [served.request("GET", f"/v1/responses/{name}").status for name in names]
        assert found == [404, 200, 200]
    with serving(stored_response_s=0.2) as served:
        name = post(served).json["id"]
        assert served.request("GET", f"/v1/responses/{name}").status == 200
        wait_for(lambda: served.request("GET", f"/v1/responses/{name}").status == 404)
    with serving(stored_responses=0) as served:
        answer = post(served)
        assert answer.json["store"] is False
        assert served.request("GET", f"/v1/responses/{answer.json['id']}").status == 404
        assert post(served, store=True).error["param"] == "store"
    with serving(stored_response_bytes=2_000) as served:
        assert post(served, instructions="x" * 4_000).json["store"] is False


def test_a_response_whose_client_left_is_not_stored() -> None:
    with serving(lambda: ScriptedEngine(Script(tokens=("a",) * 1000, step_s=0.01))) as served:
        with served.connect() as peer:
            peer.sendall(served.compose("POST", "/v1/responses", {"model": "tiny", "input": "Hi", "stream": True}))
            data = b""
            while b"output_text.delta" not in data:
                data += peer.recv(4096)
        name = data.partition(b'"id":"')[2].partition(b'"')[0].decode()
        assert name.startswith("resp_")
        wait_for(lambda: served.service.active == 0)
        assert served.request("GET", f"/v1/responses/{name}").status == 404


def test_a_failing_stream_says_so_and_a_failing_answer_has_a_status() -> None:
    with serving(lambda: ScriptedEngine(Script(crash_at=2))) as served:
        streamed = [
            json.loads(data.partition("\ndata: ")[2])
            for data in post(served, stream=True).body.decode().split("\n\n")[:-1]
        ]
        assert streamed[-1]["type"] == "response.failed"
        assert streamed[-1]["response"]["error"]["code"] == "server_error"
        whole = post(served)
        assert whole.status == 500
        assert whole.error["code"] == "engine_crashed"


def test_an_answer_that_reaches_its_limit_is_incomplete(served: Served) -> None:
    with client(served) as sdk:
        answer = sdk.responses.create(model="tiny", input="Hi", max_output_tokens=2)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"


def test_a_prompt_that_does_not_fit_is_refused_whatever_truncation_says(served: Served) -> None:
    with serving(lambda: ScriptedEngine(Script(prompt_tokens=9_000))) as full:
        for truncation in ("auto", "disabled"):
            error = post(full, truncation=truncation).error
            assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    assert post(served, truncation="auto").headers["x-ocserve-ignored"] == "truncation"


# What an agent sends: every tool that it knows, thoughts asked for in secret, nothing stored.
AGENT: dict[str, Any] = {
    "model": "tiny",
    "instructions": "You are an agent.",
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Rules."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
    ],
    "tools": [
        WEATHER,
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}},
        {"type": "namespace", "name": "mcp", "description": "x", "tools": [WEATHER]},
        {"type": "web_search", "external_web_access": False},
        {"type": "local_shell"},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "a7c1",
    "client_metadata": {"installation": "x"},
    "text": {"verbosity": "low"},
}


def test_an_agents_request_is_served(loop: Served) -> None:
    answer = loop.request("POST", "/v1/responses", AGENT)
    assert answer.status == 200
    ignored = answer.headers["x-ocserve-ignored"].split(", ")
    assert set(ignored) == {
        "tools[1]", "tools[2]", "tools[3]", "tools[4]", "include[0]", "prompt_cache_key", "client_metadata",
        "text.verbosity",
    }  # fmt: skip
    assert b"response.reasoning_summary_text.delta" in answer.body
    assert b"event: response.completed" in answer.body
    prompt = list(loop.engine.runs.values())[-1].request.prompt
    assert prompt.messages[0] == Message(role="system", content="You are an agent.\n\nRules.")  # type: ignore
    assert [tool.name for tool in prompt.tools] == ["weather"]  # type: ignore[union-attr]


def test_nothing_of_a_conversation_is_in_a_refusal(served: Served) -> None:
    for fields in (
        {"input": [{"role": "canary"}]},
        {"input": [{"type": "canary"}]},
        {"previous_response_id": "canary"},
        {"input": [{"type": "item_reference", "id": "canary"}]},
        {"text": {"format": {"type": "canary"}}},
        {"input": [{"type": "function_call_output", "call_id": "canary", "output": "canary"}]},
        {"include": ["canary"]},
    ):
        assert b"canary" not in post(served, **fields).body


def test_the_tokens_of_an_input_are_counted_with_what_came_before(served: Served) -> None:
    with client(served) as sdk:
        first = sdk.responses.create(model="tiny", input="Hi")
        count = sdk.responses.input_tokens.count(model="tiny", input="And?", previous_response_id=first.id)
    assert (count.object, count.input_tokens > 0) == ("response.input_tokens", True)
    asked = served.engine.asked[-1]
    assert [turn.content for turn in asked.prompt.messages] == ["Hi", "Hello, world!", "And?"]
    refused = served.request("POST", "/v1/responses/input_tokens", {"model": "tiny", "input": "Hi", "stream": True})
    assert refused.error["param"] == "stream"


def test_the_limits_of_a_key_hold_for_responses() -> None:
    with serving(limits=config.Limits(requests_per_minute=1)) as served:
        assert post(served).status == 200
        refused = post(served)
        assert refused.status == 429
        assert "retry-after" in refused.headers
