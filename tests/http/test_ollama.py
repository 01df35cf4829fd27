"""Ollama's own client, unmodified, with only a base URL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import ollama
import pytest
from msgspec.structs import replace

from ocserve.api import ollama_chat
from ocserve.api.dialect import Reply
from ocserve.generation import (
    ChatPrompt,
    FillPrompt,
    Finished,
    JsonConstraint,
    ReasoningDelta,
    TextDelta,
    TextPrompt,
    TokenChance,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from tests.http.harness import MODEL, Served, serving
from tests.scripted import Script, ScriptedEngine

CAPABLE = replace(
    MODEL,
    capabilities=("chat", "completion", "tools", "fim", "reasoning", "embedding"),
    architecture="llama",
    size_bytes=98_362_432,
    digest="ab" * 32,
)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SCRIPTS: dict[str, Script] = {
    "think": Script(tokens=(ReasoningDelta(text="Hm", tokens=1), "Yes")),
    "call": Script(
        tokens=(
            ToolCallDelta(call=0, name="weather", tokens=1),
            ToolCallDelta(call=0, arguments='{"city":', tokens=1),
            ToolCallDelta(call=0, arguments='"Paris"}', tokens=1),
            ToolCallDelta(call=1, name="weather", arguments='{"city":"Rome"}', tokens=1),
        ),
        reason="tool_calls",
    ),
    "cut": Script(tokens=("a", "b", "c", "d")),
    "chances": Script(
        tokens=(
            TextDelta(
                text="A",
                tokens=1,
                logprobs=(TokenLogprob(chosen=TokenChance(1, b"A", -0.1), top=(TokenChance(2, b"\xc3", -2.5),)),),
            ),
        )
    ),
}


def script(request: Any) -> Script:
    """The script that the last message names."""
    prompt = request.prompt
    word = prompt.messages[-1].content if isinstance(prompt, ChatPrompt) else getattr(prompt, "text", "")
    return SCRIPTS.get(word, Script())


@pytest.fixture(scope="module")
def capable() -> Iterator[Served]:
    with serving(lambda: ScriptedEngine(script), model=CAPABLE) as server:
        yield server


@pytest.fixture
def client(capable: Served) -> Iterator[ollama.Client]:
    with_client = ollama.Client(host=capable.url)
    yield with_client
    with_client._client.close()


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def last(served: Served) -> Any:
    return list(served.engine.runs.values())[-1].request


def test_models_are_found_with_what_they_can_do(client: ollama.Client) -> None:
    (listed,) = client.list().models
    assert (listed.model, int(listed.size or 0)) == ("tiny", 98_362_432)
    assert listed.details is not None
    assert (listed.details.parameter_size, listed.details.quantization_level) == ("135.00M", "Q4_1")
    shown = client.show("tiny")
    assert shown.capabilities == ["completion", "tools", "insert", "embedding", "thinking"]
    assert shown.modelinfo is not None
    architecture = shown.modelinfo["general.architecture"]
    assert shown.modelinfo[f"{architecture}.context_length"] == 8192
    assert ".Suffix" in (shown.template or "")
    assert "num_ctx" in (shown.parameters or "")
    with pytest.raises(ollama.ResponseError) as caught:
        client.show("none")
    assert caught.value.status_code == 404


def test_a_server_is_new_enough_for_editors(capable: Served) -> None:
    version = capable.request("GET", "/api/version").json["version"]
    assert tuple(map(int, version.split("."))) >= (0, 6, 4)


def test_a_request_without_messages_loads_the_model(client: ollama.Client, capable: Served) -> None:
    answer = client.chat("tiny", messages=[])
    assert (answer.done, answer.done_reason, answer.message.content) == (True, "load", "")
    assert client.generate("tiny").done_reason == "load"
    assert [model.model for model in client.ps().models] == ["tiny"]
    assert capable.engine.loaded


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        ("/api/chat", {"messages": [], "tools": [{"function": {"name": "N"}}]}, "tools[0].type"),
        ("/api/chat", {"messages": [], "options": {"top_k": "x"}}, "options.top_k"),
        ("/api/chat", {"messages": [], "keep_alive": {}}, "keep_alive"),
        ("/api/generate", {"keep_alive": True}, "keep_alive"),
    ],
)
def test_a_load_is_checked_as_what_is_answered(capable: Served, path: str, fields: dict[str, Any], named: str) -> None:
    answer = capable.request("POST", path, {"model": "tiny", **fields})
    assert (answer.status, named in answer.json["error"]) == (400, True), answer.json


def test_a_chat_is_answered_whole_and_in_lines(client: ollama.Client) -> None:
    whole = client.chat("tiny", messages=say("Hi"))
    assert whole.message.content == "Hello, world!"
    assert (whole.done, whole.done_reason, whole.prompt_eval_count, whole.eval_count) == (True, "stop", 7, 4)
    lines = list(client.chat("tiny", messages=say("Hi"), stream=True))
    assert "".join(line.message.content or "" for line in lines) == "Hello, world!"
    assert [line.done for line in lines] == [False] * 4 + [True]
    assert (lines[-1].prompt_eval_count, lines[-1].eval_count, lines[-1].done_reason) == (7, 4, "stop")
    assert (lines[-1].total_duration or 0) >= (lines[-1].eval_duration or 0) >= 0


def test_streaming_is_what_silence_means(capable: Served) -> None:
    answer = capable.request("POST", "/api/chat", {"model": "tiny", "messages": say("Hi")})
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert len(answer.body.decode().strip().splitlines()) == 5


def test_names_with_the_tag_that_clients_add_are_known(client: ollama.Client) -> None:
    assert client.chat("tiny:latest", messages=say("Hi")).model == "tiny"


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_leave_complete(client: ollama.Client, stream: bool) -> None:
    answer: Any = client.chat("tiny", messages=say("call"), tools=[TOOL], stream=stream)
    messages = [line.message for line in answer] if stream else [answer.message]
    calls = [call for message in messages for call in message.tool_calls or []]
    assert [(call.function.name, dict(call.function.arguments)) for call in calls] == [
        ("weather", {"city": "Paris"}),
        ("weather", {"city": "Rome"}),
    ]


def test_a_tools_result_finds_its_call(client: ollama.Client, capable: Served) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
    history = [
        *say("call"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_name": "weather"},
    ]
    client.chat("tiny", messages=history, tools=[TOOL])
    _, asked, result = last(capable).prompt.messages
    assert json.loads(asked.tool_calls[0].arguments) == {"city": "Paris"}
    assert (result.tool_call_id, result.name, result.content) == (asked.tool_calls[0].id, "weather", "sunny")


def test_thoughts_are_apart_from_the_answer(client: ollama.Client) -> None:
    whole = client.chat("tiny", messages=say("think"), think=True)
    assert (whole.message.thinking, whole.message.content) == ("Hm", "Yes")
    lines = list(client.chat("tiny", messages=say("think"), think="high", stream=True))
    assert "".join(line.message.thinking or "" for line in lines) == "Hm"
    assert client.chat("tiny", messages=say("think"), think=False).message.thinking is None


def test_options_reach_the_sampler_and_limits_the_engine(client: ollama.Client, capable: Served) -> None:
    options = {
        "temperature": 0.5, "top_k": 7, "top_p": 0.8, "min_p": 0.1, "seed": 5, "repeat_penalty": 1.1,
        "repeat_last_n": 32, "num_predict": 2, "stop": ["x"] * 10, "num_ctx": 32768, "mirostat": 2,
    }  # fmt: skip
    answer = client.chat("tiny", messages=say("cut"), options=options)
    assert (answer.message.content, answer.done_reason) == ("ab", "length")
    request = last(capable)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 7, 0.8, 0.1)
    assert (sampling.seed, sampling.repetition_penalty, sampling.penalty_window) == (5, 1.1, 32)
    assert (sampling.mirostat, request.max_tokens, len(request.stop)) == (2, 2, 10)
    client.chat("tiny", messages=say("Hi"), options={"num_predict": -1, "seed": -1})
    assert last(capable).max_tokens == MODEL.max_output_tokens
    assert last(capable).sampling.seed is None


def test_what_has_no_effect_is_named(capable: Served) -> None:
    body = {"model": "tiny", "messages": say("Hi"), "stream": False, "keep_alive": "5m", "options": {"num_ctx": 99}}
    assert capable.request("POST", "/api/chat", body).headers["x-ocserve-ignored"] == "keep_alive, options.num_ctx"
    load = {"model": "tiny", "messages": [], "options": {"num_ctx": 99}}
    assert capable.request("POST", "/api/chat", load).headers["x-ocserve-ignored"] == "options.num_ctx"
    answer = capable.request("POST", "/api/generate", {"model": "tiny", "options": {"temperature": 9}})
    assert (answer.status, answer.json["param"]) == (400, "options.temperature")


def test_a_wish_to_think_is_named_where_the_model_does_not() -> None:
    body = json.dumps({"model": "tiny", "messages": say("Hi"), "think": True}).encode()
    silent = replace(CAPABLE, capabilities=("chat",))
    assert ollama_chat.parse(body, lambda _: silent, refuse_unknown=True).ignored == ("think",)
    assert ollama_chat.parse(body, lambda _: CAPABLE, refuse_unknown=True).ignored == ()


def test_the_tokens_of_a_hidden_thought_are_not_told() -> None:
    chance = TokenLogprob(chosen=TokenChance(1, b"secret", -0.1), top=())
    events = [
        ReasoningDelta(text="secret", tokens=1, logprobs=(chance,)),
        Finished(reason="stop", usage=Usage()),
    ]
    for shown in (True, False):
        reply = Reply(id="a", model="tiny", created=1, show_reasoning=shown)
        assert (b"secret" in ollama_chat.encoder(reply).complete(events, Usage())) is shown


def test_a_format_is_a_constraint(client: ollama.Client, capable: Served) -> None:
    client.chat("tiny", messages=say("Hi"), format="json")
    assert last(capable).constraint == JsonConstraint()
    client.chat("tiny", messages=say("Hi"), format={"type": "object"})
    assert last(capable).constraint == JsonConstraint(schema='{"type": "object"}')


def test_chances_of_tokens_are_told(client: ollama.Client) -> None:
    answer = client.chat("tiny", messages=say("chances"), logprobs=True, top_logprobs=1)
    assert answer.logprobs is not None
    assert (answer.logprobs[0].token, answer.logprobs[0].logprob) == ("A", -0.1)
    assert [other.logprob for other in answer.logprobs[0].top_logprobs or []] == [-2.5]


def test_generate_is_a_turn_raw_text_or_a_gap(client: ollama.Client, capable: Served) -> None:
    assert client.generate("tiny", "Hi", system="Be brief.").response == "Hello, world!"
    assert [message.role for message in last(capable).prompt.messages] == ["system", "user"]
    client.generate("tiny", "Hi", raw=True)
    assert last(capable).prompt == TextPrompt(text="Hi")
    client.generate("tiny", "def f(", suffix="    return x")
    assert last(capable).prompt == FillPrompt(prefix="def f(", suffix="    return x")
    assert "".join(line.response or "" for line in client.generate("tiny", "Hi", stream=True)) == "Hello, world!"


def test_vectors_come_in_order(client: ollama.Client) -> None:
    answer = client.embed("tiny", ["abc", "abcde"])
    assert [vector[0] for vector in answer.embeddings] == [3.0, 5.0]
    assert answer.prompt_eval_count == 8


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/api/chat", {"messages": [{"role": "user", "content": "Hi"}]}, "model"),
        ("/api/chat", {"model": "tiny", "messages": [{"content": "Hi"}]}, "messages[0].role"),
        ("/api/chat", {"model": "tiny", "messages": [{"role": "wizard"}]}, "messages[0].role"),
        ("/api/chat", {"model": "tiny", "messages": say("Hi"), "options": {"top_p": 2}}, "options.top_p"),
        (
            "/api/chat",
            {"model": "tiny", "messages": say("Hi"), "options": {"num_predict": 9999}},
            "options.num_predict",
        ),
        ("/api/chat", {"model": "tiny", "messages": say("Hi"), "format": "xml"}, "format"),
        ("/api/chat", {"model": "tiny", "messages": [{"role": "user", "images": ["aGk="]}]}, "messages[0].images"),
        ("/api/generate", {"model": "tiny", "prompt": "Hi", "template": "{{ .Prompt }}"}, "template"),
        ("/api/generate", {"model": "tiny", "prompt": "Hi", "suffix": "x", "system": "y"}, "system"),
        ("/api/generate", {"model": "tiny", "prompt": "Hi", "top_logprobs": 2}, "top_logprobs"),
        ("/api/embed", {"model": "tiny", "input": []}, "input"),
        ("/api/show", {}, "model"),
    ],
)
def test_what_is_wrong_is_named_in_ollamas_shape(capable: Served, path: str, body: Any, param: str) -> None:
    answer = capable.request("POST", path, body)
    assert (answer.status, answer.json["param"]) == (400, param)
    assert isinstance(answer.json["error"], str)


def test_an_error_in_a_stream_is_a_line(client: ollama.Client) -> None:
    SCRIPTS["crash"] = Script(crash_at=1)
    with pytest.raises(ollama.ResponseError, match="engine process died"):
        list(client.chat("tiny", messages=say("crash"), stream=True))
