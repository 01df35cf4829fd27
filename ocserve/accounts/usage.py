"""What the ledger says was used: sums by key, model and day, and the lines of an invoice. Reads only."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import apsw
import msgspec

from ocserve.accounts.ledger import LedgerError, connect, named_failures, transaction

By = Literal["day", "model", "key"]

_BUSY_MS = 5000
_EPOCH = datetime.date(1970, 1, 1)
_DAY_US = 86_400_000_000
_COLUMNS: dict[By, str] = {
    "day": f"date(admitted_us / {_DAY_US} * 86400, 'unixepoch')",
    "model": "model",
    "key": "key_id",
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
    def condition(self) -> tuple[str, dict[str, object]]:
        """As SQL, with its values."""
        values: dict[str, object] = {"since": 0, "until": 2**62, "key": self.key}
        if self.since is not None:
            values["since"] = (self.since - _EPOCH).days * _DAY_US
        if self.until is not None:
            values["until"] = ((self.until - _EPOCH).days + 1) * _DAY_US
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
    """One line of an invoice: so many of one kind at one price; `amount` and `price` are picodollars."""

    model: str
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
    with _reading(file) as connection:
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
        "SELECT model, count(*), sum(prompt_tokens - cached_tokens), sum(cached_tokens), sum(completion_tokens), "  # noqa: S608
        f"sum(images), sum(cost), {', '.join(_PRICES)} FROM requests "
        f"WHERE {condition} AND cost > 0 GROUP BY model, {', '.join(_PRICES)} ORDER BY model, min(admitted_us)"
    )
    with _reading(file) as connection:
        groups = connection.execute(query, values).fetchall()
    quantities: dict[tuple[str, str, int], int] = {}
    for model, *found in groups:
        counts, total, prices = found[: len(_KINDS)], found[len(_KINDS)], found[len(_KINDS) + 1 :]
        amount = 0
        for kind, count, price in zip(_KINDS, map(_whole, counts), map(_whole, prices), strict=True):
            amount += count * price
            item = str(model), kind, price
            quantities[item] = quantities.get(item, 0) + count
        if amount != total:
            raise LedgerError(f"the ledger {file} does not add up for {model}: costs are not what prices say")
    return [
        Line(model=model, kind=kind, quantity=quantity, price=price, amount=quantity * price)
        for (model, kind, price), quantity in sorted(quantities.items(), key=lambda each: each[0][0])
        if quantity and price
    ]


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
            connection.execute("VACUUM")
            connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        finally:
            connection.close()
    return deleted


def _whole(value: object) -> int:
    assert isinstance(value, int)
    return value


@contextmanager
def _reading(file: Path) -> Iterator[apsw.Connection]:
    if not file.exists():
        raise LedgerError(f"there is no ledger at {file}: nothing has been recorded yet")
    with named_failures(file):
        connection = apsw.Connection(str(file), flags=apsw.SQLITE_OPEN_READONLY)
        try:
            connection.set_busy_timeout(_BUSY_MS)
            yield connection
        finally:
            connection.close()
