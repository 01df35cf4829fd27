"""Embeddings and rerank as codecs: what is read, what is refused by name, what an answer looks like."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
from msgspec.structs import replace

from ocserve.api import json_body, openai_embeddings, rerank
from ocserve.api.questions import Asked
from ocserve.errors import ApiError, InvalidRequest
from ocserve.generation import Embedded, EmbedRequest, Scored, ScoreRequest, TextPrompt, TokenPrompt
from ocserve.modelcard import ServedModel
from tests.api import mutations
from tests.api.mutations import Valid, integer, text
from tests.http.harness import MODEL

EMBEDDER = replace(
    MODEL, capabilities=("embedding",), output_modalities=("embedding",), dimensions=8, context_length=64
)
SHORTENABLE = replace(EMBEDDER, id="nested", aliases=(), card=replace(MODEL.card, shortest_vector=4))
RERANKER = replace(MODEL, capabilities=("rerank",), output_modalities=("rerank",))

EMBEDDINGS: dict[str, Any] = {"model": "tiny", "input": "Hi"}
RANKING: dict[str, Any] = {"model": "tiny", "query": "Who?", "documents": ["I", "you"]}


def parse(body: dict[str, Any] | bytes, *served: ServedModel, module: Any = openai_embeddings) -> Asked:
    """`body` read by a server of these models."""

    def models(name: str) -> ServedModel:
        for model in served or (EMBEDDER if module is openai_embeddings else RERANKER,):
            if model.answers_to(name):
                return model
        raise InvalidRequest("no such model", param="model", code="model_not_found")

    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    json_body.check_shape(data, 64)
    asked: Asked = module.parse(data, models, refuse_unknown=True)
    return asked


def refused(body: dict[str, Any], *served: ServedModel, module: Any = openai_embeddings) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(body, *served, module=module)
    return caught.value


# --- every field with every wrong value -------------------------------------------------------------------------------


def one_input(value: Any) -> bool:
    if isinstance(value, str):
        return value != ""
    return isinstance(value, list) and bool(value) and all(integer(0, 2**24 - 1)(each) for each in value)


EMBEDDINGS_ORACLE: dict[str, Valid] = {
    "input": lambda v: (
        one_input(v)
        or (
            isinstance(v, list) and 0 < len(v) <= 2048 and isinstance(v[0], str | list) and all(one_input(e) for e in v)
        )
    ),
    "model": lambda v: v == "tiny",
    "dimensions": mutations.only(8),
    "encoding_format": mutations.only("float", "base64"),
    "user": text(1024),
    "input_type": text(64),
}
RANKING_ORACLE: dict[str, Valid] = {
    "model": lambda v: v == "tiny",
    "query": text(2**26, 1),
    "documents": lambda v: (
        isinstance(v, list)
        and 0 < len(v) <= 2048
        and all(
            isinstance(e, str) or (isinstance(e, dict) and set(e) == {"text"} and isinstance(e["text"], str)) for e in v
        )
    ),
    "top_n": integer(1, 2**31 - 1),
    "return_documents": mutations.boolean,
    "max_tokens_per_doc": mutations.only(),
    "max_chunks_per_doc": mutations.only(),
    "rank_fields": mutations.only(),
    "user": text(1024),
    "priority": integer(0, 999),
}
SUITES = pytest.mark.parametrize(
    ("module", "base", "oracle"),
    [(openai_embeddings, EMBEDDINGS, EMBEDDINGS_ORACLE), (rerank, RANKING, RANKING_ORACLE)],
    ids=["embeddings", "rerank"],
)


@SUITES
def test_every_field_with_every_invalid_value_is_refused_by_name(
    module: Any, base: dict[str, Any], oracle: dict[str, Valid]
) -> None:
    assert set(oracle) == {field.name for field in module.PARAMETERS}
    cases = list(mutations.bodies("", base, oracle))
    wrong: list[Any] = []
    for case in cases:
        try:
            parse(case.body, module=module)
        except ApiError as error:
            if case.param is not ... and not (error.param or "").startswith(case.param):
                wrong.append((case.body[:100], error.param))
            if error.info.status != 400 or "canary" in error.message:
                wrong.append((case.body[:100], error.info))
        else:
            wrong.append((case.body[:100], "accepted"))
    assert not wrong, wrong[:10]
    assert min(sum(case.param == name for case in cases) for name in oracle) >= 12


@SUITES
def test_every_valid_value_of_the_pool_is_accepted(module: Any, base: dict[str, Any], oracle: dict[str, Valid]) -> None:
    accepted = 0
    for name, valid in oracle.items():
        for value in map(json.loads, mutations.POOL):
            if valid(value):
                parse({**base, name: value}, module=module)
                accepted += 1
    assert accepted > 20


@SUITES
def test_null_means_absent_except_where_something_is_needed(
    module: Any, base: dict[str, Any], oracle: dict[str, Valid]
) -> None:
    parse({**base, **dict.fromkeys(oracle.keys() - base.keys())}, module=module)
    for name in base:
        error = refused({**base, name: None}, module=module)
        assert (error.code, error.param) == ("missing_required_parameter", name)


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("", "input"),
        ([], "input"),
        (["a", ""], "input[1]"),
        (["a", 1], "input[1]"),
        ([1, "a"], "input[1]"),
        ([1, -1], "input[1]"),
        ([1, True], "input[1]"),
        ([1, 2**24], "input[1]"),
        ([[1], []], "input[1]"),
        ([[1], [1.5]], "input[1][0]"),
        (["a"] * 2049, "input"),
        ({"text": "a"}, "input"),
        ([{"text": "a"}], "input[0]"),
    ],
)
def test_a_wrong_input_is_named_by_its_place(value: Any, param: str) -> None:
    assert refused({**EMBEDDINGS, "input": value}).param == param


@pytest.mark.parametrize(
    ("value", "param"),
    [
        (["a", 5], "documents[1]"),
        ([{}], "documents[0].text"),
        ([{"text": 1}], "documents[0].text"),
        (["a", {"text": "b", "title": "c"}], "documents[1].title"),
        ([], "documents"),
    ],
)
def test_a_wrong_document_is_named_by_its_place(value: Any, param: str) -> None:
    assert refused({**RANKING, "documents": value}, module=rerank).param == param


# --- embeddings -------------------------------------------------------------------------------------------------------


def test_inputs_come_in_four_forms_and_keep_their_order() -> None:
    def inputs(value: Any) -> Any:
        question = parse({**EMBEDDINGS, "input": value}).question
        assert isinstance(question, EmbedRequest)
        return question.inputs

    assert inputs("a") == (TextPrompt(text="a"),)
    assert inputs(["b", "a"]) == (TextPrompt(text="b"), TextPrompt(text="a"))
    assert inputs([3, 1]) == (TokenPrompt(tokens=(3, 1)),)
    assert inputs([[3, 1], [2]]) == (TokenPrompt(tokens=(3, 1)), TokenPrompt(tokens=(2,)))
    assert len(inputs(["a"] * 2048)) == 2048


def test_vectors_are_shortened_only_where_the_model_was_trained_for_it() -> None:
    def asked(dimensions: int | None, model: ServedModel) -> int | None:
        question = parse({"model": model.id, "input": "a", "dimensions": dimensions}, model).question
        assert isinstance(question, EmbedRequest)
        return question.dimensions

    assert asked(None, EMBEDDER) is None
    assert asked(8, EMBEDDER) is None
    assert asked(8, SHORTENABLE) is None
    assert asked(4, SHORTENABLE) == 4
    error = refused({**EMBEDDINGS, "dimensions": 4})
    assert (error.param, error.code) == ("dimensions", "unsupported_parameter")
    assert "accepted: 8" in error.message
    for dimensions, code in ((3, "integer_below_min_value"), (9, "integer_above_max_value")):
        error = refused({"model": "nested", "input": "a", "dimensions": dimensions}, SHORTENABLE)
        assert (error.param, error.code) == ("dimensions", code)


def test_an_answer_holds_every_vector_in_order_as_floats_or_as_their_bytes() -> None:
    vectors = [(0.1, -0.25, 1e-20), (3.0, 0.0, -1.5)]
    packed = tuple(struct.pack("<3f", *vector) for vector in vectors)
    answer = Embedded(vectors=packed, tokens=(3, 4))
    body = json.loads(parse(EMBEDDINGS).reply(answer))
    assert body["object"] == "list"
    assert body["model"] == "tiny"
    assert body["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert [entry["index"] for entry in body["data"]] == [0, 1]
    assert {entry["object"] for entry in body["data"]} == {"embedding"}
    assert tuple(struct.pack("<3f", *entry["embedding"]) for entry in body["data"]) == packed
    coded = json.loads(parse({**EMBEDDINGS, "encoding_format": "base64"}).reply(answer))
    assert tuple(base64.b64decode(entry["embedding"]) for entry in coded["data"]) == packed
    assert {name: value for name, value in coded.items() if name != "data"} == {
        name: value for name, value in body.items() if name != "data"
    }


def test_what_has_no_effect_is_named() -> None:
    assert parse({**EMBEDDINGS, "user": "u", "input_type": "query"}).ignored == ("user", "input_type")


def test_models_that_cannot_are_refused_by_name() -> None:
    for module, base in ((openai_embeddings, EMBEDDINGS), (rerank, RANKING)):
        error = refused(base, MODEL, module=module)
        assert (error.param, error.code, error.info.status) == ("model", "model_not_capable", 400)
        assert "tiny" in error.message


# --- rerank -----------------------------------------------------------------------------------------------------------


def test_documents_are_strings_or_objects_with_a_text() -> None:
    question = parse({**RANKING, "documents": ["a", {"text": "b"}, ""]}, module=rerank).question
    assert isinstance(question, ScoreRequest)
    assert (question.query, question.documents) == ("Who?", ("a", "b", ""))


def test_a_ranking_names_places_by_relevance() -> None:
    answer = Scored(scores=(0.25, 0.75, 0.25), tokens=(5, 6, 7))
    asked = {**RANKING, "documents": ["a", "b", {"text": "c"}]}

    def ranked(**extra: Any) -> Any:
        return json.loads(parse({**asked, **extra}, module=rerank).reply(answer))

    body = ranked()
    assert [(entry["index"], entry["relevance_score"]) for entry in body["results"]] == [
        (1, 0.75),
        (0, 0.25),
        (2, 0.25),
    ]
    assert body["data"] == body["results"]
    assert body["usage"] == {"prompt_tokens": 18, "total_tokens": 18}
    assert body["meta"]["tokens"]["input_tokens"] == 18
    assert [entry["index"] for entry in ranked(top_n=2)["results"]] == [1, 0]
    assert len(ranked(top_n=99)["results"]) == 3
    assert [entry["document"] for entry in ranked(top_n=2, return_documents=True)["results"]] == [
        {"text": "b"},
        {"text": "a"},
    ]
    assert "document" not in ranked(return_documents=False)["results"][0]
