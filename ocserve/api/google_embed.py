"""Google's embedContent and batchEmbedContents: the text of one content, or of each of several, as a vector."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import partial

from ocserve.api import charge, fields, google_wire, json_body, protojson
from ocserve.api.dialect import Models
from ocserve.api.fields import Field
from ocserve.api.google_contents import TEXT, ContentReader
from ocserve.api.google_wire import error_body
from ocserve.api.questions import Asked, capable, dimensions
from ocserve.errors import ErrorInfo, InvalidRequest
from ocserve.generation import Answer, Embedded, EmbedRequest, TextPrompt
from ocserve.modelcard import ServedModel

_MAX_REQUESTS = 2048

REQUEST: tuple[Field, ...] = (
    Field("content", "effective", fields.pairs(8), required=True, of=TEXT),
    Field("outputDimensionality", "effective", protojson.whole(1, 2**20)),
    Field("taskType", "advisory", fields.string(64)),
    Field("title", "advisory", fields.string(1024)),
    Field("autoTruncate", "unsupported", fields.boolean(), neutral=(False,)),
)
_TABLE = protojson.table(*REQUEST, Field("model", "advisory", fields.string(256)))
BATCH: tuple[Field, ...] = (
    Field("requests", "effective", fields.items(_MAX_REQUESTS, least=1), required=True, of=_TABLE),
)
_BATCH_TABLE = protojson.table(*BATCH)


@dataclass(frozen=True, slots=True)
class EmbedContent:
    """A `QuestionDialect` for one request to the model that its path names; `batch`: of several contents."""

    model: str
    batch: bool

    def parse(self, body: bytes, models: Models, *, refuse_unknown: bool) -> Asked:
        """The contents in `body`."""
        given = json_body.decode(body)
        model = capable(models(self.model), "embedding")
        reader = _Reader(model, refuse_unknown=refuse_unknown)
        if self.batch:
            outer = fields.read(given, _BATCH_TABLE, refuse_unknown=refuse_unknown)
            requests = fields.array(outer.get("requests", list), "requests", 1, _MAX_REQUESTS)
            inputs = tuple(reader.read(item, f"requests[{index}]") for index, item in enumerate(requests))
        else:
            inputs = (reader.read(given, ""),)
        question = EmbedRequest(
            request_id="",
            model=model.id,
            inputs=inputs,
            dimensions=reader.dimensions,
            deadline_s=model.wall_clock_s,
        )
        reply = partial(_reply, self.batch)
        return Asked(question=question, model=model, reply=reply, ignored=tuple(reader.ignored))

    def error_body(self, info: ErrorInfo) -> bytes:
        """The body of an error answer."""
        return error_body(info)


class _Reader:
    """Reads the contents of one request; all of them are to be vectors of one length."""

    def __init__(self, model: ServedModel, *, refuse_unknown: bool) -> None:
        self._model = model
        self._refuse_unknown = refuse_unknown
        self._asked: list[int | None] = []
        self.dimensions: int | None = None
        self.ignored: list[str] = []

    def read(self, value: object, path: str) -> TextPrompt:
        """One content's text."""
        at = f"{path}." if path else ""
        given = fields.mapping(value, path)
        values = fields.read(given, _TABLE, refuse_unknown=self._refuse_unknown, path=path)
        asked, where = values.get("outputDimensionality", int), f"{at}outputDimensionality"
        self._asked.append(asked)
        if asked != self._asked[0]:
            raise InvalidRequest(f"Invalid '{where}': all requests of a batch must ask for one length.", param=where)
        self.dimensions = dimensions(asked, where, self._model)
        contents = ContentReader(self._model, refuse_unknown=self._refuse_unknown)
        text = contents.text(values.get("content", dict), f"{at}content")
        if not text:
            raise InvalidRequest(f"Invalid '{at}content': there is no text in it.", param=f"{at}content")
        self.ignored += (*values.ignored, *contents.ignored)
        return TextPrompt(text=text)


def _reply(batch: bool, answer: Answer) -> bytes:
    assert isinstance(answer, Embedded)
    vectors = [{"values": struct.unpack(f"<{len(vector) // 4}f", vector)} for vector in answer.vectors]
    total = sum(answer.tokens)
    spent = {"usageMetadata": {"promptTokenCount": total, "totalTokenCount": total, **charge.cost(answer.cost)}}
    return google_wire.dumps({"embeddings": vectors, **spent} if batch else {"embedding": vectors[0], **spent})
