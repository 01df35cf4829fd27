"""OpenAI's text completions: raw prompts in, text out, without a chat template. The answer is `openai_texts`'."""

from __future__ import annotations

from functools import partial

from msgspec.structs import replace

from ocserve.api import fields, json_body, openai_format, openai_sampling, openai_wire
from ocserve.api.dialect import Models, Parsed, Reply
from ocserve.api.fields import Field, Values
from ocserve.api.openai_texts import CompletionEncoder
from ocserve.api.openai_wire import error_body
from ocserve.errors import InvalidRequest
from ocserve.generation import FillPrompt, GenerateRequest, Prompt, TextPrompt, TokenPrompt

__all__ = ["PARAMETERS", "encoder", "error_body", "parse"]

_MAX_INT = 2**31 - 1
_MAX_PROMPT_TOKENS = 2**20  # above any context; the engine knows the real limit
MAX_PROMPTS = 256
_MAX_BEST_OF = 20
_TEXT = 64 * 1024 * 1024  # the body's own limit is far below

_IDS = fields.lists_of_ids(_MAX_PROMPT_TOKENS)
_SEVERAL = [
    {"type": "array", "items": each, "minItems": 1, "maxItems": MAX_PROMPTS} for each in ({"type": "string"}, _IDS)
]
PARAMETERS: tuple[Field, ...] = (
    Field("prompt", "effective", required=True, shape={"anyOf": [{"type": "string"}, _IDS, *_SEVERAL]}),
    *openai_sampling.SHARED,
    Field("max_tokens", "effective", fields.integer(0, _MAX_INT)),  # 0 scores the prompt
    Field("logprobs", "effective", fields.integer(0, 5)),
    Field("echo", "effective", fields.boolean()),
    Field("best_of", "effective", fields.integer(0, _MAX_BEST_OF)),
    Field("suffix", "effective", fields.string(_TEXT)),
    Field("response_format", "effective", fields.pairs(8), of=openai_format.FORMAT),
    *openai_format.GUIDED,
)
_TABLE = openai_sampling.table(*PARAMETERS)


def parse(body: bytes, models: Models, *, refuse_unknown: bool) -> Parsed:
    """The completion request in `body`."""
    values = fields.read(json_body.decode(body), _TABLE, refuse_unknown=refuse_unknown)
    model = openai_sampling.model_of(values, models)
    options = openai_sampling.stream_options(values, refuse_unknown=refuse_unknown)
    prompts = _prompts(values)
    constraint, paths, unread = openai_format.asked(values, refuse_unknown=refuse_unknown)
    logprobs, echo = values.get("logprobs", int), values.get("echo", bool) or False
    returned, generated = _choices(values)
    # The text of token ids is what their pieces say, and the best answers are known by their chances.
    scored = echo and (logprobs is not None or any(isinstance(prompt, TokenPrompt) for prompt in prompts))
    request = GenerateRequest(
        request_id="",
        model=model.id,
        prompt=prompts[0],
        sampling=openai_sampling.sampling(values, model),
        max_tokens=openai_sampling.output_limit(values, model),
        choices=generated,
        constraint=constraint,
        logprobs=0 if logprobs is None and generated > returned else logprobs,
        prompt_logprobs=(logprobs or 0) if scored else None,
        stop=values.get("stop", tuple) or (),
        deadline_s=model.wall_clock_s,
    )
    return Parsed(
        request=request,
        more=tuple(replace(request, prompt=prompt) for prompt in prompts[1:]),
        model=model,
        stream=values.get("stream", bool) or False,
        ignored=(*values.ignored, *options.ignored, *unread),
        include_usage=options.get("include_usage", bool),
        paths=paths,
        encoder=partial(
            CompletionEncoder,
            fingerprint=openai_wire.fingerprint(model),
            service_tier=openai_sampling.served_tier(values),
            prompts=tuple(prompt.text if isinstance(prompt, TextPrompt) else None for prompt in prompts),
            returned=returned,
            echo=echo,
            logprobs=logprobs is not None,
        ),
    )


def _choices(values: Values) -> tuple[int, int]:
    """How many answers are returned, and how many are generated for the best of them."""
    choices = values.get("n", int) or 1
    best_of = values.get("best_of", int) or choices
    if best_of < choices:
        raise InvalidRequest(f"Invalid 'best_of': expected at least n ({choices}), but got {best_of}.", param="best_of")
    if best_of > choices and values.get("stream", bool):
        raise InvalidRequest("'best_of' above 'n' cannot be streamed: the best are known at the end.", param="best_of")
    return choices, best_of


def _prompts(values: Values) -> tuple[Prompt, ...]:
    """Every prompt of the request; with a suffix it is one text."""
    prompts = _read_prompts(values.get("prompt", object))
    suffix = values.get("suffix", str)
    if not suffix:
        return prompts
    if len(prompts) > 1 or not isinstance(prompts[0], TextPrompt):
        raise fields.unsupported("suffix", "it is only supported with one prompt that is a string.")
    if values.get("echo", bool):
        raise fields.unsupported("echo", "it is not supported together with 'suffix'.")
    return (FillPrompt(prefix=prompts[0].text, suffix=suffix),)


def _read_prompts(value: object) -> tuple[Prompt, ...]:
    """Text, token ids, or an array of them."""
    if isinstance(value, str):
        return (TextPrompt(text=value),)
    if not isinstance(value, list):
        raise fields.wrong_type("prompt", "a string or an array", value)
    found = fields.array(value, "prompt", 1, _MAX_PROMPT_TOKENS)
    if not isinstance(found[0], str | list):
        return (_tokens(found, "prompt"),)
    fields.array(found, "prompt", 1, MAX_PROMPTS)
    return tuple(_one(item, f"prompt[{index}]", type(found[0])) for index, item in enumerate(found))


def _one(value: object, path: str, kind: type) -> Prompt:
    if kind is str:
        return TextPrompt(text=fields.string(_TEXT)(value, path))
    return _tokens(fields.array(value, path, 1, _MAX_PROMPT_TOKENS), path)


def _tokens(values: list[object], path: str) -> TokenPrompt:
    return TokenPrompt(tokens=fields.token_ids(values, path))


def encoder(reply: Reply) -> CompletionEncoder:
    """A fresh encoder for one reply to a request that asked for nothing special."""
    return CompletionEncoder(reply)
