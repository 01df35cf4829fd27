"""The official client against the server: tools, reasoning, log-probabilities, several prompts, echo, grammars."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pydantic
import pytest
from msgspec.structs import replace

from ocserve import config
from ocserve.errors import InvalidRequest
from ocserve.generation import (
    ChatPrompt,
    FillPrompt,
    GenerateRequest,
    JsonConstraint,
    ReasoningDelta,
    TextDelta,
    TextPrompt,
    TokenChance,
    TokenLogprob,
    ToolCallDelta,
)
from tests.http.harness import COMPLETION, MODEL, Served, serving, wait_for
from tests.scripted import Script, ScriptedEngine

HELLO = Script()
TOOL: Any = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
HI: Any = [{"role": "user", "content": "Weather?"}]
CALLS = Script(
    tokens=(
        ToolCallDelta(call=0, name="get_weather", tokens=1),
        ToolCallDelta(call=0, arguments='{"city":', tokens=1),
        ToolCallDelta(call=0, arguments='"Rome"}', tokens=1),
        ToolCallDelta(call=1, name="get_weather", arguments='{"city":"Oslo"}', tokens=2),
    ),
    reason="tool_calls",
)


@contextmanager
def client(script: Any = HELLO, **settings: Any) -> Iterator[tuple[openai.OpenAI, Served]]:
    with (
        serving(lambda: ScriptedEngine(script), **settings) as served,
        openai.OpenAI(base_url=served.url + "/v1", api_key="any", max_retries=0) as sdk,
    ):
        yield sdk, served


def requests(served: Served) -> list[GenerateRequest]:
    return [run.request for run in served.engine.runs.values()]


def answers_after_the_tool(request: GenerateRequest) -> Script:
    assert isinstance(request.prompt, ChatPrompt)
    if request.prompt.messages[-1].role == "tool":
        said = ", ".join(message.content for message in request.prompt.messages if message.role == "tool")
        return Script(tokens=("It is ", said, "."))
    return CALLS


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_loop_with_tools(stream: bool) -> None:
    with client(answers_after_the_tool) as (sdk, served):
        messages = list(HI)
        for _ in range(2):
            if stream:
                with sdk.chat.completions.stream(model="tiny", messages=messages, tools=[TOOL]) as events:
                    choice: Any = events.get_final_completion().choices[0]
            else:
                choice = sdk.chat.completions.create(model="tiny", messages=messages, tools=[TOOL]).choices[0]
            if choice.finish_reason != "tool_calls":
                break
            messages.append(choice.message.to_dict())
            for call in choice.message.tool_calls:
                city = json.loads(call.function.arguments)["city"]
                messages.append({"role": "tool", "tool_call_id": call.id, "content": f"sunny in {city}"})
        assert choice.message.content == "It is sunny in Rome, sunny in Oslo."
        first, last = requests(served)
        assert isinstance(first.prompt, ChatPrompt)
        assert isinstance(last.prompt, ChatPrompt)
        assert first.prompt.tools[0].name == "get_weather"
        assistant, *results = last.prompt.messages[1:]
        assert [call.id for call in assistant.tool_calls] == [message.tool_call_id for message in results]
        assert len({call.id for call in assistant.tool_calls}) == 2


def test_streamed_calls_are_those_of_the_whole_answer() -> None:
    with client(CALLS) as (sdk, _):
        whole = sdk.chat.completions.create(model="tiny", messages=HI, tools=[TOOL], n=2)
        with sdk.chat.completions.stream(model="tiny", messages=HI, tools=[TOOL], n=2) as events:
            final = events.get_final_completion()
        for one, other in zip(whole.choices, final.choices, strict=True):
            assert (one.index, one.finish_reason, one.message.content) == (other.index, "tool_calls", None)
            assert [call.function.to_dict() for call in one.message.tool_calls or ()] == [  # type: ignore[union-attr]
                {"name": call.function.name, "arguments": call.function.arguments}
                for call in other.message.tool_calls or ()
            ]


def test_parsed_arguments_and_answers() -> None:
    class Weather(pydantic.BaseModel):
        city: str

    with client(CALLS) as (sdk, served):
        tool = openai.pydantic_function_tool(Weather, name="get_weather")
        parsed = sdk.chat.completions.parse(model="tiny", messages=HI, tools=[tool])
        assert [
            call.function.parsed_arguments.city  # type: ignore[union-attr]
            for call in parsed.choices[0].message.tool_calls or ()
        ] == ["Rome", "Oslo"]
        assert requests(served)[0].prompt.tools[0].strict  # type: ignore[union-attr]
    with client(Script(tokens=('{"city"', ':"Rome"}'))) as (sdk, served):
        answer = sdk.chat.completions.parse(model="tiny", messages=HI, response_format=Weather)
        assert answer.choices[0].message.parsed == Weather(city="Rome")
        constraint = requests(served)[0].constraint
        assert isinstance(constraint, JsonConstraint)
        assert json.loads(constraint.schema or "")["required"] == ["city"]
        with pytest.raises(openai.LengthFinishReasonError):
            sdk.chat.completions.parse(model="tiny", messages=HI, response_format=Weather, max_tokens=1)


REASONS = replace(MODEL, capabilities=(*MODEL.capabilities, "reasoning"))
THOUGHT = Script(
    tokens=(ReasoningDelta(text="Two and", tokens=1), ReasoningDelta(text=" two.", tokens=1), "4"), reasoning_tokens=2
)


def test_reasoning_is_told_counted_and_hidden_on_request() -> None:
    with client(THOUGHT, model=REASONS) as (sdk, served):
        whole: Any = sdk.chat.completions.create(model="tiny", messages=HI, reasoning_effort="low")
        message = whole.choices[0].message
        assert (message.content, message.reasoning_content, message.reasoning) == ("4", "Two and two.", "Two and two.")
        assert whole.usage.completion_tokens_details.reasoning_tokens == 2
        with sdk.chat.completions.stream(model="tiny", messages=HI) as events:
            final: Any = events.get_final_completion().choices[0].message
        assert final.content == "4"
        assert final.reasoning_content == message.reasoning_content
        assert final.reasoning_details == message.reasoning_details
        hidden: Any = sdk.chat.completions.create(
            model="tiny", messages=HI, extra_body={"reasoning": {"exclude": True, "max_tokens": 100}}
        )
        assert not hasattr(hidden.choices[0].message, "reasoning")
        wishes = [request.prompt.reasoning for request in requests(served)]  # type: ignore[union-attr]
        assert [(wish.enabled, wish.effort, wish.max_tokens) for wish in wishes] == [
            (True, "low", None),
            (None, None, None),
            (True, None, 100),
        ]


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"reasoning": {"enabled": True}}, "reasoning.enabled"),
        ({"reasoning": {"max_tokens": 5}}, "reasoning.max_tokens"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking"),
        ({"reasoning": {"effort": "low"}, "reasoning_effort": "none"}, "reasoning.effort"),
        ({"reasoning": {"enabled": False, "effort": "low"}}, "reasoning.effort"),
        ({"include_reasoning": True, "reasoning": {"exclude": True}}, "include_reasoning"),
    ],
)
def test_a_model_that_does_not_reason_says_so(served: Served, wish: dict[str, Any], param: str) -> None:
    answer = served.chat(**wish)
    assert (answer.status, answer.error["param"]) == (400, param)
    for nothing in ({"reasoning_effort": "none"}, {"reasoning": {"enabled": False}}, {"include_reasoning": False}):
        assert served.chat(**nothing).status == 200


def likely(piece: str, logprob: float) -> TokenLogprob:
    chosen = TokenChance(1, piece.encode(), logprob)
    return TokenLogprob(chosen=chosen, top=(chosen, TokenChance(2, b"x", logprob - 1)))


CHANCES = Script(
    tokens=tuple(TextDelta(text=piece, tokens=1, logprobs=(likely(piece, -0.5),)) for piece in ("a", "b")),
    prompt=(likely("H", 0.0), likely("i", -2.0)),
)


def test_log_probabilities_whole_and_streamed() -> None:
    with client(CHANCES) as (sdk, served):
        whole = sdk.chat.completions.create(model="tiny", messages=HI, logprobs=True, top_logprobs=2)
        listed = whole.choices[0].logprobs
        assert listed is not None
        assert [(token.token, len(token.top_logprobs)) for token in listed.content or ()] == [("a", 2), ("b", 2)]
        with sdk.chat.completions.stream(model="tiny", messages=HI, logprobs=True, top_logprobs=2) as events:
            final = events.get_final_completion().choices[0].logprobs
        assert final is not None
        assert final.content == listed.content
        assert [request.logprobs for request in requests(served)] == [2, 2]


def test_several_prompts_are_one_request_with_one_answer() -> None:
    def script(request: GenerateRequest) -> Script:
        assert isinstance(request.prompt, TextPrompt)
        return Script(tokens=(request.prompt.text, "!"), prompt_tokens=len(request.prompt.text))

    limits = config.Limits(requests_per_minute=2, tokens_per_minute=100_000)
    with client(script, limits=limits) as (sdk, served):
        prompts = ["a", "bb", "ccc"]
        whole = sdk.completions.with_raw_response.create(model="tiny", prompt=prompts, n=2)
        assert whole.headers["x-ratelimit-remaining-requests"] == "1"
        answer = whole.parse()
        assert [(choice.index, choice.text) for choice in answer.choices] == [
            (index, f"{prompts[index // 2]}!") for index in range(6)
        ]
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 12)
        *chunks, last = sdk.completions.create(model="tiny", prompt=prompts, n=2, stream=True)
        texts = ["".join(c.text for chunk in chunks for c in chunk.choices if c.index == index) for index in range(6)]
        assert texts == [choice.text for choice in answer.choices]
        assert last.usage == answer.usage
        wait_for(lambda: served.service.active == 0)
        with pytest.raises(openai.RateLimitError):
            sdk.completions.create(model="tiny", prompt="x")


def test_one_prompt_that_cannot_be_prepared_refuses_all_of_them() -> None:
    def script(request: GenerateRequest) -> Script:
        refuse = InvalidRequest("No.", param="prompt") if request.prompt == TextPrompt(text="bad") else None
        return Script(refuse=refuse)

    with client(script) as (sdk, served):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError):
                sdk.completions.create(model="tiny", prompt=["good", "bad", "good"], stream=stream)
        assert all(run.phase in ("prepared", "preparing") and run.steps == 0 for run in served.engine.runs.values())
        assert all(run.cancelled for run in served.engine.runs.values() if run.phase == "prepared")
        wait_for(lambda: served.service.active == 0)


def test_one_prompt_that_fails_ends_the_others() -> None:
    def script(request: GenerateRequest) -> Script:
        if request.prompt == TextPrompt(text="bad"):
            return Script(crash_at=1)
        return Script(tokens=("x",) * 1000, step_s=0.01)

    with client(script) as (sdk, served):
        with pytest.raises(openai.InternalServerError):
            sdk.completions.create(model="tiny", prompt=["bad", "good"], max_tokens=1000)
        good = [run for run in served.engine.runs.values() if run.request.prompt == TextPrompt(text="good")]
        wait_for(lambda: all(run.phase == "done" for run in good), 2)
        assert all(run.steps < 100 for run in good)


def test_a_client_that_leaves_ends_every_prompt() -> None:
    with client(Script(tokens=("x",) * 4000, step_s=0.01)) as (_, served):
        body = {**COMPLETION, "prompt": ["a", "b", "c"], "stream": True, "max_tokens": 4000}
        peer = served.connect()
        peer.sendall(served.compose("POST", "/v1/completions", body))
        wait_for(lambda: served.engine.running == 3)
        peer.close()
        wait_for(lambda: served.engine.running == 0, 2)
        assert all(run.cancelled for run in served.engine.runs.values())
        wait_for(lambda: served.service.active == 0)


def test_echo_with_log_probabilities_for_scoring() -> None:
    with client(CHANCES) as (sdk, served):
        answer = sdk.completions.create(
            model="tiny", prompt=[7, 8], max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234
        )
        choice = answer.choices[0]
        assert choice.text == "Hia"
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == ["H", "i", "a"]
        assert choice.logprobs.token_logprobs == [None, -2.0, -0.5]
        assert choice.logprobs.text_offset == [0, 1, 2]
        scored = sdk.completions.create(model="tiny", prompt=[7, 8], max_tokens=0, logprobs=0, echo=True)
        assert scored.choices[0].text == "Hi"
        assert scored.usage is not None
        assert scored.usage.completion_tokens == 0
        assert [request.prompt_logprobs for request in requests(served)] == [1, 0]


def test_a_suffix_reaches_the_engine_as_a_gap_to_fill() -> None:
    with client() as (sdk, served):
        sdk.completions.create(model="tiny", prompt="def f(", suffix="return x")
        assert requests(served)[0].prompt == FillPrompt(prefix="def f(", suffix="return x")


def test_a_prediction_reaches_the_engine() -> None:
    with client() as (sdk, served):
        for content in ("abc", [{"type": "text", "text": "a"}, {"type": "text", "text": "bc"}]):
            sdk.chat.completions.create(
                model="tiny",
                messages=HI,
                prediction={"type": "content", "content": content},  # type: ignore[typeddict-item]
            )
        assert [request.prediction for request in requests(served)] == ["abc", "abc"]


def test_the_engines_refusal_names_what_the_client_wrote() -> None:
    def script(_: GenerateRequest) -> Script:
        path = "response_format.json_schema.schema"
        return Script(refuse=InvalidRequest(f"Invalid '{path}': no value satisfies the schema.", param=path))

    with client(script) as (_, served):
        for given, param in (
            ({"guided_json": {}}, "guided_json"),
            ({"structured_outputs": {"json": {}}}, "structured_outputs.json"),
        ):
            error = served.chat(**given).error
            assert error["param"] == param
            assert f"'{param}'" in error["message"]


def test_images_reach_a_model_that_sees_and_no_other() -> None:
    data = "data:image/png;base64,iVBORw0KGgo="
    content: Any = [
        {"type": "text", "text": "What is "},
        {"type": "image_url", "image_url": {"url": data, "detail": "low"}},
        {"type": "text", "text": "this?"},
    ]
    sees = replace(MODEL, capabilities=(*MODEL.capabilities, "vision"), input_modalities=("text", "image"))
    with client(model=sees) as (sdk, served):
        sdk.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])
        (message,) = requests(served)[0].prompt.messages  # type: ignore[union-attr]
        assert message.content == "What is this?"
        assert [(image.data, image.at) for image in message.images] == [(b"\x89PNG\r\n\x1a\n", 8)]
        for url in ("https://example.com/a.png", "data:image/bmp;base64,AAAA", "data:image/png;base64,@", "x"):
            content[1]["image_url"]["url"] = url
            with pytest.raises(openai.BadRequestError) as caught:
                sdk.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])
            assert caught.value.param == "messages[0].content[1].image_url.url"


def test_a_client_without_retries_of_its_own_that_waits_as_told_is_served() -> None:
    with client(limits=config.Limits(requests_per_minute=60)) as (sdk, _):
        refused = 0
        for _ in range(62):
            try:
                sdk.completions.create(**COMPLETION)
            except openai.RateLimitError as refusal:
                refused += 1
                time.sleep(int(refusal.response.headers["retry-after-ms"]) / 1000)
                sdk.completions.create(**COMPLETION)
        assert refused
