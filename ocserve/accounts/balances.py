"""What keys have been credited and charged: the ledger's sums, read and changed inside its transactions.

A key's balance is its credits less the costs of its settled requests, exact and in picodollars. What running requests
may cost at most is held beside that, so that neither a balance goes below zero nor a month's spending above its cap,
however many run at a time. A request belongs to the month (UTC) in which it was admitted.
"""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import apsw
import msgspec
from msgspec.structs import replace

from ocserve.accounts.ledger_schema import (
    HOUR_US,
    REBUILT,
    RECENT_HOURS,
    connect,
    named_failures,
    now_us,
    reading,
    transaction,
)
from ocserve.accounts.pricing import dollars
from ocserve.decoding import resolved

# Sums stay below SQLite's 2**63, beyond which it would no longer count in integers: some four million dollars.
MOST = 2**62


class Declined(Exception):
    """A credit that cannot be made; the text says why. `reused`: its idempotency key names another one."""

    def __init__(self, reason: str, *, reused: bool = False) -> None:
        super().__init__(reason)
        self.reused = reused


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """What bounds a key's spending: its balance if it is `prepaid`, and picodollars in a month."""

    prepaid: bool = False
    spend_cap: int | None = None

    def __bool__(self) -> bool:
        return self.prepaid or self.spend_cap is not None


# A key that may spend what it likes.
UNBOUNDED = Account()


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """A key's money in picodollars: all that was credited and charged, what running requests hold, and of the month
    what was charged and is held. `month_tokens` are those of one model that settled requests of the month used.
    """

    month: str
    credited: int = 0
    charged: int = 0
    held: int = 0
    month_charged: int = 0
    month_held: int = 0
    month_tokens: int = 0

    @property
    def balance(self) -> int:
        return self.credited - self.charged

    @property
    def available(self) -> int:
        """What of the balance is not held."""
        return self.balance - self.held

    def left(self, account: Account) -> int | None:
        """What a request may cost at most; None: anything."""
        bounds = [self.available] if account.prepaid else []
        if account.spend_cap is not None:
            bounds.append(account.spend_cap - self.month_charged - self.month_held)
        return min(bounds, default=None)

    def with_hold(self, held: int) -> Standing:
        """As it is once so much more is held."""
        return replace(self, held=self.held + held, month_held=self.month_held + held)


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a request may spend what it was to hold, and how the key stands then."""

    standing: Standing
    granted: bool


@resolved
class Credit(msgspec.Struct, frozen=True, kw_only=True):
    """What was added to a key's balance, in picodollars; less than zero as a correction and only so.

    `balance` is what it then was. `made_by` is whoever asked; the same `idempotency_key` of theirs is credited once.
    """

    key_id: str
    amount: int
    note: str = ""
    correction: bool = False
    made_by: str
    idempotency_key: str | None = None
    id: str = msgspec.field(default_factory=lambda: f"credit-{secrets.token_hex(8)}")
    credited_us: int = msgspec.field(default_factory=now_us)
    balance: int = 0


@resolved
class Hour(msgspec.Struct, frozen=True, kw_only=True):
    """What a key used of a model in one hour (hours since 1970): requests admitted, tokens used or reserved."""

    key_id: str
    hour: int
    model: str
    requests: int
    tokens: int


_CREDIT = Credit.__struct_fields__


def month_of(moment_us: int) -> str:
    """The month of a moment, UTC: `2026-11`."""
    return f"{datetime.datetime.fromtimestamp(moment_us // 1_000_000, datetime.UTC):%Y-%m}"


def month_end(month: str) -> datetime.datetime:
    """When a month ends."""
    year, number = map(int, month.split("-"))
    return datetime.datetime(year + number // 12, number % 12 + 1, 1, tzinfo=datetime.UTC)


def standing(connection: apsw.Connection, key_id: str, month: str, model: str = "") -> Standing:
    """How a key stands; everything is zero for one that was never credited or charged."""
    account = connection.execute(
        "SELECT credited, charged, held FROM balances WHERE key_id = ?", (key_id,)
    ).fetchone() or (0, 0, 0)
    of_month = connection.execute(
        "SELECT total.cost, total.held, coalesce(own.tokens, 0) FROM "
        "(SELECT coalesce(sum(cost), 0) AS cost, coalesce(sum(held), 0) AS held FROM months "
        "WHERE key_id = :key AND month = :month) AS total "
        "LEFT JOIN months AS own ON own.key_id = :key AND own.month = :month AND own.model = :model",
        {"key": key_id, "month": month, "model": model},
    ).fetchone()
    credited, charged, held = _integers(account)
    month_charged, month_held, tokens = _integers(of_month or ())
    return Standing(
        month=month,
        credited=credited,
        charged=charged,
        held=held,
        month_charged=month_charged,
        month_held=month_held,
        month_tokens=tokens,
    )


def credit(connection: apsw.Connection, wanted: Credit) -> Credit:
    """Write a credit, or find that it was written before; raises `Declined`."""
    before = connection.execute(
        f"SELECT {', '.join(_CREDIT)} FROM credits "  # noqa: S608 - of our own words only
        "WHERE id = :id OR (made_by = :made_by AND idempotency_key = :key)",
        {"id": wanted.id, "made_by": wanted.made_by, "key": wanted.idempotency_key},
    ).fetchone()
    if before is not None:
        found = _credit(before)
        if _what(found) != _what(wanted):
            raise Declined("This Idempotency-Key was used for another credit.", reused=True)
        return found
    now = standing(connection, wanted.key_id, month_of(wanted.credited_us))
    if not wanted.amount:
        raise Declined("A credit of nothing is none.")
    if wanted.amount < 0 and not wanted.correction:
        raise Declined("A credit of less than nothing is taken only where it is said to be a correction.")
    if wanted.amount > 0 and wanted.correction:
        raise Declined("A correction takes back what was credited: its amount is less than nothing.")
    if wanted.amount < 0 and now.available + wanted.amount < 0:
        raise Declined(_too_much(now))
    if now.credited + wanted.amount > MOST:
        raise Declined("All credits of a key together cannot be that much.")
    made = replace(wanted, balance=now.balance + wanted.amount)
    connection.execute(
        f"INSERT INTO credits ({', '.join(_CREDIT)}) VALUES (?{', ?' * (len(_CREDIT) - 1)})",  # noqa: S608
        tuple(getattr(made, name) for name in _CREDIT),
    )
    return made


def tally(connection: apsw.Connection, key_id: str, hour: int, model: str) -> None:
    """Count a request that no row tells of."""
    connection.execute(
        "INSERT INTO hours VALUES (?, ?, ?, 1, 0) "
        "ON CONFLICT (key_id, hour, model) DO UPDATE SET requests = requests + 1",
        (key_id, hour, model),
    )


def hours(connection: apsw.Connection) -> list[Hour]:
    """What each key used in each of the last hours."""
    since = now_us() // HOUR_US - RECENT_HOURS
    found = connection.execute(
        "SELECT key_id, hour, model, requests, tokens FROM hours WHERE hour >= ? ORDER BY hour", (since,)
    )
    return [msgspec.convert(dict(zip(Hour.__struct_fields__, row, strict=True)), Hour) for row in found]


def forget(connection: apsw.Connection, *, before_hour: int, before_month: str) -> None:
    """Delete sums that nothing asks for any more. Balances stay."""
    connection.execute("DELETE FROM hours WHERE hour < ?", (before_hour,))
    connection.execute("DELETE FROM months WHERE month < ? AND held = 0", (before_month,))


def forget_key(connection: apsw.Connection, key_id: str) -> None:
    """Delete all that is known of a key's money but what its rows say: what runs keeps what it holds."""
    for table in ("credits", "balances", "months", "hours"):
        connection.execute(f"DELETE FROM {table} WHERE key_id = ?", (key_id,))  # noqa: S608
    for statement in REBUILT:  # what settles later changes these sums, so they have to be there
        connection.execute(statement, (key_id,))


# From here on for commands, each with a connection of its own


def add_credit(file: Path, wanted: Credit) -> Credit:
    """Write a credit beside whatever server uses the file; raises `Declined` and `LedgerError`."""
    with named_failures(file):
        connection = connect(file)
        try:
            with transaction(connection):
                return credit(connection, wanted)
        finally:
            connection.close()


def credits_of(file: Path, since_us: int, until_us: int, key_id: str | None) -> list[Credit]:
    """The credits from one moment to before another, of one key or of all, in order; raises `LedgerError`."""
    with reading(file) as connection:
        found = connection.execute(
            f"SELECT {', '.join(_CREDIT)} FROM credits WHERE credited_us >= :since AND credited_us < :until "  # noqa: S608
            "AND (:key IS NULL OR key_id = :key) ORDER BY credited_us, rowid",
            {"since": since_us, "until": until_us, "key": key_id},
        )
        return [_credit(row) for row in found]


def standings(file: Path, key_ids: Iterable[str] | None = None, month: str | None = None) -> dict[str, Standing]:
    """How some keys stand, or all that were ever credited or charged; raises `LedgerError`."""
    month = month or month_of(now_us())
    with reading(file) as connection:
        known = (str(row[0]) for row in connection.execute("SELECT key_id FROM balances ORDER BY key_id").fetchall())
        return {key_id: standing(connection, key_id, month) for key_id in (known if key_ids is None else key_ids)}


def _too_much(now: Standing) -> str:
    return (
        f"The balance is {dollars(now.balance)} US dollars, of which {dollars(now.held)} is held for running requests: "
        f"at most {dollars(max(0, now.available))} can be taken back."
    )


def _what(each: Credit) -> tuple[str, int, str, bool]:
    return each.key_id, each.amount, each.note, each.correction


def _credit(row: Iterable[object]) -> Credit:
    return msgspec.convert(dict(zip(_CREDIT, row, strict=True)), Credit, strict=False)


def _integers(row: Iterable[object]) -> tuple[int, ...]:
    return tuple(cast(int, value) for value in row)
