"""Anthropic's count of the tokens that a message's prompt has."""

from __future__ import annotations

from ocserve.api import fields, json_body
from ocserve.api.anthropic_request import PROMPT, Request
from ocserve.api.anthropic_wire import dumps, error_body
from ocserve.api.dialect import Models
from ocserve.api.questions import Asked
from ocserve.generation import Answer, Encoded, EncodeRequest

__all__ = ["PARAMETERS", "error_body", "parse"]

PARAMETERS = PROMPT
_TABLE = fields.table(*PARAMETERS)


def parse(body: bytes, models: Models, *, refuse_unknown: bool) -> Asked:
    """The question in `body`."""
    values = fields.read(json_body.decode(body), _TABLE, refuse_unknown=refuse_unknown)
    reader = Request(values, models, refuse_unknown=refuse_unknown)
    prompt = reader.prompt()
    reader.choice(prompt.tools)
    reader.constraint()
    question = EncodeRequest(request_id="", model=reader.model.id, prompt=prompt, count_only=True)
    return Asked(question=question, model=reader.model, reply=_reply, ignored=tuple(reader.ignored), paths=reader.paths)


def _reply(answer: Answer) -> bytes:
    assert isinstance(answer, Encoded)
    return dumps({"input_tokens": answer.count})
