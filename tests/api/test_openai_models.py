"""The model list tells a client what it needs before it sends anything."""

from __future__ import annotations

import json
import re

import pytest
from msgspec.structs import replace

from ocserve.api import openai_chat, openai_models
from ocserve.modelcard import ServedModel
from tests.api.models import ALL, EMBEDDING, PRICED, PRICED_BY_THE_PIECE, TOOLS
from tests.http.harness import MODEL


@pytest.mark.parametrize("model", ALL, ids=lambda model: f"{model.id}-{model.quantisation}")
def test_an_entry_has_everything_that_listings_read(model: ServedModel) -> None:
    found = json.loads(openai_models.one(model))
    assert (found["id"], found["object"], found["created"]) == (model.id, "model", model.created)
    assert isinstance(found["owned_by"], str)
    assert found["context_length"] == model.context_length
    assert found["max_output_tokens"] == found["max_output_length"] == model.max_output_tokens
    charged = {"prompt", "completion", "image", "request", "input_cache_read"}
    assert charged <= set(found["pricing"]) <= charged | {"input_cache_write"}
    assert all(re.fullmatch(r"\d+(\.\d+)?", price) for price in found["pricing"].values())
    assert set(found["supported_sampling_parameters"]) <= set(found["supported_parameters"])
    # Another format's mark: with it the entry would be read as that.
    assert "schema_version" not in found


def test_an_entry_says_what_the_card_says_of_the_model() -> None:
    card = replace(MODEL.card, strengths="Quick.", limitations="English only.", intended_use="Tests.")
    found = json.loads(openai_models.one(replace(MODEL, card=card)))
    assert [found[name] for name in ("strengths", "limitations", "intended_use")] == [
        "Quick.",
        "English only.",
        "Tests.",
    ]


def test_supported_parameters_are_the_effective_ones() -> None:
    effective = {field.name for field in openai_chat.PARAMETERS if field.kind == "effective"}
    listed = json.loads(openai_models.one(TOOLS))["supported_parameters"]
    assert set(listed) == effective - {"model", "messages", "stream", "stream_options", "service_tier"}
    assert json.loads(openai_models.one(EMBEDDING))["supported_parameters"] == ["dimensions", "encoding_format"]


def test_prices_are_the_models_and_zero_where_nothing_is_charged() -> None:
    assert set(json.loads(openai_models.one(MODEL))["pricing"].values()) == {"0"}
    assert json.loads(openai_models.one(PRICED))["pricing"] == {
        "prompt": "0.00000002",
        "completion": "0.00000006",
        "image": "0",
        "request": "0",
        "input_cache_read": "0.00000001",
    }
    assert json.loads(openai_models.one(PRICED_BY_THE_PIECE))["pricing"] == {
        "prompt": "0.1",
        "completion": "0.2",
        "image": "0.4",
        "request": "0.5",
        "input_cache_read": "0.1",
        "input_cache_write": "0.3",
    }
