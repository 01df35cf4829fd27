"""A ledger whose file is moved, deleted, replaced or cut short under it is one that fails."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import apsw
import pytest
from msgspec.structs import replace

from ocserve.accounts import balances, usage
from ocserve.accounts import ledger as module
from ocserve.accounts.balances import Credit
from ocserve.accounts.ledger import Ledger
from tests.accounts.books import mismatches, opened, rows, settled, unsound

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps open files where they are")

Damage = Callable[[Path], Callable[[], None]]  # what undoes it


def serve(books: Ledger, number: int) -> Future[bool]:
    row = replace(opened(number), held=number % 7)
    books.open(row)
    return books.settle(replace(settled(row), held=0))


def all_moved(file: Path) -> Callable[[], None]:
    """As for a backup; then another process makes a ledger in its place."""
    moved = file.parent / "backup"
    moved.mkdir()
    names = [each.name for each in file.parent.glob("ledger.db*")]
    for name in names:
        (file.parent / name).rename(moved / name)
    balances.add_credit(file, Credit(key_id="key-1", amount=5, made_by="test"))

    def undo() -> None:
        for name in names:
            (moved / name).replace(file.parent / name)

    return undo


def renamed(ending: str) -> Damage:
    def rename(file: Path) -> Callable[[], None]:
        part, other = Path(f"{file}{ending}"), file.parent / "other"
        part.rename(other)
        return lambda: (other.rename(part), None)[1]

    return rename


def cut(ending: str) -> Damage:
    """The bytes are kept and put back by other processes: to close a descriptor here would give up SQLite's locks."""

    def truncate(file: Path) -> Callable[[], None]:
        part, kept = Path(f"{file}{ending}"), file.parent / "kept"
        subprocess.run(["cp", part, kept], check=True)
        os.truncate(part, 0)
        return lambda: (subprocess.run(["cp", kept, part], check=True), None)[1]

    return truncate


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (all_moved, "moved, deleted or replaced"),
        (renamed(""), "moved, deleted or replaced"),
        (renamed("-wal"), "its write-ahead log was moved, deleted or replaced"),
        (cut(""), "cut short"),
        (cut("-wal"), "its write-ahead log was cut short"),
    ],
    ids=["moved", "database", "log", "short", "short-log"],
)
def test_a_file_that_is_no_longer_the_open_one_fails_until_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Damage, said: str
) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    heard: list[tuple[str, str]] = []
    file = tmp_path / "ledger.db"
    books = Ledger(
        file, retention_days=1, on_event=lambda name, **facts: heard.append((name, str(facts.get("reason"))))
    )
    assert serve(books, 1).result()
    undo = damage(file)
    assert not serve(books, 2).result()
    assert not books.healthy
    assert not serve(books, 3).result()
    assert books.unwritten == 4
    undo()
    wait_for(lambda: books.healthy)
    assert serve(books, 4).result()
    assert books.close() == 0
    assert [name for name, _ in heard] == ["ledger_failed", "ledger_recovered"]
    assert said in heard[0][1]
    assert str(file) in heard[0][1]
    assert mismatches(rows(file), {f"id-{number}" for number in (1, 2, 3, 4)}) == []
    connection = apsw.Connection(str(file))
    assert unsound(connection) == []
    connection.close()


def test_a_server_that_has_nothing_to_write_notices_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    books = Ledger(tmp_path / "ledger.db", retention_days=1)
    (tmp_path / "ledger.db").rename(tmp_path / "other")
    wait_for(lambda: not books.healthy)
    books.close()


def test_the_log_goes_into_the_database_where_only_the_log_is_gone_and_is_left_where_another_is_there(
    tmp_path: Path,
) -> None:
    for number, other in enumerate((None, b"another's")):
        file = tmp_path / f"{number}.db"
        log = Path(f"{file}-wal")
        books = Ledger(file, retention_days=1)
        assert serve(books, 1).result()
        log.rename(tmp_path / f"{number}.moved")
        if other is not None:
            log.write_bytes(other)
        assert not serve(books, 2).result()
        books.close()
        if other is None:
            assert mismatches(rows(file), {"id-1"}) == []
        else:
            assert log.read_bytes() == other
            (tmp_path / f"{number}.moved").replace(log)
            assert mismatches(rows(file), {"id-1"}) == []


def test_what_another_process_cleans_up_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHECKPOINT_PAGES", 1)
    heard: list[str] = []
    file = tmp_path / "ledger.db"
    books = Ledger(file, retention_days=1, on_event=lambda name, **facts: heard.append(name))
    for waiting in [serve(books, number) for number in range(300)]:
        assert waiting.result()
    assert serve(books, 300).result()
    before = file.stat().st_size
    subprocess.run([sys.executable, "-c", PURGE, str(file)], check=True, cwd=Path(usage.__file__).parents[2])
    assert file.stat().st_size < before
    assert Path(f"{file}-wal").stat().st_size == 0
    assert serve(books, 301).result()
    assert books.healthy
    books.close()
    assert heard == []
    assert mismatches(rows(file), {"id-301"}) == []


PURGE = """
import sys
from pathlib import Path
from ocserve.accounts import usage
usage.purge(Path(sys.argv[1]), usage.Span())
"""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)
