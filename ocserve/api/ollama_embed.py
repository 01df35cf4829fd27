"""Ollama's `/api/embed`: texts in, a vector for each out. An input that is too long is refused, never cut."""

from __future__ import annotations

from array import array
from functools import partial

from ocserve.api import charge, fields, json_body, ollama_request
from ocserve.api.dialect import Models
from ocserve.api.fields import Field, Reader
from ocserve.api.ollama_wire import dumps, error_body
from ocserve.api.openai_embeddings import MAX_INPUTS
from ocserve.api.questions import Asked, capable, dimensions
from ocserve.generation import Answer, Embedded, EmbedRequest, TextPrompt

__all__ = ["PARAMETERS", "error_body", "parse"]


def _inputs() -> Reader[tuple[str, ...]]:
    one = fields.string(64 * 1024 * 1024, empty=False)

    def reader(value: object, where: str) -> tuple[str, ...]:
        if isinstance(value, str):
            return (one(value, where),)
        if not isinstance(value, list):
            raise fields.wrong_type(where, "a string or an array of strings", value)
        given = fields.array(value, where, 1, MAX_INPUTS)
        return tuple(one(item, f"{where}[{index}]") for index, item in enumerate(given))

    several = {"type": "array", "items": one.schema, "minItems": 1, "maxItems": MAX_INPUTS}
    return Reader(reader, {"anyOf": [one.schema, several]})


PARAMETERS: tuple[Field, ...] = (
    Field("model", "effective", ollama_request.MODEL, required=True),
    Field("input", "effective", _inputs(), required=True),
    Field("dimensions", "effective", fields.integer(1, 2**20)),
    Field("truncate", "advisory", fields.boolean()),
    Field("options", "advisory", fields.pairs(64)),
    ollama_request.keep_alive(),
)
_TABLE = fields.table(*PARAMETERS)


def parse(body: bytes, models: Models, *, refuse_unknown: bool) -> Asked:
    """The request for embeddings in `body`."""
    values = fields.read(json_body.decode(body), _TABLE, refuse_unknown=refuse_unknown)
    model = capable(ollama_request.model_of(values.get("model", str), models), "embedding")
    return Asked(
        question=EmbedRequest(
            request_id="",
            model=model.id,
            inputs=tuple(TextPrompt(text=text) for text in values.get("input", tuple) or ()),
            dimensions=dimensions(values.get("dimensions", int), "dimensions", model),
            deadline_s=model.wall_clock_s,
        ),
        model=model,
        reply=partial(_reply, model.id),
        ignored=values.ignored,
    )


def _reply(model: str, answer: Answer) -> bytes:
    assert isinstance(answer, Embedded)
    vectors = [array("f", vector).tolist() for vector in answer.vectors]
    counted = {"prompt_eval_count": sum(answer.tokens), **charge.cost(answer.cost)}
    return dumps({"model": model, "embeddings": vectors, **counted})
