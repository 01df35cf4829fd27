"""LM Studio's and llama-server's routes, as editors and completion plug-ins use them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from ocserve.generation import FillPrompt, JsonConstraint, TextPrompt, TokenPrompt
from tests.http.harness import MODEL, Served, serving
from tests.scripted import Script, ScriptedEngine

FILLS = replace(MODEL, capabilities=("chat", "completion", "fim", "tools"))


@pytest.fixture(scope="module")
def fills() -> Iterator[Served]:
    with serving(lambda: ScriptedEngine(Script(stop_sequence="!")), model=FILLS) as server:
        yield server


def last(served: Served) -> Any:
    return list(served.engine.runs.values())[-1].request


def test_lm_studio_clients_see_state_and_context(fills: Served) -> None:
    fills.chat()
    listing = fills.request("GET", "/api/v0/models").json
    (entry,) = listing["data"]
    assert listing["object"] == "list"
    assert (entry["id"], entry["type"], entry["state"], entry["compatibility_type"]) == (
        "tiny",
        "llm",
        "loaded",
        "gguf",
    )
    assert entry["max_context_length"] == entry["loaded_context_length"] == 8192
    assert entry["capabilities"] == ["tool_use"]
    assert fills.request("GET", "/api/v0/models/org/tiny:135m").json == entry
    assert fills.request("GET", "/api/v0/models/none").status == 404
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    answer = fills.request("POST", "/api/v0/chat/completions", chat).json
    assert answer["choices"][0]["message"]["content"] == "Hello, world!"


def test_an_unloaded_model_says_so(served: Served) -> None:
    (entry,) = served.request("GET", "/api/v0/models").json["data"]
    assert entry["state"] == "not-loaded"
    assert "loaded_context_length" not in entry


def test_props_tell_context_slots_and_template(fills: Served) -> None:
    found = fills.request("GET", "/props").json
    assert found["default_generation_settings"]["n_ctx"] == 8192
    assert found["default_generation_settings"]["params"]["temperature"] == 0.2
    assert (found["total_slots"], found["model_alias"], found["modalities"]["vision"]) == (8, "tiny", False)
    assert fills.request("GET", "/props?model=none").status == 404


def test_text_becomes_tokens_and_text_again(fills: Served) -> None:
    assert fills.request("POST", "/tokenize", {"content": "hi"}).json == {"tokens": [104, 105]}
    pieces = fills.request("POST", "/tokenize", {"content": "é", "with_pieces": True}).json["tokens"]
    assert pieces == [{"id": 0xC3, "piece": [0xC3]}, {"id": 0xA9, "piece": [0xA9]}]
    assert fills.request("POST", "/detokenize", {"tokens": [104, 105]}).json == {"content": "hi"}
    questions = [question for question in fills.engine.asked if question.prompt == TextPrompt(text="hi")]
    assert (questions[-1].plain, questions[-1].add_bos) == (False, False)
    fills.request("POST", "/tokenize", {"content": "hi", "add_special": True, "parse_special": False})
    assert (fills.engine.asked[-1].plain, fills.engine.asked[-1].add_bos) == (True, True)


def test_a_conversation_is_rendered_without_an_answer(fills: Served) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    assert fills.request("POST", "/apply-template", body).json == {"prompt": "<user>Hi"}


def test_a_completion_is_answered_whole_and_streamed(fills: Served) -> None:
    body = {"prompt": "Hi", "n_predict": 10, "cache_prompt": True, "repeat_penalty": 1.1, "seed": -1}
    answer = fills.request("POST", "/completion", body)
    found = answer.json
    assert (found["content"], found["stop"], found["stop_type"], found["stopping_word"]) == (
        "Hello, world!", True, "word", "!",
    )  # fmt: skip
    assert (found["tokens_predicted"], found["tokens_evaluated"], found["truncated"]) == (4, 7, False)
    assert answer.headers["x-ocserve-ignored"] == "cache_prompt"
    assert (last(fills).sampling.repetition_penalty, last(fills).sampling.seed) == (1.1, None)
    events = [json.loads(event) for event in fills.request("POST", "/completion", {**body, "stream": True}).events]
    assert "".join(event["content"] for event in events) == "Hello, world!"
    assert [event["stop"] for event in events] == [False] * 4 + [True]


def test_a_prompt_may_be_tokens_and_the_answer_held_to_a_schema(fills: Served) -> None:
    fills.request("POST", "/completion", {"prompt": [1, 2], "json_schema": {"type": "object"}, "n_predict": -1})
    request = last(fills)
    assert request.prompt == TokenPrompt(tokens=(1, 2))
    assert request.constraint == JsonConstraint(schema='{"type": "object"}')
    assert request.max_tokens == MODEL.max_output_tokens
    fills.request("POST", "/completion", {"prompt": "x", "logit_bias": [[5, 1.5], [6, False]]})
    assert last(fills).sampling.logit_bias == {5: 1.5, 6: -100.0}


def test_a_gap_is_filled_as_editors_ask_for_it(fills: Served) -> None:
    body = {
        "input_prefix": "def f():\n",
        "input_suffix": "\n",
        "input_extra": [{"filename": "a.py", "text": "x = 1"}],
        "prompt": "    ",
        "n_predict": 0,
        "samplers": ["top_k", "top_p", "infill"],
        "t_max_predict_ms": 1000,
    }
    assert fills.request("POST", "/infill", body).status == 200
    assert last(fills).prompt == FillPrompt(prefix="def f():\n    ", suffix="\n", files=(("a.py", "x = 1"),))
    assert last(fills).max_tokens == 0


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/completion", {}, "prompt"),
        ("/completion", {"prompt": "x", "grammar": "root ::= x"}, "grammar"),
        ("/completion", {"prompt": "x", "ignore_eos": True}, "ignore_eos"),
        ("/completion", {"prompt": "x", "n_predict": 5000}, "n_predict"),
        ("/completion", {"prompt": "x", "logit_bias": [[1]]}, "logit_bias[0]"),
        ("/completion", {"prompt": ["x"]}, "prompt[0]"),
        ("/infill", {"input_extra": [{"filename": "a"}]}, "input_extra[0].text"),
        ("/tokenize", {}, "content"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/apply-template", {"model": "tiny"}, "messages"),
    ],
)
def test_what_is_wrong_is_named(fills: Served, path: str, body: Any, param: str) -> None:
    answer = fills.request("POST", path, body)
    assert (answer.status, answer.error["param"]) == (400, param)
