"""The API reference as it is served, and the server's answers held to it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from msgspec.structs import replace

from ocserve.api.response_schemas import SCHEMAS
from tests.http.harness import KEY, MODEL, Served, serving

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
REQUESTS: dict[tuple[str, str], Any] = {
    ("POST", "/v1/chat/completions"): CHAT,
    ("POST", "/v1/completions"): {"model": "tiny", "prompt": "Hi"},
    ("POST", "/v1/embeddings"): {"model": "tiny", "input": "Hi"},
    ("POST", "/v1/responses"): {"model": "tiny", "input": "Hi"},
    ("POST", "/v1/responses/input_tokens"): {"model": "tiny", "input": "Hi"},
    ("POST", "/v1/rerank"): {"model": "tiny", "query": "Hi", "documents": ["Ho"]},
    ("POST", "/v1/messages"): {**CHAT, "max_tokens": 5},
    ("POST", "/v1/messages/count_tokens"): CHAT,
    ("POST", "/v1beta/models/tiny:generateContent"): {"contents": [{"parts": [{"text": "Hi"}]}]},
    ("POST", "/v1beta/models/tiny:countTokens"): {"contents": [{"parts": [{"text": "Hi"}]}]},
    ("POST", "/v1beta/models/tiny:embedContent"): {"content": {"parts": [{"text": "Hi"}]}},
    ("POST", "/v1beta/models/tiny:batchEmbedContents"): {"requests": [{"content": {"parts": [{"text": "Hi"}]}}]},
    ("POST", "/api/chat"): {**CHAT, "stream": False},
    ("POST", "/api/generate"): {"model": "tiny", "prompt": "Hi", "stream": False},
    ("POST", "/api/embed"): {"model": "tiny", "input": "Hi"},
    ("POST", "/api/show"): {"model": "tiny"},
    ("POST", "/completion"): {"prompt": "Hi"},
    ("POST", "/infill"): {"input_prefix": "Hi"},
    ("POST", "/tokenize"): {"content": "Hi", "with_pieces": True},
    ("POST", "/detokenize"): {"tokens": [72]},
    ("POST", "/apply-template"): CHAT,
    ("GET", "/v1/models"): None,
    ("GET", "/v1/models/tiny"): None,
    ("GET", "/v1beta/models"): None,
    ("GET", "/v1beta/models/tiny"): None,
    ("GET", "/openrouter/models"): None,
    ("GET", "/api/tags"): None,
    ("GET", "/api/ps"): None,
    ("GET", "/api/version"): None,
    ("GET", "/api/v0/models"): None,
    ("GET", "/api/v0/models/tiny"): None,
    ("GET", "/props"): None,
    ("GET", "/health"): None,
    ("GET", "/openapi.json"): None,
}
ALL = replace(MODEL, capabilities=("chat", "completion", "embedding", "fim", "rerank"), dimensions=2)


@pytest.fixture(scope="module")
def documented() -> Iterator[Served]:
    with serving(model=ALL) as server:
        yield server


def template(document: Any, path: str) -> str:
    """The documented path that `path` is one of: the one with the fewest parameters."""
    found = [each for each in document["paths"] if re.fullmatch(re.sub(r"\\\{\w+\\\}", "[^:]+", re.escape(each)), path)]
    return min(found, key=lambda each: each.count("{"))


@pytest.mark.parametrize(("method", "path"), REQUESTS, ids=lambda each: str(each))
def test_answers_have_the_documented_shape(documented: Served, method: str, path: str) -> None:
    document = documented.request("GET", "/openapi.json").json
    operation = document["paths"][template(document, path)][method.lower()]
    body = REQUESTS[method, path]
    if body is not None:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        jsonschema.validate(body, schema)
    answer = documented.request(method, path, body)
    assert answer.status == 200, answer.body
    reference = operation["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.validate(answer.json, {**reference, "components": {"schemas": SCHEMAS}})


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat", "/completion"])
def test_refusals_have_the_documented_shape(documented: Served, path: str) -> None:
    document = documented.request("GET", "/openapi.json").json
    answer = documented.request("POST", path, {"frobnicate": 1})
    refused = document["paths"][path]["post"]["responses"][str(answer.status)]
    schema = refused["content"]["application/json"]["schema"]
    jsonschema.validate(answer.json, {**schema, "components": {"schemas": SCHEMAS}})


def hold(data: str, documented: Any) -> None:
    """Hold the data of an event to its schema; by itself JSON Schema does not look into the content of a text."""
    jsonschema.validate(data, documented)
    for form in documented.get("anyOf", [documented]):
        if form.get("const") == data:
            return
        if "contentSchema" in form:
            jsonschema.validate(json.loads(data), {**form["contentSchema"], "components": {"schemas": SCHEMAS}})


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/messages",
        "/v1/responses",
        "/v1beta/models/tiny:streamGenerateContent",
        "/completion",
        "/infill",
    ],
)
def test_events_of_streams_have_the_documented_shape(documented: Served, path: str) -> None:
    document = documented.request("GET", "/openapi.json").json
    operation = document["paths"][template(document, path)]["post"]
    event = operation["responses"]["200"]["content"]["text/event-stream"]["schema"]
    google = path.endswith(":streamGenerateContent")
    body = REQUESTS["POST", path.replace("streamGenerate", "generate")] | ({} if google else {"stream": True})
    answer = documented.request("POST", path + "?alt=sse" * google, body)
    events = [line.removeprefix("data: ") for line in answer.body.decode().split("\n") if line.startswith("data: ")]
    assert len(events) > 1
    for data in events:
        hold(data, event["properties"]["data"])


def test_lines_of_streams_have_the_documented_shape(documented: Served) -> None:
    lines = documented.request("POST", "/api/chat", CHAT).body.decode().splitlines()
    for line in lines:
        jsonschema.validate(json.loads(line), SCHEMAS["OllamaChat"])


def test_the_page_is_self_contained(documented: Served) -> None:
    answer = documented.request("GET", "/docs")
    page = answer.body.decode()
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.findall(r"<script|src=|https?://|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page
    for path in ("/v1/chat/completions", "/api/tags", "/infill"):
        assert f"<code>{path}</code>" in page
    assert "repetition_penalty" in page
    for language in ("cURL", "Python", "JavaScript"):
        assert f"<h3>{language}</h3><pre><code>" in page


def test_the_pages_example_for_python_runs(
    documented: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = documented.request("GET", "/docs").body.decode()
    example = html.unescape(page.partition("<h3>Python</h3><pre><code>")[2].partition("</code>")[0])
    monkeypatch.setenv("OCSERVE", documented.url)
    monkeypatch.setenv("OCSERVE_API_KEY", KEY)
    exec(compile(example, "example", "exec"), {})
    assert capsys.readouterr().out == "Hello, world!\n"


def test_strangers_see_the_reference_but_no_model() -> None:
    with serving(key=KEY, public_hosts=("models.example",)) as server:
        host = {"Host": "models.example"}
        document = server.request("GET", "/openapi.json", headers=host)
        assert document.status == 200
        assert "org/tiny:135m" not in document.body.decode()
        known = server.request("GET", "/openapi.json", headers={**host, "Authorization": f"Bearer {KEY}"})
        assert "org/tiny:135m" in known.body.decode()
        assert server.request("GET", "/docs", headers=host).status == 200
        assert server.request("GET", "/props", headers=host).status == 401
