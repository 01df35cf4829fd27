"""The prices as a page and as a document, in US dollars per million tokens: of today, announced ones, and of tiers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from ocserve.modelcard import DatedPrices, Prices
from ocserve.pages.frame import page, prose, table
from ocserve.pages.publication import Publication

_MILLION = 10**6
_TOKENS = {
    "prompt": "Input tokens",
    "completion": "Output tokens",
    "cached_prompt": "Input tokens read from the cache",
    "cache_write": "Input tokens computed and kept in the cache",
}
_PIECES = {"image": "Images, each beside its tokens", "request": "Requests, each"}

_UNITS = (
    "<p>US dollars (USD) per million tokens, unless it says for one. Each input token is charged once: one that was "
    f"computed as “{_TOKENS['cache_write']}”, one that was read as “{_TOKENS['cached_prompt']}”. Where these have no "
    f"price of their own, theirs is that of “{_TOKENS['prompt']}”.</p>"
)


# The prices of each model that hold now, and then those that are announced.
Lists = Mapping[str, Sequence[DatedPrices]]


@dataclass(frozen=True, slots=True)
class Terms:
    """What is charged beside the prices: whether for requests that are cancelled or fail, and all of it in words."""

    cancelled: bool
    failed: bool
    text: str


def document(models: Lists, terms: Terms, publication: Publication) -> dict[str, object]:
    """`GET /pricing` as JSON."""
    return {
        "currency": "USD",
        "unit": "per million tokens",
        "units": {"image": "per image", "request": "per request"},
        "models": [entry for name, prices in models.items() for entry in _entries(name, prices)],
        "policy": {
            "cancelled": "used" if terms.cancelled else "free",
            "failed": "used" if terms.failed else "free",
            "text": terms.text,
        },
        "payment": publication.texts.payment.markdown or None,
    }


def _entries(name: str, prices: Sequence[DatedPrices]) -> Iterator[dict[str, object]]:
    for dated in prices:
        (_, first), *tiers = dated.steps
        yield {
            "id": name,
            "prices": _amounts(first),
            "from": None if dated.since is None else dated.since.isoformat(),
            "announced": dated.announced,
            "tiers": [{"above": above, "prices": _amounts(step)} for above, step in tiers],
        }


def _amounts(prices: Prices) -> dict[str, str]:
    """Each kind's price; those that a price list leaves out are what is charged in their place."""
    return {
        **{kind: per_million(getattr(prices, kind) or prices.prompt) for kind in _TOKENS},
        **{kind: getattr(prices, kind) or "0" for kind in _PIECES},
    }


def per_million(dollars: str) -> str:
    """A price of one as that of a million, exact: `0.00000002` is `0.02`."""
    whole = format(Decimal(dollars) * _MILLION, "f")
    return whole.rstrip("0").rstrip(".") if "." in whole else whole


def html(models: Lists, terms: Terms, publication: Publication) -> bytes:
    """`GET /pricing` as a page."""
    parts = []
    for name, prices in models.items():
        for dated in prices:
            since = "" if dated.since is None else f" from {dated.since.isoformat()} on (UTC)"
            parts.append(f"<h2>{prose(name)}{', announced:' if dated.announced else ''}{since}</h2>{_table(dated)}")
    if not parts:
        parts.append("<p>No prices are published.</p>")
    else:
        parts.insert(0, _UNITS)
    parts.append(f"<h2>What is charged</h2><p>{prose(terms.text)}</p>")
    if publication.texts.payment:
        parts.append(f"<h2>Payment</h2>{publication.texts.payment.html}")
    return page("Pricing", "\n".join(parts), publication.links)


def _table(dated: DatedPrices) -> str:
    columns = [f"above {above:,} tokens a month" if above else "price" for above, _ in dated.steps]
    amounts = [_amounts(step) for _, step in dated.steps]
    rows = [
        (title, *(f"${column[kind]}" for column in amounts))
        for kind, title in (_TOKENS | _PIECES).items()
        if kind in _TOKENS or any(column[kind] != "0" for column in amounts)
    ]
    return table(("", *columns), rows)
