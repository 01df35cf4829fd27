"""Prices, rows and a reader of ledgers, for tests of what is charged."""

from __future__ import annotations

import datetime
import tempfile
from pathlib import Path

import apsw
from msgspec.structs import replace

from ocserve.accounts import pricing
from ocserve.accounts.ledger import Row
from ocserve.accounts.ledger_schema import now_us
from ocserve.accounts.pricing import Tariff

PRICES = """
[[price]]
model = "{model}"
prompt = "0.00000002"
completion = "0.00000006"
cached_prompt = "0.000000005"
request = "0.000001"
"""
# The same in picodollars.
PROMPT, COMPLETION, CACHED, REQUEST = 20_000, 60_000, 5_000, 1_000_000
TODAY = datetime.date(2026, 11, 22)


def priced(model: str = "tiny", text: str = PRICES) -> Tariff:
    """The tariff of a price list."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prices.toml"
        file.write_text(text.replace("{model}", model))
        return pricing.load(file)


def opened(number: int, *, key_id: str = "key") -> Row:
    """A row as it is at admission; its counts and cost will follow from its number."""
    return Row(
        id=f"id-{number}",
        request_id=f"req-{number}",
        key_id=key_id,
        model="tiny",
        route="/v1/chat/completions",
        admitted_us=now_us(),
        price_prompt=PROMPT,
        price_completion=COMPLETION,
    )


def settled(row: Row) -> Row:
    """The same row at its end."""
    number = int(row.id.partition("-")[2])
    prompt, completion = 1 + number % 97, number % 31
    cost = prompt * PROMPT + completion * COMPLETION
    return replace(
        row,
        outcome="completed",
        settled_us=now_us(),
        prompt_tokens=prompt,
        completion_tokens=completion,
        cost=cost,
    )


def rows(file: Path) -> list[Row]:
    """Everything in a ledger, after SQLite's own check of it."""
    connection = apsw.Connection(str(file), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        connection.set_busy_timeout(5000)
        return rows_of(connection)
    finally:
        connection.close()


def rows_of(connection: apsw.Connection) -> list[Row]:
    """The same of a connection."""
    assert connection.pragma("integrity_check") == "ok"
    names = Row.__struct_fields__
    found = connection.execute(f"SELECT {', '.join(names)} FROM requests ORDER BY rowid")
    return [Row(**dict(zip(names, values, strict=True))) for values in found]  # type: ignore[arg-type]


def unsound(connection: apsw.Connection) -> list[str]:
    """Which keys' sums are not those of the rows, of a ledger that has all its rows still."""
    found = connection.execute(
        "SELECT key_id FROM requests LEFT JOIN balances USING (key_id) LEFT JOIN "
        "(SELECT key_id, sum(cost) AS cost, sum(held) AS held FROM months GROUP BY key_id) AS months USING (key_id) "
        "GROUP BY key_id HAVING sum(requests.cost) <> balances.charged OR sum(requests.held) <> balances.held "
        "OR balances.charged <> months.cost OR balances.held <> months.held OR months.cost IS NULL"
    )
    return [f"the sums of {key_id} are not those of its rows" for (key_id,) in found]


def mismatches(found: list[Row], acknowledged: set[str]) -> list[str]:
    """What is wrong with a ledger: an acknowledged row that is missing or differs, a row twice, a sum that is off."""
    by_id = {row.id: row for row in found}
    wrong = [] if len(by_id) == len(found) else ["a row is there twice"]
    for row_id in acknowledged:
        row = by_id.get(row_id)
        if row is None or row.outcome != "completed":
            wrong.append(f"{row_id} was acknowledged and is {row and row.outcome}")
    for row in found:
        expected = settled(row)
        if row.outcome == "completed" and (row.prompt_tokens, row.completion_tokens, row.cost) != (
            expected.prompt_tokens,
            expected.completion_tokens,
            expected.cost,
        ):
            wrong.append(f"{row.id} differs")
        if row.outcome in ("open", "lost") and row.cost:
            wrong.append(f"{row.id} is charged though it never ended")
    return wrong
