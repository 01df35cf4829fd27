"""P31: a ledger of any released version becomes one of this version, whatever interrupts that, with all its rows."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from pathlib import Path

import apsw
import msgspec
import pytest

from ocserve.accounts import ledger_schema as module
from ocserve.accounts import usage
from ocserve.accounts.ledger import Ledger
from ocserve.accounts.ledger_schema import MIGRATIONS, LedgerError
from tests.accounts.books import mismatches, opened, rows, settled

# SHA-256 of each released step: files in the world were made by them, so a change is a step of its own.
RELEASED = ("05ce1504",)
ROWS = 500
NEXT = (
    "ALTER TABLE requests ADD COLUMN later TEXT NOT NULL DEFAULT ''; UPDATE requests SET later = request_id;",
    "CREATE TABLE later (id TEXT NOT NULL UNIQUE) STRICT; INSERT INTO later SELECT id FROM requests;",
)
NEWEST = (*MIGRATIONS, *NEXT)


def test_what_was_released_is_never_changed() -> None:
    assert tuple(hashlib.sha256(each.encode()).hexdigest()[:8] for each in MIGRATIONS[: len(RELEASED)]) == RELEASED


def written(file: Path, version: int) -> None:
    """A ledger as that version left it, with rows in it."""
    connection = apsw.Connection(str(file))
    connection.pragma("journal_mode", "wal")
    with connection:
        for script in MIGRATIONS[:version]:
            connection.execute(script)
        connection.pragma("user_version", version)
        known = [str(column[1]) for column in connection.execute("PRAGMA table_info(requests)")]
        for number in range(ROWS):
            row = {**msgspec.to_builtins(settled(opened(number))), "process": "1@1.00"}
            values = [row[name] for name in known]
            connection.execute(f"INSERT INTO requests VALUES (?{', ?' * (len(known) - 1)})", values)
    connection.close()
    file.chmod(0o600)


def summed(connection: apsw.Connection) -> list[tuple[object, ...]]:
    """What the sums of the file are, and what they should be by its rows."""
    tokens = "sum(prompt_tokens + completion_tokens)"
    of_rows = connection.execute(f"SELECT count(*), sum(cost), {tokens} FROM requests").fetchall()
    charged = connection.execute("SELECT sum(charged), sum(held), count(*) FROM balances").fetchall()
    months = connection.execute("SELECT sum(cost), sum(tokens) FROM months").fetchall()
    hours = connection.execute("SELECT sum(requests), sum(tokens) FROM hours").fetchall()
    (count, cost, used) = of_rows[0]
    assert charged == [(cost, 0, 1)]
    assert months == [(cost, used)]
    assert hours == [(count, used)]
    return of_rows


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS) + 1))
def test_p31_a_kill_while_a_ledger_is_brought_to_a_new_version_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, full: bool
) -> None:
    """P31: SIGKILL at random while steps run; the next start finishes them."""
    kills, interrupted = (100 if full else 8), 0
    monkeypatch.setattr(module, "MIGRATIONS", NEWEST)
    for kill in range(kills):
        file = tmp_path / f"{kill}.db"
        written(file, version)
        child = os.fork()
        if child == 0:
            try:
                Ledger(file, retention_days=30)
                time.sleep(10)
            finally:
                os._exit(1)
        time.sleep(random.random() * 0.02 if kill else 0.0)  # the first before anything is done
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        connection = apsw.Connection(str(file))
        interrupted += connection.pragma("user_version") < len(NEWEST)
        connection.close()
        books = Ledger(file, retention_days=30)
        acknowledged = {f"id-{number}" for number in range(ROWS)}
        assert books.settle(settled(opened(0))).result()  # a row of before, written again
        assert books.settle(settled(opened(ROWS))).result()
        books.close()
        assert mismatches(rows(file), acknowledged) == []
        connection = apsw.Connection(str(file))
        assert connection.pragma("user_version") == len(NEWEST)
        assert summed(connection)[0][0] == ROWS + 1
        counted = connection.execute("SELECT count(*) FROM requests JOIN later USING (id) WHERE later <> ''").fetchall()
        assert counted == [(ROWS,)]
        connection.close()
    print(f"P31: {kills} kills from version {version}, {interrupted} before the end, 0 rows lost")
    assert interrupted


def test_a_command_that_only_reads_leaves_an_older_file_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    written(file, 1)
    with pytest.raises(LedgerError, match="another version"):
        usage.sums(file, ["day"], usage.Span())
    Ledger(file, retention_days=30).close()
    assert [each.requests for each in usage.sums(file, ["key"], usage.Span())] == [ROWS]
