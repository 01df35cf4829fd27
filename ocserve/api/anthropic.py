"""Anthropic's Messages: the request, its events, the whole answer."""

from __future__ import annotations

from ocserve.api import anthropic_wire, fields, json_body, sampling
from ocserve.api.anthropic_request import FORMAT, PROMPT, Request
from ocserve.api.anthropic_wire import MessageEncoder, error_body
from ocserve.api.dialect import Models, Parsed, Reply
from ocserve.api.fields import Field
from ocserve.generation import GenerateRequest

__all__ = ["PARAMETERS", "encoder", "error_body", "parse"]

_MAX_INT = 2**31 - 1
_MAX_STOPS = 16

PARAMETERS: tuple[Field, ...] = (
    *PROMPT,
    Field("max_tokens", "effective", fields.integer(0, _MAX_INT), required=True),
    Field("stream", "effective", fields.boolean()),
    Field("temperature", "effective", fields.number(0, 1)),
    Field("top_p", "effective", fields.number(0, 1, above_low=True)),
    Field("top_k", "effective", fields.integer(0, _MAX_INT)),
    Field("stop_sequences", "effective", fields.strings(_MAX_STOPS, fields.MAX_STOP_LENGTH)),
    Field("output_format", "effective", fields.pairs(8), of=FORMAT),
    Field("metadata", "advisory", fields.pairs(16)),
    Field("service_tier", "advisory", fields.word("auto", "standard_only")),
    Field("inference_geo", "advisory", fields.string(64)),
    Field("diagnostics", "advisory", fields.pairs(16)),
    Field("container", "unsupported"),
    Field("compaction", "unsupported"),
    Field("fallbacks", "unsupported"),
    Field("thread", "unsupported"),
)
_TABLE = fields.table(*PARAMETERS)
_LABELS = {"tool_call_id": "messages[].content[].tool_use_id"}


def parse(body: bytes, models: Models, *, refuse_unknown: bool) -> Parsed:
    """The request in `body`."""
    values = fields.read(json_body.decode(body), _TABLE, refuse_unknown=refuse_unknown)
    reader = Request(values, models, refuse_unknown=refuse_unknown)
    prompt = reader.prompt()
    limit = values.get("max_tokens", int)
    request = GenerateRequest(
        request_id="",
        model=reader.model.id,
        prompt=prompt,
        sampling=sampling.sampling(
            {
                "temperature": values.get("temperature", float),
                "top_p": values.get("top_p", float),
                "top_k": values.get("top_k", int),
            },
            reader.model,
        ),
        max_tokens=sampling.output_limit(limit, "max_tokens", reader.model),
        constraint=reader.constraint(),
        tool_choice=reader.choice(prompt.tools),
        stop=values.get("stop_sequences", tuple) or (),
        deadline_s=reader.model.wall_clock_s,
    )
    return Parsed(
        request=request,
        model=reader.model,
        stream=values.get("stream", bool) or False,
        ignored=tuple(reader.ignored),
        show_reasoning=reader.thoughts_shown,
        framing=anthropic_wire.FRAMING,
        paths=reader.paths,
        labels=_LABELS,
    )


def encoder(reply: Reply) -> MessageEncoder:
    """A fresh encoder for one reply."""
    return MessageEncoder(reply)
