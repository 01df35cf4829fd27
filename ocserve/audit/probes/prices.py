"""Probes of prices: what is published, what is listed and what an answer costs are one, to the last digit."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from ocserve.audit.published import PATHS
from ocserve.audit.server import dig
from ocserve.audit.subject import STORY, Subject, named
from ocserve.audit.verdict import Unproven, Unsaid, clean, expect

_PRICE = re.compile(r"\d+(\.\d+)?")
_MILLION = 10**6
# The names of prices in the model list, on the page of prices and in OpenRouter's feed.
_OF_TOKENS = {
    "prompt": "prompt",
    "completion": "completion",
    "input_cache_read": "cached_prompt",
    "input_cache_write": "cache_write",
}
_NEAR = Decimal("5e-13")  # US dollars; half of what the finest price is a multiple of


def _listed(subject: Subject) -> dict[str, Decimal]:
    """The listed prices, for one of each. Raises `Unproven` where there are none."""
    pricing = subject.entry.get("pricing")
    found = {
        name: Decimal(price)
        for name, price in (pricing if isinstance(pricing, dict) else {}).items()
        if isinstance(price, str) and _PRICE.fullmatch(price)
    }
    if not any(found.values()):
        raise Unproven("no price is listed")
    return found


async def _published(subject: Subject) -> tuple[str, Mapping[str, Any]]:
    """The page of prices and the audited model's on it. Raises `Unsaid` where it is not there."""
    for page in await subject.published("pricing"):
        models = dig(page.json, "models")
        for each in models if isinstance(models, list) else []:
            holds = dig(each, "id") == subject.model and not dig(each, "announced")  # a price to come is none yet
            if holds and isinstance(prices := dig(each, "prices"), dict):
                expect(dig(page.json, "currency") == "USD", f"{page.address}: the currency is not USD")
                unit = str(dig(page.json, "unit"))
                expect("million" in unit and "token" in unit, f"{page.address}: the unit is not a million tokens")
                return page.address, prices
    where = subject.pages.get("pricing", PATHS["pricing"][0])
    raise Unsaid(f"{clean(where, 120)} has no prices of {clean(subject.model, 80)} that can be read as JSON")


async def prices_published(subject: Subject) -> str:
    """Prices are published in US dollars for a million tokens, to be read by anybody."""
    address, prices = await _published(subject)
    for name in ("prompt", "completion"):
        price = dig(prices, name)
        expect(isinstance(price, str) and _PRICE.fullmatch(price), f"{address}: {name} is not a plain decimal string")
    shown = ", ".join(f"{clean(name, 20)} {clean(price, 20)}" for name, price in prices.items() if price is not None)
    return f"{address}, USD per million tokens: {shown}"


async def prices_equal(subject: Subject) -> str:
    """The published prices are those of the model list, and of OpenRouter's feed where there is one."""
    listed = _listed(subject)
    address, prices = await _published(subject)
    compared = []
    for name, published in _OF_TOKENS.items():
        price = prices.get(published)
        if isinstance(price, str) and _PRICE.fullmatch(price) and name in listed:
            expect(
                Decimal(price) == listed[name] * _MILLION,
                f"{name} is {listed[name]} for one token in the list and {price} for a million at {address}",
            )
            compared.append(name)
    expect({"prompt", "completion"} <= set(compared), f"{address} lacks the price of prompt or completion")
    for name, price in await _of_feed(subject):
        if name in listed:
            expect(price == listed[name], f"{name} is {listed[name]} in the list and {price} in the feed")
            compared.append(f"{name} of the feed")
    return f"equal: {', '.join(compared)}"


async def _of_feed(subject: Subject) -> list[tuple[str, Decimal]]:
    """(name in the model list, price for one token) of what OpenRouter's feed says of the model."""
    feed = await subject.document("/openrouter/models")
    entries = dig(feed, "data")
    entry = next((each for each in entries or [] if dig(each, "id") == subject.model), None)
    kinds = {published: name for name, published in _OF_TOKENS.items()}
    return [
        (kinds[dig(price, "type")], Decimal(price["cost_usd"]))
        for side in ("input_modalities", "output_modalities")
        for modality in dig(entry, side) or []
        for price in dig(modality, "pricing") or []
        if dig(price, "type") in kinds and _PRICE.fullmatch(str(dig(price, "cost_usd")))
    ]


def _cost(usage: Any, listed: Mapping[str, Decimal]) -> Decimal:
    """What an answer costs by hand: the request, what was read from a cache, what was computed, what was made.

    All that was computed counts as written to the cache, unless the usage says how much of it was.
    """
    prompt, completion = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    cached = _count(usage, "prompt_tokens_details", "cached_tokens")
    told = dig(usage, "prompt_tokens_details", "cache_write_tokens")
    written = told if isinstance(told, int) else prompt - cached
    return (
        listed.get("request", Decimal())
        + cached * listed.get("input_cache_read", listed["prompt"])
        + written * listed.get("input_cache_write", listed["prompt"])
        + (prompt - cached - written) * listed["prompt"]
        + completion * listed["completion"]
    )


def _count(usage: Any, *path: str) -> int:
    found = dig(usage, *path)
    return found if isinstance(found, int) else 0


def _charged(usage: Any, listed: Mapping[str, Decimal]) -> str:
    """The evidence that what an answer says it costs is what the prices make of its counts."""
    given, exact = dig(usage, "cost"), _cost(usage, listed)
    if given is None:
        raise Unproven("`usage.cost` is not there, so that nothing can be compared")
    expect(isinstance(given, int | float | str), "`usage.cost` is no number")
    expect(abs(Decimal(str(given)) - exact) <= _NEAR, f"`usage.cost` is {clean(given, 40)}, and {exact} by hand")
    prompt, cached = _count(usage, "prompt_tokens"), _count(usage, "prompt_tokens_details", "cached_tokens")
    return f"{prompt} ({cached} cached) + {_count(usage, 'completion_tokens')} tokens cost {exact.normalize():f}"


async def cost_exact(subject: Subject) -> str:
    """What an answer says that it costs is computed from its usage and the listed prices: input, cache read, output."""
    listed = _listed(subject)
    expect({"prompt", "completion"} <= listed.keys(), "the price of prompt or completion is not listed")
    # A text of its own for each audit, so that the first request computes it.
    text = f"Log {time.time_ns()}. " + " ".join(f"Ship number {i} is at sea." for i in range(20))
    usages = [dig((await subject.chat(text, max_tokens=8)).json, "usage") for _ in range(2)]
    usages.append((await subject.chat_stream(STORY, max_tokens=16)).usage)
    found = [_charged(usage, listed) for usage in usages]
    return f"USD, also streamed: {'; '.join(dict.fromkeys(found))}"


async def price_cache_read(subject: Subject) -> str:
    """The price of tokens read from a cache is listed or published."""
    return await _stated(subject, "input_cache_read")


async def price_cache_write(subject: Subject) -> str:
    """The price of tokens written to a cache is listed or published."""
    return await _stated(subject, "input_cache_write")


async def _stated(subject: Subject, name: str) -> str:
    if isinstance(price := dig(subject.entry, "pricing", name), str):
        return f"pricing.{name} {clean(price, 30)} in the model list"
    address, prices = await _published(subject)
    if (price := prices.get(_OF_TOKENS[name])) is not None:
        return f"{_OF_TOKENS[name]} {clean(price, 30)} at {address}"
    raise Unsaid(f"neither the model list nor {address} has a price of its own for it: it is the prompt's")


async def price_images_made(subject: Subject) -> str:
    """Where images are made, their price is listed."""
    places = (dig(subject.entry, "output_modalities"), dig(subject.entry, "architecture", "output_modalities"))
    made = next((place for place in places if isinstance(place, list)), None)
    if made is None:
        raise Unsaid("the listing does not say what the model makes")
    if "image" not in made:
        return f"none are made: the output is {clean(', '.join(map(str, made)), 60)}"
    price = dig(subject.entry, "pricing", "image_output")
    expect(isinstance(price, str) and _PRICE.fullmatch(price), "pricing.image_output is not a plain decimal string")
    return f"image_output {clean(price, 30)}"


PROBES = named(
    prices_published, prices_equal, price_cache_read, price_cache_write, price_images_made, cost_exact,
)  # fmt: skip
