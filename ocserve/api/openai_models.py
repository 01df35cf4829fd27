"""OpenAI's model list, with what a provider's listing and a careful client need beside the four standard keys."""

from __future__ import annotations

from collections.abc import Iterable

from ocserve.api import openai_wire
from ocserve.api.openai_sampling import SHARED
from ocserve.generation import Sampling
from ocserve.modelcard import ServedModel

# The names that listings know; the rest of the effective parameters are about transport.
_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
    "stop", "seed", "max_tokens", "logit_bias",
)  # fmt: skip
_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def listing(models: Iterable[ServedModel]) -> bytes:
    """`GET /v1/models`."""
    return openai_wire.dumps({"object": "list", "data": [_model(model) for model in models]})


def one(model: ServedModel) -> bytes:
    """`GET /v1/models/{id}`."""
    return openai_wire.dumps(_model(model))


def _model(model: ServedModel) -> dict[str, object]:
    card = model.card
    neutral = Sampling()
    effective = {field.name for field in SHARED if field.kind == "effective"}
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": card.publisher or "ocserve",
        "name": card.title,
        "description": card.summary,
        "aliases": list(model.aliases),
        "context_length": model.context_length,
        "max_output_tokens": model.max_output_tokens,
        "max_output_length": model.max_output_tokens,
        "trained_context_length": card.context_length,
        "input_modalities": list(model.input_modalities),
        "output_modalities": list(model.output_modalities),
        "capabilities": list(model.capabilities),
        "quantization": _feed_quantization(model.quantisation),
        "gguf_quantization": model.quantisation,
        "parameters": card.parameters,
        "supported_sampling_parameters": [name for name in _SAMPLING if name in effective],
        "supported_features": [],
        "defaults": {
            **{name: _default(model, neutral, name) for name in _DEFAULTED},
            "max_tokens": min(model.default_output_tokens, model.max_output_tokens),
            "wall_clock_s": model.wall_clock_s,
        },
        "parallel": model.parallel,
        "license": card.license,
        "license_url": card.license_url,
        "hugging_face_id": card.hugging_face_id,
        "languages": list(card.languages),
        "released": card.released,
    }


def _default(model: ServedModel, neutral: Sampling, name: str) -> float:
    value = getattr(model.sampling, name)
    chosen: float = getattr(neutral, name) if value is None else value
    return chosen


def _feed_quantization(gguf: str) -> str | None:
    """The listing's word for a GGUF type. 2-, 3-, 5- and 6-bit types have none: null is then the only honest value."""
    name = gguf.upper()
    for prefix, word in (("Q8", "int8"), ("Q4", "int4"), ("IQ4", "int4"), ("MXFP4", "mxfp4")):
        if name.startswith(prefix):
            return word
    return {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}.get(name)
