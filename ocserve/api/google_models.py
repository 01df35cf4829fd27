"""Google's model list."""

from __future__ import annotations

from collections.abc import Iterable

from ocserve.api.google_wire import dumps
from ocserve.generation import Sampling
from ocserve.modelcard import ServedModel


def listing(models: Iterable[ServedModel]) -> bytes:
    """`GET /v1beta/models`: one page with all of them."""
    return dumps({"models": [_model(model) for model in models]})


def one(model: ServedModel) -> bytes:
    """`GET /v1beta/models/{model}`."""
    return dumps(_model(model))


def _model(model: ServedModel) -> dict[str, object]:
    neutral, own = Sampling(), model.sampling
    generates = "chat" in model.capabilities
    defaults = {
        "temperature": neutral.temperature if own.temperature is None else own.temperature,
        "topP": neutral.top_p if own.top_p is None else own.top_p,
        "topK": neutral.top_k if own.top_k is None else own.top_k,
        "maxTemperature": 2.0,
        "thinking": "reasoning" in model.capabilities,
    }
    return {
        "name": f"models/{model.id}",
        "version": model.quantisation,
        "displayName": model.card.title,
        "description": model.card.summary,
        "inputTokenLimit": model.context_length,
        "outputTokenLimit": model.max_output_tokens if generates else 1,
        "supportedGenerationMethods": ["generateContent", "streamGenerateContent", "countTokens"] if generates else [],
        **(defaults if generates else {}),
    }
