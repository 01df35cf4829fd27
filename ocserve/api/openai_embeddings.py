"""OpenAI's embeddings: texts or token ids in, one vector for each out, in order.

`dimensions` keeps the first numbers of each vector and gives it length 1 again, for models that were trained so; of
others it is refused. `base64` is the vector's little-endian float32.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from functools import partial

from ocserve.api import charge, fields, json_body, openai_wire
from ocserve.api.dialect import Models
from ocserve.api.fields import Field, Reader
from ocserve.api.openai_wire import error_body
from ocserve.api.questions import Asked, capable, dimensions
from ocserve.generation import Answer, Embedded, EmbedRequest, TextPrompt, TokenPrompt

__all__ = ["PARAMETERS", "error_body", "parse"]

MAX_INPUTS = 2048
_MAX_TOKENS = 2**20  # above any context; the engine knows the real limit
_text = fields.string(64 * 1024 * 1024, empty=False)

Input = TextPrompt | TokenPrompt


def inputs() -> Reader[tuple[Input, ...]]:
    """One text or list of token ids, or up to 2,048 of either."""

    def one(value: object, where: str) -> Input:
        if isinstance(value, str):
            return TextPrompt(text=_text(value, where))
        if isinstance(value, list):
            return TokenPrompt(tokens=fields.token_ids(fields.array(value, where, 1, _MAX_TOKENS), where))
        raise fields.wrong_type(where, "a string or an array of token ids", value)

    def reader(value: object, where: str) -> tuple[Input, ...]:
        if isinstance(value, str):
            return (one(value, where),)
        if not isinstance(value, list):
            raise fields.wrong_type(where, "a string or an array", value)
        if value and not isinstance(value[0], str | list):
            return (one(value, where),)
        found = fields.array(value, where, 1, MAX_INPUTS)
        return tuple(one(item, f"{where}[{index}]") for index, item in enumerate(found))

    ids = fields.lists_of_ids(_MAX_TOKENS)
    several = [{"type": "array", "items": item, "minItems": 1, "maxItems": MAX_INPUTS} for item in (_text.schema, ids)]
    return Reader(reader, {"anyOf": [_text.schema, ids, *several]})


PARAMETERS: tuple[Field, ...] = (
    Field("input", "effective", inputs(), required=True),
    Field("model", "effective", fields.string(256, empty=False), required=True),
    Field("dimensions", "effective", fields.integer(1, 2**20)),
    Field("encoding_format", "effective", fields.word("float", "base64")),
    Field("user", "advisory", fields.string(1024)),
    Field("input_type", "advisory", fields.string(64)),
)
_TABLE = fields.table(*PARAMETERS)


def parse(body: bytes, models: Models, *, refuse_unknown: bool) -> Asked:
    """The request for embeddings in `body`."""
    values = fields.read(json_body.decode(body), _TABLE, refuse_unknown=refuse_unknown)
    model = capable(models(values.get("model", str) or ""), "embedding")
    encode = _base64 if values.get("encoding_format", str) == "base64" else _floats
    return Asked(
        question=EmbedRequest(
            request_id="",
            model=model.id,
            inputs=values.get("input", tuple) or (),
            dimensions=dimensions(values.get("dimensions", int), "dimensions", model),
            deadline_s=model.wall_clock_s,
        ),
        model=model,
        reply=partial(_reply, model.id, encode),
        ignored=values.ignored,
    )


def _floats(vector: bytes) -> object:
    return struct.unpack(f"<{len(vector) // 4}f", vector)


def _base64(vector: bytes) -> object:
    return base64.b64encode(vector).decode()


def _reply(model: str, encode: Callable[[bytes], object], answer: Answer) -> bytes:
    assert isinstance(answer, Embedded)
    total = sum(answer.tokens)
    usage: dict[str, object] = {"prompt_tokens": total, "total_tokens": total, **charge.cost(answer.cost)}
    return openai_wire.dumps(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": encode(vector)}
                for index, vector in enumerate(answer.vectors)
            ],
            "model": model,
            "usage": usage,
        }
    )
