"""LM Studio's model list, by which editors find models with their context and state."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ocserve.api import openai_wire
from ocserve.modelcard import ServedModel

Loaded = Callable[[str], bool]  # whether the model of this id is in memory


def listing(models: Iterable[ServedModel], loaded: Loaded) -> bytes:
    """`GET /api/v0/models`."""
    return openai_wire.dumps({"object": "list", "data": [_model(model, loaded) for model in models]})


def one(model: ServedModel, loaded: Loaded) -> bytes:
    """`GET /api/v0/models/{id}`."""
    return openai_wire.dumps(_model(model, loaded))


def _model(model: ServedModel, loaded: Loaded) -> dict[str, object]:
    """The most context is what this server takes; a longer one that the model was trained for is of no use here."""
    found: dict[str, object] = {
        "id": model.id,
        "object": "model",
        "type": _kind(model),
        "publisher": model.card.publisher,
        "arch": model.architecture or model.card.family,
        "compatibility_type": "gguf",
        "quantization": model.quantisation,
        "state": "loaded" if loaded(model.id) else "not-loaded",
        "max_context_length": model.context_length,
        "capabilities": ["tool_use"] if "tools" in model.capabilities else [],
    }
    return {**found, "loaded_context_length": model.context_length} if loaded(model.id) else found


def _kind(model: ServedModel) -> str:
    if "embedding" in model.capabilities:
        return "embeddings"
    return "vlm" if "image" in model.input_modalities else "llm"
