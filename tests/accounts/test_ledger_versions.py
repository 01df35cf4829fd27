"""P31: a ledger of any released version becomes one of this version, whatever interrupts that, with all its rows."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from pathlib import Path

import apsw
import pytest

from ocserve.accounts import ledger as module
from ocserve.accounts.ledger import MIGRATIONS, Ledger
from tests.accounts.books import mismatches, opened, rows, settled

# SHA-256 of each released step: files in the world were made by them, so a change is a step of its own.
RELEASED = ("05ce1504",)
ROWS = 500
NEXT = (
    "ALTER TABLE requests ADD COLUMN note TEXT NOT NULL DEFAULT ''; UPDATE requests SET note = request_id;",
    "CREATE TABLE later (id TEXT NOT NULL UNIQUE) STRICT; INSERT INTO later SELECT id FROM requests;",
)


def test_what_was_released_is_never_changed() -> None:
    assert tuple(hashlib.sha256(each.encode()).hexdigest()[:8] for each in MIGRATIONS[: len(RELEASED)]) == RELEASED


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS) + 1))
def test_p31_a_kill_while_a_ledger_is_brought_to_a_new_version_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, full: bool
) -> None:
    """P31: SIGKILL at random while steps run; the next start finishes them."""
    newest = (*MIGRATIONS[:version], *NEXT)
    kills, interrupted = (100 if full else 8), 0
    for kill in range(kills):
        file = tmp_path / f"{kill}.db"
        monkeypatch.setattr(module, "MIGRATIONS", MIGRATIONS[:version])
        books = Ledger(file, retention_days=30)
        assert all(each.result() for each in [books.settle(settled(opened(number))) for number in range(ROWS)])
        books.close()
        monkeypatch.setattr(module, "MIGRATIONS", newest)
        child = os.fork()
        if child == 0:
            try:
                Ledger(file, retention_days=30)
                time.sleep(10)
            finally:
                os._exit(1)
        time.sleep(random.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        connection = apsw.Connection(str(file))
        interrupted += connection.pragma("user_version") < len(newest)
        connection.close()
        Ledger(file, retention_days=30).close()
        assert mismatches(rows(file), {f"id-{number}" for number in range(ROWS)}) == []
        connection = apsw.Connection(str(file))
        assert connection.pragma("user_version") == len(newest)
        counted = connection.execute("SELECT count(*) FROM requests JOIN later USING (id) WHERE note <> ''").fetchall()
        assert counted == [(ROWS,)]
        connection.close()
    print(f"P31: {kills} kills from version {version}, {interrupted} before the end, 0 rows lost")
    assert interrupted
