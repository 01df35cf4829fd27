"""A content policy in front of the real server: what is refused, in every dialect's own words, and what it costs."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import ollama
import openai
import pytest
import structlog
from google import genai
from google.genai import errors as google_errors
from msgspec.structs import replace

from ocserve import config
from ocserve.accounts.billing import Billing
from ocserve.accounts.ledger import Ledger
from ocserve.generation import ChatPrompt, FillPrompt, GenerateRequest, ReasoningDelta, TextPrompt, ToolCallDelta
from ocserve.telemetry import logs
from tests.accounts.books import COMPLETION, PROMPT, REQUEST, priced, rows
from tests.http.harness import CHAT, MODEL, Served, read_all, serving, wait_for
from tests.http.test_websocket import opened, refusal, said
from tests.policy.moderation import ALLOWED, REFUSED, Moderator, by_word, moderating
from tests.scripted import Script, ScriptedEngine

ALL = replace(MODEL, capabilities=("chat", "completion", "tools", "reasoning", "fim"))
BAD = Script(tokens=("This ", "is ", "forbidden", "."), prompt_tokens=7)
CALLS = Script(
    tokens=(
        ReasoningDelta(text="Hm.", tokens=1),
        "Let me see.",
        ToolCallDelta(call=0, name="see", tokens=1),
        ToolCallDelta(call=0, arguments='{"what":"forbidden"}', tokens=1),
    ),
    reason="tool_calls",
)
SEE: Any = {
    "type": "function",
    "function": {"name": "see", "parameters": {"type": "object", "properties": {"what": {"type": "string"}}}},
}


def script(request: GenerateRequest) -> Script:
    """Says something bad, or calls something bad, where it is asked to."""
    match request.prompt:
        case ChatPrompt(messages=messages):
            text = messages[-1].content
        case TextPrompt(text=text):
            pass
        case FillPrompt(prefix=text):
            pass
        case _:
            text = ""
    return CALLS if "call" in text else BAD if "bad" in text else hello(request)


def hello(request: GenerateRequest) -> Script:
    """Of several choices the second is bad."""
    return Script(others=(BAD.tokens,)) if request.choices > 1 else Script()


@pytest.fixture(scope="module")
def moderator() -> Iterator[Moderator]:
    with moderating() as found:
        yield found


@pytest.fixture(scope="module")
def holding(moderator: Moderator) -> Iterator[Served]:
    with serving(lambda: ScriptedEngine(script), model=ALL, policy=moderator.settings()) as served:
        yield served


@pytest.fixture(scope="module")
def passing(moderator: Moderator) -> Iterator[Served]:
    with serving(lambda: ScriptedEngine(script), model=ALL, policy=moderator.settings(streams="pass")) as served:
        yield served


def sdk(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url + "/v1", api_key="any", max_retries=0)


def says(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_openais_client_is_told_why_its_prompt_is_refused(holding: Served, moderator: Moderator) -> None:
    steps = holding.engine.steps
    for stream in (False, True):
        with sdk(holding) as client, pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="tiny", messages=says("a forbidden thing"), stream=stream)
        error = refused.value
        assert (error.code, error.type, error.param) == ("content_filter", "invalid_request_error", None)
        assert error.body == {
            "message": "Not here, please.",
            "type": "invalid_request_error",
            "param": None,
            "code": "content_filter",
            "category": "violence",
        }
    assert holding.engine.steps == steps, "something was computed"
    assert not holding.engine.running
    asked = moderator.of("prompt")[-1]
    assert asked["messages"] == says("a forbidden thing")
    assert asked["key"] == "anonymous"
    assert asked["request_id"]


def test_an_answer_that_is_refused_is_withheld_from_openais_client(holding: Served) -> None:
    with sdk(holding) as client:
        whole = client.chat.completions.create(model="tiny", messages=says("be bad"))
        stream = client.chat.completions.create(model="tiny", messages=says("be bad"), stream=True)
        chunks = list(stream)
    choice = whole.choices[0]
    assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("content_filter", "", None)
    assert whole.usage
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (7, 4)
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(each.delta.content or "" for each in deltas) == ""
    assert [each.finish_reason for each in deltas if each.finish_reason] == ["content_filter"]
    assert chunks[-1].usage == whole.usage


def test_what_is_allowed_is_the_same_with_and_without_a_policy(holding: Served) -> None:
    with serving(lambda: ScriptedEngine(script), model=ALL) as free, sdk(free) as plain, sdk(holding) as judged:
        answers = [
            [
                chunk.choices[0].delta.content
                for chunk in client.chat.completions.create(model="tiny", messages=says("Hi"), stream=True)
                if chunk.choices
            ]
            for client in (plain, judged)
        ]
        assert answers[0] == answers[1]
        wholes = [client.chat.completions.create(model="tiny", messages=says("Hi")) for client in (plain, judged)]
        assert wholes[0].choices == wholes[1].choices


def test_calls_and_thoughts_are_judged_and_withheld_too(holding: Served, moderator: Moderator) -> None:
    with sdk(holding) as client:
        answer = client.chat.completions.create(model="tiny", messages=says("call it"), tools=[SEE])
    choice = answer.choices[0]
    assert choice.finish_reason == "content_filter"
    assert not choice.message.tool_calls
    assert not choice.message.content
    assert not (choice.message.model_extra or {}).get("reasoning_content")
    asked = moderator.of("answer")[-1]
    assert (asked["text"], asked["reasoning"]) == ("Let me see.", "Hm.")
    assert asked["tool_calls"] == [{"name": "see", "arguments": '{"what":"forbidden"}'}]


def test_a_stream_that_passes_ends_with_the_reason(passing: Served) -> None:
    with sdk(passing) as client:
        stream = client.chat.completions.create(model="tiny", messages=says("be bad"), stream=True)
        deltas = [chunk.choices[0] for chunk in stream if chunk.choices]
        whole = client.chat.completions.create(model="tiny", messages=says("be bad"))
    assert "".join(each.delta.content or "" for each in deltas) == "This is forbidden."
    assert deltas[-1].finish_reason == "content_filter"
    assert whole.choices[0].message.content == ""  # nothing was streamed, so nothing had to pass


def test_each_choice_and_each_prompt_is_judged_by_itself(holding: Served, moderator: Moderator) -> None:
    with sdk(holding) as client:
        two = client.chat.completions.create(model="tiny", messages=says("Hi"), n=2)
        texts = client.completions.create(model="tiny", prompt=["good", "bad", "good"])
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="tiny", prompt=["good", "forbidden", "good"])
    assert [each.finish_reason for each in two.choices] == ["stop", "content_filter"]
    assert [each.message.content for each in two.choices] == ["Hello, world!", ""]
    assert two.usage
    assert two.usage.completion_tokens == 8
    assert sorted(question["choice"] for question in moderator.of("answer")[-3:]) == [0, 1, 2]
    assert [each.finish_reason for each in texts.choices] == ["stop", "content_filter", "stop"]
    assert [each.text for each in texts.choices] == ["Hello, world!", "", "Hello, world!"]
    assert refused.value.param == "prompt[1]"


def test_anthropics_client(holding: Served) -> None:
    base: Any = {"model": "tiny", "max_tokens": 50}
    with anthropic.Anthropic(base_url=holding.url, api_key="any", max_retries=0) as client:
        whole = client.messages.create(messages=says("be bad"), **base)
        with client.messages.stream(messages=says("be bad"), **base) as stream:
            final = stream.get_final_message()
        with pytest.raises(anthropic.BadRequestError) as refused:
            client.messages.create(messages=says("forbidden"), **base)
    for message in (whole, final):
        assert (message.stop_reason, message.content) == ("refusal", [])
        assert message.usage.output_tokens == 4
    body: Any = refused.value.body
    assert body["error"]["code"] == "content_filter"
    assert body["error"]["category"] == "violence"


def test_googles_client(holding: Served) -> None:
    with genai.Client(api_key="any", http_options={"base_url": holding.url}) as client:
        whole = client.models.generate_content(model="tiny", contents="be bad")
        parts = list(client.models.generate_content_stream(model="tiny", contents="be bad"))
        with pytest.raises(google_errors.ClientError) as refused:
            client.models.generate_content(model="tiny", contents="forbidden")
    for answer in (whole, parts[-1]):
        assert answer.candidates
        assert answer.candidates[0].finish_reason == genai.types.FinishReason.SAFETY
        assert not answer.text
    assert refused.value.code == 400
    assert "Not here, please." in str(refused.value)
    error = holding.request(
        "POST", "/v1beta/models/tiny:generateContent", {"contents": [{"parts": [{"text": "forbidden"}]}]}
    ).json["error"]
    assert error["details"][0]["reason"] == "CONTENT_FILTER"
    assert error["details"][0]["metadata"] == {"category": "violence"}


def test_ollamas_client(holding: Served) -> None:
    client = ollama.Client(holding.url)
    whole = client.chat("tiny", says("be bad"))
    lines = list(client.chat("tiny", says("be bad"), stream=True))
    with pytest.raises(ollama.ResponseError) as refused:
        client.chat("tiny", says("forbidden"))
    client._client.close()
    assert (whole.done_reason, whole.message.content) == ("content_filter", "")
    assert lines[-1].done_reason == "content_filter"
    assert "".join(line.message.content or "" for line in lines) == ""
    assert refused.value.status_code == 400
    assert refused.value.error == "Not here, please."


@pytest.mark.parametrize("path", ["/completion", "/infill"])
def test_llama_servers_routes(holding: Served, path: str) -> None:
    def ask(text: str, **fields: Any) -> Any:
        body = {"prompt": text} if path == "/completion" else {"input_prefix": text, "input_suffix": ""}
        return holding.request("POST", path, {**body, **fields})

    whole, stream, refused = ask("bad").json, ask("bad", stream=True), ask("forbidden")
    assert (whole["content"], whole["stop_type"], whole["tokens_predicted"]) == ("", "content_filter", 4)
    last = json.loads(stream.events[-1])
    assert (last["content"], last["stop_type"]) == ("", "content_filter")
    assert len(stream.events) == 1
    assert (refused.status, refused.code) == (400, "content_filter")


def test_responses_end_incomplete_and_are_not_stored(holding: Served, passing: Served) -> None:
    for served in (holding, passing):
        with sdk(served) as client:
            whole = client.responses.create(model="tiny", input="be bad")
            events = list(client.responses.create(model="tiny", input="be bad", stream=True))
            fine = client.responses.create(model="tiny", input="Hi")
            last: Any = events[-1]
            assert last.type == "response.incomplete"
            for response in (whole, last.response):
                assert response.status == "incomplete"
                assert response.incomplete_details.reason == "content_filter"
                with pytest.raises(openai.NotFoundError):
                    client.responses.retrieve(response.id)
            assert whole.output_text == ""
            assert last.response.output_text == ("" if served is holding else "This is forbidden.")
            assert client.responses.retrieve(fine.id).output_text == "Hello, world!"
            with pytest.raises(openai.BadRequestError) as refused:
                client.responses.create(model="tiny", input="forbidden")
            assert refused.value.code == "content_filter"


def test_responses_on_a_websocket(holding: Served) -> None:
    with opened(holding) as peer:
        refused = refusal(peer, input="forbidden")
        assert (refused["code"], refused["category"]) == ("content_filter", "violence")
        last = said(peer, input="be bad")
        assert (last["type"], last["response"]["incomplete_details"]) == (
            "response.incomplete",
            {"reason": "content_filter"},
        )
        assert "forbidden" not in json.dumps(last)
        assert said(peer, input="Hi")["type"] == "response.completed"


def test_embeddings_and_rankings_are_judged_and_counting_is_not(moderator: Moderator) -> None:
    model = replace(MODEL, capabilities=("embedding", "rerank", "chat"), dimensions=2)
    with serving(model=model, policy=moderator.settings()) as served:
        before = len(moderator.asked)
        texts: Any = ["fine", [102, 105, 110, 101]]
        assert served.request("POST", "/v1/embeddings", {"model": "tiny", "input": texts}).status == 200
        assert moderator.asked[-1]["text"] == "fine\n\nfine"  # what the ids spell
        assert len(moderator.asked) == before + 1
        spelt = list(b"forbidden")
        for path, body in (
            ("/v1/embeddings", {"model": "tiny", "input": ["fine", "forbidden"]}),
            ("/v1/embeddings", {"model": "tiny", "input": spelt}),
            ("/v1/rerank", {"model": "tiny", "query": "q", "documents": ["fine", "forbidden"]}),
        ):
            answer = served.request("POST", path, body)
            assert (answer.status, answer.code) == (400, "content_filter"), path
        before = len(moderator.asked)
        assert served.request("POST", "/tokenize", {"content": "forbidden"}).status == 200
        assert (
            served.request("POST", "/v1/messages/count_tokens", {**CHAT, "messages": says("forbidden")}).status == 200
        )
        assert len(moderator.asked) == before


def test_token_ids_are_judged_by_what_they_spell(holding: Served) -> None:
    answer = holding.request("POST", "/v1/completions", {"model": "tiny", "prompt": list(b"forbidden")})
    assert (answer.status, answer.code) == (400, "content_filter")


@pytest.mark.parametrize("checks", ["prompt", "answer"])
def test_only_what_the_settings_name_is_judged(moderator: Moderator, checks: Any) -> None:
    with serving(lambda: ScriptedEngine(script), policy=moderator.settings(checks=(checks,))) as served:
        prompt, answer = served.chat(messages=says("forbidden")), served.chat(messages=says("bad"))
    assert prompt.status == (400 if checks == "prompt" else 200)
    assert answer.json["choices"][0]["finish_reason"] == ("stop" if checks == "prompt" else "content_filter")


def test_refused_prompts_are_free_and_in_no_ledger_and_refused_answers_are_charged(
    tmp_path: Path, moderator: Moderator
) -> None:
    file = tmp_path / "ledger.db"
    ledger = Ledger(file, retention_days=1)
    billing = Billing(config.Billing(), priced(), ledger)
    try:
        with serving(lambda: ScriptedEngine(script), billing=billing, policy=moderator.settings()) as served:
            assert served.chat(messages=says("forbidden")).status == 400
            assert rows(file) == []
            answer = served.chat(messages=says("bad"))
            (row,) = rows(file)
            cost = 7 * PROMPT + 4 * COMPLETION + REQUEST
            assert (row.outcome, row.completion_tokens, row.cost) == ("completed", 4, cost)
            assert answer.json["usage"]["cost"] == cost / 10**12
            moderator.answer = lambda question: (500 if question["stage"] == "answer" else 200, ALLOWED, {})
            for stream in (False, True):
                failed = served.chat(messages=says("Hi"), stream=stream)
                assert failed.status == (200 if stream else 503)
            lost = rows(file)[1:]
            assert [(row.outcome, row.completion_tokens, row.cost) for row in lost] == [("failed", 4, 0)] * 2
            assert json.loads(failed.events[-1])["error"]["code"] == "policy_unavailable"
            assert b"Hello" not in failed.body
    finally:
        moderator.answer = by_word
        ledger.close()


def test_a_hook_that_fails_refuses_prompts_for_a_while_or_lets_them_pass(moderator: Moderator) -> None:
    moderator.answer = lambda question: (200, b"perhaps", {})
    try:
        with serving(policy=moderator.settings()) as served:
            answer = served.chat()
            assert (answer.status, answer.error["code"]) == (503, "policy_unavailable")
            assert int(answer.headers["retry-after"]) > 0
        with serving(policy=moderator.settings(on_failure="allow")) as served:
            assert served.chat().json["choices"][0]["message"]["content"] == "Hello, world!"
    finally:
        moderator.answer = by_word


@pytest.mark.parametrize("streams", ["hold", "pass"])
def test_a_text_that_was_sent_before_it_was_refused_is_not_kept_for_repeats(moderator: Moderator, streams: Any) -> None:
    keyed = {"Idempotency-Key": "one"}
    with serving(lambda: ScriptedEngine(script), policy=moderator.settings(streams=streams)) as served:
        first, again = (served.chat(headers=keyed, messages=says("bad"), stream=True) for _ in range(2))
        kept = again.headers.get("idempotent-replayed") == "true"
        assert kept == (streams == "hold")
        assert (b"forbidden" in first.body) == (streams == "pass")
        assert len(served.engine.runs) == (1 if kept else 2)


def test_a_held_stream_is_kept_alive_and_its_client_may_leave(moderator: Moderator) -> None:
    release = threading.Event()

    def slow(question: dict[str, Any]) -> Any:
        if question["stage"] == "answer":
            release.wait(10)
        return 200, ALLOWED, {}

    moderator.answer = slow
    try:
        with serving(policy=moderator.settings(timeout_s=20.0), stream_heartbeat_s=0.02) as served:
            before = len(moderator.of("answer"))
            with served.connect() as peer:
                peer.sendall(served.compose("POST", "/v1/chat/completions", {**CHAT, "stream": True}))
                data = b""
                while data.count(b": keep-alive") < 3:
                    data += peer.recv(65536)
                assert b"Hello" not in data
                assert len(moderator.of("answer")) == before + 1
            wait_for(lambda: served.service.active == 0)
            release.set()
            assert served.service.judge
            assert sum(dict(checks.outcomes)["failed"] for checks in served.service.judge.stats) == 0
    finally:
        release.set()
        moderator.answer = by_word


def test_a_client_that_leaves_while_its_answer_is_judged_is_charged_as_one_that_left(
    tmp_path: Path, moderator: Moderator
) -> None:
    release = threading.Event()

    def slow(question: dict[str, Any]) -> Any:
        if question["stage"] == "answer":
            release.wait(10)
        return 200, ALLOWED, {}

    moderator.answer = slow
    file = tmp_path / "ledger.db"
    ledger = Ledger(file, retention_days=1)
    try:
        billing = Billing(config.Billing(), priced(), ledger)
        with serving(billing=billing, policy=moderator.settings(timeout_s=20.0)) as served:
            before = len(moderator.of("answer"))
            with served.connect() as peer:
                peer.sendall(served.compose("POST", "/v1/chat/completions", CHAT))
                wait_for(lambda: len(moderator.of("answer")) > before)
            wait_for(lambda: [row.outcome for row in rows(file)] not in ([], ["open"]))
            (row,) = rows(file)
            assert (row.outcome, row.prompt_tokens, row.completion_tokens) == ("cancelled", 7, 4)
    finally:
        release.set()
        moderator.answer = by_word
        ledger.close()


@pytest.mark.parametrize("stage", ["prompt", "answer"])
def test_what_is_judged_at_the_deadline_of_a_drain_ends_with_an_error(moderator: Moderator, stage: str) -> None:
    release = threading.Event()

    def slow(question: dict[str, Any]) -> Any:
        if question["stage"] == stage:
            release.wait(10)
        return 200, ALLOWED, {}

    moderator.answer = slow
    try:
        settings = moderator.settings(timeout_s=20.0, on_failure="allow")
        with serving(policy=settings, stream_heartbeat_s=0.02) as served, served.connect() as peer:
            before = len(moderator.of(stage))
            peer.sendall(served.compose("POST", "/v1/chat/completions", {**CHAT, "stream": True}))
            wait_for(lambda: len(moderator.of(stage)) > before)
            begun = time.monotonic()
            assert served.request("POST", "/admin/drain", {"deadline_s": 0.05}).json["active"] == 0
            told = read_all(peer)
            assert b'"code":"draining"' in told
            assert b"Hello" not in told
            assert time.monotonic() - begun < 5
    finally:
        release.set()
        moderator.answer = by_word


def test_a_program_judges_as_a_server_does() -> None:
    judge = f"""if grep -q forbidden; then echo '{REFUSED.decode()}'; else echo '{ALLOWED.decode()}'; fi"""
    policy = config.Policy(command=("/bin/sh", "-c", judge), timeout_s=30.0)
    with serving(lambda: ScriptedEngine(script), policy=policy) as served:
        assert served.chat(messages=says("Hi")).json["choices"][0]["message"]["content"] == "Hello, world!"
        assert served.chat(messages=says("forbidden")).status == 400
        assert served.chat(messages=says("bad")).json["choices"][0]["finish_reason"] == "content_filter"


def test_what_is_judged_and_what_the_judge_says_reach_no_log(moderator: Moderator) -> None:
    root = logging.getLogger()
    before, stream = (root.level, root.handlers[:]), io.StringIO()
    logs.configure(config.Log(level="debug", format="json"), stream)
    try:
        with serving(lambda: ScriptedEngine(script), policy=moderator.settings(token="tok-canary")) as served:
            served.chat(messages=says("forbidden canary"))
            served.chat(messages=says("bad canary"))
            moderator.answer = lambda question: (200, b'{"allow": "canary"}', {})
            served.chat(messages=says("canary"))
            metrics = served.request("GET", "/metrics").body.decode()
    finally:
        moderator.answer = by_word
        structlog.reset_defaults()
        root.setLevel(before[0])
        root.handlers[:] = before[1]
        logging.captureWarnings(False)
    log = stream.getvalue()
    failed = [line for line in map(json.loads, log.splitlines()) if line["event"] == "policy_failed"]
    assert [(line["state"], line["reason"]) for line in failed] == [("prompt", "the answer is no verdict")]
    for text in ("canary", "Not here", "violence"):
        assert text not in log
        assert text not in metrics
    assert 'ocserve_policy_checks_total{stage="prompt",verdict="refused"} 1.0' in metrics
    assert 'ocserve_policy_checks_total{stage="answer",verdict="refused"} 1.0' in metrics
    assert 'ocserve_policy_checks_total{stage="prompt",verdict="failed"} 1.0' in metrics
