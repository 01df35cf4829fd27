"""Google's embedding requests without a server."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from msgspec.structs import replace

from ocserve.api import google_embed
from ocserve.errors import ApiError
from ocserve.generation import Embedded, EmbedRequest, TextPrompt
from tests.http.harness import MODEL

CARD = replace(MODEL.card, shortest_vector=2)
EMBEDDING = replace(MODEL, card=CARD, capabilities=("embedding",), dimensions=4)


def content(*texts: str) -> dict[str, Any]:
    return {"parts": [{"text": text} for text in texts]}


def parse(body: dict[str, Any], *, batch: bool = True, model: Any = EMBEDDING) -> Any:
    dialect = google_embed.EmbedContent("tiny", batch=batch)
    return dialect.parse(json.dumps(body).encode(), lambda _: model, refuse_unknown=True)


def test_one_content_and_several() -> None:
    one = parse({"content": content("a ", "b"), "taskType": "RETRIEVAL_QUERY"}, batch=False)
    assert isinstance(one.question, EmbedRequest)
    assert one.question.inputs == (TextPrompt(text="a b"),)
    assert one.ignored == ("taskType",)
    answer = Embedded(vectors=(struct.pack("<2f", 1.0, 0.5),), tokens=(3,))
    assert json.loads(one.reply(answer))["embedding"] == {"values": [1.0, 0.5]}
    several = parse({"requests": [{"content": content("a"), "output_dimensionality": 2}] * 2})
    assert (several.question.inputs, several.question.dimensions) == ((TextPrompt(text="a"),) * 2, 2)
    both = json.loads(several.reply(Embedded(vectors=answer.vectors * 2, tokens=(3, 4))))
    assert both["embeddings"] == [{"values": [1.0, 0.5]}] * 2
    assert both["usageMetadata"]["promptTokenCount"] == 7


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "requests"),
        ({"requests": []}, "requests"),
        ({"requests": [1]}, "requests[0]"),
        ({"requests": [{}]}, "requests[0].content"),
        ({"requests": [{"content": content()}]}, "requests[0].content"),
        ({"requests": [{"content": {"parts": [{"functionCall": {"name": "f"}}]}}]}, "requests[0].content.parts[0]"),
        ({"requests": [{"content": content("a"), "outputDimensionality": 1}]}, "requests[0].outputDimensionality"),
        ({"requests": [{"content": content("a"), "outputDimensionality": 5}]}, "requests[0].outputDimensionality"),
        (
            {"requests": [{"content": content("a")}, {"content": content("a"), "outputDimensionality": 2}]},
            "requests[1].outputDimensionality",
        ),
        ({"requests": [{"content": content("a"), "autoTruncate": True}]}, "requests[0].autoTruncate"),
        ({"requests": [{"content": content("a"), "frob": 1}]}, "requests[0].frob"),
    ],
)
def test_what_is_wrong_is_refused_by_its_path(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(body)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_model_that_does_not_embed_says_so() -> None:
    with pytest.raises(ApiError) as caught:
        parse({"content": content("a")}, batch=False, model=MODEL)
    assert (caught.value.param, caught.value.code) == ("model", "model_not_capable")
