"""OpenAI's Responses without a server: items become turns, events become frames that the published schema knows."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from msgspec.structs import replace

from ocserve.api import json_body, openai_responses_parameters
from ocserve.api.dialect import Reply
from ocserve.api.openai_responses import ResponseDialect, StoredResponse
from ocserve.api.openai_responses_items import MAX_RECALLED_BYTES, Item
from ocserve.errors import ApiError, EngineCrashed, InvalidRequest, Overloaded
from ocserve.generation import (
    Failed,
    Finished,
    FinishReason,
    GenerateEvent,
    Image,
    JsonConstraint,
    Message,
    ReasoningDelta,
    Started,
    TextDelta,
    TokenChance,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from tests.api import mutations
from tests.api.mutations import Case
from tests.api.test_fields import models
from tests.http.harness import MODEL

SCHEMA = json.loads((Path(__file__).parent.parent / "data/openai/responses.schema.json").read_text())
BASE: dict[str, Any] = {"model": "tiny", "input": "Hi"}
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}, "strict": True}
USAGE = Usage(prompt_tokens=7, cached_tokens=3, completion_tokens=4, reasoning_tokens=1)


class Remembered:
    """A memory that is a dict."""

    def __init__(self, *, keeps: bool = True) -> None:
        self.keeps = keeps
        self.stored: dict[str, StoredResponse] = {}

    def response(self, name: str) -> StoredResponse | None:
        return self.stored.get(name)

    def item(self, name: str) -> Item | None:
        return next((item for one in self.stored.values() for item in one.conversation if item.id == name), None)

    def keep(self, stored: StoredResponse, *, lasting: bool) -> bool:
        if lasting:
            self.stored[stored.id] = stored
        return lasting


def dialect(memory: Remembered | None = None) -> ResponseDialect:
    return ResponseDialect(memory or Remembered(), "cafe", lambda: 18)


ABLE = replace(MODEL, capabilities=("chat", "tools", "reasoning"), input_modalities=("text", "image"))


def able(name: str) -> Any:
    return ABLE if models(name) is MODEL else None


def parse(memory: Remembered | None = None, **extra: Any) -> Any:
    return dialect(memory).parse(json.dumps({**BASE, **extra}).encode(), able, refuse_unknown=True)


def refused(memory: Remembered | None = None, **extra: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(memory, **extra)
    return caught.value


def messages(*items: Any, memory: Remembered | None = None, **extra: Any) -> tuple[Message, ...]:
    turns: tuple[Message, ...] = parse(memory, input=list(items), **extra).request.prompt.messages
    return turns


# Items to turns

CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"at":"Oslo"}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "rain"}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hmm"}]}


def said(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def asked(text: str, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": [{"type": "input_text", "text": text}]}


WEATHER_CALL = ToolCall(id="c1", name="weather", arguments='{"at":"Oslo"}')
RAIN = Message(role="tool", content="rain", tool_call_id="c1", name="weather")


def test_a_text_is_a_users_turn() -> None:
    assert parse(input="Hi").request.prompt.messages == (Message(role="user", content="Hi"),)
    assert messages({"role": "user", "content": "a"}) == messages(asked("a")) == (Message(role="user", content="a"),)


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert messages({"role": "user", "content": parts}) == (Message(role="user", content="ab"),)
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    assert messages(asked("a"), refusal, asked("b"))[1] == Message(role="assistant", content="No.")


def test_what_an_assistant_thought_said_and_called_is_one_turn() -> None:
    both = Message(role="assistant", content="Let me see.", reasoning="hmm", tool_calls=(WEATHER_CALL,))
    assert messages(asked("a"), THOUGHT, said("Let me see."), CALL, RESULT) == (
        Message(role="user", content="a"),
        both,
        RAIN,
    )


def test_parallel_calls_are_one_turn_in_either_order() -> None:
    other = {**CALL, "call_id": "c2"}
    two = (WEATHER_CALL, ToolCall(id="c2", name="weather", arguments='{"at":"Oslo"}'))
    together = messages(asked("a"), CALL, other, RESULT, {**RESULT, "call_id": "c2"})
    assert together[1] == Message(role="assistant", tool_calls=two)
    alternating = messages(asked("a"), CALL, RESULT, other, {**RESULT, "call_id": "c2"})
    assert [turn.role for turn in alternating] == ["user", "assistant", "tool", "assistant", "tool"]


def test_words_after_words_and_after_a_call_are_turns_of_their_own() -> None:
    roles = [turn.content for turn in messages(asked("a"), said("b"), said("c"))]
    assert roles == ["a", "b", "c"]
    turns = messages(asked("a"), CALL, RESULT, said("It rains."))
    assert turns[-1] == Message(role="assistant", content="It rains.")


def test_a_thought_without_words_is_left_out() -> None:
    secret = {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "x"}
    for thought in (THOUGHT, secret):
        assert messages(asked("a"), thought, asked("b")) == (
            Message(role="user", content="a"),
            Message(role="user", content="b"),
        )
    assert messages(asked("a"), secret, said("b"))[1] == Message(role="assistant", content="b")


def test_a_summary_stands_for_the_thought_where_there_is_no_more() -> None:
    thought = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "short"}]}
    assert messages(asked("a"), thought, said("b"))[1].reasoning == "short"


def test_instructions_at_the_beginning_are_one_system_turn() -> None:
    system = Message(role="system", content="Be kind.")
    assert messages(asked("a"), instructions="Be kind.") == (system, Message(role="user", content="a"))
    joined = messages(asked("Be brief.", "developer"), asked("a"), instructions="Be kind.")
    assert joined[0] == Message(role="system", content="Be kind.\n\nBe brief.")
    assert messages(asked("Be brief.", "developer"), asked("a"))[0].role == "developer"
    later = messages(asked("a"), said("b"), asked("Be brief.", "system"), asked("c"), instructions="Be kind.")
    assert [turn.role for turn in later] == ["system", "user", "assistant", "system", "user"]


def test_custom_calls_of_earlier_turns_are_calls() -> None:
    call = {"type": "custom_tool_call", "call_id": "c9", "name": "patch", "input": 'a "b"'}
    turns = messages(asked("a"), call, {"type": "custom_tool_call_output", "call_id": "c9", "output": "ok"})
    assert turns[1].tool_calls == (ToolCall(id="c9", name="patch", arguments='{"input":"a \\"b\\""}'),)
    assert turns[2] == Message(role="tool", content="ok", tool_call_id="c9", name="patch")


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([], "input"),
        (5, "input"),
        ({"role": "user"}, "input"),
        (["x"], "input[0]"),
        ([asked("a"), None], "input[1]"),
        ([{}], "input[0].role"),
        ([{"type": 5}], "input[0].type"),
        ([{"type": "poem"}], "input[0].type"),
        ([{"type": "web_search_call", "id": "ws_1"}], "input[0].type"),
        ([{"role": "wizard", "content": "x"}], "input[0].role"),
        ([{"role": "tool", "content": "x"}], "input[0].role"),
        ([{"role": "user"}], "input[0].content"),
        ([{"role": "user", "content": None}], "input[0].content"),
        ([{"role": "user", "content": 5}], "input[0].content"),
        ([{"role": "user", "content": [5]}], "input[0].content[0]"),
        ([{"role": "user", "content": [{"text": "x"}]}], "input[0].content[0].type"),
        ([{"role": "user", "content": [{"type": 1}]}], "input[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "poem"}]}], "input[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "input[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "input_text", "text": 1}]}], "input[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "input_text", "text": "a", "b": 1}]}], "input[0].content[0].b"),
        ([{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}], "input[0].content[0].type"),
        ([{"role": "user", "content": "x", "color": 1}], "input[0].color"),
        ([{"role": "user", "content": "x", "status": "done"}], "input[0].status"),
        ([{"role": "user", "content": "x", "id": ""}], "input[0].id"),
        ([{"role": "user", "content": "x", "phase": "loud"}], "input[0].phase"),
        ([{**CALL, "call_id": None}], "input[0].call_id"),
        ([{**CALL, "name": ""}], "input[0].name"),
        ([{**CALL, "arguments": {}}], "input[0].arguments"),
        ([{**CALL, "extra": 1}], "input[0].extra"),
        ([CALL], "input"),
        ([asked("a"), RESULT], "input[1].call_id"),
        ([RESULT, CALL], "input[0].call_id"),
        ([CALL, {**RESULT, "output": None}], "input[1].output"),
        ([CALL, {**RESULT, "output": 5}], "input[1].output"),
        ([CALL, {**RESULT, "output": [{"type": "input_text", "text": 1}]}], "input[1].output[0].text"),
        ([{"type": "custom_tool_call", "call_id": "c", "name": "n", "input": {}}], "input[0].input"),
        ([{"type": "reasoning", "summary": "x"}], "input[0].summary"),
        ([{"type": "reasoning", "summary": [{"type": "summary_text"}]}], "input[0].summary[0].text"),
        ([{"type": "reasoning", "content": [{"type": "reasoning_text", "text": 5}]}], "input[0].content[0].text"),
        ([{"type": "item_reference"}], "input[0].id"),
        ([{"type": "item_reference", "id": "msg_nowhere"}], "input[0].id"),
        ([{"id": "msg_nowhere"}], "input[0].id"),
    ],
)
def test_what_is_wrong_in_an_item_is_named(items: Any, param: str) -> None:
    error = refused(input=items)
    assert (error.status, error.param) == (400, param)


# Parameters

NATURAL = mutations.integer
ORACLE: dict[str, mutations.Valid] = {
    **{
        name: mutations.SHARED[name]
        for name in (
            "model", "stream", "stream_options", "temperature", "top_p", "top_k", "min_p", "frequency_penalty",
            "presence_penalty", "repetition_penalty", "seed", "logit_bias", "stop", "user", "safety_identifier",
            "session_id", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "service_tier",
        )
    },
    "input": lambda v: isinstance(v, str),
    "instructions": mutations.text(2**26),
    "previous_response_id": lambda v: False,  # nothing is stored
    "store": mutations.boolean,
    "metadata": lambda v: mutations.mapping(16)(v) and all(isinstance(text, str) for text in v.values()),
    "max_output_tokens": NATURAL(1, 4096),
    "tools": mutations.only([]),
    "tool_choice": mutations.only("none"),
    "parallel_tool_calls": mutations.boolean,
    "text": mutations.only({}),
    "reasoning": mutations.only({}),
    "top_logprobs": NATURAL(0, 20),
    "include": mutations.only([]),
    "truncation": mutations.only(),
    "max_tool_calls": NATURAL(1, 2**31 - 1),
    "client_metadata": mutations.mapping(64),
    "background": mutations.only(False),
    "conversation": mutations.only(),
    "prompt": mutations.only(),
    "context_management": mutations.only([]),
    "moderation": mutations.only(),
}  # fmt: skip


def refusal(body: bytes) -> ApiError | None:
    try:
        json_body.check_shape(body, 64)
        dialect().parse(body, models, refuse_unknown=True)
    except ApiError as error:
        return error
    return None


def cases() -> Iterator[Case]:
    return mutations.bodies("/v1/responses", BASE, ORACLE)


def test_every_parameter_with_every_invalid_value_is_refused_by_name() -> None:
    assert set(ORACLE) == {field.name for field in openai_responses_parameters.PARAMETERS}
    wrong = []
    for case in cases():
        error = refusal(case.body)
        if error is None or error.info.status != 400 or not error.code:
            wrong.append((case.body[:120], error))
        elif case.param is not ... and not (error.param or "").startswith(case.param):
            wrong.append((case.body[:120], error.param))
    assert not wrong, wrong[:10]


def test_every_valid_value_is_accepted_and_null_is_absent() -> None:
    accepted = 0
    for name, valid in ORACLE.items():
        for text in ("null", *mutations.POOL) if name not in BASE else mutations.POOL:
            value = json.loads(text)
            if value is None or valid(value):
                assert refusal(json.dumps({**BASE, name: value}).encode()) is None, (name, text)
                accepted += 1
    assert accepted > 150
    for name in BASE:
        error = refusal(json.dumps({**BASE, name: None}).encode())
        assert error is not None
        assert (error.code, error.param) == ("missing_required_parameter", name)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"text": {"format": {}}}, "text.format.type"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": 5}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_object", "schema": {}}}}, "text.format.schema"),
        ({"text": {"format": {"type": "text", "colour": 1}}}, "text.format.colour"),
        ({"text": {"verbosity": "chatty"}}, "text.verbosity"),
        ({"text": {"colour": 1}}, "text.colour"),
        ({"reasoning": {"effort": "herculean"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "none"}}, "reasoning.summary"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"reasoning": {"depth": 1}}, "reasoning.depth"),
        ({"include": ["message.output_text.logprobs", "everything"]}, "include[1]"),
        ({"include": [5]}, "include[0]"),
        ({"truncation": "middle"}, "truncation"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": 1}}, "stream_options.include_obfuscation"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {"a" * 300: "x"}}, "metadata"),
        ({"tools": [{}]}, "tools[0].type"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{"type": "web_search"}, WEATHER, WEATHER]}, "tools[2].name"),
        ({"tools": [{**WEATHER, "parameters": []}]}, "tools[0].parameters"),
        ({"tools": [{**WEATHER, "strict": 1}]}, "tools[0].strict"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "web_search_preview"}}, "tool_choice.type"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"max_output_tokens": 4097}, "max_output_tokens"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_is_wrong_inside_a_parameter_is_named(extra: dict[str, Any], param: str) -> None:
    assert refused(**extra).param == param


def test_parameters_become_the_request() -> None:
    request = parse(
        temperature=0.5,
        top_p=0.9,
        max_output_tokens=20,
        tools=[WEATHER, {"type": "function", "name": "now"}],
        tool_choice={"type": "function", "name": "now"},
        parallel_tool_calls=False,
        reasoning={"effort": "low"},
        top_logprobs=2,
        text={"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}},
    ).request
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0.5, 0.9, 40)
    assert request.max_tokens == 20
    assert [tool.name for tool in request.prompt.tools] == ["weather", "now"]
    assert (request.tool_choice.mode, request.tool_choice.names) == ("required", ("now",))
    assert not request.tool_choice.parallel
    assert (request.prompt.reasoning.effort, request.prompt.reasoning.enabled) == ("low", True)
    assert request.logprobs == 2
    assert request.constraint == JsonConstraint(schema='{"type": "object"}')
    assert parse().request.logprobs is None
    assert parse(include=["message.output_text.logprobs"]).request.logprobs == 0
    assert parse(text={"format": {"type": "json_object"}}).request.constraint == JsonConstraint()
    assert parse(reasoning={"effort": "none"}).request.prompt.reasoning.enabled is False
    assert parse().request.max_tokens == MODEL.default_output_tokens


def test_tools_that_only_their_vendor_runs_are_passed_over_and_named() -> None:
    parsed = parse(tools=[{"type": "web_search"}, WEATHER, {"type": "namespace", "name": "n", "tools": []}])
    assert [tool.name for tool in parsed.request.prompt.tools] == ["weather"]
    assert parsed.ignored == ("tools[0]", "tools[2]")
    assert parsed.paths["tools[0].function.parameters"] == "tools[1].parameters"
    assert next(iter(parsed.paths.items())) == ("messages", "input")
    assert [theirs for ours, theirs in parsed.paths.items() if ours in "response_format.json_schema.schema"] == [
        "text.format.schema",  # the first that fits is what the client reads
        "text.format",
    ]


def test_what_has_no_effect_is_named() -> None:
    parsed = parse(
        truncation="auto",
        include=["reasoning.encrypted_content"],
        reasoning={"summary": "concise"},
        text={"verbosity": "low"},
        user="u",
        max_tool_calls=3,
        client_metadata={"a": "b"},
        input=[{**asked("a"), "phase": "commentary"}],
    )
    assert set(parsed.ignored) == {
        "truncation", "include[0]", "reasoning.summary", "text.verbosity", "user", "max_tool_calls", "client_metadata",
        "input[0].phase",
    }  # fmt: skip
    assert parse(truncation="disabled").ignored == ()


def test_a_model_that_does_not_reason_is_not_asked_to() -> None:
    body = json.dumps({**BASE, "reasoning": {"effort": "low"}}).encode()
    with pytest.raises(InvalidRequest) as caught:
        dialect().parse(body, models, refuse_unknown=True)
    assert caught.value.param == "reasoning.effort"


PICTURE = {"type": "input_image", "image_url": "data:image/png;base64,aGVsbG8=", "detail": "low"}


def test_an_image_is_seen_where_it_stands() -> None:
    content = [{"type": "input_text", "text": "ab"}, PICTURE, {"type": "input_text", "text": "c"}]
    assert messages({"role": "user", "content": content}) == (
        Message(
            role="user", content="abc", images=(Image(data=b"hello", at=2, where="input[0].content[1].image_url"),)
        ),
    )
    result = messages(asked("a"), CALL, {**RESULT, "output": [PICTURE]})[-1]
    assert result.images == (Image(data=b"hello", at=0, where="input[2].output[0].image_url"),)


@pytest.mark.parametrize(
    ("picture", "param"),
    [
        ({"image_url": None}, "image_url"),
        ({"image_url": "https://example.org/a.png"}, "image_url"),
        ({"image_url": "data:image/png;base64,!"}, "image_url"),
        ({"image_url": "data:text/html;base64,aGVsbG8="}, "image_url"),
        ({"file_id": "file-1"}, "file_id"),
        ({"detail": "some"}, "detail"),
    ],
)
def test_what_is_wrong_with_an_image_is_named(picture: dict[str, Any], param: str) -> None:
    error = refused(input=[{"role": "user", "content": [{**PICTURE, **picture}]}])
    assert error.param == f"input[0].content[0].{param}"


def test_a_model_that_sees_nothing_is_shown_nothing() -> None:
    body = json.dumps({**BASE, "input": [{"role": "user", "content": [PICTURE]}]}).encode()
    with pytest.raises(InvalidRequest) as caught:
        dialect().parse(body, models, refuse_unknown=True)
    assert caught.value.param == "input[0].content[0].type"


# Events to frames

CHANCE = TokenLogprob(
    chosen=TokenChance(5, b"Hel", -0.5), top=(TokenChance(5, b"Hel", -0.5), TokenChance(9, b"\xf0\x9f", -1.5))
)
ANSWER: list[GenerateEvent] = [
    Started(prompt_tokens=7, cached_tokens=3),
    ReasoningDelta(text="Let me ", tokens=1),
    ReasoningDelta(text="see.", tokens=1),
    TextDelta(text="Hel", tokens=1, logprobs=(CHANCE,)),
    TextDelta(text="", tokens=1),
    TextDelta(text="lo", tokens=1),
    ToolCallDelta(call=0, name="weather", arguments='{"at":', tokens=1),
    ToolCallDelta(call=0, arguments='"Oslo"}', tokens=1),
    ToolCallDelta(call=1, name="weather", tokens=1),
    ToolCallDelta(call=1, arguments="{}", tokens=1),
    Finished(reason="tool_calls", usage=USAGE),
]


def valid(name: str, document: Any) -> None:
    """Holds `document` to the published schema. It has no null for `usage` and `user`, which real answers have."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {key: item for key, item in value.items() if item is not None or key not in ("usage", "user")}
            return {key: without(item) for key, item in kept.items()}
        return [without(item) for item in value] if isinstance(value, list) else value

    jsonschema.Draft202012Validator({**SCHEMA, "$ref": f"#/$defs/{name}"}).validate(without(document))


SCHEMA_OF = {
    one["properties"]["type"]["enum"][0]: name
    for name, one in SCHEMA["$defs"].items()
    if name.startswith("Response") and name.endswith("Event")
}


def transcript(events: list[GenerateEvent], usage: Usage = USAGE, **extra: Any) -> list[dict[str, Any]]:
    """The frames of a stream, each held to the schema of its type and numbered without a gap."""
    turn = dialect()
    turn.parse(json.dumps({**BASE, **extra}).encode(), able, refuse_unknown=True)
    encoder = turn.encoder(Reply(id="abc", model="tiny", created=17))
    frames = [*encoder.open(), *(frame for event in events for frame in encoder.event(event))]
    if isinstance(events[-1], Finished):
        frames += encoder.close(usage)
    found = [json.loads(frame.data) for frame in frames]
    assert [frame.event for frame in frames] == [one["type"] for one in found]
    assert [one["sequence_number"] for one in found] == list(range(len(found)))
    for one in found:
        valid(SCHEMA_OF[one["type"]], one)
    return found


def whole(events: list[GenerateEvent], usage: Usage = USAGE, **extra: Any) -> dict[str, Any]:
    turn = dialect()
    turn.parse(json.dumps({**BASE, **extra}).encode(), able, refuse_unknown=True)
    answer: dict[str, Any] = json.loads(turn.encoder(Reply(id="abc", model="tiny", created=17)).complete(events, usage))
    valid("Response", answer)
    return answer


def finished(*events: GenerateEvent, reason: FinishReason = "stop") -> list[GenerateEvent]:
    return [*events, Finished(reason=reason, usage=USAGE)]


def test_the_events_of_an_answer_of_every_kind() -> None:
    frames = transcript(ANSWER, tools=[WEATHER])
    assert [one["type"].removeprefix("response.") for one in frames] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    indices = [one["output_index"] for one in frames if "output_index" in one]
    assert indices == sorted(indices)
    assert set(indices) == {0, 1, 2, 3}
    output = frames[-1]["response"]["output"]
    assert [one["item"] for one in frames if one["type"] == "response.output_item.done"] == output
    assert [one["item"]["id"] for one in frames if one["type"] == "response.output_item.added"] == [
        item["id"] for item in output
    ]


def test_deltas_concatenate_to_what_is_done() -> None:
    frames = transcript(ANSWER, tools=[WEATHER])
    for kind, key in (("output_text", "text"), ("reasoning_text", "text"), ("function_call_arguments", "arguments")):
        joined: dict[str, str] = {}
        done: dict[str, str] = {}
        for one in frames:
            if one["type"] == f"response.{kind}.delta":
                joined[one["item_id"]] = joined.get(one["item_id"], "") + one["delta"]
            elif one["type"] == f"response.{kind}.done":
                done[one["item_id"]] = one[key]
        assert joined == done


def test_the_whole_answer_is_what_a_stream_ends_with() -> None:
    assert whole(ANSWER, tools=[WEATHER]) == transcript(ANSWER, tools=[WEATHER])[-1]["response"]


def test_a_whole_answer_of_text() -> None:
    answer = whole(finished(TextDelta(text="Hello", tokens=1)), metadata={"a": "b"}, user="u")
    assert answer == {
        "id": "resp_abc",
        "object": "response",
        "created_at": 17,
        "completed_at": 18,
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "model": "tiny",
        "output": [
            {
                "id": "msg_abc000",
                "type": "message",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}],
            }
        ],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": True,
        "temperature": 0.2,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 7,
            "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
            "output_tokens": 4,
            "output_tokens_details": {"reasoning_tokens": 1},
            "total_tokens": 11,
        },
        "user": "u",
        "metadata": {"a": "b"},
    }


def test_a_response_repeats_its_request() -> None:
    form = {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": True}
    answer = whole(
        finished(TextDelta(text="{}", tokens=1)),
        tools=[{"type": "web_search"}, WEATHER],
        tool_choice={"type": "function", "name": "weather"},
        text={"format": form},
        reasoning={"effort": "low", "summary": "auto"},
        instructions="Be kind.",
    )
    assert answer["tools"] == [{**WEATHER, "description": ""}]
    assert answer["tool_choice"] == {"type": "function", "name": "weather"}
    assert answer["text"]["format"] == form
    assert answer["reasoning"] == {"effort": "low", "summary": "auto"}
    assert answer["instructions"] == "Be kind."


def test_a_client_that_asks_for_a_summary_gets_the_thought_as_one() -> None:
    frames = transcript(ANSWER, tools=[WEATHER], reasoning={"summary": "auto"})
    kinds = [one["type"].removeprefix("response.") for one in frames[2:9]]
    assert kinds == [
        "output_item.added", "reasoning_summary_part.added", "reasoning_summary_text.delta",
        "reasoning_summary_text.delta", "reasoning_summary_text.done", "reasoning_summary_part.done",
        "output_item.done",
    ]  # fmt: skip
    thought = frames[-1]["response"]["output"][0]
    assert thought["summary"] == [{"type": "summary_text", "text": "Let me see."}]
    assert "content" not in thought


def test_logprobs_stand_with_their_text() -> None:
    frames = transcript(ANSWER, tools=[WEATHER], top_logprobs=2)
    [first, _] = [one for one in frames if one["type"] == "response.output_text.delta"]
    assert first["logprobs"] == [
        {
            "token": "Hel",
            "logprob": -0.5,
            "bytes": [72, 101, 108],
            "top_logprobs": [
                {"token": "Hel", "logprob": -0.5, "bytes": [72, 101, 108]},
                {"token": "\\xf0\\x9f", "logprob": -1.5, "bytes": [240, 159]},
            ],
        }
    ]
    assert frames[-1]["response"]["output"][1]["content"][0]["logprobs"] == first["logprobs"]


@pytest.mark.parametrize(("reason", "why"), [("length", "max_output_tokens"), ("content_filter", "content_filter")])
def test_an_answer_that_was_cut_is_incomplete(reason: FinishReason, why: str) -> None:
    frames = transcript(finished(TextDelta(text="Hel", tokens=1), reason=reason))
    assert frames[-1]["type"] == "response.incomplete"
    response = frames[-1]["response"]
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": why})
    assert response["completed_at"] is None
    assert [item["status"] for item in response["output"]] == ["incomplete"]
    assert whole(finished(TextDelta(text="Hel", tokens=1), reason=reason)) == response


def test_only_the_last_item_of_a_cut_answer_is_incomplete() -> None:
    events = finished(ReasoningDelta(text="x", tokens=1), TextDelta(text="y", tokens=1), reason="length")
    assert [item["status"] for item in whole(events)["output"]] == ["completed", "incomplete"]


def test_an_empty_answer_has_an_empty_message() -> None:
    frames = transcript(finished())
    [item] = frames[-1]["response"]["output"]
    assert (item["type"], item["content"][0]["text"]) == ("message", "")
    [thought] = whole(finished(ReasoningDelta(text="x", tokens=1), reason="length"))["output"]
    assert thought["type"] == "reasoning"


@pytest.mark.parametrize(
    ("error", "code"), [(EngineCrashed("It died."), "server_error"), (Overloaded("Busy."), "rate_limit_exceeded")]
)
def test_a_failure_is_the_last_event(error: ApiError, code: str) -> None:
    frames = transcript([*ANSWER[:4], Failed(error=error.info, usage=USAGE)])
    last = frames[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": code, "message": error.message}
    assert last["response"]["usage"]["output_tokens"] == 4
    assert [item["status"] for item in last["response"]["output"]] == ["completed", "incomplete"]


def test_any_split_of_an_answer_makes_the_same_whole() -> None:
    random_source = random.Random(5)
    text, arguments = "The weather in Oslo: rain 🌧", '{"at":"Oslo"}'

    def split(value: str) -> list[str]:
        cuts = sorted(random_source.sample(range(1, len(value)), random_source.randrange(len(value) - 1)))
        return [value[start:end] for start, end in zip([0, *cuts], [*cuts, len(value)], strict=True)]

    outputs = set()
    for _ in range(200):
        calls = [ToolCallDelta(call=0, name="weather")]
        calls += [ToolCallDelta(call=0, arguments=piece) for piece in split(arguments)]
        events: list[GenerateEvent] = [TextDelta(text=piece, tokens=1) for piece in split(text)]
        outputs.add(json.dumps(whole(finished(*events, *calls, reason="tool_calls"), tools=[WEATHER])["output"]))
    assert len(outputs) == 1


# Memory


def answered(memory: Remembered, name: str, events: list[GenerateEvent], **extra: Any) -> dict[str, Any]:
    turn = dialect(memory)
    turn.parse(json.dumps({**BASE, **extra}).encode(), able, refuse_unknown=True)
    answer: dict[str, Any] = json.loads(turn.encoder(Reply(id=name, model="tiny", created=17)).complete(events, USAGE))
    return answer


def test_a_conversation_goes_on_from_its_last_response_without_its_instructions() -> None:
    memory = Remembered()
    answered(memory, "one", ANSWER, input="What weather?", instructions="Be kind.", tools=[WEATHER])
    assert set(memory.stored) == {"resp_one"}
    outputs = [{**RESULT, "call_id": f"call_one00{index:02d}"} for index in (0, 1)]
    turns = messages(*outputs, memory=memory, previous_response_id="resp_one")
    assert turns == (
        Message(role="user", content="What weather?"),
        Message(
            role="assistant",
            content="Hello",
            reasoning="Let me see.",
            tool_calls=(
                ToolCall(id="call_one0000", name="weather", arguments='{"at":"Oslo"}'),
                ToolCall(id="call_one0001", name="weather", arguments="{}"),
            ),
        ),
        Message(role="tool", content="rain", tool_call_id="call_one0000", name="weather"),
        Message(role="tool", content="rain", tool_call_id="call_one0001", name="weather"),
    )
    assert refused(memory, previous_response_id="resp_one").param == "input"  # the calls have no results
    error = refused(memory, previous_response_id="resp_two")
    assert (error.param, error.code) == ("previous_response_id", "previous_response_not_found")


def test_the_body_that_is_stored_is_the_answer() -> None:
    memory = Remembered()
    answer = answered(memory, "one", finished(TextDelta(text="Hello", tokens=1)))
    assert json.loads(memory.stored["resp_one"].body) == answer
    assert answer["store"] is True


def test_nothing_is_stored_that_is_not_to_be() -> None:
    memory = Remembered()
    assert answered(memory, "one", finished(), store=False)["store"] is False
    off = Remembered(keeps=False)
    assert answered(off, "two", finished())["store"] is False
    assert not memory.stored
    assert not off.stored
    assert refused(off, store=True).param == "store"


def test_an_item_is_found_by_its_id() -> None:
    memory = Remembered()
    answer = answered(memory, "one", finished(TextDelta(text="Hello", tokens=1)))
    turns = messages(asked("a"), {"type": "item_reference", "id": answer["output"][0]["id"]}, asked("b"), memory=memory)
    assert [turn.content for turn in turns] == ["a", "Hello", "b"]


def kept(memory: Remembered, name: str, *items: Item) -> None:
    memory.stored[name] = StoredResponse(id=name, body=b"", before=(), input=items, output=())


def reference(name: str) -> dict[str, str]:
    return {"type": "item_reference", "id": name}


def test_a_short_request_cannot_recall_more_than_fits() -> None:
    memory = Remembered()
    piece = Message(role="assistant", reasoning="x")
    large = [Item(id=f"i{n}", wire=b"x" * (MAX_RECALLED_BYTES // 3), piece=piece) for n in range(4)]
    kept(memory, "all", *large)
    kept(memory, "two", *large[:2])
    assert messages(*(reference(f"i{n}") for n in range(3)), asked("a"), memory=memory)
    assert refused(memory, input=[reference(f"i{n}") for n in range(4)]).param == "input[3].id"
    assert refused(memory, previous_response_id="all").param == "previous_response_id"
    more = [asked("a"), reference("i2"), reference("i3")]
    assert refused(memory, previous_response_id="two", input=more).param == "input[2].id"


def test_an_item_is_referenced_once() -> None:
    memory = Remembered()
    kept(memory, "one", Item(id="i", wire=b"", piece=Message(role="user", content="x")))
    assert refused(memory, input=[reference("i"), asked("a"), reference("i")]).param == "input[2].id"


def test_images_that_are_recalled_count() -> None:
    memory = Remembered()
    images = (Image(data=b"", at=0),) * 40
    for name in "ab":
        kept(memory, name, Item(id=f"i{name}", wire=b"", piece=Message(role="user", content="x", images=images)))
    assert refused(memory, previous_response_id="a", input=[reference("ib")]).param == "input[0].id"
