"""Anthropic's dialect without a server: every refusal by its exact path, what a conversation becomes, the events."""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import pytest

from ocserve.api import anthropic, anthropic_count, json_body
from ocserve.api.dialect import Encoder, Reply
from ocserve.errors import ApiError, ContextLengthExceeded, EngineCrashed, InvalidRequest, ModelNotFound, RateLimited
from ocserve.generation import (
    Encoded,
    EncodeRequest,
    Failed,
    Finished,
    GenerateEvent,
    Image,
    JsonConstraint,
    Message,
    Reasoning,
    ReasoningDelta,
    Started,
    TextDelta,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
    Usage,
)
from ocserve.modelcard import ServedModel
from tests.api import mutations
from tests.api.mutations import Case, Valid, boolean, integer, mapping, number, only
from tests.http.harness import MODEL

SEEING = msgspec.structs.replace(MODEL, input_modalities=("text", "image"))
BASE: dict[str, Any] = {"model": "tiny", "max_tokens": 100, "messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"name": "look", "description": "Looks.", "input_schema": {"type": "object", "properties": {}}}
PIXEL = base64.b64encode(b"\x89PNG...").decode()


def models(name: str) -> ServedModel:
    if MODEL.answers_to(name):
        return MODEL
    raise ModelNotFound("no such model", param="model")


def parse(model: ServedModel = MODEL, **extra: Any) -> Any:
    return anthropic.parse(json.dumps({**BASE, **extra}).encode(), lambda _: model, refuse_unknown=True)


def refused(model: ServedModel = MODEL, **extra: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(model, **extra)
    return caught.value


# What each parameter may be, of the values in the pool; written apart from the dialect's own table.
ORACLE: dict[str, Valid] = {
    "model": only("tiny"),
    "messages": lambda v: False,
    "system": lambda v: isinstance(v, str) or v == [],
    "tools": only([]),
    "tool_choice": lambda v: False,
    "thinking": lambda v: False,
    "output_config": only({}),
    "output_format": lambda v: False,
    "cache_control": mapping(8),
    "context_management": mapping(8),
    "speed": only("standard"),
    "mcp_servers": only([]),
    "max_tokens": integer(0, 4096),
    "stream": boolean,
    "temperature": number(0, 1),
    "top_p": number(0, 1, above=True),
    "top_k": integer(0, 2**31 - 1),
    "stop_sequences": lambda v: isinstance(v, list) and len(v) <= 16 and all(map(mutations.text(256, 1), v)),
    "metadata": mapping(16),
    "service_tier": only("auto", "standard_only"),
    "inference_geo": mutations.text(64),
    "diagnostics": mapping(16),
    "container": only(),
    "compaction": only(),
    "fallbacks": only(),
    "thread": only(),
}


def refusal(case: Case) -> ApiError | None:
    try:
        json_body.check_shape(case.body, 64)
        anthropic.parse(case.body, models, refuse_unknown=True)
    except ApiError as error:
        return error
    return None


def test_the_oracle_has_every_parameter() -> None:
    assert set(ORACLE) == {field.name for field in anthropic.PARAMETERS}


def test_every_field_with_every_invalid_value_is_refused_by_name() -> None:
    wrong = []
    cases = list(mutations.bodies("/v1/messages", BASE, ORACLE))
    for case in cases:
        error = refusal(case)
        if error is None:
            wrong.append((case.body[-120:], "accepted"))
        elif error.status != (404 if error.code == "model_not_found" else 400):
            wrong.append((case.body[-120:], error.info))
        elif case.param is not ... and not (error.param or "").startswith(case.param):
            wrong.append((case.body[-120:], error.param))
    assert not wrong, wrong[:10]
    assert len(cases) > 1500


def test_every_valid_value_is_accepted_and_null_means_absent() -> None:
    for name, valid in ORACLE.items():
        for text in mutations.POOL:
            if valid(value := json.loads(text)):
                error = refusal(Case("", json.dumps({**BASE, name: value}).encode(), ...))
                assert error is None, (name, text, error)
    nulls = dict.fromkeys(set(ORACLE) - set(BASE))
    assert refusal(Case("", json.dumps({**BASE, **nulls}).encode(), ...)) is None
    for name in BASE:
        error = refusal(Case("", json.dumps({**BASE, name: None}).encode(), ...))
        assert error is not None
        assert (error.code, error.param) == ("missing_required_parameter", name)


def user(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


def said(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": list(blocks)}]}


CALL = {"type": "tool_use", "id": "t1", "name": "look", "input": {}}
AT, AT1 = "messages[0].content[0]", "messages[1].content[0]"
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [None]}, "messages[0]"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": {}}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name"),
    (user("x"), AT),
    (user({}), f"{AT}.type"),
    (user({"type": 1}), f"{AT}.type"),
    (user({"type": "poem"}), f"{AT}.type"),
    (user({"type": "text"}), f"{AT}.text"),
    (user({"type": "text", "text": 1}), f"{AT}.text"),
    (user({"type": "text", "text": "x", "bold": 1}), f"{AT}.bold"),
    (user({"type": "text", "text": "x", "cache_control": 1}), f"{AT}.cache_control"),
    (user(CALL), f"{AT}.type"),
    (user({"type": "thinking", "thinking": ""}), f"{AT}.type"),
    (user({"type": "document", "source": {}}), f"{AT}.type"),
    (user({"type": "search_result"}), f"{AT}.type"),
    (user({"type": "image", "source": {"type": "base64"}}), f"{AT}.type"),
    (user({"type": "tool_result"}), f"{AT}.tool_use_id"),
    (user({"type": "tool_result", "tool_use_id": 1}), f"{AT}.tool_use_id"),
    (user({"type": "tool_result", "tool_use_id": "t", "content": 1}), f"{AT}.content"),
    (user({"type": "tool_result", "tool_use_id": "t", "content": [1]}), f"{AT}.content[0]"),
    (user({"type": "tool_result", "tool_use_id": "t", "content": [CALL]}), f"{AT}.content[0].type"),
    (user({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "document"}]}), f"{AT}.content[0].type"),
    (user({"type": "tool_result", "tool_use_id": "t", "is_error": "no"}), f"{AT}.is_error"),
    (said({"type": "image"}), f"{AT1}.type"),
    (said({"type": "server_tool_use"}), f"{AT1}.type"),
    (said({"type": "tool_result"}), f"{AT1}.type"),
    (said({**CALL, "id": None}), f"{AT1}.id"),
    (said({**CALL, "name": 1}), f"{AT1}.name"),
    (said({**CALL, "input": "{}"}), f"{AT1}.input"),
    (said({**CALL, "input": None}), f"{AT1}.input"),
    (said(CALL, CALL), "messages[1].content[1].id"),
    (said({"type": "thinking"}), f"{AT1}.thinking"),
    (said({"type": "redacted_thinking"}), f"{AT1}.data"),
    ({"system": 5}, "system"),
    ({"system": ["x"]}, "system[0]"),
    ({"system": [{"type": "image"}]}, "system[0].type"),
    ({"system": [{"type": "text"}]}, "system[0].text"),
    ({"tools": [5]}, "tools[0]"),
    ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
    ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
    ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
    ({"tools": [{"name": "a", "input_schema": {"type": "array"}}]}, "tools[0].input_schema.type"),
    ({"tools": [TOOL, TOOL]}, "tools[1].name"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tools": [{**TOOL, "frob": 1}]}, "tools[0].frob"),
    ({"tool_choice": {}}, "tool_choice.type"),
    ({"tool_choice": {"type": "required"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice.name"),
    ({"tools": [TOOL], "tool_choice": {"type": "auto", "name": "look"}}, "tool_choice.name"),
    ({"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}},
     "tool_choice.disable_parallel_tool_use"),
    ({"thinking": {"type": "maybe"}}, "thinking.type"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 100}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "adaptive", "budget_tokens": 5}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "adaptive", "display": "loud"}}, "thinking.display"),
    ({"output_config": {"effort": "some"}}, "output_config.effort"),
    ({"output_config": {"format": {"type": "json_object"}}}, "output_config.format.type"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ({"output_config": {"format": {"type": "json_schema", "schema": []}}}, "output_config.format.schema"),
    ({"output_format": {"type": "json_schema"}}, "output_format.schema"),
    ({"stop_sequences": ["a", ""]}, "stop_sequences[1]"),
    ({"max_tokens": 4097}, "max_tokens"),
    ({"betas": []}, "betas"),
]  # fmt: skip


@pytest.mark.parametrize(("extra", "param"), WRONG, ids=[param + str(n) for n, (_, param) in enumerate(WRONG)])
def test_what_is_wrong_inside_is_refused_by_its_path(extra: dict[str, Any], param: str) -> None:
    error = refused(**extra)
    assert (error.status, error.param) == (400, param)


def test_the_nonce_line_of_the_vendors_agent_is_not_part_of_the_prompt() -> None:
    line = "x-anthropic-billing-header: cc_version=2.1.9.a1f; cc_entrypoint=cli; cch={};"
    for system in (
        lambda nonce: [{"type": "text", "text": line.format(nonce)}, {"type": "text", "text": "Be terse."}],
        lambda nonce: [{"type": "text", "text": line.format(nonce) + "\nBe terse."}],
        lambda nonce: line.format(nonce) + "\nBe terse.",
    ):
        one, other = parse(system=system("a0001")), parse(system=system("fffff"))
        assert one.request.prompt == other.request.prompt
        assert one.request.prompt.messages[0] == Message(role="system", content="Be terse.")
        assert one.ignored == ("x-anthropic-billing-header",)
    # Anywhere else it is what somebody wrote.
    kept = parse(system=[{"type": "text", "text": "Be terse."}, {"type": "text", "text": line}])
    assert line in kept.request.prompt.messages[0].content


def test_a_conversation_with_tools_and_thoughts() -> None:
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "Look "}, {"type": "text", "text": "twice."}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "s"},
            {"type": "redacted_thinking", "data": "zzz"},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "look", "input": {"where": "é"}},
            {"type": "tool_use", "id": "t2", "name": "peek", "input": {}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "a "},
                                                                      {"type": "text", "text": "cat"}]},
            {"type": "tool_result", "tool_use_id": "t2", "is_error": True, "content": "no light"},
            {"type": "tool_result", "tool_use_id": "t2"},
            {"type": "text", "text": "So?"},
        ]},
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": "A"},
    ]  # fmt: skip
    parsed = parse(messages=conversation, tools=[TOOL])
    assert parsed.request.prompt.messages == (
        Message(role="user", content="Look twice."),
        Message(
            role="assistant",
            content="I look.",
            reasoning="Hm.",
            tool_calls=(
                ToolCall(id="t1", name="look", arguments='{"where": "é"}'),
                ToolCall(id="t2", name="peek", arguments="{}"),
            ),
        ),
        Message(role="tool", content="a cat", tool_call_id="t1", name="look"),
        Message(role="tool", content="Error: no light", tool_call_id="t2", name="peek"),
        Message(role="tool", content="", tool_call_id="t2", name="peek"),
        Message(role="user", content="So?\n\nWell?"),
        Message(role="assistant", content="A"),
    )
    assert parsed.ignored == ("messages[1].content[1]",)
    assert parsed.request.prompt.tools == (
        Tool(name="look", description="Looks.", parameters='{"type": "object", "properties": {}}'),
    )


def test_images_stand_where_they_stood() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}
    found = Image(data=b"\x89PNG...", at=5, where="messages[0].content[1].source.data")
    turns = [{"role": "user", "content": [{"type": "text", "text": "This:"}, image]}]
    assert parse(SEEING, messages=turns).request.prompt.messages[0].images == (found,)
    result = {"type": "tool_result", "tool_use_id": "t", "content": [image], "is_error": True}
    (turn,) = parse(SEEING, **user(result)).request.prompt.messages
    assert (turn.role, turn.content, turn.images[0].at) == ("tool", "Error: ", 7)
    (both,) = parse(SEEING, messages=[*turns, *turns]).request.prompt.messages
    assert [image.at for image in both.images] == [5, 12]
    for source, param in (
        ({"type": "url", "url": "http://x/y.png"}, f"{AT}.source.url"),
        ({"type": "file", "file_id": "f"}, f"{AT}.source.file_id"),
        ({"type": "base64", "data": PIXEL}, f"{AT}.source.media_type"),
        ({"type": "base64", "media_type": "image/tiff", "data": PIXEL}, f"{AT}.source.media_type"),
        ({"type": "base64", "media_type": "image/png"}, f"{AT}.source.data"),
        ({"type": "base64", "media_type": "image/png", "data": "?"}, f"{AT}.source.data"),
    ):
        error = refused(SEEING, **user({"type": "image", "source": source}))
        assert (error.status, error.param) == (400, param)


def test_tool_choices() -> None:
    def choice(**fields: Any) -> ToolChoice:
        found: ToolChoice = parse(tools=[TOOL], tool_choice=fields).request.tool_choice
        return found

    assert parse(tools=[TOOL]).request.tool_choice == ToolChoice()
    assert choice(type="auto") == ToolChoice()
    assert choice(type="none") == ToolChoice(mode="none")
    assert choice(type="any", disable_parallel_tool_use=True) == ToolChoice(mode="required", parallel=False)
    assert choice(type="tool", name="look") == ToolChoice(mode="required", names=("look",))


def test_a_wish_to_think_is_named_where_the_model_does_not() -> None:
    silent = msgspec.structs.replace(MODEL, capabilities=("chat", "tools"))
    wishes = {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}
    assert parse(silent, **wishes).ignored == ("thinking", "output_config.effort")
    assert parse(silent, thinking={"type": "disabled"}).ignored == ()
    thinks = msgspec.structs.replace(MODEL, capabilities=("chat", "reasoning"))
    assert parse(thinks, **wishes).ignored == ()


def test_thinking_effort_and_format() -> None:
    assert parse().request.prompt.reasoning == Reasoning()
    thinking = {"type": "enabled", "budget_tokens": 50, "display": "omitted"}
    parsed = parse(thinking=thinking, output_config={"effort": "low"})
    assert parsed.request.prompt.reasoning == Reasoning(enabled=True, effort="low", max_tokens=50)
    assert not parsed.show_reasoning
    assert parse(thinking={"type": "adaptive"}).request.prompt.reasoning == Reasoning(enabled=True)
    assert parse(thinking={"type": "disabled"}).request.prompt.reasoning == Reasoning(enabled=False)
    form = {"type": "json_schema", "schema": {"type": "object"}}
    for extra in ({"output_config": {"format": form}}, {"output_format": form}):
        assert parse(**extra).request.constraint == JsonConstraint(schema='{"type": "object"}')
    assert refused(output_config={"format": form}, output_format=form).param == "output_format"


def test_the_vendors_model_names_mean_the_default_model_and_that_is_said() -> None:
    body = json.dumps({**BASE, "model": "claude-opus-4-8"}).encode()
    parsed = anthropic.parse(body, models, refuse_unknown=True)
    assert (parsed.model.id, parsed.ignored) == ("tiny", ("model",))
    with pytest.raises(ModelNotFound):
        anthropic.parse(json.dumps({**BASE, "model": "gpt-9"}).encode(), models, refuse_unknown=True)


def test_a_count_reads_what_makes_the_prompt_and_nothing_else() -> None:
    body = {**BASE, "system": "Be terse.", "tools": [TOOL], "tool_choice": {"type": "any"}}
    del body["max_tokens"]
    asked = anthropic_count.parse(json.dumps(body).encode(), models, refuse_unknown=True)
    assert isinstance(asked.question, EncodeRequest)
    assert asked.question.count_only
    assert asked.question.prompt == parse(system="Be terse.", tools=[TOOL]).request.prompt
    for extra, param in (({"max_tokens": 5}, "max_tokens"), ({"messages": None}, "messages")):
        with pytest.raises(InvalidRequest) as caught:
            anthropic_count.parse(json.dumps({**body, **extra}).encode(), models, refuse_unknown=True)
        assert caught.value.param == param
    assert json.loads(asked.reply(Encoded(count=2))) == {"input_tokens": 2}


COUNTS = Usage(prompt_tokens=9, cached_tokens=4, completion_tokens=7, reasoning_tokens=2)
USAGE = {
    "input_tokens": 5,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 4,
    "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
    "output_tokens": 7,
    "output_tokens_details": {"thinking_tokens": 2},
    "service_tier": "standard",
}
EVENTS: list[GenerateEvent] = [
    ReasoningDelta(text="Let me", tokens=1),
    ReasoningDelta(text=" see.", tokens=1),
    TextDelta(text="", tokens=1),
    TextDelta(text="I ", tokens=1),
    TextDelta(text="look.", tokens=1),
    ToolCallDelta(call=0, name="look"),
    ToolCallDelta(call=0, arguments='{"a":'),
    ToolCallDelta(call=0, arguments="1}", tokens=1),
    ToolCallDelta(call=1, name="peek"),
    Finished(reason="tool_calls", usage=COUNTS),
]


def encoder(**fields: Any) -> Encoder:
    prompt = Usage(prompt_tokens=9, cached_tokens=4)
    return anthropic.encoder(Reply(id="ab", model="tiny", created=1, prompt=prompt, **fields))


def stream(events: list[GenerateEvent], **fields: Any) -> list[tuple[str | None, dict[str, Any]]]:
    made = encoder(**fields)
    frames = [*made.open(), *(frame for event in events for frame in made.event(event)), *made.close(COUNTS)]
    return [(frame.event, json.loads(frame.data)) for frame in frames]


def test_the_events_of_a_message_in_their_order() -> None:
    found = stream(EVENTS)
    assert all(name == data["type"] for name, data in found)
    started = found[0][1]["message"]
    assert (started["id"], started["content"], started["stop_reason"]) == ("msg_ab", [], None)
    assert started["usage"] == {**USAGE, "output_tokens": 0, "output_tokens_details": {"thinking_tokens": 0}}

    def start(index: int, **block: Any) -> dict[str, Any]:
        return {"type": "content_block_start", "index": index, "content_block": block}

    def delta(index: int, **fields: Any) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": index, "delta": fields}

    def stop(index: int) -> dict[str, Any]:
        return {"type": "content_block_stop", "index": index}

    assert [data for _, data in found[1:]] == [
        {"type": "ping"},
        start(0, type="thinking", thinking="", signature=""),
        delta(0, type="thinking_delta", thinking="Let me"),
        delta(0, type="thinking_delta", thinking=" see."),
        delta(0, type="signature_delta", signature=found[5][1]["delta"]["signature"]),
        stop(0),
        start(1, type="text", text=""),
        delta(1, type="text_delta", text="I "),
        delta(1, type="text_delta", text="look."),
        stop(1),
        start(2, type="tool_use", id="toolu_ab0000", name="look", input={}),
        delta(2, type="input_json_delta", partial_json=""),
        delta(2, type="input_json_delta", partial_json='{"a":'),
        delta(2, type="input_json_delta", partial_json="1}"),
        stop(2),
        start(3, type="tool_use", id="toolu_ab0001", name="peek", input={}),
        delta(3, type="input_json_delta", partial_json=""),
        stop(3),
        {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": USAGE},
        {"type": "message_stop"},
    ]


def assembled(found: list[tuple[str | None, dict[str, Any]]]) -> dict[str, Any]:
    """The message that a client makes of the events."""
    message: dict[str, Any] = {}
    for _, data in found:
        match data["type"]:
            case "message_start":
                message = data["message"]
            case "content_block_start":
                message["content"].append({**data["content_block"], "json": ""})
            case "content_block_delta":
                block, delta = message["content"][data["index"]], data["delta"]
                match delta["type"]:
                    case "text_delta":
                        block["text"] += delta["text"]
                    case "thinking_delta":
                        block["thinking"] += delta["thinking"]
                    case "signature_delta":
                        block["signature"] = delta["signature"]
                    case "input_json_delta":
                        block["json"] += delta["partial_json"]
            case "content_block_stop":
                block = message["content"][data["index"]]
                if text := block.pop("json"):
                    block["input"] = json.loads(text)
            case "message_delta":
                message |= data["delta"]
                message["usage"] |= data["usage"]
    return message


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize(
    "events",
    [
        EVENTS,
        [Finished(reason="stop", usage=COUNTS)],
        [TextDelta(text="a", tokens=1), Finished(reason="length", usage=COUNTS)],
        [TextDelta(text="a", tokens=1), Finished(reason="stop", usage=COUNTS, stop_sequence="END")],
        [ToolCallDelta(call=0, name="f", arguments="{}"),
         Finished(reason="tool_calls", usage=COUNTS, stop_sequence="END")],
        [TextDelta(text="No.", tokens=1), Finished(reason="content_filter", usage=COUNTS)],
        [ReasoningDelta(text="a", tokens=1), TextDelta(text="b", tokens=1), ReasoningDelta(text="c", tokens=1),
         Finished(reason="stop", usage=COUNTS)],
    ],
    ids=["all", "nothing", "length", "stop", "stop after a call", "refusal", "thinks twice"],
)  # fmt: skip
def test_a_stream_makes_the_whole_message(events: list[GenerateEvent], shown: bool) -> None:
    whole = json.loads(encoder(show_reasoning=shown).complete([Started(prompt_tokens=9), *events], COUNTS))
    assert assembled(stream(events, show_reasoning=shown)) == whole
    assert whole["usage"] == USAGE
    reasons = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
    last = events[-1]
    assert isinstance(last, Finished)
    stopped = last.stop_sequence if last.reason == "stop" else None
    expected = "stop_sequence" if stopped else reasons[last.reason]
    assert (whole["stop_reason"], whole["stop_sequence"]) == (expected, stopped)
    assert all(block["thinking"] == "" or shown for block in whole["content"] if block["type"] == "thinking")
    assert all(block["signature"] for block in whole["content"] if block["type"] == "thinking")


def test_a_call_that_the_limit_cut_off_is_not_one() -> None:
    events = [*EVENTS[:7], Finished(reason="length", usage=COUNTS)]
    whole = json.loads(encoder().complete(events, COUNTS))
    assert [block["type"] for block in whole["content"]] == ["thinking", "text"]
    assert whole["stop_reason"] == "max_tokens"


def test_errors_are_in_the_vendors_shape() -> None:
    def body(error: ApiError) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(anthropic.error_body(ApiError.from_info(error.info).info))
        assert found["type"] == "error"
        inner: dict[str, Any] = found["error"]
        return inner

    assert body(InvalidRequest("No.", param="system")) == {
        "type": "invalid_request_error",
        "message": "No.",
        "param": "system",
        "code": "invalid_value",
    }
    assert body(RateLimited("Slow."))["type"] == "rate_limit_error"
    assert body(EngineCrashed("Died."))["type"] == "api_error"
    assert body(ModelNotFound("No."))["type"] == "not_found_error"
    long = ContextLengthExceeded(limit=8192, prompt_tokens=9000, param="messages")
    assert body(long)["message"] == "prompt is too long: 9000 tokens > 8191 maximum"
    (frame,) = encoder().event(Failed(error=EngineCrashed("Died.").info))
    assert (frame.event, json.loads(frame.data)["error"]["message"]) == ("error", "Died.")


def test_the_engines_names_for_schemas_are_the_clients() -> None:
    form = {"type": "json_schema", "schema": {}}
    schema = "response_format.json_schema.schema"
    assert parse(output_config={"format": form}).paths[schema] == "output_config.format.schema"
    assert parse(output_format=form).paths[schema] == "output_format.schema"
    assert parse().paths[".function.parameters"] == ".input_schema"
