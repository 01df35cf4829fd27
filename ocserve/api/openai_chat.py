"""OpenAI's chat completions: request, chunks, whole answer."""

from __future__ import annotations

from collections.abc import Sequence

from ocserve.api import fields, json_body, openai_format, openai_sampling, openai_wire
from ocserve.api.dialect import Frame, Models, Parsed, Reply
from ocserve.api.fields import Field
from ocserve.api.openai_messages import MAX_MESSAGES, MessageReader
from ocserve.api.openai_wire import error_body
from ocserve.generation import ChatPrompt, GenerateRequest

__all__ = ["PARAMETERS", "encoder", "error_body", "parse"]

PARAMETERS: tuple[Field, ...] = (
    Field("messages", "effective", fields.items(MAX_MESSAGES)),
    *openai_sampling.SHARED,
    Field("max_completion_tokens", "effective", fields.integer(1, 2**31 - 1)),
    Field("parallel_tool_calls", "advisory", fields.boolean()),
    Field("include_reasoning", "advisory", fields.boolean()),
    Field("logprobs", "unsupported", fields.boolean(), neutral=(False,)),
    Field("top_logprobs", "unsupported", fields.integer(0, 20), neutral=(0,)),
    Field("tools", "unsupported", fields.items(128), neutral=([],)),
    Field("tool_choice", "unsupported", neutral=("none", "auto")),
    Field("functions", "unsupported", fields.items(128), neutral=([],)),
    Field("function_call", "unsupported", neutral=("none", "auto")),
    Field("response_format", "effective", fields.pairs(8)),
    Field("structured_outputs", "unsupported", neutral=(False,)),
    Field("modalities", "unsupported", fields.items(8), neutral=(["text"],)),
    Field("audio", "unsupported"),
    Field("prediction", "unsupported"),
    Field("reasoning", "unsupported", fields.pairs(8), neutral=({}, {"enabled": False}, {"effort": "none"})),
    Field("reasoning_effort", "unsupported", fields.string(64), neutral=("none",)),
    Field("verbosity", "unsupported", fields.string(64), neutral=("medium",)),
    Field("web_search_options", "unsupported"),
    Field("moderation", "unsupported"),
)
_TABLE = fields.table(*PARAMETERS)


def parse(body: bytes, models: Models, *, refuse_unknown: bool) -> Parsed:
    """The chat request in `body`."""
    values = fields.read(json_body.decode(body), _TABLE, refuse_unknown=refuse_unknown)
    options = openai_sampling.stream_options(values, refuse_unknown=refuse_unknown)
    messages = values.get("messages", list)
    if messages is None:
        raise fields.missing("messages")
    reader = MessageReader(refuse_unknown=refuse_unknown)
    turns = reader.read(messages)
    constraint, unread = openai_format.constraint(values.get("response_format", dict), refuse_unknown=refuse_unknown)
    model = openai_sampling.model_of(values, models)
    request = GenerateRequest(
        request_id="",
        model=model.id,
        prompt=ChatPrompt(messages=turns),
        sampling=openai_sampling.sampling(values, model),
        max_tokens=openai_sampling.output_limit(values, model),
        choices=values.get("n", int) or 1,
        constraint=constraint,
        stop=values.get("stop", tuple) or (),
        deadline_s=model.wall_clock_s,
    )
    return Parsed(
        request=request,
        model=model,
        stream=values.get("stream", bool) or False,
        ignored=(*values.ignored, *options.ignored, *reader.ignored, *unread),
        include_usage=options.get("include_usage", bool) or False,
    )


class ChatEncoder(openai_wire.ReplyEncoder):
    """A chat reply: the role once for each choice, then text."""

    id_prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def open(self) -> Sequence[Frame]:
        """The chunks that carry the role, one for each choice: SDKs concatenate a repeated one."""
        role: dict[str, object] = {"delta": {"role": "assistant", "content": "", "refusal": None}}
        return tuple(self._chunk(role, None, index) for index in self._choices)

    def _piece(self, text: str) -> dict[str, object]:
        return {"delta": {"content": text} if text else {}}

    def _whole(self, text: str) -> dict[str, object]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}


def encoder(reply: Reply) -> ChatEncoder:
    """A fresh encoder for one reply."""
    return ChatEncoder(reply)
