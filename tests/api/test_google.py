"""Google's dialect without a server: every refusal by its exact path, what a conversation becomes, the records."""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import pytest

from ocserve.api import google, google_config, google_wire, json_body
from ocserve.api.dialect import Parsed, Reply
from ocserve.errors import ApiError, ContextLengthExceeded, EngineCrashed, InvalidRequest, ModelNotFound, RateLimited
from ocserve.generation import (
    Encoded,
    Failed,
    Finished,
    GenerateEvent,
    GrammarConstraint,
    Image,
    JsonConstraint,
    Message,
    Reasoning,
    ReasoningDelta,
    Started,
    TextDelta,
    TokenChance,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
    Usage,
)
from ocserve.modelcard import ServedModel
from tests.api import mutations
from tests.api.mutations import Case, Valid, boolean, mapping, number, only, text
from tests.http.harness import MODEL

SEEING = msgspec.structs.replace(MODEL, input_modalities=("text", "image"))
BASE: dict[str, Any] = {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]}
PIXEL = base64.b64encode(b"\x89PNG...").decode()
LOOK = {
    "name": "look",
    "description": "Looks.",
    "parameters": {"type": "OBJECT", "properties": {"at": {"type": "STRING"}}},
}
TOOLS = {"tools": [{"functionDeclarations": [LOOK, {"name": "peek"}]}]}


def models(name: str) -> ServedModel:
    if MODEL.answers_to(name):
        return MODEL
    raise ModelNotFound("no such model", param="model")


def parse(model: ServedModel = MODEL, **extra: Any) -> Parsed:
    dialect = google.GenerateContent("tiny")
    return dialect.parse(json.dumps({**BASE, **extra}).encode(), lambda _: model, refuse_unknown=True)


def configured(**config: Any) -> Parsed:
    return parse(generationConfig=config)


def refused(model: ServedModel = MODEL, **extra: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(model, **extra)
    return caught.value


def whole(low: int, high: int) -> Valid:
    return lambda v: type(v) in (int, float) and v == v and abs(v) < 1e300 and v == int(v) and low <= v <= high


# What each parameter may be, of the values in the pool; written apart from the dialect's own tables.
ORACLE: dict[str, Valid] = {
    "contents": lambda v: False,
    "systemInstruction": lambda v: False,
    "tools": lambda v: v in ([], [{}]),
    "toolConfig": only({}),
    "generationConfig": only({}),
    "safetySettings": lambda v: isinstance(v, list) and len(v) <= 64,
    "labels": mapping(64),
    "serviceTier": text(64),
    "store": only(False),
    "cachedContent": only(""),
}
CONFIG: dict[str, Valid] = {
    "temperature": number(0, 2),
    "topP": number(0, 1, above=True),
    "topK": whole(0, 2**31 - 1),
    "candidateCount": whole(1, 8),
    "maxOutputTokens": whole(1, 4096),
    "stopSequences": lambda v: isinstance(v, list) and len(v) <= 16 and all(map(text(256, 1), v)),
    "seed": whole(-(2**31), 2**31 - 1),
    "presencePenalty": number(-2, 2),
    "frequencyPenalty": number(-2, 2),
    "responseLogprobs": boolean,
    "logprobs": lambda v: False,  # never without responseLogprobs
    "responseMimeType": only(),
    "responseSchema": lambda v: False,  # never without a type of answer
    "responseJsonSchema": lambda v: False,
    "thinkingConfig": only({}),
    "mediaResolution": text(64),
    "enableEnhancedCivicAnswers": boolean,
    "responseModalities": only([]),
    **dict.fromkeys(
        ("responseFormat", "speechConfig", "imageConfig", "audioTimestamp", "routingConfig", "modelSelectionConfig",
         "enableAffectiveDialog", "audioTranscriptionConfig", "translationConfig", "continuationToken"),
        only(),
    ),
}  # fmt: skip


def refusal(body: bytes) -> ApiError | None:
    try:
        json_body.check_shape(body, 64)
        google.GenerateContent("tiny").parse(body, models, refuse_unknown=True)
    except ApiError as error:
        return error
    return None


def inner(case: Case) -> Case:
    """A case of `generationConfig` as a case of the request."""
    body = json.dumps(BASE).encode()[:-1] + b', "generationConfig": ' + case.body + b"}"
    return Case(case.path, body, case.param if case.param is ... else f"generationConfig.{case.param}")


CASES = [
    *mutations.bodies("", BASE, ORACLE),
    *map(inner, mutations.bodies("", {}, CONFIG)),
]


def test_the_oracle_has_every_parameter() -> None:
    assert set(ORACLE) == {field.name for field in google.PARAMETERS}
    assert set(CONFIG) == {field.name for field in google_config.CONFIG.values()}


def test_every_field_with_every_invalid_value_is_refused_by_name() -> None:
    wrong = []
    for case in CASES:
        error = refusal(case.body)
        if error is None:
            wrong.append((case.body[-120:], "accepted"))
        elif error.status != 400:
            wrong.append((case.body[-120:], error.info))
        elif case.param is not ... and not (error.param or "").startswith(case.param):
            wrong.append((case.body[-120:], error.param))
    assert not wrong, wrong[:10]
    assert len(CASES) > 2000


def test_every_valid_value_is_accepted_in_both_spellings_and_null_means_absent() -> None:
    def check(make: Any, oracle: dict[str, Valid]) -> None:
        for name, valid in oracle.items():
            snake = "".join(f"_{c.lower()}" if c.isupper() else c for c in name)
            for value in map(json.loads, mutations.POOL):
                for spelling in {name, snake} if valid(value) else ():
                    error = refusal(json.dumps(make({spelling: value})).encode())
                    assert error is None, (spelling, value, error)
        nulls = {name: None for name in oracle if name not in BASE}
        assert refusal(json.dumps(make(nulls)).encode()) is None

    check(lambda fields: {**BASE, **fields}, ORACLE)
    check(lambda fields: {**BASE, "generation_config": fields}, CONFIG)
    error = refused(contents=None)
    assert (error.code, error.param) == ("missing_required_parameter", "contents")


def test_one_parameter_under_two_spellings_is_refused() -> None:
    error = refused(generationConfig={"topP": 0.5, "top_p": 0.5})
    assert (error.code, error.param) == ("duplicate_key", "generationConfig.top_p")


def user(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"contents": [{"role": role, "parts": list(parts)}]}


def declared(**function: Any) -> dict[str, Any]:
    return {"tools": [{"functionDeclarations": [function]}]}


def config(**fields: Any) -> dict[str, Any]:
    return {"generationConfig": fields}


def calling(**fields: Any) -> dict[str, Any]:
    return {**TOOLS, "toolConfig": {"functionCallingConfig": fields}}


AT = "contents[0].parts[0]"
FUNCTION = "tools[0].functionDeclarations[0]"
CALLING = "toolConfig.functionCallingConfig"
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"contents": []}, "contents"),
    ({"contents": "Hi"}, "contents"),
    ({"contents": ["Hi"]}, "contents[0]"),
    ({"contents": [{"role": "user"}]}, "contents[0].parts"),
    ({"contents": [{"role": "assistant", "parts": []}]}, "contents[0].role"),
    ({"contents": [{"parts": "Hi"}]}, "contents[0].parts"),
    (user("Hi"), AT),
    (user({}), AT),
    (user({"text": "a", "inlineData": {"mimeType": "image/png", "data": PIXEL}}), AT),
    (user({"text": 1}), f"{AT}.text"),
    (user({"text": "a", "colour": "red"}), f"{AT}.colour"),
    (user({"thought": "yes", "text": "a"}), f"{AT}.thought"),
    (user({"thought": True, "text": "a"}), f"{AT}.thought"),
    (user({"fileData": {"fileUri": "x"}}), f"{AT}.fileData"),
    (user({"executable_code": {}}), f"{AT}.executable_code"),
    (user({"functionCall": {"name": "f"}}), f"{AT}.functionCall"),
    (user({"functionCall": {"name": "f"}}, role="model") | {"contents": [{"role": "model", "parts": [
        {"functionCall": {"args": {}}}]}]}, f"{AT}.functionCall.name"),
    (user({"functionCall": {"name": "f", "args": []}}, role="model"), f"{AT}.functionCall.args"),
    (user({"functionCall": {"name": "f", "id": 1}}, role="model"), f"{AT}.functionCall.id"),
    (user({"functionResponse": {"name": "f", "response": {}}}, role="model"), f"{AT}.functionResponse"),
    (user({"inlineData": {"mimeType": "image/png", "data": PIXEL}}, role="model"), f"{AT}.inlineData"),
    (user({"functionResponse": {"response": {}}}), f"{AT}.functionResponse.name"),
    (user({"functionResponse": {"name": "f"}}), f"{AT}.functionResponse.response"),
    (user({"functionResponse": {"name": "f", "response": "x"}}), f"{AT}.functionResponse.response"),
    (user({"inlineData": {"mimeType": "image/png", "data": PIXEL}}), f"{AT}.inlineData"),
    ({"systemInstruction": {"parts": [{"functionCall": {"name": "f"}}]}}, "systemInstruction.parts[0]"),
    ({"systemInstruction": {}}, "systemInstruction.parts"),
    ({"systemInstruction": "Be terse."}, "systemInstruction"),
    ({"tools": [{"googleSearch": {}}]}, "tools[0].googleSearch"),
    ({"tools": [{"google_search": {}}]}, "tools[0].google_search"),
    ({"tools": [{"codeExecution": {}}]}, "tools[0].codeExecution"),
    ({"tools": [{"functions": []}]}, "tools[0].functions"),
    ({"tools": [{"functionDeclarations": {}}]}, "tools[0].functionDeclarations"),
    ({"tools": [{"functionDeclarations": [1]}]}, FUNCTION),
    (declared(), f"{FUNCTION}.name"),
    (declared(name="a b"), f"{FUNCTION}.name"),
    (declared(name="a", parameters={"type": "ARRAY"}), f"{FUNCTION}.parameters.type"),
    (declared(name="a", parameters={"type": "OBJECT", "properties": {"x": {"type": "Y"}}}),
     f"{FUNCTION}.parameters.properties.x.type"),
    (declared(name="a", parameters={}, parametersJsonSchema={"type": "object"}), f"{FUNCTION}.parametersJsonSchema"),
    ({"tools": [{"functionDeclarations": [LOOK]}, {"functionDeclarations": [LOOK]}]},
     "tools[1].functionDeclarations[0].name"),
    ({"toolConfig": {"functionCallingConfig": {"mode": "ANY"}}}, CALLING),
    (calling(mode="SOME"), f"{CALLING}.mode"),
    (calling(mode="AUTO", allowedFunctionNames=["look"]), f"{CALLING}.allowedFunctionNames"),
    (calling(mode="ANY", allowedFunctionNames=["look", "x"]), f"{CALLING}.allowedFunctionNames[1]"),
    (calling(streamFunctionCallArguments=True), f"{CALLING}.streamFunctionCallArguments"),
    ({"toolConfig": {"retrievalConfig": {}}}, "toolConfig.retrievalConfig"),
    (config(maxOutputTokens=5000), "generationConfig.maxOutputTokens"),
    (config(logprobs=2), "generationConfig.logprobs"),
    (config(responseSchema={"type": "OBJECT"}), "generationConfig.responseSchema"),
    (config(responseMimeType="application/json", responseSchema={"type": "X"}), "generationConfig.responseSchema.type"),
    (config(responseMimeType="application/json", responseSchema={}, responseJsonSchema={}),
     "generationConfig.responseJsonSchema"),
    (config(responseMimeType="text/x.enum"), "generationConfig.responseSchema"),
    (config(responseMimeType="text/x.enum", responseSchema={"type": "STRING"}), "generationConfig.responseSchema.enum"),
    (config(responseMimeType="image/png"), "generationConfig.responseMimeType"),
    (config(thinkingConfig={"thinkingBudget": -2}), "generationConfig.thinkingConfig.thinkingBudget"),
    (config(thinkingConfig={"thinkingLevel": "ULTRA"}), "generationConfig.thinkingConfig.thinkingLevel"),
    (config(responseModalities=["IMAGE"]), "generationConfig.responseModalities"),
    ({"frob": 1}, "frob"),
]  # fmt: skip


@pytest.mark.parametrize(("extra", "param"), WRONG, ids=[param + str(n) for n, (_, param) in enumerate(WRONG)])
def test_what_is_wrong_inside_is_refused_by_its_path(extra: dict[str, Any], param: str) -> None:
    error = refused(**extra)
    assert (error.status, error.param) == (400, param)


def test_a_conversation_with_tools_and_thoughts_in_either_spelling() -> None:
    call = {"functionCall": {"name": "look", "args": {"at": "é"}}}
    named = {"function_call": {"id": "c9", "name": "peek"}}
    contents = [
        {"parts": [{"text": "Look "}, {"text": "twice."}]},
        {"role": "model", "parts": [
            {"text": "Hm.", "thought": True, "thoughtSignature": "zz"},
            {"text": "I look."}, call, named, call,
        ]},
        {"role": "user", "parts": [
            {"functionResponse": {"name": "look", "response": {"output": "cat"}}},
            {"function_response": {"id": "c9", "name": "peek", "response": {"error": "dark"}}},
            {"functionResponse": {"name": "look", "response": {"output": "dog"}}},
            {"functionResponse": {"name": "look", "response": {}}},
            {"text": "So?"},
        ]},
        {"role": "user", "parts": [{"text": "Well?"}]},
        {"role": "model", "parts": [{"text": "A"}]},
    ]  # fmt: skip
    parsed = parse(
        contents=contents,
        system_instruction={"role": "system", "parts": [{"text": "Be "}, {"text": "terse."}]},
        **TOOLS,
    )
    arguments = '{"at": "é"}'
    assert parsed.request.prompt == msgspec.structs.replace(
        parsed.request.prompt,  # type: ignore[arg-type]
        messages=(
            Message(role="system", content="Be terse."),
            Message(role="user", content="Look twice."),
            Message(
                role="assistant",
                content="I look.",
                reasoning="Hm.",
                tool_calls=(
                    ToolCall(id="call_1", name="look", arguments=arguments),
                    ToolCall(id="c9", name="peek", arguments="{}"),
                    ToolCall(id="call_3", name="look", arguments=arguments),
                ),
            ),
            Message(role="tool", content='{"output": "cat"}', tool_call_id="call_1", name="look"),
            Message(role="tool", content='{"error": "dark"}', tool_call_id="c9", name="peek"),
            Message(role="tool", content='{"output": "dog"}', tool_call_id="call_3", name="look"),
            Message(role="tool", content="{}", tool_call_id="call_4", name="look"),
            Message(role="user", content="So?\n\nWell?"),
            Message(role="assistant", content="A"),
        ),
        tools=(
            Tool(
                name="look",
                description="Looks.",
                parameters='{"type": "object", "properties": {"at": {"type": "string"}}}',
            ),
            Tool(name="peek"),
        ),
    )
    assert parsed.ignored == ("system_instruction.role",) or parsed.ignored == ("systemInstruction.role",)


def test_images_stand_where_they_stood() -> None:
    turns = [{"parts": [{"text": "This:"}, {"inline_data": {"mime_type": "image/png", "data": PIXEL}}]}]
    prompt: Any = parse(SEEING, contents=turns).request.prompt
    assert prompt.messages[0].images == (Image(data=b"\x89PNG...", at=5, where="contents[0].parts[1].inlineData.data"),)
    for blob, name in (
        ({"data": PIXEL}, "mimeType"),
        ({"mimeType": "image/tiff", "data": PIXEL}, "mimeType"),
        ({"mimeType": "image/png"}, "data"),
        ({"mimeType": "image/png", "data": "?"}, "data"),
    ):
        error = refused(SEEING, **user({"inlineData": blob}))
        assert (error.status, error.param) == (400, f"{AT}.inlineData.{name}")


def test_tool_choices() -> None:
    def choice(**fields: Any) -> ToolChoice:
        return parse(**calling(**fields)).request.tool_choice

    assert choice() == choice(mode="AUTO") == choice(mode="VALIDATED") == ToolChoice()
    assert choice(mode="none") == ToolChoice(mode="none")
    assert choice(mode="any") == ToolChoice(mode="required")
    assert choice(mode="ANY", allowed_function_names=["peek"]) == ToolChoice(mode="required", names=("peek",))


def test_a_wish_to_think_is_named_where_the_model_does_not() -> None:
    silent = msgspec.structs.replace(MODEL, capabilities=("chat", "tools"))
    config = {"thinkingConfig": {"thinkingBudget": 100, "thinkingLevel": "LOW"}}
    path = "generationConfig.thinkingConfig"
    assert parse(silent, generationConfig=config).ignored == (f"{path}.thinkingBudget", f"{path}.thinkingLevel")
    thinks = msgspec.structs.replace(MODEL, capabilities=("chat", "reasoning"))
    assert parse(thinks, generationConfig=config).ignored == ()


def test_settings_become_sampling_limits_and_thoughts() -> None:
    request = configured(
        temperature=0.5, top_p=0.9, topK=40.0, candidateCount=2, maxOutputTokens=9, stopSequences=["a", "b"], seed=-3,
        presencePenalty=1, frequency_penalty=-1, responseLogprobs=True, logprobs=3,
    ).request  # fmt: skip
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 40, -3)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.0, -1.0)
    assert (request.choices, request.max_tokens, request.stop, request.logprobs) == (2, 9, ("a", "b"), 3)
    assert parse().request.sampling.temperature == 0.2
    assert parse().request.logprobs is None
    assert configured(responseLogprobs=True).request.logprobs == 0

    def reasoning(**fields: Any) -> tuple[Reasoning, bool]:
        parsed = configured(thinkingConfig=fields)
        return parsed.request.prompt.reasoning, parsed.show_reasoning  # type: ignore[union-attr]

    assert reasoning() == (Reasoning(), False)
    assert reasoning(includeThoughts=True, thinkingBudget=-1) == (Reasoning(), True)
    assert reasoning(thinkingBudget=0) == (Reasoning(enabled=False), False)
    assert reasoning(thinking_budget=64, thinkingLevel="low") == (
        Reasoning(enabled=True, effort="low", max_tokens=64),
        False,
    )


def test_answers_in_a_form() -> None:
    schema = {"type": "OBJECT", "properties": {"a": {"type": "INTEGER", "nullable": True}}}
    made = '{"type": "object", "properties": {"a": {"type": ["integer", "null"]}}}'
    form = "application/json"
    assert configured(responseMimeType=form).request.constraint == JsonConstraint()
    assert configured(responseMimeType=form, responseSchema=schema).request.constraint == JsonConstraint(schema=made)
    standard = configured(response_mime_type=form, response_json_schema={"type": "object"})
    assert standard.request.constraint == JsonConstraint(schema='{"type": "object"}')
    words = {"type": "STRING", "enum": ["yes", "no."]}
    choice = configured(responseMimeType="text/x.enum", responseSchema=words).request.constraint
    assert choice == GrammarConstraint(text="yes|no\\.", syntax="regex")


def test_the_vendors_model_names_mean_the_default_model_and_that_is_said() -> None:
    body = json.dumps(BASE).encode()
    parsed = google.GenerateContent("gemini-3-flash").parse(body, models, refuse_unknown=True)
    assert (parsed.model.id, parsed.ignored) == ("tiny", ("model",))
    with pytest.raises(ModelNotFound):
        google.GenerateContent("nope").parse(body, models, refuse_unknown=True)


def test_a_count_takes_contents_or_a_whole_request() -> None:
    def count(**body: Any) -> Any:
        return google.CountTokens("tiny").parse(json.dumps(body).encode(), models, refuse_unknown=True)

    assert count(**BASE).question.prompt == parse().request.prompt
    whole_request = {"model": "models/tiny", **BASE, **TOOLS, "systemInstruction": {"parts": [{"text": "x"}]}}
    expected = parse(**TOOLS, systemInstruction={"parts": [{"text": "x"}]}).request.prompt
    assert count(generateContentRequest=whole_request).question.prompt == expected
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "contents"),
        ({"tools": []}, "tools"),
        ({**BASE, "generateContentRequest": BASE}, "generateContentRequest"),
        ({"generateContentRequest": {}}, "generateContentRequest.contents"),
        ({"generateContentRequest": user({})}, f"generateContentRequest.{AT}"),
        ({"generateContentRequest": {**BASE, "tools": [1]}}, "generateContentRequest.tools[0]"),
    ]
    for body, param in wrong:
        with pytest.raises(InvalidRequest) as caught:
            count(**body)
        assert caught.value.param == param
    configured = {"generateContentRequest": {**BASE, "toolConfig": {"functionCallingConfig": {"mode": "ANY"}}}}
    with pytest.raises(InvalidRequest) as caught:
        count(**configured)
    assert caught.value.param == "generateContentRequest.toolConfig.functionCallingConfig"
    wishes = {**BASE, "generationConfig": {"mediaResolution": "LOW"}}
    named = google.CountTokens("tiny").parse(
        json.dumps({"generateContentRequest": wishes, "frob": 1}).encode(), models, refuse_unknown=False
    )
    assert named.ignored == ("frob", "generateContentRequest.generationConfig.mediaResolution")
    assert json.loads(count(**BASE).reply(Encoded(count=2))) == {"totalTokens": 2}


COUNTS = Usage(prompt_tokens=9, cached_tokens=4, completion_tokens=7, reasoning_tokens=2)
USAGE = {
    "promptTokenCount": 9,
    "candidatesTokenCount": 5,
    "thoughtsTokenCount": 2,
    "totalTokenCount": 16,
    "cachedContentTokenCount": 4,
    "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 9}],
}


def token(text: str, logprob: float) -> TokenLogprob:
    chosen = TokenChance(len(text), text.encode(), logprob)
    return TokenLogprob(chosen=chosen, top=(chosen, TokenChance(9, b"\xff", -9.0)))


EVENTS: list[GenerateEvent] = [
    ReasoningDelta(text="Let me", tokens=1),
    ReasoningDelta(text=" see.", tokens=1),
    TextDelta(text="", tokens=1),
    TextDelta(text="I ", tokens=1, logprobs=(token("I", -0.5), token(" ", -0.25))),
    TextDelta(text="look.", tokens=1, logprobs=(token("look.", -0.75),)),
    ToolCallDelta(call=0, name="look"),
    ToolCallDelta(call=0, arguments='{"a":', tokens=1, logprobs=(token("{", -0.1),)),
    TextDelta(text="", tokens=0),
    ToolCallDelta(call=0, arguments="1}", tokens=1),
    ToolCallDelta(call=1, name="peek"),
    Finished(reason="tool_calls", usage=COUNTS),
]


def encoder(**fields: Any) -> google_wire.ContentEncoder:
    return google.GenerateContent("tiny").encoder(Reply(id="ab", model="tiny", created=1, **fields))


def stream(events: list[GenerateEvent], **fields: Any) -> list[dict[str, Any]]:
    made = encoder(**fields)
    frames = [*made.open(), *(frame for event in events for frame in made.event(event)), *made.close(COUNTS)]
    assert all(frame.event is None for frame in frames)
    return [json.loads(frame.data) for frame in frames]


def test_the_records_of_a_stream() -> None:
    records = stream(EVENTS)
    assert all((record["modelVersion"], record["responseId"]) == ("tiny", "ab") for record in records)
    parts = [record["candidates"][0]["content"]["parts"] for record in records]
    call = {"id": "call_ab0000", "name": "look", "args": {"a": 1}}
    other = {"id": "call_ab0001", "name": "peek", "args": {}}
    assert parts == [
        [{"text": "Let me", "thought": True}],
        [{"text": " see.", "thought": True}],
        [{"text": "I "}],
        [{"text": "look."}],
        [{"functionCall": call}],
        [{"functionCall": other}],
    ]
    assert ["finishReason" in record["candidates"][0] for record in records] == [False] * 5 + [True]
    assert ["usageMetadata" in record for record in records] == [False] * 5 + [True]
    assert records[-1]["candidates"][0]["finishReason"] == "STOP"
    assert records[-1]["usageMetadata"] == USAGE
    logprobs = records[2]["candidates"][0]["logprobsResult"]
    assert logprobs["chosenCandidates"] == [
        {"token": "I", "tokenId": 1, "logProbability": -0.5},
        {"token": " ", "tokenId": 1, "logProbability": -0.25},
    ]
    assert logprobs["topCandidates"][0]["candidates"][1] == {"token": "�", "tokenId": 9, "logProbability": -9.0}


def assembled(records: list[dict[str, Any]], candidates: int) -> list[dict[str, Any]]:
    """The candidates that a client makes of the records."""
    found: list[dict[str, Any]] = [{"index": index, "parts": [], "chosen": []} for index in range(candidates)]
    for record in records:
        for candidate in record["candidates"]:
            own = found[candidate["index"]]
            for part in candidate["content"]["parts"]:
                last = own["parts"][-1] if own["parts"] else {}
                if "text" in part and "text" in last and part.get("thought") == last.get("thought"):
                    last["text"] += part["text"]
                elif part != {"text": ""}:
                    own["parts"].append(dict(part))
            own["chosen"] += candidate.get("logprobsResult", {}).get("chosenCandidates", [])
            if reason := candidate.get("finishReason"):
                own["reason"] = reason
    return found


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize(
    "events",
    [
        EVENTS,
        [Finished(reason="stop", usage=COUNTS)],
        [TextDelta(text="a", tokens=1), Finished(reason="length", usage=COUNTS)],
        [TextDelta(text="No.", tokens=1), Finished(reason="content_filter", usage=COUNTS)],
        [*EVENTS[:7], Finished(reason="length", usage=COUNTS)],
        [TextDelta(text="b", tokens=1, index=1), TextDelta(text="a", tokens=1),
         Finished(reason="stop", usage=COUNTS, index=1), ToolCallDelta(call=0, name="f"), TextDelta(text="c", tokens=1),
         Finished(reason="length", usage=COUNTS)],
    ],
    ids=["all", "nothing", "length", "refusal", "cut in a call", "two candidates"],
)  # fmt: skip
def test_a_stream_makes_the_whole_response(events: list[GenerateEvent], shown: bool) -> None:
    choices = 1 + max(getattr(event, "index", 0) for event in events)
    fields = {"show_reasoning": shown, "choices": choices}
    answer = json.loads(encoder(**fields).complete([Started(prompt_tokens=9), *events], COUNTS))
    assert answer["usageMetadata"] == USAGE
    records = stream(events, **fields)
    assert assembled(records, choices) == assembled([answer], choices)
    assert records[-1]["usageMetadata"] == USAGE
    reasons = {"stop": "STOP", "length": "MAX_TOKENS", "tool_calls": "STOP", "content_filter": "SAFETY"}
    expected = {event.index: reasons[event.reason] for event in events if isinstance(event, Finished)}
    assert {one["index"]: one["finishReason"] for one in answer["candidates"]} == expected
    assert "thought" not in json.dumps(answer["candidates"]) or shown


def test_the_mean_log_probability_of_a_whole_answer() -> None:
    (candidate,) = json.loads(encoder().complete(EVENTS, COUNTS))["candidates"]
    assert candidate["avgLogprobs"] == pytest.approx((-0.5 - 0.25 - 0.75 - 0.1) / 4)


def test_errors_are_in_the_vendors_shape() -> None:
    def body(error: ApiError) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(google.error_body(ApiError.from_info(error.info).info))
        assert list(found) == ["error"]
        inner: dict[str, Any] = found["error"]
        return inner

    bad = body(InvalidRequest("No.", param="contents[0]"))
    assert (bad["code"], bad["status"], bad["message"]) == (400, "INVALID_ARGUMENT", "No.")
    assert bad["details"][1]["fieldViolations"] == [{"field": "contents[0]", "description": "No."}]
    slow = body(RateLimited("Slow.", retry_after_s=1.5))
    assert (slow["code"], slow["status"]) == (429, "RESOURCE_EXHAUSTED")
    assert slow["details"][1]["retryDelay"] == "1.500s"
    assert body(EngineCrashed("Died."))["status"] == "INTERNAL"
    assert body(ModelNotFound("No."))["status"] == "NOT_FOUND"
    long = ContextLengthExceeded(limit=8192, prompt_tokens=9000, param="messages")
    assert body(long)["message"] == (
        "The input token count (9000) exceeds the maximum number of tokens allowed (8191)."
    )
    (frame,) = encoder().event(Failed(error=EngineCrashed("Died.").info))
    assert frame.data.startswith(b'{"error":')


def test_the_engines_names_for_schemas_are_the_clients() -> None:
    more = {"tools": [*TOOLS["tools"], {"functionDeclarations": [{"name": "third"}]}]}
    paths = parse(**more, generationConfig={"responseMimeType": "application/json", "responseSchema": {}}).paths
    assert paths["tools[1].function.parameters"] == "tools[0].functionDeclarations[1].parameters"
    assert paths["tools[2].function.parameters"] == "tools[1].functionDeclarations[0].parameters"
    assert paths["response_format.json_schema.schema"] == "generationConfig.responseSchema"


def test_functions_are_counted_over_all_tools() -> None:
    several = [{"functionDeclarations": [{"name": f"f{n}_{m}"} for m in range(16)]} for n in range(17)]
    assert len(parse(tools=several[:16]).request.prompt.tools) == 256  # type: ignore[union-attr]
    assert refused(tools=several).param == "tools[16].functionDeclarations[0]"


@pytest.mark.parametrize("shown", [True, False])
def test_the_tokens_of_a_thought_are_as_hidden_as_its_text(shown: bool) -> None:
    events: list[GenerateEvent] = [
        ReasoningDelta(text="secret", tokens=1, logprobs=(token("secret", -0.5),)),
        TextDelta(text="a", tokens=1, logprobs=(token("a", -0.25),)),
        Finished(reason="stop", usage=COUNTS),
    ]
    whole = encoder(show_reasoning=shown).complete(events, COUNTS).decode()
    assert ("secret" in whole) is shown
    assert ("secret" in json.dumps(stream(events, show_reasoning=shown))) is shown


def test_a_calls_arguments_leave_as_they_were_written() -> None:
    number = "1" * 5000
    text = f'{{\n "a": {number}, "b": 1e999, "c": "\\n"}}'
    events: list[GenerateEvent] = [
        ToolCallDelta(call=0, name="look", arguments=text),
        ToolCallDelta(call=1, name="look", arguments="[1]"),
        ToolCallDelta(call=2, name="look", arguments='{"a":' * 9000),
        Finished(reason="tool_calls", usage=COUNTS),
    ]
    whole = encoder().complete(events, COUNTS)
    assert f'"args":{{"a":{number},"b":1e999,"c":"\\n"}}'.encode() in whole
    assert whole.count(b"functionCall") == 1
