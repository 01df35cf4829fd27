"""llama-server's routes about tokens and templates, as editors and scripts use them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec

from ocserve.api import fields, json_body, openai_chat
from ocserve.api.dialect import Models
from ocserve.api.fields import Field
from ocserve.api.llama_server import DEFAULT, MODEL, model_of
from ocserve.api.openai_wire import dumps, error_body
from ocserve.api.questions import Asked
from ocserve.errors import ErrorInfo
from ocserve.generation import Answer, ChatPrompt, Encoded, EncodeRequest, Prompt, TextPrompt, TokenPrompt
from ocserve.modelcard import ServedModel

_TEXT = fields.string(64 * 1024 * 1024)  # the body's own limit is far below
_MAX_TOKENS = 2**20

TOKENIZE: tuple[Field, ...] = (
    Field("content", "effective", _TEXT, required=True),
    Field("add_special", "effective", fields.boolean()),
    Field("parse_special", "effective", fields.boolean()),
    Field("with_pieces", "effective", fields.boolean()),
    MODEL,
)
DETOKENIZE: tuple[Field, ...] = (
    Field(
        "tokens",
        "effective",
        fields.items(_MAX_TOKENS),
        required=True,
        shape={"items": fields.TOKEN_ID.schema},
    ),
    MODEL,
)
APPLY_TEMPLATE = openai_chat.PARAMETERS


def tokenize(body: bytes, models: Models, *, refuse_unknown: bool) -> Asked:
    """`POST /tokenize`."""
    values = fields.read(json_body.decode(body), fields.table(*TOKENIZE), refuse_unknown=refuse_unknown)
    model = model_of(values, models)
    prompt = TextPrompt(text=values.get("content", str) or "")
    reply = _pieces if values.get("with_pieces", bool) else _tokens
    return _asked(
        model,
        prompt,
        reply,
        plain=values.get("parse_special", bool) is False,
        add_bos=values.get("add_special", bool) or False,
        ignored=values.ignored,
    )


def detokenize(body: bytes, models: Models, *, refuse_unknown: bool) -> Asked:
    """`POST /detokenize`."""
    values = fields.read(json_body.decode(body), fields.table(*DETOKENIZE), refuse_unknown=refuse_unknown)
    tokens = fields.token_ids(values.get("tokens", list) or [], "tokens")
    reply = partial(_text, "content")
    return _asked(model_of(values, models), TokenPrompt(tokens=tokens), reply, ignored=values.ignored)


def apply_template(body: bytes, models: Models, *, refuse_unknown: bool) -> Asked:
    """`POST /apply-template`: what a chat request with this body would be as a prompt."""
    given = json_body.decode(body)
    if given.get("model") is None:
        body = msgspec.json.encode({**given, "model": DEFAULT})
    parsed = openai_chat.parse(body, models, refuse_unknown=refuse_unknown)
    assert isinstance(parsed.request.prompt, ChatPrompt)
    return _asked(parsed.model, parsed.request.prompt, partial(_text, "prompt"), ignored=parsed.ignored)


def _asked(
    model: ServedModel,
    prompt: Prompt,
    reply: Callable[[Answer], bytes],
    *,
    plain: bool = False,
    add_bos: bool = False,
    ignored: tuple[str, ...] = (),
) -> Asked:
    question = EncodeRequest(request_id="", model=model.id, prompt=prompt, plain=plain, add_bos=add_bos)
    return Asked(question=question, model=model, reply=reply, ignored=ignored)


def _tokens(answer: Answer) -> bytes:
    assert isinstance(answer, Encoded)
    return dumps({"tokens": answer.tokens})


def _pieces(answer: Answer) -> bytes:
    """Each token with its text, or with its bytes where these are only a part of a character."""
    assert isinstance(answer, Encoded)
    pairs = zip(answer.tokens, answer.pieces, strict=True)
    return dumps({"tokens": [{"id": token, "piece": _piece(piece)} for token, piece in pairs]})


def _piece(piece: bytes) -> object:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


def _text(key: str, answer: Answer) -> bytes:
    assert isinstance(answer, Encoded)
    return dumps({key: answer.text})


@dataclass(frozen=True, slots=True)
class Route:
    """One of the routes as a dialect of its own."""

    parse: Callable[..., Asked]
    error_body: Callable[[ErrorInfo], bytes] = error_body


TOKENIZER = Route(tokenize)
DETOKENIZER = Route(detokenize)
TEMPLATE = Route(apply_template)
