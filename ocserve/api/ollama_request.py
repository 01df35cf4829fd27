"""What Ollama's chat and generate have in common on the way in: options, format, thinking, names of models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ocserve.api import fields, json_body, openai_format
from ocserve.api.dialect import Models, Parsed
from ocserve.api.fields import Field, Reader, Values
from ocserve.api.ollama_wire import LINES
from ocserve.api.sampling import output_limit, sampling, seed
from ocserve.errors import InvalidRequest, ModelNotFound
from ocserve.generation import (
    GenerateRequest,
    JsonConstraint,
    Prompt,
    Reasoning,
    Sampling,
)
from ocserve.modelcard import ServedModel

_MAX_INT = 2**31 - 1
_MAX_STOPS = 32
_LATEST = ":latest"
MODEL = fields.string(256, empty=False)
TEXT = fields.string(64 * 1024 * 1024)  # the body's own limit is far below
IMAGES = fields.strings(64, 64 * 1024 * 1024)

# Of the options that say how a model is loaded none has an effect: it is loaded as the server's settings say. A prompt
# that is longer than the context is refused, whatever `num_ctx` says, and never cut.
_LOADING = (
    "num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "draft_num_predict",
)  # fmt: skip
_SWITCHES = (
    "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mmap", "use_mlock", "embedding_only", "numa",
    "penalize_newline",
)  # fmt: skip


def _stops() -> Reader[tuple[str, ...]]:
    several = fields.strings(_MAX_STOPS, fields.MAX_STOP_LENGTH)

    def reader(value: object, where: str) -> tuple[str, ...]:
        return several([value], where) if isinstance(value, str) else several(value, where)

    return Reader(reader, {"anyOf": [several.schema["items"], several.schema]})


OPTIONS = fields.table(
    Field("temperature", "effective", fields.number(0, 2)),
    Field("top_p", "effective", fields.number(0, 1, above_low=True)),
    Field("top_k", "effective", fields.integer(0, _MAX_INT)),
    Field("min_p", "effective", fields.number(0, 1)),
    Field("typical_p", "effective", fields.number(0, 1, above_low=True)),
    Field("repeat_penalty", "effective", fields.number(0.01, 2)),  # logits are divided by it
    Field("repeat_last_n", "effective", fields.integer(-1, _MAX_INT)),
    Field("presence_penalty", "effective", fields.number(-2, 2)),
    Field("frequency_penalty", "effective", fields.number(-2, 2)),
    Field("mirostat", "effective", fields.integer(0, 2)),
    Field("mirostat_tau", "effective", fields.number(0, 100)),
    Field("mirostat_eta", "effective", fields.number(0, 1)),
    Field("seed", "effective", seed(fields.int64())),
    Field("num_predict", "effective", fields.integer(-2, _MAX_INT)),
    Field("stop", "effective", _stops()),
    Field("tfs_z", "unsupported", fields.number(0, 1000), neutral=(1, 1.0)),
    *(Field(name, "advisory", fields.integer(-1, _MAX_INT)) for name in _LOADING),
    *(Field(name, "advisory", fields.boolean()) for name in _SWITCHES),
)


def _format() -> Reader[JsonConstraint | None]:
    def reader(value: object, where: str) -> JsonConstraint | None:
        if isinstance(value, str):
            return JsonConstraint() if fields.word("", "json")(value, where) else None
        if not isinstance(value, dict):
            raise fields.wrong_type(where, "'json' or a schema", value)
        return JsonConstraint(schema=json.dumps(value, ensure_ascii=False))

    return Reader(reader, {"anyOf": [{"enum": ["", "json"]}, {"type": "object"}]})


def _think() -> Reader[Reasoning]:
    efforts = ("low", "medium", "high", "max")

    def reader(value: object, where: str) -> Reasoning:
        if isinstance(value, bool):
            return Reasoning(enabled=value)
        if not isinstance(value, str):
            raise fields.wrong_type(where, "a boolean or a string", value)
        return Reasoning(enabled=True, effort=fields.word(*efforts)(value, where))

    return Reader(reader, {"anyOf": [{"type": "boolean"}, {"enum": list(efforts)}]})


def keep_alive() -> Field:
    """How long to keep the model: a matter of this server's settings."""

    def reader(value: object, where: str) -> object:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise fields.wrong_type(where, "a string or a number", value)
        return value

    return Field("keep_alive", "advisory", Reader(reader, {"anyOf": [{"type": "string"}, {"type": "number"}]}))


SHARED: tuple[Field, ...] = (
    Field("model", "effective", MODEL, required=True),
    Field("stream", "effective", fields.boolean()),
    Field("format", "effective", _format()),
    Field("think", "effective", _think()),
    Field("options", "effective", fields.pairs(64), of=OPTIONS),
    Field("logprobs", "effective", fields.boolean()),
    Field("top_logprobs", "effective", fields.integer(0, 20)),
    keep_alive(),
    Field("truncate", "advisory", fields.boolean()),  # nothing is ever cut
    Field("shift", "advisory", fields.boolean()),
)


@dataclass(frozen=True, slots=True)
class Load:
    """A request without a prompt, which asks for nothing but that its model be loaded."""

    model: ServedModel
    ignored: tuple[str, ...]


def load(
    body: bytes,
    table: Mapping[str, Field],
    prompts: tuple[str, ...],
    models: Models,
    *,
    refuse_unknown: bool,
    check: Callable[[Values], None] = lambda values: None,
) -> Load | None:
    """The load that `body` asks for; None if it has one of the `prompts`, and so is to be answered.

    `check` refuses what is wrong within the parameters that a load has no use for.
    """
    values = fields.read(json_body.decode(body), table, refuse_unknown=refuse_unknown)
    if any(values.get(name, object) for name in prompts):
        return None
    check(values)
    options = _options(values, refuse_unknown=refuse_unknown)
    return Load(model_of(values.get("model", str), models), (*values.ignored, *options.ignored))


def _options(values: Values, *, refuse_unknown: bool) -> Values:
    return fields.read(values.get("options", dict) or {}, OPTIONS, refuse_unknown=refuse_unknown, path="options")


def model_of(name: str | None, models: Models) -> ServedModel:
    """The model of that name, also with the tag that Ollama's clients add to names without one."""
    assert name is not None
    try:
        return models(name)
    except ModelNotFound:
        if not name.endswith(_LATEST):
            raise
        return models(name.removesuffix(_LATEST))


def parsed(
    values: Values,
    model: ServedModel,
    prompt: Prompt,
    *,
    refuse_unknown: bool,
    ignored: tuple[str, ...] = (),
    labels: Mapping[str, str] | None = None,
) -> Parsed:
    """The request that a prompt and the shared parameters make."""
    options = _options(values, refuse_unknown=refuse_unknown)
    asked = options.get("num_predict", int)
    wish = reasoning(values).enabled
    unmet = ("think",) if wish and "reasoning" not in model.capabilities else ()
    return Parsed(
        request=GenerateRequest(
            request_id="",
            model=model.id,
            prompt=prompt,
            sampling=_sampling(options, model),
            # -1 is Ollama's word for no bound, -2 for the context's: the largest that is served.
            max_tokens=model.max_output_tokens
            if asked in (-1, -2)
            else output_limit(asked, "options.num_predict", model),
            constraint=values.get("format", JsonConstraint),
            logprobs=_logprobs(values),
            stop=options.get("stop", tuple) or (),
            deadline_s=model.wall_clock_s,
        ),
        model=model,
        stream=values.get("stream", bool) is not False,
        ignored=(*values.ignored, *options.ignored, *unmet, *ignored),
        show_reasoning=wish is not False,
        framing=LINES,
        paths={openai_format.SCHEMA: "format"},
        labels=labels,
    )


def _sampling(options: Values, model: ServedModel) -> Sampling:
    same = (
        *("temperature", "top_p", "top_k", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "seed"),
        *("mirostat", "mirostat_tau", "mirostat_eta"),
    )
    given: Mapping[str, Any] = {name: options.get(name, object) for name in same}
    window = options.get("repeat_last_n", int)
    return sampling(
        {
            **given,
            "repetition_penalty": options.get("repeat_penalty", float),
            "penalty_window": None if window == -1 else window,  # the whole context
        },
        model,
    )


def _logprobs(values: Values) -> int | None:
    top = values.get("top_logprobs", int)
    if values.get("logprobs", bool):
        return top or 0
    if top:
        raise InvalidRequest("'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs")
    return None


def reasoning(values: Values) -> Reasoning:
    """How the model is to think."""
    return values.get("think", Reasoning) or Reasoning()
