"""The feed is refused whole for one wrong key: every kind of model is held to the published schema."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ocserve.api import offer, openai_chat, openrouter
from ocserve.errors import InvalidRequest
from ocserve.modelcard import ServedModel
from tests.api.models import ALL, BASE, EMBEDDING, PRICED, PRICED_BY_THE_PIECE, RERANKER, TOOLS, VISION
from tests.api.test_fields import models as named
from tests.http.harness import CHAT, MODEL

SCHEMA = json.loads(
    (Path(__file__).parent.parent / "data/openrouter/provider-monitor-schema-v2.openapi.json").read_text("utf-8")
)
VALIDATOR = jsonschema.Draft202012Validator({**SCHEMA, "$ref": "#/components/schemas/ModelDocumentV2"})


def entry(model: ServedModel) -> dict[str, Any]:
    (found,) = json.loads(openrouter.feed([model]))["data"]
    assert isinstance(found, dict)
    return found


def parameters(model: ServedModel) -> dict[str, Any]:
    found = entry(model)["output_modalities"][0]["supported_parameters"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("model", ALL, ids=lambda model: f"{model.id}-{model.quantisation}")
def test_every_kind_of_model_makes_a_valid_document(model: ServedModel) -> None:
    found = entry(model)
    VALIDATOR.validate(found)
    # What the schema of 2026-09 asks beyond the copy.
    assert re.fullmatch(r"2\.\d+", found["schema_version"])
    for entries in [found.get("pricing", []), found.get("capacity", []), *_lists(found)]:
        kinds = [each["type"] for each in entries]
        assert len(kinds) == len(set(kinds)), "entries are unique by type"


def _lists(found: dict[str, Any]) -> list[list[dict[str, Any]]]:
    return [
        each.get(name, [])
        for side in ("input_modalities", "output_modalities")
        for each in found[side]
        for name in ("pricing", "capacity")
    ]


@pytest.mark.parametrize("extra", [{"object": "model"}, {"context_length": 8192}, {"pricing": None}])
def test_the_schema_refuses_what_a_flat_listing_has(extra: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate({**entry(MODEL), **extra})


def test_all_models_are_listed_under_the_names_that_requests_use() -> None:
    found = json.loads(openrouter.feed(ALL))
    assert set(found) == {"data"}
    assert [each["id"] for each in found["data"]] == [model.id for model in ALL]


def test_limits_and_quantisation_are_the_models() -> None:
    found = entry(MODEL)
    assert found["quantization"] == "int4"
    assert found["input_modalities"][0]["supported_inputs"]["max_context_length"] == {"value": 8192, "unit": "token"}
    assert found["output_modalities"][0]["max_length"] == {"value": 4096, "unit": "token"}
    assert found["capacity"] == [{"type": "concurrency", "unit": "request", "value": 8}]
    assert "quantization" not in entry(TOOLS), "5 bits have no name in the feed"


def test_prices_are_there_only_if_something_is_charged() -> None:
    assert "pricing" not in entry(MODEL)["input_modalities"][0]
    found = entry(PRICED)
    assert found["input_modalities"][0]["pricing"] == [
        {"type": "prompt", "unit": "token", "cost_usd": "0.00000002"},
        {"type": "cached_prompt", "unit": "token", "cost_usd": "0.00000001"},
    ]
    assert found["output_modalities"][0]["pricing"] == [
        {"type": "completion", "unit": "token", "cost_usd": "0.00000006"}
    ]
    found = entry(PRICED_BY_THE_PIECE)
    assert found["input_modalities"][0]["pricing"] == [
        {"type": "prompt", "unit": "token", "cost_usd": "0.1"},
        {"type": "cache_write", "unit": "token", "cost_usd": "0.3"},
    ]
    assert found["input_modalities"][1]["pricing"] == [{"type": "prompt", "unit": "image", "cost_usd": "0.4"}]
    assert found["pricing"] == [{"type": "request", "unit": "request", "cost_usd": "0.5"}]


def test_parameters_are_those_that_are_enforced_for_this_model() -> None:
    effective = {field.name for field in openai_chat.PARAMETERS if field.kind == "effective"}
    assert set(parameters(MODEL)) <= effective
    assert {"temperature", "top_p", "max_tokens", "seed", "stop"} <= set(parameters(MODEL))
    assert not {"tools", "tool_choice", "reasoning"} & set(parameters(MODEL))
    assert {"tools", "tool_choice"} & effective <= set(parameters(TOOLS))
    assert "temperature" in parameters(BASE)
    assert set(parameters(EMBEDDING)) == {"dimensions", "encoding_format"}
    assert parameters(RERANKER) == {}
    assert entry(VISION)["input_modalities"][1]["type"] == "image"


def test_every_published_bound_is_accepted_and_what_lies_beyond_is_not() -> None:
    """Documented = enforced, from the document's own numbers."""
    tried = 0
    for name, described in parameters(MODEL).items():
        step = 1 if described["type"] == "integer" else 0.001
        for bound, beyond in (("min", -step), ("max", step)):
            if bound in described:
                tried += 1
                assert _accepted(name, described[bound]), (name, described)
                assert not _accepted(name, described[bound] + beyond), (name, described)
        if described["type"] == "array" and "max_items" in described and name == "stop":
            assert _accepted(name, ["x"] * described["max_items"])
            assert not _accepted(name, ["x"] * (described["max_items"] + 1))
    assert tried >= 12


def _accepted(name: str, value: object) -> bool:
    try:
        openai_chat.parse(json.dumps({**CHAT, "logprobs": True, name: value}).encode(), named, refuse_unknown=True)
    except InvalidRequest:
        return False
    return True


def test_defaults_are_the_ones_that_are_used() -> None:
    found = parameters(MODEL)
    sampling = openai_chat.parse(json.dumps(CHAT).encode(), named, refuse_unknown=True).request.sampling
    for name, described in found.items():
        if hasattr(sampling, name) and "default" in described:
            assert described["default"] == getattr(sampling, name), name
    assert found["max_tokens"]["default"] == offer.default_max_tokens(MODEL)
