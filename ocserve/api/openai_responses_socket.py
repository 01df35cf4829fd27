"""OpenAI's Responses over a WebSocket: the client's messages, and what is said around a response's own events.

A message has the fields of a request over HTTP and a type; a response's events are the same. As there are no headers,
what a header says over HTTP stands in the first event. Sources: openai-python's `responses_client_event`,
`responses_server_event`; developers.openai.com/api/docs/guides/websocket-mode.
"""

from __future__ import annotations

from collections.abc import Mapping

from ocserve.api import fields, json_body, openai_wire
from ocserve.api.dialect import Frame, Models, Parsed
from ocserve.api.fields import Field
from ocserve.api.openai_responses import ResponseDialect
from ocserve.errors import ErrorInfo

# What a message has beside the request's own fields. Without `generate` a prompt is only made ready.
PARAMETERS = (
    Field("type", "effective", fields.word("response.create"), required=True),
    Field("generate", "effective", fields.boolean()),
    Field("stream", "unsupported", fields.boolean(), neutral=(True,)),
    Field("stream_id", "unsupported", fields.string(256)),  # responses of one connection are made one after another
)
_TABLE = fields.table(*PARAMETERS)


def parse(dialect: ResponseDialect, message: bytes, models: Models, *, refuse_unknown: bool) -> Parsed:
    """The request in `message`, for the dialect that will encode its answer."""
    source = json_body.decode(message)
    envelope = {name: source.pop(name) for name in _TABLE if name in source}
    asked = fields.read(envelope, _TABLE, refuse_unknown=refuse_unknown)
    return dialect.understand(
        {**source, "stream": True},
        models,
        refuse_unknown=refuse_unknown,
        generate=asked.get("generate", bool) is not False,
    )


def with_headers(frame: Frame, headers: Mapping[str, str]) -> Frame:
    """The first event of a response, with what HTTP would say in headers."""
    return Frame(b'%b,"headers":%b}' % (frame.data[:-1], openai_wire.dumps(headers)), frame.event)


def error(info: ErrorInfo, headers: Mapping[str, str]) -> bytes:
    """The event of a refusal. OpenAI's clients look for the headers within the error, Codex beside it."""
    told = {**openai_wire.error(info), "headers": headers}
    return openai_wire.dumps({"type": "error", "status": info.status, "error": told, "headers": headers})
