"""Embeddings and rerank behind the real server, over a scripted engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from ocserve import config
from ocserve.errors import InputTooLong
from ocserve.generation import Answer, EmbedRequest, Question
from tests.http.harness import CHAT, COMPLETION, MODEL, Served, serving

EMBEDDER = replace(
    MODEL, capabilities=("embedding",), output_modalities=("embedding",), dimensions=2, max_output_tokens=0
)
RERANKER = replace(MODEL, capabilities=("rerank",), output_modalities=("rerank",), max_output_tokens=0)
EMBEDDINGS: dict[str, Any] = {"model": "tiny", "input": ["abc", "de"]}
RANKING: dict[str, Any] = {"model": "tiny", "query": "Who?", "documents": ["long one", "you"]}


@pytest.fixture(scope="module")
def embedder() -> Iterator[Served]:
    with serving(model=EMBEDDER) as server:
        yield server


@pytest.fixture(scope="module")
def reranker() -> Iterator[Served]:
    with serving(model=RERANKER) as server:
        yield server


def test_embeddings_are_answered_whole_with_their_usage(embedder: Served) -> None:
    answer = embedder.request("POST", "/v1/embeddings", EMBEDDINGS)
    assert answer.status == 200
    assert [entry["embedding"] for entry in answer.json["data"]] == [[3.0, 1.0], [2.0, 1.0]]
    assert answer.json["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert answer.headers["x-request-id"]
    assert "x-ocserve-ignored" not in answer.headers


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_a_ranking_is_found_under_the_paths_that_clients_use(reranker: Served, path: str) -> None:
    answer = reranker.request("POST", path, RANKING)
    assert [entry["index"] for entry in answer.json["results"]] == [1, 0]


def test_what_is_ignored_is_named_in_a_header(embedder: Served) -> None:
    answer = embedder.request("POST", "/v1/embeddings", {**EMBEDDINGS, "user": "u", "input_type": "query"})
    assert answer.headers["x-ocserve-ignored"] == "user, input_type"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "max_tokens": 5}),
        ("/v1/completions", COMPLETION),
        ("/v1/rerank", RANKING),
    ],
)
def test_a_model_that_embeds_does_nothing_else(embedder: Served, path: str, body: dict[str, Any]) -> None:
    answer = embedder.request("POST", path, body)
    assert answer.status == 400
    assert (answer.error["param"], answer.error["code"]) == ("model", "model_not_capable")
    assert not embedder.engine.runs


@pytest.mark.parametrize(("path", "body"), [("/v1/embeddings", EMBEDDINGS), ("/v1/rerank", RANKING)])
def test_a_model_that_generates_does_neither(served: Served, path: str, body: dict[str, Any]) -> None:
    before = len(served.engine.asked)
    answer = served.request("POST", path, body)
    assert answer.status == 400
    assert (answer.error["param"], answer.error["code"]) == ("model", "model_not_capable")
    assert len(served.engine.asked) == before


def test_what_the_engine_refuses_keeps_its_words_and_costs_nothing(embedder: Served) -> None:
    def refuse(question: Question) -> Answer:
        raise InputTooLong(limit=512, tokens=600, param="input[1]")

    kept, embedder.engine.answer = embedder.engine.answer, refuse
    try:
        answer = embedder.request("POST", "/v1/embeddings", EMBEDDINGS)
    finally:
        embedder.engine.answer = kept
    assert answer.status == 400
    assert (answer.error["param"], answer.error["code"]) == ("input[1]", "context_length_exceeded")
    assert "512" in answer.error["message"]
    assert "600" in answer.error["message"]


def test_tokens_count_against_the_limits_of_the_key() -> None:
    branch = config.Limits(tokens_per_minute=100)
    with serving(model=EMBEDDER, limits=branch) as server:
        first = server.request("POST", "/v1/embeddings", {**EMBEDDINGS, "input": "x" * 60})
        assert first.status == 200
        second = server.request("POST", "/v1/embeddings", EMBEDDINGS)
        assert 30 < int(second.headers["x-ratelimit-remaining-tokens"]) < 45


def test_clients_texts_reach_neither_errors_nor_ids(embedder: Served) -> None:
    body = json.dumps({"model": "tiny", "input": ["canary-4711"], "canary-4711": 1}).encode()
    answer = embedder.request("POST", "/v1/embeddings", body)
    assert answer.status == 400
    assert "4711" not in answer.error["message"].replace("'canary-4711'", "")
    good = embedder.request("POST", "/v1/embeddings", {"model": "tiny", "input": "canary-4711"})
    assert b"canary" not in good.raw
    question = embedder.engine.asked[-1]
    assert isinstance(question, EmbedRequest)
    assert len(question.request_id) == 24
