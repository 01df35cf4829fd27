"""Probes of the model list: what it must state, and that what it states is what answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from ocserve.audit.server import dig
from ocserve.audit.subject import SHORT, Probe, Subject, named
from ocserve.audit.verdict import Fault, Unproven, Unsaid, clean, expect

_PRICE = re.compile(r"\d+(\.\d+)?")
_PRICED = ("prompt", "completion")


async def _entries(subject: Subject) -> list[Any]:
    reply = (await subject.server.send("GET", "/models")).ok()
    data = dig(reply.json, "data")
    expect(isinstance(data, list) and data, "GET /models has no `data`")
    return list(data)


async def models_list(subject: Subject) -> str:
    """GET /models is a list of models in OpenAI's shape."""
    reply = (await subject.server.send("GET", "/models")).ok()
    expect(dig(reply.json, "object") == "list", "`object` of the list is not `list`")
    entries = await _entries(subject)
    ids = [dig(entry, "id") for entry in entries]
    expect(all(isinstance(name, str) and name for name in ids), "an entry has no `id`")
    expect(len(set(ids)) == len(ids), "two entries have the same `id`")
    return f"{len(entries)} listed in {reply.took_s * 1000:.0f} ms"


def _each(name: str, about: str, holds: Callable[[Any], bool]) -> Probe:
    """A probe that a field of every entry holds what it should."""

    async def run(subject: Subject) -> str:
        for entry in await _entries(subject):
            expect(holds(dig(entry, name)), f"`{name}` of {clean(dig(entry, 'id'), 60)} is missing or wrong")
        return f"`{name}` holds in every entry"

    run.__doc__ = about
    return Probe(f"models-{name.replace('_', '-')}", run)


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


async def models_context_length(subject: Subject) -> str:
    """The listing states how many tokens fit, prompt and answer together."""
    expect(_positive(subject.context_length), "no context length under any of the usual names")
    return f"{subject.context_length} tokens"


async def models_max_output_tokens(subject: Subject) -> str:
    """The listing states the largest answer."""
    most = subject.max_output_tokens
    if most is None or not _positive(most):
        raise Fault("no largest answer under any of the usual names")
    expect(most <= (subject.context_length or most), "the largest answer exceeds the context")
    return f"{most} tokens"


async def models_by_id(subject: Subject) -> str:
    """A model can be asked for by its id, and one that is not there is a 404."""
    reply = (await subject.server.send("GET", f"/models/{quote(subject.model)}")).ok()
    expect(dig(reply.json, "id") == subject.model, "GET /models/{id} answers for another id")
    missing = await subject.server.send("GET", "/models/no-such-model")
    expect(missing.status == 404, f"an unknown id is answered with status {missing.status}")
    return "found by id; an unknown id is a 404"


async def models_match(subject: Subject) -> str:
    """The listed id is what a request names and what its answer says."""
    reply = await subject.chat(SHORT, max_tokens=4)
    ids = [dig(entry, "id") for entry in await _entries(subject)]
    expect(subject.model in ids, "the audited model is not listed")
    expect(dig(reply.json, "model") in ids, "an answer names a model that is not listed")
    return "the answer names a listed id"


async def models_pricing(subject: Subject) -> str:
    """Listed prices are decimal strings in USD for one token."""
    pricing = subject.entry.get("pricing")
    if pricing is None:
        raise Unproven("no price is listed")
    for name in _PRICED:
        price = dig(pricing, name)
        expect(isinstance(price, str) and _PRICE.fullmatch(price), f"pricing.{name} is not a plain decimal string")
    return ", ".join(f"{name} {clean(pricing[name], 30)}" for name in _PRICED)


async def models_image_pricing(subject: Subject) -> str:
    """Where images are taken, their price is listed."""
    if not subject.takes("image"):
        raise Unproven("the model takes no images")
    if subject.entry.get("pricing") is None:
        raise Unproven("no price is listed")
    price = dig(subject.entry, "pricing", "image")
    expect(isinstance(price, str) and _PRICE.fullmatch(price), "pricing.image is not a plain decimal string")
    return f"image {clean(price, 30)}"


def _stated(
    name: str, about: str, *places: tuple[str, ...], otherwise: type[Fault | Unsaid] = Fault, shown: int = 80
) -> Probe:
    """A probe that the listing states something in one of several places: a text, a number or a list."""

    async def run(subject: Subject) -> str:
        for place in places:
            found = dig(subject.entry, *place)
            if isinstance(found, str | int | list) and found not in ("", []):
                return f"`{'.'.join(place)}`: {clean(found, shown)}"
        raise otherwise(f"the listing has no {' or '.join('.'.join(place) for place in places)}")

    run.__doc__ = about
    return Probe(f"states-{name}", run)


def _optional(name: str, about: str, *places: tuple[str, ...]) -> Probe:
    """As `_stated`, of what a listing need not have."""
    return _stated(name, about, *places, otherwise=Unsaid, shown=300)


_CAPABILITIES: tuple[tuple[str, ...], ...] = (("capabilities",), ("supported_features",), ("supported_parameters",))

PROBES = (
    *named(models_list, models_context_length, models_max_output_tokens, models_by_id, models_match, models_pricing),
    *named(models_image_pricing),
    _each("id", "Every entry has an id.", _text),
    _each("object", "Every entry is a `model`.", lambda value: value == "model"),
    _each("created", "Every entry has a time of creation.", _positive),
    _each("owned_by", "Every entry names its owner.", _text),
    _stated("name", "The listing states a display name.", ("name",), ("display_name",)),
    _stated("release", "The listing states a version or date of release.", ("released",), ("version",), ("created",)),
    _stated(
        "family",
        "The listing states the model's family.",
        ("family",),
        ("architecture",),
        ("details", "family"),
        ("tokenizer",),
    ),
    _stated("languages", "The listing states the languages.", ("languages",), ("card", "languages")),
    _optional(
        "cutoff",
        "The listing states where the model's training data end.",
        ("knowledge_cutoff",),
        ("training_cutoff",),
        ("training_data_cutoff",),
    ),
    _optional("uses", "The listing states what the model is for.", ("intended_use",), ("use_cases",)),
    _optional("strengths", "The listing states the model's strengths.", ("strengths",)),
    _optional("limitations", "The listing states the model's limits.", ("limitations",)),
    _stated(
        "modality",
        "The listing states what goes in and out.",
        ("input_modalities",),
        ("architecture", "input_modalities"),
    ),
    _stated("quantization", "The listing states the quantisation.", ("gguf_quantization",), ("quantization",)),
    _stated("capabilities", "The listing states what the model can do.", *_CAPABILITIES),
    _stated("description", "The listing describes the model.", ("description",)),
    _stated("license", "The listing states the model's licence.", ("license",), ("license_url",)),
)
