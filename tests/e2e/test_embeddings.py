"""Embeddings and rerank from the real server by real clients: MiniLM, and random weights where no real model is had."""

from __future__ import annotations

import base64
import concurrent.futures
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests import minilm as writer
from tests import tiny_embedding
from tests.conftest import MiniLm
from tests.e2e.daemon import RunningDaemon, daemon

TEXTS = ["The cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose by half a point."]
NAME = "all-minilm-l6-v2-f16"


@pytest.fixture(scope="module")
def server(
    smollm2: Path, minilm: MiniLm, model_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningDaemon]:
    """A chat model, the embedding model and a reranker of random weights in one server."""
    reranker = tiny_embedding.write(tmp_path_factory.mktemp("rerank") / "reranker.gguf", "reranker", context=256)
    with daemon("smollm2:135m", str(minilm.path), str(reranker), store=model_cache) as running:
        yield running


@pytest.fixture
def client(server: RunningDaemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base_url, api_key="anything", max_retries=0) as made:
        yield made


def post(client: openai.OpenAI, path: str, body: dict[str, Any]) -> Any:
    return client.post(path, body=body, cast_to=object)


def test_the_sdk_gets_the_models_own_vectors(client: openai.OpenAI, minilm: MiniLm) -> None:
    answer = client.embeddings.create(model=NAME, input=TEXTS)  # asks for base64
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    cat, kitten, rates = (np.array(entry.embedding) for entry in answer.data)
    assert cat.shape == (384,)
    assert cat @ kitten > 0.5 > cat @ rates
    ids = [101, 1996, 4937, 7719, 2006, 1996, 13523, 1012, 102]
    assert float(cat @ writer.reference(writer.weights(minilm.source / "model.safetensors"), ids)) > 0.9999
    assert answer.usage.prompt_tokens == answer.usage.total_tokens >= len(ids) * 3
    assert answer.model == NAME


def test_floats_base64_texts_and_tokens_agree(client: openai.OpenAI) -> None:
    as_floats = client.embeddings.create(model=NAME, input=TEXTS[0], encoding_format="float").data[0].embedding
    coded = post(client, "/embeddings", {"model": NAME, "input": TEXTS[0], "encoding_format": "base64"})
    decoded = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(decoded, np.array(as_floats, np.float32))
    tokens = client.embeddings.create(model=NAME, input=[101, 1996, 4937, 7719, 2006, 1996, 13523, 1012, 102])
    assert float(np.array(tokens.data[0].embedding) @ decoded) > 0.99999


def test_many_clients_each_get_their_own(client: openai.OpenAI) -> None:
    texts = [f"sentence number {n} about {'cats' if n % 2 else 'stocks'}" for n in range(24)]
    expected = [np.array(e.embedding) for e in client.embeddings.create(model=NAME, input=texts).data]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: client.embeddings.create(model=NAME, input=text), texts))
    for answer, vector in zip(answers, expected, strict=True):
        assert float(np.array(answer.data[0].embedding) @ vector) > 0.9999


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"input": "word " * 600}, "input", "context_length_exceeded"),
        ({"input": ["a", "word " * 600]}, "input[1]", "context_length_exceeded"),
        ({"input": [[101, 40_000]]}, "input", "invalid_value"),
        ({"input": "a", "dimensions": 128}, "dimensions", "unsupported_parameter"),
        ({"input": ""}, "input", "empty_string"),
    ],
)
def test_what_cannot_be_is_refused_by_name(client: openai.OpenAI, body: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        post(client, "/embeddings", {"model": NAME, **body})
    assert (caught.value.param, caught.value.code) == (param, code)
    if code == "context_length_exceeded":
        assert "maximum context length is 512 tokens" in str(caught.value)


def test_each_model_does_what_it_can(client: openai.OpenAI) -> None:
    for path, body in (
        ("/embeddings", {"model": "smollm2:135m", "input": "a"}),
        ("/rerank", {"model": NAME, "query": "a", "documents": ["b"]}),
        ("/chat/completions", {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]}),
        ("/completions", {"model": "reranker", "prompt": "Hi"}),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            post(client, path, body)
        assert (caught.value.param, caught.value.code) == ("model", "model_not_capable")
    chat = client.chat.completions.create(
        model="smollm2:135m", messages=[{"role": "user", "content": "Hi"}], max_tokens=3
    )
    assert chat.usage is not None


def test_documents_are_ranked(client: openai.OpenAI) -> None:
    documents = ["abc", {"text": "who are you"}, "xyz " * 20]
    body = {"model": "reranker", "query": "who", "documents": documents}
    ranked = post(client, "/rerank", {**body, "return_documents": True})
    scores = [entry["relevance_score"] for entry in ranked["results"]]
    assert scores == sorted(scores, reverse=True)
    assert all(0 < score < 1 for score in scores)
    assert sorted(entry["index"] for entry in ranked["results"]) == [0, 1, 2]
    for entry in ranked["results"]:
        alone = post(client, "/rerank", {**body, "documents": [documents[entry["index"]]]})
        assert alone["results"][0]["relevance_score"] == pytest.approx(entry["relevance_score"], abs=1e-3)
    assert ranked["usage"]["prompt_tokens"] > 3
    assert len(post(client, "/rerank", {**body, "top_n": 1})["results"]) == 1


def test_the_list_says_what_each_model_does(server: RunningDaemon) -> None:
    listed = {model["id"]: model for model in server.get("/v1/models")["data"]}
    assert listed[NAME]["capabilities"] == ["embedding"]
    assert listed[NAME]["output_modalities"] == ["embeddings"]
    assert listed[NAME]["context_length"] == 512
    assert listed["reranker"]["capabilities"] == ["rerank"]
    assert "chat" in listed["smollm2:135m"]["capabilities"]


def test_an_embedding_model_alone_starts_and_says_so(minilm: MiniLm, model_cache: Path) -> None:
    with daemon(str(minilm.path), store=model_cache) as running:
        health = running.health()
        assert health["ready"]
        assert health["engine"]["dimensions"] == 384
        assert health["engine"]["architecture"] == "bert"
        answer = running.health()["models"]
        assert answer[NAME]["state"] == "ready"
