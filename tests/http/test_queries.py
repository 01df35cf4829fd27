"""What stands behind a path's `?`, and in whose words a path's errors are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from ocserve import config
from ocserve.api.operations import OPERATIONS
from ocserve.chat import messages
from ocserve.engine.wire import Prepared
from ocserve.errors import InvalidRequest
from ocserve.generation import Answer as Answered
from ocserve.generation import ChatPrompt, GenerateRequest, Question
from tests.http.harness import CHAT, KEY, Answer, Served, serving
from tests.scripted import Script, ScriptedEngine

ANTHROPIC = {"anthropic-version": "2023-06-01"}
GOOGLE = {"x-goog-api-client": "google-genai-sdk/2.19"}
CONTENTS = {"contents": [{"parts": [{"text": "Hi"}]}]}


def path_of(route: str) -> str:
    return re.sub(r"\{\w+:path\}", "tiny", route).replace("{id}", "resp_none")


@pytest.mark.parametrize("route", sorted({operation.route for operation in OPERATIONS}), ids=" ".join)
def test_no_query_is_passed_over_in_silence(served: Served, route: tuple[str, str]) -> None:
    """An unknown parameter is refused; where anybody may ask it is named."""
    method, path = route
    answer = served.request(method, f"{path_of(path)}?frobnicate=1", {} if method in ("POST", "PUT") else None)
    if any(operation.public for operation in OPERATIONS if operation.route == route):
        assert answer.status == 200
        assert answer.headers["x-ocserve-ignored"] == "frobnicate"
    else:
        assert answer.status == 400
        assert b"'frobnicate'" in answer.body


def test_what_each_dialects_clients_send_is_taken(served: Served) -> None:
    for path, body, ignored in (
        ("/v1/chat/completions?api-version=2024-10-21", CHAT, "api-version"),
        ("/v1/messages?beta=true", {**CHAT, "max_tokens": 5}, "beta"),
        ("/v1/messages/count_tokens?beta=true", CHAT, "beta"),
        ("/v1beta/models/tiny:generateContent?alt=json&key=anything", CONTENTS, None),
        ("/v1beta/models/tiny:streamGenerateContent?alt=sse&prettyPrint=false", CONTENTS, "prettyPrint"),
    ):
        answer = served.request("POST", path, body)
        assert answer.status == 200, (path, answer.body)
        assert answer.headers.get("x-ocserve-ignored") == ignored
    for path, headers, ignored in (
        ("/v1/models?limit=20", ANTHROPIC, "limit"),
        ("/v1/models?pageSize=20", GOOGLE, "pageSize"),
        ("/v1beta/models?pageSize=20", {}, "pageSize"),
        ("/v1/models/tiny?api-version=1", {}, "api-version"),
    ):
        answer = served.request("GET", path, headers=headers)
        assert (answer.status, answer.headers.get("x-ocserve-ignored")) == (200, ignored), path


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1beta/models/tiny:generateContent?alt=sse", CONTENTS),
        ("POST", "/v1beta/models/tiny:streamGenerateContent?alt=sse&alt=json", CONTENTS),
        ("GET", "/props?model=tiny&model=tiny", None),
        ("GET", "/v1/models?limit=0", None),
        ("GET", "/v1beta/models?pageSize=many", None),
    ],
)
def test_what_cannot_be_meant_is_refused(served: Served, method: str, path: str, body: Any) -> None:
    answer = served.request(method, path, body)
    assert answer.status == 400
    name = path.partition("?")[2].partition("=")[0]
    assert f"'{name}'".encode() in answer.body


def test_a_lenient_server_names_unknown_parameters() -> None:
    with serving(unknown_parameters="ignore") as server:
        answer = server.request("POST", "/v1/chat/completions?frobnicate=1", {**CHAT, "blorb": 1})
        assert answer.status == 200
        assert answer.headers["x-ocserve-ignored"] == "frobnicate, blorb"


def test_googles_clients_may_send_the_key_in_the_query() -> None:
    remote = config.Auth(anonymous=False)
    with serving(key=KEY, auth=remote) as server:
        for path in ("/v1beta/models/tiny:generateContent", "/v1/models/tiny:countTokens"):
            assert server.request("POST", f"{path}?key={KEY}", CONTENTS).status == 200
            assert server.request("POST", f"{path}?key=wrong", CONTENTS).status == 401
            both = {"x-goog-api-key": "other"}
            assert server.request("POST", f"{path}?key={KEY}", CONTENTS, both).code == "invalid_api_key"
        assert server.request("GET", f"/v1beta/models?key={KEY}").status == 200
        # Elsewhere a key has no business in an address, which others write down.
        assert server.request("POST", f"/v1/chat/completions?key={KEY}", CHAT).status == 401


def shape_of(answer: Answer) -> str:
    """Whose error object it is."""
    body = answer.json
    error = body["error"]
    if isinstance(error, str):
        return "ollama"
    if body.get("type") == "error":
        return "anthropic"
    if {"code", "message", "status"} <= set(error):
        return "google"
    assert set(error) == {"message", "type", "param", "code"}
    return "openai"


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    """A server that nobody may use without its key."""
    with serving(key=KEY, auth=config.Auth(anonymous=False)) as server:
        yield server


@pytest.mark.parametrize(
    ("method", "path", "headers", "shape"),
    [
        ("GET", "/v1/models", {}, "openai"),
        ("GET", "/v1/models", ANTHROPIC, "anthropic"),
        ("GET", "/v1/models/none", ANTHROPIC, "anthropic"),
        ("GET", "/v1/models", GOOGLE, "google"),
        ("GET", "/models/none", GOOGLE, "google"),
        ("GET", "/v1/files", {}, "openai"),
        ("POST", "/v1/files", ANTHROPIC, "anthropic"),
        ("POST", "/v1/messages/batches", {}, "anthropic"),
        ("POST", "/messages/batches", {}, "anthropic"),
        ("PUT", "/v1/messages", {}, "anthropic"),
        ("POST", "/v1beta/cachedContents", {}, "google"),
        ("DELETE", "/v1beta/models/tiny", {}, "google"),
        ("POST", "/api/push", {}, "ollama"),
        ("DELETE", "/api/chat", {}, "ollama"),
        ("GET", "/api/v0/nothing", {}, "openai"),
        ("POST", "/v1/messagesx", {}, "openai"),
    ],
)
def test_refusals_are_in_the_words_of_whose_path_it_is(
    locked: Served, method: str, path: str, headers: dict[str, str], shape: str
) -> None:
    stranger = locked.request(method, path, headers=headers)
    page = locked.request(method, path, headers={**headers, "Origin": "https://evil.example"})
    caller = locked.request(method, path, headers={**headers, "x-api-key": KEY})
    assert stranger.status == 401
    assert page.status == 403
    assert caller.status in (200, 404, 405)
    refusals = [answer for answer in (stranger, page, caller) if answer.status != 200]
    assert {shape_of(answer) for answer in refusals} == {shape}


def refusing(param: str) -> Callable[[], ScriptedEngine]:
    """An engine that refuses what is asked, by its own name for it."""

    def made() -> ScriptedEngine:
        engine = ScriptedEngine()

        def answer(question: Question) -> Answered:
            raise InvalidRequest(f"Invalid '{param}': no such schema.", param=param)

        engine.answer = answer
        return engine

    return made


def test_counts_are_refused_in_the_clients_words() -> None:
    schema = {"name": "f", "input_schema": {"type": "object"}}
    functions = {"tools": [{"functionDeclarations": [{"name": "f", "parametersJsonSchema": {"type": "object"}}]}]}
    function = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    place = "tools[0].functionDeclarations[0].parameters"
    with serving(refusing("tools[0].function.parameters")) as server:
        for path, body, words in (
            ("/v1/messages/count_tokens", {**CHAT, "tools": [schema]}, "tools[0].input_schema"),
            ("/v1beta/models/tiny:countTokens", {"generateContentRequest": {**CONTENTS, **functions}}, place),
            (
                "/v1/responses/input_tokens",
                {"model": "tiny", "input": "Hi", "tools": [function]},
                "tools[0].parameters",
            ),
        ):
            answer = server.request("POST", path, body)
            assert answer.status == 400
            assert f"{words}'".encode() in answer.body
            assert b"function.parameters" not in answer.body


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/api/chat", {**CHAT, "format": {"type": "string"}}, "format"),
        ("/completion", {"prompt": "Hi", "json_schema": {"type": "string"}}, "json_schema"),
    ],
)
def test_schemas_are_refused_in_the_clients_words(path: str, body: Any, words: str) -> None:
    ours = "response_format.json_schema.schema"
    refusal = InvalidRequest(f"Invalid '{ours}': no.", param=ours)
    with serving(lambda: ScriptedEngine(Script(refuse=refusal))) as server:
        answer = server.request("POST", path, body)
        assert answer.status == 400
        assert f"'{words}'".encode() in answer.body
        assert b"response_format" not in answer.body


CALLED = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}


@pytest.mark.parametrize(
    ("path", "body", "ignored"),
    [
        (
            "/v1/messages",
            {
                "model": "tiny",
                "max_tokens": 5,
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "f", "input": {}}]},
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "x"}]},
                ],
            },
            "messages[].content[].tool_use_id",
        ),
        (
            "/v1/responses",
            {
                "model": "tiny",
                "input": [CALLED, {"type": "function_call_output", "call_id": "c1", "output": "x"}],
            },
            "input[].call_id",
        ),
        (
            "/v1beta/models/tiny:generateContent",
            {
                "contents": [
                    {"role": "model", "parts": [{"functionCall": {"id": "c1", "name": "f"}}]},
                    {"parts": [{"functionResponse": {"id": "c1", "name": "f", "response": {}}}]},
                ]
            },
            "contents[].parts[].functionResponse.id",
        ),
        (
            "/v1beta/models/tiny:generateContent",
            {
                "contents": [
                    {"role": "model", "parts": [{"functionCall": {"name": "f"}}]},
                    {"parts": [{"functionResponse": {"name": "f", "response": {}}}]},
                ]
            },
            None,
        ),
        (
            "/api/chat",
            {
                "model": "tiny",
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
                    {"role": "tool", "content": "x"},
                ],
            },
            None,
        ),
        (
            "/v1/chat/completions",
            {
                "model": "tiny",
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                    },
                    {"role": "tool", "content": "x", "tool_call_id": "c1"},
                ],
            },
            "messages[1].tool_call_id",
        ),
    ],
)
def test_what_the_engine_has_no_use_for_is_named_in_the_clients_words(
    path: str, body: Any, ignored: str | None
) -> None:
    """A template that passes over the ids of results is the usual case."""

    class Passing(ScriptedEngine):
        async def prepare(self, request: GenerateRequest) -> Prepared:
            assert isinstance(request.prompt, ChatPrompt)
            unread = messages.unread(request.prompt.messages, frozenset({"content"}))
            return replace(await super().prepare(request), ignored=unread)

    with serving(Passing) as server:
        answer = server.request("POST", path, body)
        assert answer.status == 200, answer.body
        assert answer.headers.get("x-ocserve-ignored") == ignored


def test_a_post_without_a_body_needs_no_type(served: Served) -> None:
    """As OpenAI's client for Node sends it."""
    made = served.request("POST", "/v1/responses", {"model": "tiny", "input": "Hi"}).json["id"]
    for headers in ({}, {"Content-Length": "0"}):
        answer = served.request("POST", f"/v1/responses/{made}/cancel", headers=headers)
        assert (answer.status, answer.code) == (400, "response_not_cancellable")
    assert served.request("POST", f"/v1/responses/{made}/cancel", b"x", {"Content-Type": "text/plain"}).status == 415
    assert served.request("POST", "/v1/chat/completions").code == "invalid_json"
