"""What editors ask of a server, asked of a real model."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import ollama

from tests.e2e.alike import alike
from tests.e2e.daemon import RunningDaemon

TEXT = "Grüße aus Köln: <|im_start|> is text here."


def post(server: RunningDaemon, path: str, body: Any) -> Any:
    request = urllib.request.Request(
        server.root + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_text_survives_the_way_to_tokens_and_back(server: RunningDaemon) -> None:
    """Also text that spells a control token, as text and as a token."""
    plain = post(server, "/tokenize", {"content": TEXT, "parse_special": False})["tokens"]
    special = post(server, "/tokenize", {"content": TEXT})["tokens"]
    assert len(plain) > len(special), "one token instead of the pieces of its spelling"
    for tokens in (plain, special):
        assert post(server, "/detokenize", {"tokens": tokens}) == {"content": TEXT}
    pieces = post(server, "/tokenize", {"content": TEXT, "parse_special": False, "with_pieces": True})["tokens"]
    spelt = [piece.encode() if isinstance(piece := each["piece"], str) else bytes(piece) for each in pieces]
    assert b"".join(spelt).decode() == TEXT


def test_a_rendered_conversation_is_the_prompt_that_is_counted(server: RunningDaemon) -> None:
    messages = [{"role": "user", "content": "Name three colours."}]
    prompt = post(server, "/apply-template", {"messages": messages})["prompt"]
    assert "Name three colours." in prompt
    tokens = post(server, "/tokenize", {"content": prompt})["tokens"]
    answer = post(server, "/v1/chat/completions", {"model": "default", "messages": messages, "max_tokens": 1})
    assert answer["usage"]["prompt_tokens"] == len(tokens)


def test_props_tell_the_models_own_template_and_marks(server: RunningDaemon) -> None:
    props = server.get("/props")
    assert "im_start" in props["chat_template"]
    assert props["eos_token"] == "<|im_end|>"
    assert props["default_generation_settings"]["n_ctx"] == server.get("/v1/models")["data"][0]["context_length"]


def test_ollamas_client_gets_an_answer_of_the_real_model(server: RunningDaemon) -> None:
    client = ollama.Client(host=server.root)
    try:
        (model,) = client.list().models
        assert (model.size or 0) > 90_000_000
        assert len(model.digest or "") == 64
        options = {"temperature": 0, "num_predict": 24}
        messages = [{"role": "user", "content": "Name three colours."}]
        whole = client.chat(str(model.model), messages=messages, options=options)
        lines = list(client.chat(str(model.model), messages=messages, options=options, stream=True))
        assert len(whole.message.content or "") > 5
        assert alike("".join(line.message.content or "" for line in lines), whole.message.content or "")
        assert lines[-1].prompt_eval_count == whole.prompt_eval_count
        assert (lines[-1].eval_duration or 0) > 0
        assert [each.model for each in client.ps().models] == [model.model]
    finally:
        client._client.close()


def test_a_completion_goes_on_where_the_prompt_ends(server: RunningDaemon) -> None:
    answer = post(server, "/completion", {"prompt": "One, two, three,", "n_predict": 8, "temperature": 0})
    assert answer["content"]
    assert answer["tokens_predicted"] <= 8
    assert answer["stop_type"] in ("limit", "eos")
