"""The ledger's file: its tables, version by version, and connections that write to it.

Beside the rows of requests there are three tables of sums. Triggers keep them, in the transaction that changes a row,
whoever changes it: a row that is written again counts its difference, and one that is deleted for its age stays in the
sums. So a start reads no rows, retention takes nobody's balance, and several daemons see one another's spending.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

import apsw

from ocserve import files

_BUSY_MS = 5000  # how long another process may hold the file
_LARGEST_WAL = 8 * 1024 * 1024
_NEWER = "it was written by a newer version of ocserve"
HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US
RECENT_HOURS = 72  # of which it is known how much of the day limits each key used

# What the triggers and the step to their version have in common. Microseconds since 1970 become months and hours.
_MONTH = "strftime('%Y-%m', {row}admitted_us / 1000000, 'unixepoch')"
_HOUR = f"{{row}}admitted_us / {HOUR_US}"
# What is settled is counted by what was used; until then, and of what was lost for good, by what was reserved.
_TAKEN = "max({row}reserved_tokens, {row}prompt_tokens + {row}completion_tokens)"
_SETTLED = "({row}outcome IN ('completed', 'cancelled', 'failed')) * ({row}prompt_tokens + {row}completion_tokens)"

# Each brings a file from the version before to its own; a released one is never changed.
MIGRATIONS = (
    """
    CREATE TABLE requests (
        id TEXT NOT NULL UNIQUE,
        request_id TEXT NOT NULL,
        key_id TEXT NOT NULL,
        model TEXT NOT NULL,
        route TEXT NOT NULL,
        process TEXT NOT NULL,
        admitted_us INTEGER NOT NULL,
        settled_us INTEGER,
        outcome TEXT NOT NULL CHECK (outcome IN ('open', 'completed', 'cancelled', 'failed', 'lost')),
        prompt_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL,
        image_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        reasoning_tokens INTEGER NOT NULL,
        images INTEGER NOT NULL,
        price_prompt INTEGER,
        price_cached_prompt INTEGER,
        price_cache_write INTEGER,
        price_completion INTEGER,
        price_image INTEGER,
        price_request INTEGER,
        cost INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX requests_admitted ON requests (admitted_us);
    CREATE INDEX requests_open ON requests (process) WHERE outcome = 'open';
    """,
    f"""
    ALTER TABLE requests ADD COLUMN held INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE requests ADD COLUMN reserved_tokens INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE requests ADD COLUMN tier INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE credits (
        id TEXT NOT NULL UNIQUE,
        key_id TEXT NOT NULL,
        amount INTEGER NOT NULL,
        balance INTEGER NOT NULL,
        correction INTEGER NOT NULL CHECK (correction IN (0, 1)),
        note TEXT NOT NULL,
        made_by TEXT NOT NULL,
        idempotency_key TEXT,
        credited_us INTEGER NOT NULL,
        UNIQUE (made_by, idempotency_key)
    ) STRICT;
    CREATE INDEX credits_of_key ON credits (key_id, credited_us);
    CREATE TABLE balances (
        key_id TEXT NOT NULL PRIMARY KEY,
        credited INTEGER NOT NULL,
        charged INTEGER NOT NULL,
        held INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE months (
        key_id TEXT NOT NULL,
        month TEXT NOT NULL,
        model TEXT NOT NULL,
        tokens INTEGER NOT NULL,
        cost INTEGER NOT NULL,
        held INTEGER NOT NULL,
        PRIMARY KEY (key_id, month, model)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE hours (
        key_id TEXT NOT NULL,
        hour INTEGER NOT NULL,
        model TEXT NOT NULL,
        requests INTEGER NOT NULL,
        tokens INTEGER NOT NULL,
        PRIMARY KEY (key_id, hour, model)
    ) STRICT, WITHOUT ROWID;
    INSERT INTO balances SELECT key_id, 0, sum(cost), 0 FROM requests GROUP BY key_id;
    INSERT INTO months
        SELECT key_id, {_MONTH.format(row="")}, model, sum({_SETTLED.format(row="")}), sum(cost), 0
        FROM requests GROUP BY 1, 2, 3;
    INSERT INTO hours
        SELECT key_id, {_HOUR.format(row="")}, model, count(*), sum({_TAKEN.format(row="")})
        FROM requests
        WHERE admitted_us / {HOUR_US} >= (SELECT max(admitted_us) FROM requests) / {HOUR_US} - {RECENT_HOURS}
        GROUP BY 1, 2, 3;
    CREATE TRIGGER requests_inserted AFTER INSERT ON requests BEGIN
        INSERT INTO balances VALUES (new.key_id, 0, new.cost, new.held)
            ON CONFLICT (key_id) DO UPDATE SET charged = charged + excluded.charged, held = held + excluded.held;
        INSERT INTO months VALUES (
            new.key_id, {_MONTH.format(row="new.")}, new.model, {_SETTLED.format(row="new.")}, new.cost, new.held
        ) ON CONFLICT (key_id, month, model) DO UPDATE SET
            tokens = tokens + excluded.tokens, cost = cost + excluded.cost, held = held + excluded.held;
        INSERT INTO hours VALUES (
            new.key_id, {_HOUR.format(row="new.")}, new.model, 1, {_TAKEN.format(row="new.")}
        ) ON CONFLICT (key_id, hour, model) DO UPDATE SET
            requests = requests + 1, tokens = tokens + excluded.tokens;
    END;
    CREATE TRIGGER requests_updated
        AFTER UPDATE OF outcome, prompt_tokens, completion_tokens, cost, held, reserved_tokens ON requests
    BEGIN
        UPDATE balances SET charged = charged + new.cost - old.cost, held = held + new.held - old.held
            WHERE key_id = new.key_id;
        UPDATE months SET
            tokens = tokens + {_SETTLED.format(row="new.")} - {_SETTLED.format(row="old.")},
            cost = cost + new.cost - old.cost,
            held = held + new.held - old.held
            WHERE key_id = new.key_id AND month = {_MONTH.format(row="new.")} AND model = new.model;
        UPDATE hours SET tokens = tokens + {_TAKEN.format(row="new.")} - {_TAKEN.format(row="old.")}
            WHERE key_id = new.key_id AND hour = {_HOUR.format(row="new.")} AND model = new.model;
    END;
    CREATE TRIGGER credits_inserted AFTER INSERT ON credits BEGIN
        INSERT INTO balances VALUES (new.key_id, new.amount, 0, 0)
            ON CONFLICT (key_id) DO UPDATE SET credited = credited + excluded.credited;
    END;
    """,  # noqa: S608 - of our own words only
)


# The sums of a key that has none, from the rows that it has.
REBUILT = (
    "INSERT INTO balances SELECT key_id, 0, sum(cost), sum(held) FROM requests WHERE key_id = ? GROUP BY 1",
    f"INSERT INTO months SELECT key_id, {_MONTH.format(row='')}, model, sum({_SETTLED.format(row='')}), "  # noqa: S608
    "sum(cost), sum(held) FROM requests WHERE key_id = ? GROUP BY 1, 2, 3",
    f"INSERT INTO hours SELECT key_id, {_HOUR.format(row='')}, model, count(*), sum({_TAKEN.format(row='')}) "  # noqa: S608
    "FROM requests WHERE key_id = ? GROUP BY 1, 2, 3",
)


class LedgerError(Exception):
    """The ledger cannot be used; the text names the file and says why."""


@contextmanager
def transaction(connection: apsw.Connection) -> Iterator[None]:
    """All of it is on disk afterwards, or nothing of it ever was."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(apsw.Error):
            if connection.in_transaction:  # SQLite has rolled back on its own after some failures
                connection.execute("ROLLBACK")
        raise


def connect(file: Path, vfs: str | None = None) -> apsw.Connection:
    """A connection that writes, to a file that only this user may read; made, or brought to this version, if need be.

    Raises `apsw.Error`, `OSError` and `LedgerError`.
    """
    if not file.exists():
        _make(file)
    connection = apsw.Connection(str(file), flags=apsw.SQLITE_OPEN_READWRITE, vfs=vfs)
    try:
        connection.set_busy_timeout(_BUSY_MS)
        if connection.pragma("journal_mode", "wal") != "wal":
            raise LedgerError("its disk cannot hold a write-ahead log; it must be a local one")
        for pragma, value in {
            "synchronous": "FULL",  # a commit is on disk when it returns
            "fullfsync": "ON",  # on macOS too
            "wal_autocheckpoint": 0,
            "journal_size_limit": _LARGEST_WAL,
            "trusted_schema": "OFF",
            "cache_size": -512,  # KiB; rows are written and not read again
        }.items():
            connection.pragma(pragma, value)
        _migrate(connection)
    except BaseException:
        connection.close(True)
        raise
    return connection


@contextmanager
def reading(file: Path) -> Iterator[apsw.Connection]:
    """A connection that only reads; raises `LedgerError`, also for a file of another version, which stays as it is."""
    if not file.exists():
        raise LedgerError(f"there is no ledger at {file}: nothing has been recorded yet")
    with named_failures(file):
        connection = apsw.Connection(str(file), flags=apsw.SQLITE_OPEN_READONLY)
        try:
            connection.set_busy_timeout(_BUSY_MS)
            if connection.pragma("user_version") != len(MIGRATIONS):
                raise LedgerError("it is of another version of ocserve; a server of this one brings it to its own")
            yield connection
        finally:
            connection.close()


def check(file: Path) -> None:
    """Raise `LedgerError` for a file that a server of this version could not use; nothing is made or brought to it."""
    with named_failures(file):
        # SQLite keeps further files beside it.
        if reason := files.obstacle_to(file) or files.obstacle_in(file.parent):
            raise LedgerError(reason)
        if not file.exists():
            return
        connection = apsw.Connection(str(file), flags=apsw.SQLITE_OPEN_READONLY)
        try:
            connection.set_busy_timeout(_BUSY_MS)
            if cast(int, connection.pragma("user_version")) > len(MIGRATIONS):
                raise LedgerError(_NEWER)
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        finally:
            connection.close()


def _make(file: Path) -> None:
    """An empty file for this user only (SQLite gives its further files the same mode) that no power cut takes away."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):  # another process was first
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    if os.name == "posix":
        for folder in (file.parent, file.parent.parent):
            entries = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(entries)
            finally:
                os.close(entries)


def _migrate(connection: apsw.Connection) -> None:
    """Bring the file to this version, each step whole or not at all."""
    for version, script in enumerate(MIGRATIONS, start=1):
        if connection.pragma("user_version") >= version:
            continue
        with transaction(connection):
            if connection.pragma("user_version") < version:  # another process may have been first
                connection.execute(script)
                connection.pragma("user_version", version)
    if connection.pragma("user_version") > len(MIGRATIONS):
        raise LedgerError(_NEWER)


def now_us() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


@contextmanager
def named_failures(file: Path) -> Iterator[None]:
    """Raise what goes wrong with `file` as a `LedgerError` that names it."""
    try:
        yield
    except (apsw.Error, OSError, LedgerError) as error:
        raise named(file, error) from None


def named(file: Path, error: Exception) -> LedgerError:
    """What went wrong with `file`, as an error that names it."""
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return LedgerError(f"the ledger {file} cannot be used: {reason}")
