"""OpenRouter's provider feed, schema 2: what it may route here, with the parameters that are enforced here.

One unknown key anywhere, or a null where none may be, and the whole document is refused and its models are hidden; so
an entry holds the schema's own keys and nothing without a value. Prices are left out where there are none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ocserve.api import offer, openai_wire
from ocserve.api.fields import Field, Reader
from ocserve.modelcard import Prices, ServedModel

SCHEMA_VERSION = "2.4"
_SAFE_INTEGER = 2**53  # what a JSON number is read as in most languages
_ABOVE = 1e-6  # the feed has no word for "greater than"; from here on every value is accepted
_IMAGE_FORMATS = ("image/png", "image/jpeg", "image/webp", "image/gif")

Entry = dict[str, Any]
# What is never streamed, by the feed's words.
_WHOLE_ANSWERS = {"embedding": "embeddings", "rerank": "rerank"}


def feed(models: Iterable[ServedModel]) -> bytes:
    """`GET /openrouter/models`: complete, since a model that is missing is taken down."""
    return openai_wire.dumps({"data": [_document(model) for model in models]})


def _document(model: ServedModel) -> Entry:
    card, prices = model.card, model.prices
    return _present(
        schema_version=SCHEMA_VERSION,
        id=model.id,
        name=card.title,
        hugging_face_id=card.hugging_face_id,
        created=model.created,
        quantization=offer.quantization(model),
        description=card.summary or None,
        input_modalities=[_input(model, modality) for modality in model.input_modalities],
        output_modalities=[_output(model, modality) for modality in model.output_modalities],
        pricing=[_price("request", prices.request, "request")] if prices and prices.request else None,
        capacity=[{"type": "concurrency", "unit": "request", "value": model.parallel}],
        datacenters=[{"country_code": code} for code in model.countries] or None,
    )


def _input(model: ServedModel, modality: str) -> Entry:
    if modality == "image":
        enums = {"sources": ("url", "base64") if model.image_urls else ("base64",), "formats": _IMAGE_FORMATS}
        supported = {name: {"type": "enum", "values": values} for name, values in enums.items()}
        price = model.prices and model.prices.image
        pricing = [_price("prompt", price, "image")] if price else None
        return _present(type="image", supported_inputs=supported, pricing=pricing)
    limits = {"max_context_length": _tokens(model.context_length)}
    return _present(type="text", supported_inputs=limits, pricing=_input_prices(model.prices))


def _output(model: ServedModel, modality: str) -> Entry:
    parameters = {field.name: _descriptor(field, model) for field in offer.parameters(model)}
    if modality in _WHOLE_ANSWERS:
        return {"type": _WHOLE_ANSWERS[modality], "supported_parameters": parameters}
    return _present(
        type="text",
        max_length=_tokens(model.max_output_tokens),
        streaming=True,
        supported_parameters=parameters,
        pricing=model.prices and [_price("completion", model.prices.completion)],
    )


def _input_prices(prices: Prices | None) -> list[Entry] | None:
    if prices is None:
        return None
    further = {"cached_prompt": prices.cached_prompt, "cache_write": prices.cache_write}
    return [_price("prompt", prices.prompt), *(_price(kind, price) for kind, price in further.items() if price)]


def _price(kind: str, dollars: str, unit: str = "token") -> Entry:
    return {"type": kind, "unit": unit, "cost_usd": dollars}


def _tokens(count: int) -> Entry:
    return {"value": count, "unit": "token"}


def _descriptor(field: Field, model: ServedModel) -> Entry:
    """The values that `field` may have, as far as the feed can say it."""
    schema = field.reader.schema if isinstance(field.reader, Reader) else field.shape or {}
    if field.name in ("max_tokens", "max_completion_tokens"):
        bounds = {"min": schema["minimum"], "max": model.max_output_tokens, "unit": "token"}
        return {"type": "integer", **bounds, "default": offer.default_max_tokens(model)}
    match schema.get("type"):
        case "number":
            described = {"type": "range", **_bounds(schema)}
        case "integer":
            described = {"type": "integer", **_bounds(schema)}
        case "boolean":
            described = {"type": "boolean"}
        case "string" if "enum" in schema:
            described = {"type": "enum", "values": schema["enum"]}
        case "array":
            described = _present(type="array", max_items=schema.get("maxItems"))
        case None if field.name == "stop":
            described = {"type": "array", "max_items": schema["anyOf"][1]["maxItems"]}
        case _:
            described = {"type": "unknown"}
    default = offer.default(model, field.name)
    plain = isinstance(default, bool | int | float | str)
    return {**described, "default": default} if plain else described


def _bounds(schema: Entry) -> Entry:
    """The bounds that a reader of the feed can hold; others it could only get wrong."""
    found: Entry = {}
    if "exclusiveMinimum" in schema:
        found["min"] = schema["exclusiveMinimum"] + _ABOVE
    for word, name in (("minimum", "min"), ("maximum", "max")):
        if word in schema and abs(schema[word]) < _SAFE_INTEGER:
            found[name] = schema[word]
    return found


def _present(**entry: object) -> Entry:
    return {name: value for name, value in entry.items() if value is not None}
