"""What tokens cost: decimal strings become integers here, and nothing is ever rounded.

The unit is the picodollar, 1e-12 US dollars: a millionth of a dollar for a million tokens is one of them, and a price
that is finer is refused. A row's cost fits SQLite's 64 bits up to nine million dollars. The price list is a TOML file:

    [[price]]
    model = "smollm2:135m"       # the served name
    from = 2026-12-01            # the first day it holds, UTC; without it, always
    prompt = "0.00000002"        # US dollars per token; also completion, cached_prompt, cache_write
    completion = "0.00000006"    # and per piece: image, request

    [[price.tier]]               # for a key that has used so many tokens of the model in the calendar month, UTC
    above = 1_000_000_000
    completion = "0.00000004"    # what is not named stays
"""

from __future__ import annotations

import datetime
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from ocserve.config import ConfigError
from ocserve.decoding import resolved
from ocserve.files import only_regular
from ocserve.generation import Usage
from ocserve.modelcard import KINDS, DatedPrices, Prices, Tier

PICODOLLARS = 10**12
# What is charged at most for a token or a piece: more is a misplaced decimal point, and a cost would overflow.
_MOST = PICODOLLARS
_AMOUNT = re.compile(r"[0-9]{1,12}(\.[0-9]{1,18})?", re.ASCII)
_PLACE = re.compile(r" - at `\$\.price\[([0-9]+)\]\.?(.*)`")  # in msgspec's sentences
_SUM = re.compile(r"-?[0-9]{1,7}(\.[0-9]{1,12})?", re.ASCII)


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """A model's prices in picodollars: for a token of each kind, for an image and for a request.

    Prompt tokens that were computed cost `cache_write`, since the cache keeps them; those that were read from it cost
    `cached_prompt`. Where a price list names neither, both are `prompt`.
    """

    prompt: int
    cached_prompt: int
    cache_write: int
    completion: int
    image: int
    request: int

    @staticmethod
    def of(prices: Prices) -> Rates:
        """The rates of a price list's entry; raises `ValueError` for a price that is too fine or absurd."""
        prompt = picodollars(prices.prompt)
        return Rates(
            prompt=prompt,
            cached_prompt=prompt if prices.cached_prompt is None else picodollars(prices.cached_prompt),
            cache_write=prompt if prices.cache_write is None else picodollars(prices.cache_write),
            completion=picodollars(prices.completion),
            image=picodollars(prices.image or "0"),
            request=picodollars(prices.request or "0"),
        )

    def cost(self, usage: Usage, images: int) -> int:
        """What a request costs in picodollars; one whose prompt was never begun costs nothing."""
        if not usage.prompt_tokens:
            return 0
        return (
            self.request
            + images * self.image
            + usage.cached_tokens * self.cached_prompt
            + (usage.prompt_tokens - usage.cached_tokens) * self.cache_write
            + usage.completion_tokens * self.completion
        )

    def most(self, prompt_tokens: int, completion_tokens: int, images: int) -> int:
        """What a request of at most so many tokens costs at most, whatever is found in the cache."""
        dearest = max(self.cached_prompt, self.cache_write)
        return self.request + images * self.image + prompt_tokens * dearest + completion_tokens * self.completion


def picodollars(dollars: str) -> int:
    """`dollars`, digits with at most one point, as an integer; raises `ValueError`."""
    exact = Decimal(dollars) * PICODOLLARS
    if exact != exact.to_integral_value():
        raise ValueError(f"{dollars} is finer than 0.000000000001 dollars")
    if exact > _MOST:
        raise ValueError(f"{dollars} is more than a dollar for one")
    return int(exact)


def amount(dollars: str) -> int:
    """A sum of money, such as `25.00`, in picodollars; raises `ValueError`."""
    if not _SUM.fullmatch(dollars):
        raise ValueError("expected US dollars such as 25.00, below ten million and with at most twelve decimals")
    return int(Decimal(dollars) * PICODOLLARS)


def dollars(picodollars: int) -> str:
    """The exact decimal, with two places at least: `0.0000042`, `12.50`."""
    sign, (whole, rest) = "-" if picodollars < 0 else "", divmod(abs(picodollars), PICODOLLARS)
    return f"{sign}{whole}.{f'{rest:012d}'.rstrip('0').ljust(2, '0')}"


class _Entry(Prices, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"since": "from"}):
    model: str
    since: datetime.date = datetime.date.min
    tiers: tuple[Tier, ...] = msgspec.field(default=(), name="tier")

    @property
    def called(self) -> str:
        """How a mistake in it is told."""
        return _called(self.model, None if self.since == datetime.date.min else self.since)


@resolved
class _PriceList(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    price: tuple[_Entry, ...] = ()


class Changes(msgspec.Struct, frozen=True):
    """Schedules by model, before and after; of how many `more` models they have changed as well."""

    schedules: dict[str, tuple[tuple[DatedPrices, ...], ...]]
    more: int


class Tariff:
    """The prices of every model, each from its day on. Raises `ValueError` for what no request can be charged."""

    def __init__(self, entries: Iterable[_Entry] = ()) -> None:
        self._entries: dict[str, list[tuple[datetime.date, Prices]]] = {}
        for entry in sorted(entries, key=lambda each: each.since):
            prices = Prices(**{name: getattr(entry, name) for name in Prices.__struct_fields__})
            bounds = [tier.above for tier in prices.tiers]
            if bounds != sorted(set(bounds)):
                raise ValueError(f"{entry.called}: the tiers do not begin above ever more tokens")
            for above, step in prices.steps:
                try:
                    Rates.of(step)
                except ValueError as error:
                    tier = f", above {above} tokens" if above else ""
                    raise ValueError(f"{entry.called}{tier}: {error}") from None
            self._entries.setdefault(entry.model, []).append((entry.since, prices))
        # Whether any price depends on how much a key has used.
        self.tiered = any(prices.tiers for dated in self._entries.values() for _, prices in dated)

    def __bool__(self) -> bool:
        return bool(self._entries)

    @property
    def models(self) -> tuple[str, ...]:
        """The names that have a price on some day."""
        return tuple(self._entries)

    def prices(self, model: str, day: datetime.date) -> Prices | None:
        """What a model's listing says on `day`; None: nothing is charged."""
        return next((prices for since, prices in reversed(self._entries.get(model, ())) if since <= day), None)

    def schedule(self, model: str, day: datetime.date) -> tuple[DatedPrices, ...]:
        """The prices of a model that hold on `day`, and after them those of the days to come."""
        entries = [(entry[0], entry[1]) for entry in self._entries.get(model, ())]
        past = sum(since <= day for since, _ in entries)
        return tuple(
            DatedPrices(since=None if since == datetime.date.min else since, announced=since > day, steps=prices.steps)
            for since, prices in entries[max(0, past - 1) :]
        )

    def changes(self, after: Tariff, day: datetime.date, most: int) -> Changes:
        """What `after` has otherwise, of at most so many models."""
        found: dict[str, tuple[tuple[DatedPrices, ...], ...]] = {}
        more = 0
        for model in sorted({*self._entries, *after._entries}):
            schedules = (self.schedule(model, day), after.schedule(model, day))
            if schedules[0] == schedules[1]:
                continue
            if len(found) < most:
                found[model] = schedules
            else:
                more += 1
        return Changes(found, more)

    def rates(self, model: str, day: datetime.date) -> Rates | None:
        """What a request to a model that is admitted on `day` is charged before any tier; None: nothing."""
        found = self.prices(model, day)
        return None if found is None else Rates.of(found)


def with_own(listed: Prices | None, own: Mapping[str, str]) -> Prices | None:
    """What the holder of a key is charged: the key's `own` prices by kind, in every tier, beside what is `listed`."""
    if not own:
        return listed
    listed = listed or Prices(prompt="0", completion="0")
    return replace(listed, **own, tiers=tuple(_without(tier, own) for tier in listed.tiers))


def _without(tier: Tier, own: Mapping[str, str]) -> Tier:
    return replace(tier, **dict.fromkeys(own))


def check_own(own: Mapping[str, str]) -> None:
    """Raise `ValueError` for prices of a key that no request could be charged."""
    if unknown := sorted(own.keys() - set(KINDS)):
        raise ValueError(f"there is no price of {unknown[0]}: {', '.join(KINDS)}")
    for kind, price in own.items():
        if not _AMOUNT.fullmatch(price):
            raise ValueError(f"the price of {kind} is no decimal number, such as 0.0000002")
        picodollars(price)


def load(file: Path | None) -> Tariff:
    """The price list in `file`, empty without one. Raises `ConfigError`."""
    if file is None:
        return Tariff()
    where = f"billing.prices: {file}"
    try:
        with open(file, encoding="utf-8", opener=only_regular) as source:
            document = tomllib.loads(source.read())
        entries = _entries(document)
        twice = Counter(each.called for each in entries)
        if double := next((called for called, count in twice.items() if count > 1), None):
            raise ValueError(f"{double}: a model has two prices from the same day")
        return Tariff(entries)
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from None
    except ValueError as error:  # of TOML, of types, of prices
        raise ConfigError(
            f"{where}: {error}", 'prices are texts such as "0.00000002", days such as 2026-12-01'
        ) from None


def _entries(document: dict[str, Any]) -> tuple[_Entry, ...]:
    """The entries of a price list; raises `ValueError` that names the one in which a mistake is."""
    try:
        return msgspec.convert(document, _PriceList).price
    except msgspec.ValidationError as error:
        if (place := _PLACE.search(str(error))) is None:
            raise
        entry = document["price"][int(place[1])]
        if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
            raise
        within = f" - at `{place[2]}`" if place[2] else ""
        raise ValueError(f"{_called(entry['model'], entry.get('from'))}: {_PLACE.sub(within, str(error))}") from None


def _called(model: str, since: object) -> str:
    return f"the price of {model}{'' if since is None else f' from {since}'}"
