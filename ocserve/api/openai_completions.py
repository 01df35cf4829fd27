"""OpenAI's text completions: raw prompts in, text out, without a chat template."""

from __future__ import annotations

from collections.abc import Sequence

from ocserve.api import fields, json_body, openai_sampling, openai_wire
from ocserve.api.dialect import Frame, Models, Parsed, Reply
from ocserve.api.fields import Field, Values
from ocserve.api.openai_wire import error_body
from ocserve.errors import InvalidRequest
from ocserve.generation import (
    GenerateRequest,
    Prompt,
    TextPrompt,
    TokenPrompt,
)

__all__ = ["PARAMETERS", "encoder", "error_body", "parse"]

_MAX_PROMPT_TOKENS = 2**20  # above any context; the engine knows the real limit

PARAMETERS: tuple[Field, ...] = (
    Field("prompt", "effective"),
    *openai_sampling.SHARED,
    Field("logprobs", "unsupported", fields.integer(0, 5)),
    Field("echo", "unsupported", fields.boolean(), neutral=(False,)),
    Field("best_of", "effective", fields.integer(0, 20)),
    Field("suffix", "unsupported", fields.string(64 * 1024 * 1024), neutral=("",)),
)
_TABLE = fields.table(*PARAMETERS)
_token = fields.integer(0, fields.MAX_TOKEN_ID)


def parse(body: bytes, models: Models, *, refuse_unknown: bool) -> Parsed:
    """The completion request in `body`."""
    values = fields.read(json_body.decode(body), _TABLE, refuse_unknown=refuse_unknown)
    options = openai_sampling.stream_options(values, refuse_unknown=refuse_unknown)
    given = values.get("prompt", object)
    if given is None:
        raise fields.missing("prompt")
    prompt = _prompt(given)
    model = openai_sampling.model_of(values, models)
    request = GenerateRequest(
        request_id="",
        model=model.id,
        prompt=prompt,
        sampling=openai_sampling.sampling(values, model),
        max_tokens=openai_sampling.output_limit(values, model),
        choices=_choices(values),
        stop=values.get("stop", tuple) or (),
        deadline_s=model.wall_clock_s,
    )
    return Parsed(
        request=request,
        model=model,
        stream=values.get("stream", bool) or False,
        ignored=(*values.ignored, *options.ignored),
        include_usage=options.get("include_usage", bool) or False,
    )


def _choices(values: Values) -> int:
    """How many answers: `n`. Generating more of them than are returned is not offered."""
    choices = values.get("n", int) or 1
    best_of = values.get("best_of", int)
    if best_of not in (None, choices):
        raise fields.unsupported("best_of", f"every choice that is generated is returned; accepted: n ({choices}).")
    return choices


def _prompt(value: object) -> Prompt:
    """Text, token ids, or an array that holds exactly one of them."""
    if isinstance(value, str):
        return TextPrompt(text=value)
    if not isinstance(value, list):
        raise fields.wrong_type("prompt", "a string or an array", value)
    found = fields.array(value, "prompt", 1, _MAX_PROMPT_TOKENS)
    if isinstance(found[0], str | list):
        if len(found) > 1:
            raise fields.unsupported("prompt", f"one prompt per request is supported, but got {len(found)}.")
        if isinstance(found[0], str):
            return TextPrompt(text=found[0])
        return _tokens(fields.array(found[0], "prompt[0]", 1, _MAX_PROMPT_TOKENS), "prompt[0]")
    return _tokens(found, "prompt")


def _tokens(values: list[object], path: str) -> TokenPrompt:
    # One comprehension for the common case: a prompt of 100,000 ids is read in milliseconds.
    tokens = tuple(value for value in values if type(value) is int and 0 <= value < fields.MAX_TOKEN_ID)
    if len(tokens) < len(values):
        for index, value in enumerate(values):
            _token(value, f"{path}[{index}]")
        raise InvalidRequest(f"'{path}' holds something that is not a token id.", param=path)
    return TokenPrompt(tokens=tokens)


class CompletionEncoder(openai_wire.ReplyEncoder):
    """A text completion's reply."""

    id_prefix = "cmpl"
    chunk_object = whole_object = "text_completion"

    def open(self) -> Sequence[Frame]:
        """Nothing: there is no role to announce."""
        return ()

    def _piece(self, text: str) -> dict[str, object]:
        return {"text": text}

    _whole = _piece


def encoder(reply: Reply) -> CompletionEncoder:
    """A fresh encoder for one reply."""
    return CompletionEncoder(reply)
