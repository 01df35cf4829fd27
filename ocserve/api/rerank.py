"""Reranking as Cohere and Jina have it: a query and documents in, the documents' places by relevance out.

The list stands in the answer twice: clients of Cohere and Jina read `results`, others `data`. Nothing is ever cut off,
so the parameters that ask for that are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ocserve.api import charge, field_schema, fields, json_body, openai_wire
from ocserve.api.dialect import Models
from ocserve.api.fields import Field
from ocserve.api.openai_wire import error_body
from ocserve.api.questions import Asked, capable
from ocserve.generation import Answer, Scored, ScoreRequest

__all__ = ["PARAMETERS", "error_body", "parse"]

MAX_DOCUMENTS = 2048
_text = fields.string(64 * 1024 * 1024)
DOCUMENT = fields.table(Field("text", "effective", _text, required=True))

_document = {"anyOf": [_text.schema, field_schema.of_table(DOCUMENT)]}
PARAMETERS: tuple[Field, ...] = (
    Field("model", "effective", fields.string(256, empty=False), required=True),
    Field("query", "effective", fields.string(64 * 1024 * 1024, empty=False), required=True),
    Field(
        "documents",
        "effective",
        required=True,
        shape={"type": "array", "items": _document, "minItems": 1, "maxItems": MAX_DOCUMENTS},
    ),
    Field("top_n", "effective", fields.integer(1, 2**31 - 1)),
    Field("return_documents", "effective", fields.boolean()),
    Field("max_tokens_per_doc", "unsupported", fields.integer(1, 2**31 - 1)),
    Field("max_chunks_per_doc", "unsupported", fields.integer(1, 2**31 - 1)),
    Field("rank_fields", "unsupported", fields.items(64)),
    Field("user", "advisory", fields.string(1024)),
    Field("priority", "advisory", fields.integer(0, 999)),
)
_TABLE = fields.table(*PARAMETERS)


def parse(body: bytes, models: Models, *, refuse_unknown: bool) -> Asked:
    """The request for a ranking in `body`."""
    values = fields.read(json_body.decode(body), _TABLE, refuse_unknown=refuse_unknown)
    documents, ignored = _documents(values.get("documents", object), refuse_unknown)
    model = capable(models(values.get("model", str) or ""), "rerank")
    return Asked(
        question=ScoreRequest(
            request_id="",
            model=model.id,
            query=values.get("query", str) or "",
            documents=documents,
            deadline_s=model.wall_clock_s,
        ),
        model=model,
        reply=partial(
            _reply,
            model.id,
            documents if values.get("return_documents", bool) else None,
            values.get("top_n", int) or len(documents),
        ),
        ignored=(*values.ignored, *ignored),
    )


def _documents(given: object, refuse_unknown: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The documents' texts, and what else was said of them."""
    texts: list[str] = []
    ignored: list[str] = []
    for index, item in enumerate(fields.array(given, "documents", 1, MAX_DOCUMENTS)):
        where = f"documents[{index}]"
        if isinstance(item, str):
            texts.append(_text(item, where))
        elif isinstance(item, dict):
            values = fields.read(item, DOCUMENT, refuse_unknown=refuse_unknown, path=where)
            texts.append(values.get("text", str) or "")
            ignored += values.ignored
        else:
            raise fields.wrong_type(where, "a string or an object", item)
    return tuple(texts), tuple(ignored)


def _reply(model: str, documents: Sequence[str] | None, top_n: int, answer: Answer) -> bytes:
    assert isinstance(answer, Scored)
    order = sorted(range(len(answer.scores)), key=lambda index: -answer.scores[index])  # the first of equals first
    results: list[dict[str, object]] = [
        {"index": index, "relevance_score": answer.scores[index]} for index in order[:top_n]
    ]
    if documents is not None:
        results = [
            {**result, "document": {"text": documents[index]}} for result, index in zip(results, order, strict=False)
        ]
    total = sum(answer.tokens)
    usage: dict[str, object] = {"prompt_tokens": total, "total_tokens": total, **charge.cost(answer.cost)}
    return openai_wire.dumps(
        {
            "object": "list",
            "model": model,
            "results": results,
            "data": results,
            "usage": usage,
            "meta": {"tokens": {"input_tokens": total, "output_tokens": 0}},
        }
    )
