"""Ollama's `/api/generate`: one prompt in, lines of text out; with `suffix` what belongs between the two."""

from __future__ import annotations

from collections.abc import Sequence

from ocserve.api import fields, images, json_body, ollama_request
from ocserve.api.blocks import Block
from ocserve.api.dialect import Models, Parsed, Reply
from ocserve.api.fields import Field, Values
from ocserve.api.ollama_request import Load
from ocserve.api.ollama_wire import ReplyEncoder, dumps, error_body, timestamp
from ocserve.generation import ChatPrompt, FillPrompt, Message, Prompt, TextPrompt
from ocserve.modelcard import ServedModel

__all__ = ["PARAMETERS", "encoder", "error_body", "load", "loaded", "parse"]

PARAMETERS: tuple[Field, ...] = (
    Field("prompt", "effective", ollama_request.TEXT),
    Field("suffix", "effective", ollama_request.TEXT),
    Field("system", "effective", ollama_request.TEXT),
    Field("raw", "effective", fields.boolean()),
    Field("images", "effective", ollama_request.IMAGES),
    Field("template", "unsupported", ollama_request.TEXT, neutral=("",)),
    Field("context", "unsupported", fields.items(2**20), neutral=([],)),
    Field("width", "unsupported", fields.integer(0, 2**31 - 1), neutral=(0,)),
    Field("height", "unsupported", fields.integer(0, 2**31 - 1), neutral=(0,)),
    Field("steps", "unsupported", fields.integer(0, 2**31 - 1), neutral=(0,)),
    *ollama_request.SHARED,
)
_TABLE = fields.table(*PARAMETERS)


def parse(body: bytes, models: Models, *, refuse_unknown: bool) -> Parsed:
    """The request in `body`."""
    values = fields.read(json_body.decode(body), _TABLE, refuse_unknown=refuse_unknown)
    model = ollama_request.model_of(values.get("model", str), models)
    return ollama_request.parsed(values, model, _prompt(values, model), refuse_unknown=refuse_unknown)


def _prompt(values: Values, model: ServedModel) -> Prompt:
    """One user's turn, for a model that has turns; raw text, or text with a gap in it."""
    text, suffix, system = (values.get(name, str) or "" for name in ("prompt", "suffix", "system"))
    given, raw = values.get("images", tuple) or (), values.get("raw", bool) or False
    if suffix or raw or "chat" not in model.capabilities:
        for name, value in (("system", system), ("images", given)):
            if value:
                raise fields.unsupported(name, "only a turn of a conversation has it, and this prompt is none.")
        return FillPrompt(prefix=text, suffix=suffix) if suffix else TextPrompt(text=text)
    if given:
        images.require_vision(model, "images")
    shown = tuple(images.of_base64(each, f"images[{index}]") for index, each in enumerate(given))
    turns = (Message(role="system", content=system),) if system else ()
    turn = Message(role="user", content=text, images=shown)
    return ChatPrompt(messages=(*turns, turn), reasoning=ollama_request.reasoning(values))


class GenerateEncoder(ReplyEncoder):
    """A reply to a prompt."""

    def _said(self, text: str, thinking: str, calls: Sequence[Block]) -> dict[str, object]:
        return {"response": text, "thinking": thinking} if thinking else {"response": text}


def encoder(reply: Reply) -> GenerateEncoder:
    """A fresh encoder for one reply."""
    return GenerateEncoder(reply)


def load(body: bytes, models: Models, *, refuse_unknown: bool) -> Load | None:
    """The load that `body` asks for if it has no prompt."""
    return ollama_request.load(body, _TABLE, ("prompt", "suffix", "images"), models, refuse_unknown=refuse_unknown)


def loaded(model: ServedModel, now: int) -> bytes:
    """The answer to a request without a prompt, which asks for the model to be loaded."""
    head = {"model": model.id, "created_at": timestamp(now)}
    return dumps({**head, "response": "", "done": True, "done_reason": "load"})
