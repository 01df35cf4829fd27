"""Google's model list."""

from __future__ import annotations

from collections.abc import Iterable

from ocserve.api import offer
from ocserve.api.google_wire import dumps
from ocserve.modelcard import ServedModel

_GENERATES = ["generateContent", "streamGenerateContent", "countTokens"]
_EMBEDS = ["embedContent", "batchEmbedContents"]


def listing(models: Iterable[ServedModel]) -> bytes:
    """`GET /v1beta/models`: one page with all of them."""
    return dumps({"models": [_model(model) for model in models]})


def one(model: ServedModel) -> bytes:
    """`GET /v1beta/models/{model}`."""
    return dumps(_model(model))


def _model(model: ServedModel) -> dict[str, object]:
    generates, embeds = "chat" in model.capabilities, "embedding" in model.capabilities
    defaults = {
        "temperature": offer.default(model, "temperature"),
        "topP": offer.default(model, "top_p"),
        "topK": offer.default(model, "top_k"),
        "maxTemperature": 2.0,
        "thinking": "reasoning" in model.capabilities,
    }
    return {
        "name": f"models/{model.id}",
        "version": model.quantisation,
        "displayName": model.card.title,
        "description": model.card.summary,
        "inputTokenLimit": model.context_length,
        "outputTokenLimit": model.max_output_tokens,
        "supportedGenerationMethods": _GENERATES if generates else _EMBEDS if embeds else [],
        **(defaults if generates else {}),
    }
