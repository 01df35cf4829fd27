"""P1, P2, P3: whatever ends the server, what it acknowledged is in the ledger once, and the sums are right."""

from __future__ import annotations

import os
import random
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import apsw
import psutil
import pytest
from msgspec.structs import replace

from ocserve.accounts import ledger as module
from ocserve.accounts.balances import Account
from ocserve.accounts.ledger import Ledger, Row
from ocserve.accounts.ledger_schema import DAY_US, MIGRATIONS, LedgerError, connect, now_us
from tests.accounts.books import mismatches, opened, rows, rows_of, settled, unsound
from tests.accounts.disks import Folder, Op, disk

IN_FLIGHT = 8


@contextmanager
def ledger(file: Path, *, vfs: str | None = None, days: int = 30) -> Iterator[Ledger]:
    made = Ledger(file, retention_days=days, vfs=vfs)
    try:
        yield made
    finally:
        made.close()


def serve(books: Ledger, number: int) -> Future[bool]:
    """Admit and settle a request."""
    row = replace(opened(number), held=number % 7)
    books.open(row)
    return books.settle(replace(settled(row), held=0))


def test_a_row_is_on_disk_when_its_future_says_so_and_is_for_this_user_only(tmp_path: Path) -> None:
    file = tmp_path / "new" / "ledger.db"
    with ledger(file) as books:
        assert serve(books, 1).result()
        assert mismatches(rows(file), {"id-1"}) == []
        for each in file.parent.iterdir():
            assert stat.S_IMODE(each.stat().st_mode) == 0o600, each
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_requests_that_end_together_share_a_sync(tmp_path: Path) -> None:
    synced: list[Op] = []
    with (
        disk(lambda op: synced.append(op) if op.kind == "sync" else None) as vfs,
        ledger(tmp_path / "ledger.db", vfs=vfs) as books,
    ):
        started = len(synced)
        assert all(each.result() for each in [serve(books, number) for number in range(200)])
        assert len(synced) - started < 60


def test_what_a_dead_process_left_open_is_settled_at_the_next_start_and_what_lives_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ledger.db"
    monkeypatch.setattr(module, "_this_process", lambda: "999999999@1.00")
    with ledger(file) as dead:
        dead.open(opened(1))
        assert serve(dead, 2).result()
    monkeypatch.undo()
    with ledger(file) as running:
        running.open(opened(3))
        assert serve(running, 4).result()
        with ledger(file):  # a second server beside it
            found = {row.id: row.outcome for row in rows(file)}
        assert found == {"id-1": "lost", "id-2": "completed", "id-3": "open", "id-4": "completed"}
        assert running.settle(settled(opened(1))).result()  # it lived after all
        assert {row.outcome for row in rows(file) if row.id == "id-1"} == {"completed"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the clock says when a process began")
def test_setting_the_clock_makes_no_living_process_a_dead_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = psutil.Process.create_time
    with ledger(tmp_path / "ledger.db") as running:
        running.open(opened(1))
        assert serve(running, 2).result()
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: began(self) + 5)
        with ledger(tmp_path / "ledger.db"):
            assert [row.outcome for row in rows(tmp_path / "ledger.db")] == ["open", "completed"]


@pytest.mark.skipif(sys.platform != "linux", reason="identities are by boot and tick there only")
def test_a_process_is_another_if_it_began_at_another_time_or_in_another_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = module._this_process()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        boot = own.partition("@")[2].partition("/")[0]
        ticks = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
        outcomes = {
            f"{other.pid}@{boot}/{ticks}": "open",
            f"{other.pid}@{boot}/{int(ticks) + 1}": "lost",
            f"{other.pid}@an-earlier-boot/{ticks}": "lost",
            f"{other.pid}@1.00": "open",  # of an earlier version: who knows
            f"999999999@{boot}/{ticks}": "lost",
            "999999999@1.00": "lost",
            f"{os.getpid()}@1.00": "lost",  # another had our number before us
            "nobody": "lost",
            own: "open",
        }
        for number, process in enumerate(outcomes):
            monkeypatch.setattr(module, "_this_process", lambda process=process: process)
            with ledger(tmp_path / "ledger.db") as books:
                books.open(opened(number))
        monkeypatch.undo()
        with ledger(tmp_path / "ledger.db"):
            found = {row.id: row.outcome for row in rows(tmp_path / "ledger.db")}
        assert other.stdin is not None
        other.stdin.close()
    assert found == {f"id-{number}": outcome for number, outcome in enumerate(outcomes.values())}


@pytest.mark.parametrize("seconds", [1, 5])
def test_where_only_the_clock_says_when_a_process_began_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    monkeypatch.setattr(module, "_BOOT_ID", tmp_path / "none")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        process = f"{other.pid}@{psutil.Process(other.pid).create_time() - seconds:.2f}"
        monkeypatch.setattr(module, "_this_process", lambda: process)
        with ledger(tmp_path / "ledger.db") as books:
            books.open(opened(1))
        monkeypatch.undo()
        monkeypatch.setattr(module, "_BOOT_ID", tmp_path / "none")
        with ledger(tmp_path / "ledger.db"):
            assert [row.outcome for row in rows(tmp_path / "ledger.db")] == ["open" if seconds == 1 else "lost"]
        assert other.stdin is not None
        other.stdin.close()


def test_rows_go_when_they_are_old(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    with ledger(file) as books:
        for number in range(6):
            age_us = number * DAY_US
            assert books.settle(replace(settled(opened(number)), admitted_us=now_us() - age_us - 1)).result()
    with ledger(file, days=3):
        assert [row.id for row in rows(file)] == ["id-0", "id-1", "id-2"]


def test_a_ledger_of_a_newer_version_or_no_ledger_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    newer, other = tmp_path / "newer.db", tmp_path / "other.db"
    with ledger(newer):
        pass
    connection = apsw.Connection(str(newer))
    connection.pragma("user_version", len(MIGRATIONS) + 1)
    connection.close()
    other.write_bytes(b"not a database " * 1000)
    for file, reason in ((newer, "newer version"), (other, "not a database"), (tmp_path, "cannot be used")):
        with pytest.raises(LedgerError, match=reason):
            Ledger(file, retention_days=1)
    assert other.read_bytes() == b"not a database " * 1000


def test_a_row_that_no_disk_takes_is_lost_alone_and_said(tmp_path: Path) -> None:
    told: list[tuple[str, object]] = []
    file = tmp_path / "ledger.db"
    books = Ledger(file, retention_days=30, on_event=lambda name, **facts: told.append((name, facts.get("count"))))
    impossible = books.settle(replace(settled(opened(1)), cost=2**63))
    assert books.settle(settled(opened(2))).result(5)
    assert not impossible.result(5)
    assert books.healthy
    assert books.close() == 0
    assert [row.id for row in rows(file)] == ["id-2"]
    assert told == [("ledger_rows_lost", 1)]


def test_a_row_with_which_a_sum_is_too_large_is_lost_alone_and_said(tmp_path: Path) -> None:
    told: list[tuple[str, object]] = []
    file = tmp_path / "ledger.db"
    books = Ledger(file, retention_days=30, on_event=lambda name, **facts: told.append((name, facts.get("count"))))
    most = [replace(settled(opened(number)), cost=2**62) for number in (1, 2, 3)]
    other = connect(file)
    other.execute("BEGIN IMMEDIATE")  # until its end everything waits, and is then one batch
    first = books.settle(most[0])
    waiting = [books.settle(row) for row in (settled(opened(4, key_id="other")), *most[1:], settled(opened(5)))]
    capped = Account(spend_cap=2**64)
    refused = books.hold(replace(opened(6), held=1, reserved_tokens=2**63 - 1), capped)  # at the last of its sums
    granted = books.hold(replace(opened(7), held=2**63 - 1), capped)
    no_more = books.hold(replace(opened(8), held=1), capped)
    other.execute("COMMIT")
    assert first.result(5)
    assert [each.result(5) for each in waiting] == [True, False, False, True]
    assert granted.result(5).granted
    assert isinstance(refused.exception(5), LedgerError)
    assert isinstance(no_more.exception(5), LedgerError)
    assert books.healthy
    assert books.settle(settled(opened(9, key_id="other"))).result(5)
    assert unsound(other) == []
    other.close()
    assert books.close() == 0
    assert [row.id for row in rows(file)] == ["id-1", "id-4", "id-5", "id-7", "id-9"]
    assert told == [("ledger_rows_lost", 2)]


def _write_until_killed(file: Path, told: int, first: int) -> None:
    """A server's ledger under load: `told` gets the number of each row that is acknowledged."""
    books = Ledger(file, retention_days=30)
    waiting: deque[tuple[int, Future[bool]]] = deque()
    number = first
    while True:
        waiting.append((number, serve(books, number)))
        number += 1
        while len(waiting) > random.randrange(IN_FLIGHT):
            done, future = waiting.popleft()
            assert future.result()
            os.write(told, struct.pack("<I", done))


def _kill_one(file: Path, first: int, after_s: float) -> set[str]:
    """Start a writer and kill it at once or later; what it had acknowledged."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            _write_until_killed(file, writing, first)
        finally:
            os._exit(1)
    os.close(writing)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    return {f"id-{number}" for (number,) in struct.iter_unpack("<I", data)}


def test_p1_nothing_acknowledged_is_lost_or_doubled_when_the_process_is_killed(tmp_path: Path, full: bool) -> None:
    """P1: SIGKILL at random, over and over the same file."""
    kills = 1000 if full else 15
    file = tmp_path / "ledger.db"
    told: set[str] = set()
    for kill in range(kills):
        fresh = _kill_one(file, kill * 100_000, random.random() * 0.08)
        told |= fresh
        if kill % 50 == 49 or kill == kills - 1:
            with ledger(file):
                found = rows(file)
            assert mismatches(found, told) == []
            assert not [row for row in found if row.outcome == "open"]
    connection = connect(file)
    assert unsound(connection) == []
    connection.close()
    completed = sum(row.outcome == "completed" for row in found)
    assert completed - len(told) <= kills * (IN_FLIGHT + 1)
    print(f"P1: {kills} kills, {len(told)} rows acknowledged, 0 lost, 0 doubled, {completed} completed")
    assert len(told) > kills


def _recording(file: Path, monkeypatch: pytest.MonkeyPatch) -> list[Op]:
    """Everything a ledger does to its disk while it serves, checkpoints and retires rows."""
    done: list[Op] = []
    monkeypatch.setattr(module, "_CHECKPOINT_PAGES", 24)
    with disk(done.append) as vfs:
        books = Ledger(file, retention_days=30, vfs=vfs)
        number = 0
        for together in [1, 2, 1, 5, 1, 1, 3, 12] * 6:
            waiting = []
            for _ in range(together):
                row = opened(number)
                books.open(row)
                waiting.append((row.id, books.settle(settled(row))))
                number += 1
            for row_id, future in waiting:
                assert future.result()
                done.append(Op("told", row_id))
        recorded = list(done)  # without an orderly end
        books.close()
    return recorded


def test_p2_nothing_acknowledged_is_lost_when_power_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """P2: at every point of a recorded run the power goes; what was not synced is lost, torn or out of order."""
    recorded = _recording(tmp_path / "ledger.db", monkeypatch)
    assert any(op.kind == "write" and op.name == "ledger.db" for op in recorded[200:]), "no checkpoint was recorded"
    wanted = 10_000 if full else 200
    each = -(-wanted // len(recorded))
    every = max(1, len(recorded) * each // wanted)
    chance = random.Random(5)
    points = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        files = Folder("ledger.db")
        told: set[str] = set()
        for number, op in enumerate(recorded):
            if op.kind == "told":
                told.add(op.name)
            elif not op.name.endswith("-shm"):
                files.do(op)
            if number % every:
                continue
            for _ in range(each):
                found = _found(Path(folder), files.after_power_loss(chance))
                assert mismatches(found, told) == [], f"point {number} of {len(recorded)}, {op.kind} {op.name}"
                points += 1
    print(f"P2: {points} points of power loss, {len(told)} rows acknowledged in the end, 0 lost, 0 doubled")
    assert points >= wanted


def _found(folder: Path, files: dict[str, bytes]) -> list[Row]:
    """What a new start finds."""
    for old in folder.iterdir():
        old.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    connection = connect(folder / "ledger.db")
    try:
        assert unsound(connection) == []
        return rows_of(connection)
    finally:
        connection.close()


class Failing:
    """A disk whose call number `at` fails, and with `lasting` every later one until it is mended."""

    def __init__(self, at: int, error: type[Exception], *, lasting: bool) -> None:
        self.at = at
        self.error = error
        self.lasting = lasting
        self.calls = 0
        self.mended = False
        self.failed = False

    def __call__(self, op: Op) -> None:
        self.calls += 1
        if not self.mended and (self.calls == self.at or (self.lasting and self.calls > self.at)):
            self.failed = True
            raise self.error


def _serve_on(file: Path, failing: Failing, vfs: str) -> str:
    """Serve twelve requests on a disk that fails; how it went."""
    told, waiting = set(), []
    try:
        books = Ledger(file, retention_days=30, vfs=vfs)
    except LedgerError:
        failing.mended = True
        with ledger(file, vfs=vfs) as books:  # nothing is in the way of a new start
            assert serve(books, 0).result()
        assert mismatches(rows(file), {"id-0"}) == []
        return "refused to start"
    for number in range(12):
        row = opened(number)
        books.open(row)
        waiting.append(books.settle(settled(row)))
        if number % 3 == 2:
            told |= {f"id-{each}" for each, future in enumerate(waiting) if future.result()}
    noticed = not books.healthy
    failing.mended = True
    deadline = time.monotonic() + 5
    while books.unwritten or not books.healthy:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert books.close() == 0
    found = rows(file)
    assert mismatches(found, told) == []
    assert {row.id for row in found if row.outcome == "completed"} == {f"id-{number}" for number in range(12)}
    return "stopped and recovered" if noticed else "went on"


@pytest.mark.parametrize("error", [apsw.IOError, apsw.FullError], ids=["io", "full"])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
def test_p3_nothing_is_lost_whichever_call_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], lasting: bool, full: bool
) -> None:
    """P3: the Nth call to the disk fails, for every N until none does. In the short form every ninth."""
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    monkeypatch.setattr(module, "_CHECKPOINT_PAGES", 6)
    outcomes: dict[str, int] = {}
    at = 1
    while True:
        failing = Failing(at, error, lasting=lasting)
        with disk(failing) as vfs:
            outcome = _serve_on(tmp_path / f"{at}.db", failing, vfs)
        if not failing.failed:
            break
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        at += 1 if full else 9
    print(f"P3: {at - 1} calls, {outcomes}")
    assert at > 60
    assert set(outcomes) >= {"refused to start", "stopped and recovered" if lasting else "went on"}


def test_a_failure_is_said_once_and_so_is_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    said: list[str] = []
    failing = Failing(1, apsw.FullError, lasting=True)
    failing.mended = True
    with disk(failing) as vfs:
        books = Ledger(
            tmp_path / "ledger.db", retention_days=1, vfs=vfs, on_event=lambda name, **facts: said.append(name)
        )
        assert serve(books, 1).result()
        failing.mended = False
        assert not serve(books, 2).result()
        assert not serve(books, 3).result()
        assert not books.healthy
        assert books.unwritten == 4
        failing.mended = True
        recovered = threading.Event()
        while not books.healthy:
            recovered.wait(0.001)
        assert books.close() == 0
    assert said == ["ledger_failed", "ledger_recovered"]
    assert mismatches(rows(tmp_path / "ledger.db"), {"id-1", "id-2", "id-3"}) == []
