"""The parameters that OpenAI's chat and text completions share, and what they become."""

from __future__ import annotations

from typing import Any

from ocserve.api import fields
from ocserve.api import sampling as reconcile
from ocserve.api.dialect import Models
from ocserve.api.fields import Field, Values
from ocserve.errors import InvalidRequest
from ocserve.generation import Sampling
from ocserve.modelcard import ServedModel

MAX_CHOICES = 16
_MAX_BREAKERS = 32
_MAX_INT = 2**31 - 1

STREAM_OPTIONS = fields.table(
    Field("include_usage", "effective", fields.boolean()),
    Field("include_obfuscation", "advisory", fields.boolean()),
)


# Samplers that OpenAI does not have, under the names of OpenRouter and llama.cpp's server.
SAMPLERS: tuple[Field, ...] = (
    Field("top_k", "effective", fields.integer(0, _MAX_INT)),
    Field("min_p", "effective", fields.number(0, 1)),
    Field("top_a", "effective", fields.number(0, 1)),
    Field("repetition_penalty", "effective", fields.number(0.01, 2)),  # logits are divided by it
    Field("repeat_last_n", "effective", fields.integer(-1, _MAX_INT)),
    Field("typical_p", "effective", fields.number(0, 1, above_low=True)),
    Field("top_n_sigma", "effective", fields.number(-1, 100)),
    Field("dynatemp_range", "effective", fields.number(0, 2)),
    Field("dynatemp_exponent", "effective", fields.number(0, 100)),
    Field("dry_multiplier", "effective", fields.number(0, 100)),
    Field("dry_base", "effective", fields.number(1, 100)),
    Field("dry_allowed_length", "effective", fields.integer(0, _MAX_INT)),
    Field("dry_penalty_last_n", "effective", fields.integer(-1, _MAX_INT)),
    Field("dry_sequence_breakers", "effective", fields.strings(_MAX_BREAKERS, fields.MAX_STOP_LENGTH)),
    Field("xtc_probability", "effective", fields.number(0, 1)),
    Field("xtc_threshold", "effective", fields.number(0, 1)),
    Field("mirostat", "effective", fields.integer(0, 2)),
    Field("mirostat_tau", "effective", fields.number(0, 100)),
    Field("mirostat_eta", "effective", fields.number(0, 1)),
)

SHARED: tuple[Field, ...] = (
    Field("model", "effective", fields.string(256, empty=False), required=True),
    Field("stream", "effective", fields.boolean()),
    Field("stream_options", "effective", fields.pairs(8), of=STREAM_OPTIONS),
    Field("temperature", "effective", fields.number(0, 2)),
    Field("top_p", "effective", fields.number(0, 1, above_low=True)),
    Field("frequency_penalty", "effective", fields.number(-2, 2)),
    Field("presence_penalty", "effective", fields.number(-2, 2)),
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
    Field("service_tier", "effective", fields.string(64), neutral=("auto", "default")),
    Field("store", "advisory", fields.boolean(), neutral=(False,)),
    *SAMPLERS,
)
# What some clients of llama.cpp's server call a parameter.
SPELLINGS = {"repeat_penalty": "repetition_penalty"}
# Parameters that go by another name in `Sampling`.
_ELSEWHERE = {
    "repeat_last_n": "penalty_window",
    "dynatemp_range": "dynamic_range",
    "dynatemp_exponent": "dynamic_exponent",
    "dry_penalty_last_n": "dry_window",
    "dry_sequence_breakers": "dry_breakers",
}
_SAMPLING = (
    *("temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", "logit_bias"),
    *(field.name for field in SAMPLERS),
)


def table(*declared: Field) -> dict[str, Field]:
    """Parameters by name and by their other spellings."""
    found = fields.table(*declared)
    return found | {spelling: found[name] for spelling, name in SPELLINGS.items()}


def sampling(values: Values, model: ServedModel) -> Sampling:
    """How to draw tokens: the request's word, else the model's default, else neutral."""
    asked: dict[str, Any] = {_ELSEWHERE.get(name, name): values.get(name, object) for name in _SAMPLING}
    if asked["penalty_window"] == -1:  # llama.cpp's word for all tokens
        asked["penalty_window"] = None
    asked["top_n_sigma"] = max(0.0, asked["top_n_sigma"] or 0.0)  # below 0 is llama.cpp's word for off
    return reconcile.sampling(asked, model)


def output_limit(values: Values, model: ServedModel) -> int:
    """The bound on sampled tokens, from whichever of the two names the request used."""
    given = {name: values.get(name, int) for name in ("max_completion_tokens", "max_tokens") if name in values}
    if len(set(given.values())) > 1:
        raise InvalidRequest(
            "'max_tokens' and 'max_completion_tokens' are two names of one limit; their values differ.",
            param="max_tokens",
        )
    name, limit = next(iter(given.items()), ("max_tokens", None))
    return reconcile.output_limit(limit, name, model)


def model_of(values: Values, models: Models) -> ServedModel:
    """The model that the request names."""
    name = values.get("model", str)
    if name is None:
        raise fields.missing("model")
    return models(name)


def served_tier(values: Values) -> str | None:
    """The service tier that serves the request, for an answer to a request that named one."""
    return "default" if "service_tier" in values else None


def stream_options(values: Values, *, refuse_unknown: bool) -> Values:
    """What the request says of its stream; only a stream may say it."""
    options = values.get("stream_options", dict)
    if options is None:
        return Values({}, ())
    if not values.get("stream", bool):
        raise InvalidRequest("'stream_options' is only allowed when 'stream' is true.", param="stream_options")
    return fields.read(options, STREAM_OPTIONS, refuse_unknown=refuse_unknown, path="stream_options")
