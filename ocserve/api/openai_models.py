"""OpenAI's model list, with what a provider's listing and a careful client need beside the four standard keys.

The further keys are those of OpenRouter's flat format, which are what other clients look for too.
"""

from __future__ import annotations

from collections.abc import Iterable

from ocserve.api import offer, openai_wire
from ocserve.modelcard import Prices, ServedModel

_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def listing(models: Iterable[ServedModel]) -> bytes:
    """`GET /v1/models`."""
    return openai_wire.dumps({"object": "list", "data": [_model(model) for model in models]})


def one(model: ServedModel) -> bytes:
    """`GET /v1/models/{id}`."""
    return openai_wire.dumps(_model(model))


def _model(model: ServedModel) -> dict[str, object]:
    card = model.card
    parameters = [field.name for field in offer.parameters(model)]
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": card.publisher or "ocserve",
        "name": card.title,
        "description": card.summary,
        "strengths": card.strengths,
        "limitations": card.limitations,
        "intended_use": card.intended_use,
        "family": card.family,
        "aliases": list(model.aliases),
        "context_length": model.context_length,
        "max_output_tokens": model.max_output_tokens,
        "max_output_length": model.max_output_tokens,
        "trained_context_length": card.context_length,
        "input_modalities": list(model.input_modalities),
        "output_modalities": [_MODALITIES.get(modality, modality) for modality in model.output_modalities],
        "capabilities": list(model.capabilities),
        **({} if model.refused else {"pricing": _pricing(model.prices)}),
        **_tiers(model.prices),
        "quantization": offer.quantization(model),
        "gguf_quantization": model.quantisation,
        "parameters": card.parameters,
        "supported_parameters": parameters,
        "supported_sampling_parameters": [name for name in offer.SAMPLING if name in parameters],
        "supported_features": offer.features(model),
        "defaults": {
            **{name: offer.default(model, name) for name in _DEFAULTED},
            "max_tokens": offer.default_max_tokens(model),
            "wall_clock_s": model.wall_clock_s,
        },
        "parallel": model.parallel,
        "datacenters": [{"country_code": code} for code in model.countries],
        "license": card.license,
        "license_url": card.license_url,
        "hugging_face_id": card.hugging_face_id,
        "languages": list(card.languages),
        "released": card.released,
    }


_MODALITIES = {"embedding": "embeddings"}


def _tiers(prices: Prices | None) -> dict[str, object]:
    """The prices of keys that have used so many tokens of the model in this calendar month, where there are such."""
    if prices is None or not prices.tiers:
        return {}
    above = [{"above": tokens, "pricing": _pricing(step)} for tokens, step in prices.steps[1:]]
    return {"pricing_tiers": above}


def _pricing(prices: Prices | None) -> dict[str, str]:
    """US dollars per token or per unit; what has no price costs nothing."""
    if prices is None:
        return dict.fromkeys(("prompt", "completion", "image", "request", "input_cache_read"), "0")
    return {
        "prompt": prices.prompt,
        "completion": prices.completion,
        "image": prices.image or "0",  # beside its tokens, which are prompt tokens
        "request": prices.request or "0",
        "input_cache_read": prices.cached_prompt or prices.prompt,
        **({"input_cache_write": prices.cache_write} if prices.cache_write else {}),
    }
