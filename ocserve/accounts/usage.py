"""What the ledger says was used: sums by key, model and day, and the lines of an invoice. Reads only."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import apsw
import msgspec

from ocserve.accounts import balances
from ocserve.accounts.balances import Credit, Standing
from ocserve.accounts.ledger_schema import DAY_US, LedgerError, connect, named_failures, reading, transaction

By = Literal["day", "model", "key", "tier"]

_EPOCH = datetime.date(1970, 1, 1)
_COLUMNS: dict[By, str] = {
    "day": f"date(admitted_us / {DAY_US} * 86400, 'unixepoch')",
    "model": "model",
    "key": "key_id",
    "tier": "tier",
}
_COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "images")
# What an invoice names, and where the price of each stands. Input tokens are those that were computed.
_KINDS = ("requests", "input tokens", "cached input tokens", "output tokens", "images")
_PRICES = ("price_request", "price_cache_write", "price_cached_prompt", "price_completion", "price_image")


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """Which rows: admitted from the first day to the last, both included (UTC), of one key or of all."""

    since: datetime.date | None = None
    until: datetime.date | None = None
    key: str | None = None

    @property
    def moments_us(self) -> tuple[int, int]:
        """When it begins and when it is over, microseconds since 1970."""
        since = 0 if self.since is None else (self.since - _EPOCH).days * DAY_US
        return since, 2**62 if self.until is None else ((self.until - _EPOCH).days + 1) * DAY_US

    @property
    def condition(self) -> tuple[str, dict[str, object]]:
        """As SQL, with its values."""
        since, until = self.moments_us
        values: dict[str, object] = {"since": since, "until": until, "key": self.key}
        return "admitted_us >= :since AND admitted_us < :until AND (:key IS NULL OR key_id = :key)", values


class Sum(msgspec.Struct, frozen=True, kw_only=True):
    """What was used under one heading, a value for each thing summed by. `cost` is picodollars.

    `requests` are all; `completed`, `cancelled`, `failed`, `lost` (with a server that died) and `running` are parts.
    """

    heading: tuple[str, ...]
    requests: int
    completed: int
    cancelled: int
    failed: int
    lost: int
    running: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    images: int
    cost: int


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line of an invoice: so many of one kind at one price; `amount` and `price` are picodollars.

    `tier` is how many tokens of the month were needed for the price.
    """

    model: str
    tier: int
    kind: str
    quantity: int
    price: int
    amount: int


def sums(file: Path, by: Sequence[By], span: Span) -> list[Sum]:
    """The sums of what `span` has, in the order of their headings; `LedgerError` if there is no ledger to read."""
    condition, values = span.condition
    headings = [_COLUMNS[each] for each in by] or ["'all'"]
    outcomes = ("completed", "cancelled", "failed", "lost", "open")
    fields = [
        "count(*)",
        *(f"sum(outcome = '{outcome}')" for outcome in outcomes),
        *(f"sum({name})" for name in _COUNTS),
        "sum(cost)",
    ]
    places = ", ".join(str(number + 1) for number in range(len(headings)))
    query = (
        f"SELECT {', '.join([*headings, *fields])} FROM requests "  # noqa: S608 - of our own words only
        f"WHERE {condition} GROUP BY {places} ORDER BY {places}"
    )
    names = Sum.__struct_fields__[1:]
    with reading(file) as connection:
        return [
            Sum(
                heading=tuple(map(str, row[: len(headings)])),
                **dict(zip(names, row[len(headings) :], strict=True)),
            )
            for row in connection.execute(query, values)
        ]


def invoice(file: Path, span: Span) -> list[Line]:
    """What `span` owes, by model, price and kind. The amounts add up to the rows' costs, or this raises."""
    condition, values = span.condition
    query = (
        "SELECT model, tier, count(*), sum(prompt_tokens - cached_tokens), sum(cached_tokens), sum(completion_tokens), "  # noqa: S608
        f"sum(images), sum(cost), {', '.join(_PRICES)} FROM requests "
        f"WHERE {condition} AND cost > 0 GROUP BY model, tier, {', '.join(_PRICES)} ORDER BY model, min(admitted_us)"
    )
    with reading(file) as connection:
        groups = connection.execute(query, values).fetchall()
    quantities: dict[tuple[str, int, str, int], int] = {}
    for model, tier, *found in groups:
        counts, total, prices = found[: len(_KINDS)], found[len(_KINDS)], found[len(_KINDS) + 1 :]
        amount = 0
        for kind, count, price in zip(_KINDS, map(_whole, counts), map(_whole, prices), strict=True):
            amount += count * price
            item = str(model), _whole(tier), kind, price
            quantities[item] = quantities.get(item, 0) + count
        if amount != total:
            raise LedgerError(f"the ledger {file} does not add up for {model}: costs are not what prices say")
    return [
        Line(model=model, tier=tier, kind=kind, quantity=quantity, price=price, amount=quantity * price)
        for (model, tier, kind, price), quantity in sorted(quantities.items(), key=lambda each: each[0][:2])
        if quantity and price
    ]


def credited(file: Path, span: Span) -> list[Credit]:
    """What was credited on the days of `span`; raises `LedgerError`."""
    return balances.credits_of(file, *span.moments_us, span.key)


def standings(file: Path, span: Span) -> dict[str, Standing]:
    """How every key stands that was ever credited or charged, or that of `span`, by its id; raises `LedgerError`."""
    return balances.standings(file, None if span.key is None else [span.key])


def has_key(file: Path, key_id: str) -> bool:
    """Whether anything is kept of a key: requests, credits or a balance; raises `LedgerError`."""
    with reading(file) as connection:
        return any(
            connection.execute(f"SELECT 1 FROM {table} WHERE key_id = ? LIMIT 1", (key_id,)).fetchone()  # noqa: S608
            for table in ("requests", "balances", "credits")
        )


def purge(file: Path, span: Span) -> int:
    """Delete the rows of `span` for good, from free pages and the log too; how many they were. Raises `LedgerError`."""
    condition, values = span.condition
    with named_failures(file):
        connection = connect(file)
        try:
            connection.pragma("secure_delete", "ON")
            with transaction(connection):
                connection.execute(f"DELETE FROM requests WHERE {condition} AND outcome <> 'open'", values)  # noqa: S608
                deleted = connection.changes()
                if span.key is not None and span.since is None and span.until is None:
                    balances.forget_key(connection, span.key)
            connection.execute("VACUUM")
            connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        finally:
            connection.close()
    return deleted


def _whole(value: object) -> int:
    assert isinstance(value, int)
    return value
