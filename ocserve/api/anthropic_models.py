"""Anthropic's model list."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from ocserve.api.anthropic_wire import dumps
from ocserve.modelcard import ServedModel


def listing(models: Sequence[ServedModel]) -> bytes:
    """`GET /v1/models`: one page with all of them."""
    entries = [_model(model) for model in models]
    first, last = (models[0].id, models[-1].id) if models else (None, None)
    return dumps({"data": entries, "has_more": False, "first_id": first, "last_id": last})


def one(model: ServedModel) -> bytes:
    """`GET /v1/models/{id}`."""
    return dumps(_model(model))


def _model(model: ServedModel) -> dict[str, object]:
    return {
        "type": "model",
        "id": model.id,
        "display_name": model.card.title,
        "created_at": datetime.fromtimestamp(model.created, UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": model.context_length,
        "max_tokens": model.max_output_tokens,
    }
