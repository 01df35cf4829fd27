"""The parameters that OpenAI's chat and text completions share, and what they become."""

from __future__ import annotations

from typing import Any

from ocserve.api import fields
from ocserve.api.dialect import Models
from ocserve.api.fields import Field, Values
from ocserve.errors import InvalidRequest
from ocserve.generation import Sampling
from ocserve.modelcard import ServedModel

MAX_CHOICES = 16
_MAX_INT = 2**31 - 1

STREAM_OPTIONS = {
    field.name: field
    for field in (
        Field("include_usage", "effective", fields.boolean()),
        Field("include_obfuscation", "advisory", fields.boolean()),
    )
}

SHARED: tuple[Field, ...] = (
    Field("model", "effective", fields.string(256, empty=False)),
    Field("stream", "effective", fields.boolean()),
    Field("stream_options", "effective", fields.pairs(8)),
    Field("max_tokens", "effective", fields.integer(1, _MAX_INT)),
    Field("temperature", "effective", fields.number(0, 2)),
    Field("top_p", "effective", fields.number(0, 1, above_low=True)),
    Field("top_k", "effective", fields.integer(0, _MAX_INT)),
    Field("min_p", "effective", fields.number(0, 1)),
    Field("frequency_penalty", "effective", fields.number(-2, 2)),
    Field("presence_penalty", "effective", fields.number(-2, 2)),
    Field("repetition_penalty", "effective", fields.number(0.01, 2)),  # logits are divided by it
    Field("seed", "effective", fields.int64()),
    Field("logit_bias", "effective", fields.logit_biases()),
    Field("stop", "effective", fields.stop_strings()),
    Field("n", "effective", fields.integer(1, MAX_CHOICES)),
    Field("user", "advisory", fields.string(1024)),
    Field("metadata", "advisory", fields.pairs(16)),
    Field("safety_identifier", "advisory", fields.string(1024)),
    Field("session_id", "advisory", fields.string(1024)),
    Field("prompt_cache_key", "advisory", fields.string(1024)),
    Field("prompt_cache_options", "advisory", fields.pairs(8)),
    Field("prompt_cache_retention", "advisory", fields.string(64)),
    Field("cache_control", "advisory", fields.pairs(8)),
    Field("usage", "advisory", fields.pairs(8)),
    Field("service_tier", "advisory", fields.string(64), neutral=("auto", "default")),
    Field("store", "advisory", fields.boolean(), neutral=(False,)),
    Field("top_a", "unsupported", fields.number(0, 1), neutral=(0, 0.0)),
)


def sampling(values: Values, model: ServedModel) -> Sampling:
    """How to draw tokens: the request's word, else the model's default, else neutral."""
    chosen: dict[str, Any] = {}
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"):
        value = values.get(name, float)
        if value is None:
            value = getattr(model.sampling, name, None)
        if value is not None:
            chosen[name] = value
    top_k = values.get("top_k", int)
    if top_k is None:
        top_k = model.sampling.top_k
    return Sampling(
        **chosen, top_k=top_k or 0, seed=values.get("seed", int), logit_bias=values.get("logit_bias", dict) or {}
    )


def output_limit(values: Values, model: ServedModel) -> int:
    """The bound on sampled tokens, from whichever of the two names the request used."""
    given = {name: values.get(name, int) for name in ("max_completion_tokens", "max_tokens") if name in values}
    if not given:
        return min(model.default_output_tokens, model.max_output_tokens)
    name, limit = next(iter(given.items()))
    assert limit is not None
    if len(set(given.values())) > 1:
        raise InvalidRequest(
            "'max_tokens' and 'max_completion_tokens' are two names of one limit; their values differ.",
            param="max_tokens",
        )
    if limit > model.max_output_tokens:
        raise InvalidRequest(
            f"Invalid '{name}': integer above maximum value. Expected a value <= {model.max_output_tokens}, "
            f"but got {limit} instead.",
            param=name,
            code="integer_above_max_value",
        )
    return limit


def model_of(values: Values, models: Models) -> ServedModel:
    """The model that the request names."""
    name = values.get("model", str)
    if name is None:
        raise fields.missing("model")
    return models(name)


def stream_options(values: Values, *, refuse_unknown: bool) -> Values:
    """What the request says of its stream; only a stream may say it."""
    options = values.get("stream_options", dict)
    if options is None:
        return Values({}, ())
    if not values.get("stream", bool):
        raise InvalidRequest("'stream_options' is only allowed when 'stream' is true.", param="stream_options")
    return fields.read(options, STREAM_OPTIONS, refuse_unknown=refuse_unknown, path="stream_options")
