"""The ledger: one row for each admitted request, on disk before its client is told that it has ended.

The protocol is the least that loses nothing and bills nothing twice:

1. *Admission* queues the row as `open` and waits for nothing. What this server serves it has written down by then or
   within milliseconds, and until the end nobody has been told of an end.
2. *Settlement* queues the whole row again with its counts, and the answer's last piece leaves when that is on disk:
   in SQLite's WAL, synced. Rows have an id of ours, so that writing one twice, as after a failure that may have
   succeeded, changes nothing.
3. *Start* finds what stayed `open` under processes that are gone and makes it `lost`, with nothing charged. Should its
   process live after all, settling overwrites that.

One thread owns the one connection. It takes whatever waits, writes it in one transaction and syncs once, so that
requests that end together share the cost; the event loop only ever waits for a future. Checkpoints come after the
waiting ones have been released. Several daemons may share the file: SQLite's locks keep their transactions apart.

If a write fails, the connection is made anew and the batch written again at once. If that fails too, those who wait are
let go (what is in flight finishes), `healthy` is False, which ends admission, and the rows are kept in memory and tried
again every second until the disk takes them.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import apsw
import msgspec
import psutil

Outcome = Literal["open", "completed", "cancelled", "failed", "lost"]

_BUSY_MS = 5000  # how long another process may hold the file
_SLOWEST_S = 10.0  # a write that takes longer has met a disk that does not answer
_RETRY_S = 1.0
_HOUSEKEEPING_S = 3600.0
_CLOSING_S = 30.0  # how long a disk that does not answer holds up a stop
_CHECKPOINT_PAGES = 1000  # of 4 KiB, as SQLite's own default
_LARGEST_WAL = 8 * 1024 * 1024
_DAY_US = 86_400_000_000
_RETIRED_AT_ONCE = 5000  # rows: what is deleted in one transaction keeps nobody waiting for long
_SAME_START_S = 2.0  # the clock may be set between two looks at when a process began

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
)


class LedgerError(Exception):
    """The ledger cannot be used; the text names the file and says why."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One request. `id` is ours, `request_id` what its client knows. Times are microseconds since 1970, UTC.

    Prices and `cost` are picodollars; prices are those of the moment of admission, None where nothing is charged.
    """

    id: str
    request_id: str
    key_id: str
    model: str
    route: str
    admitted_us: int
    settled_us: int | None = None
    outcome: Outcome = "open"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    image_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    images: int = 0
    price_prompt: int | None = None
    price_cached_prompt: int | None = None
    price_cache_write: int | None = None
    price_completion: int | None = None
    price_image: int | None = None
    price_request: int | None = None
    cost: int = 0


_COLUMNS = Row.__struct_fields__
_FIXED = frozenset({"id", "request_id", "key_id", "model", "route", "admitted_us"})  # at admission, for good
_INSERT = f"INSERT INTO requests (process, {', '.join(_COLUMNS)}) VALUES (?{', ?' * len(_COLUMNS)})"  # noqa: S608
_OPEN = f"{_INSERT} ON CONFLICT (id) DO NOTHING"
_SETTLE = f"{_INSERT} ON CONFLICT (id) DO UPDATE SET " + ", ".join(
    f"{name} = excluded.{name}" for name in _COLUMNS if name not in _FIXED
)

OnEvent = Callable[..., None]


class Ledger:
    """The ledger of this process. `open`, `settle` and `healthy` may be used from any thread and never block."""

    def __init__(
        self, file: Path, *, retention_days: int, on_event: OnEvent = lambda *_, **__: None, vfs: str | None = None
    ) -> None:
        """Open or make `file`; raises `LedgerError`. `on_event` hears of failures and of their ends.

        `vfs` is the SQLite VFS to reach the disk through.
        """
        self._file = file
        self._retention_us = retention_days * _DAY_US
        self._on_event = on_event
        self._vfs = vfs
        self._process = _this_process()
        self._waiting: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._unwritten: list[_Write] = []
        self._healthy = True
        self._writing_since: float | None = None
        self._closing = False
        self._refused: list[_Write] = []  # of a batch, rows that cannot be written at all
        self._kept_at = 0.0
        self._log_pages = 0  # in the write-ahead log since it last began anew
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="ledger", daemon=True)
        self._thread.start()
        opened.result()

    @property
    def healthy(self) -> bool:
        """Whether the last write succeeded, and none has taken too long."""
        since = self._writing_since
        return self._healthy and (since is None or time.monotonic() - since < _SLOWEST_S)

    @property
    def unwritten(self) -> int:
        """Rows that wait in memory for a disk that takes them."""
        return len(self._unwritten)

    def open(self, row: Row) -> None:
        """Write down that a request was admitted, soon."""
        self._waiting.put(_Write(_OPEN, row, None))

    def settle(self, row: Row) -> Future[bool]:
        """Write down how a request ended: True once that is on disk, False as soon as it is known to have to wait."""
        written: Future[bool] = Future()
        written.set_running_or_notify_cancel()  # who waits may give up; the row is written all the same
        self._waiting.put(_Write(_SETTLE, row, written))
        return written

    def close(self) -> int:
        """Write what waits and end the thread; how many rows could not be written, or not in time."""
        self._waiting.put(None)
        self._thread.join(_CLOSING_S)
        return len(self._unwritten) + (self._waiting.qsize() if self._thread.is_alive() else 0)

    # All below runs in the thread

    def _run(self, opened: Future[None]) -> None:
        try:
            self._connect()
            self._keep()
        except (apsw.Error, OSError, LedgerError) as error:
            opened.set_exception(_named(self._file, error))
            return
        opened.set_result(None)
        while not self._closing:
            batch = self._take()
            self._writing_since = time.monotonic()
            self._write(batch)
            self._writing_since = None
        with suppress(apsw.Error):
            self._connection.close()

    def _connect(self) -> None:
        def grown(connection: apsw.Connection, database: str, pages: int) -> int:
            self._log_pages = pages
            return apsw.SQLITE_OK

        self._connection = connect(self._file, self._vfs)
        self._connection.set_wal_hook(grown)

    def _take(self) -> list[_Write]:
        """What waits, at least one unless it is time for something else."""
        taken: list[_Write] = []
        with suppress(queue.Empty):
            rests = self._healthy and self._kept_at > 0
            given = self._waiting.get(timeout=_HOUSEKEEPING_S if rests else _RETRY_S)
            while given is not None:
                taken.append(given)
                given = self._waiting.get_nowait()
            self._closing = True
        return taken

    def _write(self, batch: list[_Write]) -> None:
        """Have `batch`, and what could not be written before, on disk, and release who waits for it."""
        self._unwritten += batch
        failure = self._attempt() and self._attempt(reconnect=True)
        for each in batch:
            if each.written is not None:
                each.written.set_result(failure is None and not any(each is other for other in self._refused))
        if failure is None:
            if self._refused:
                self._on_event("ledger_rows_lost", level="error", count=len(self._refused))
            self._unwritten, self._refused = [], []
            failure = self._housekeeping()
        if (failure is None) != self._healthy:
            self._healthy = failure is None
            if failure is None:
                self._on_event("ledger_recovered")
            else:
                self._on_event("ledger_failed", level="error", reason=str(failure), count=len(self._unwritten))

    def _attempt(self, *, reconnect: bool = False) -> Exception | None:
        """Write everything unwritten in one transaction; what went wrong, if anything did."""
        try:
            if reconnect:
                with suppress(apsw.Error):
                    self._connection.close(True)
                self._connect()
            if self._unwritten:
                self._refused = []
                with transaction(self._connection):
                    for each in self._unwritten:
                        values = (getattr(each.row, name) for name in _COLUMNS)
                        try:
                            self._connection.execute(each.statement, (self._process, *values))
                        except (OverflowError, UnicodeError):  # no disk would take it, and others must go on
                            self._refused.append(each)
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing may go on unrecorded
            return _named(self._file, error)
        return None

    def _housekeeping(self) -> Exception | None:
        """What nobody waits for: checkpoints, and once in a while what is old goes."""
        try:
            if self._log_pages >= _CHECKPOINT_PAGES:
                self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)  # waits for nobody
            if time.monotonic() - self._kept_at > _HOUSEKEEPING_S:
                self._keep()
        except apsw.BusyError:  # another process is at it; next time
            return None
        except Exception as error:  # noqa: BLE001 - as above
            return _named(self._file, error)
        return None

    def _keep(self) -> None:
        """Settle what processes that are gone left open, and delete what is older than it may be."""
        self._kept_at = time.monotonic()
        now = now_us()
        left = self._connection.execute("SELECT DISTINCT process FROM requests WHERE outcome = 'open'").fetchall()
        for (process,) in left:
            if process != self._process and not _lives(process):
                with transaction(self._connection):
                    self._connection.execute(
                        "UPDATE requests SET outcome = 'lost', settled_us = ? WHERE outcome = 'open' AND process = ?",
                        (now, process),
                    )
        if retire_some(self._connection, now - self._retention_us):
            self._kept_at = -_HOUSEKEEPING_S  # there is more: after what waits has been written


class _Write(msgspec.Struct, frozen=True):
    statement: str
    row: Row
    written: Future[bool] | None


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
        raise LedgerError("it was written by a newer version of ocserve")


def retire_some(connection: apsw.Connection, before_us: int) -> bool:
    """Delete some of the rows that were admitted before then; whether there are more."""
    with transaction(connection):
        connection.execute(
            "DELETE FROM requests WHERE rowid IN "
            "(SELECT rowid FROM requests WHERE admitted_us < ? AND outcome <> 'open' LIMIT ?)",
            (before_us, _RETIRED_AT_ONCE),
        )
        return connection.changes() == _RETIRED_AT_ONCE


def now_us() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


def _this_process() -> str:
    return f"{os.getpid()}@{psutil.Process().create_time():.2f}"


def _lives(process: object) -> bool:
    """Whether the process that wrote a row still runs."""
    pid, _, began = str(process).partition("@")
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(began)) < _SAME_START_S
    except (psutil.Error, ValueError):
        return False


@contextmanager
def named_failures(file: Path) -> Iterator[None]:
    """Raise what goes wrong with `file` as a `LedgerError` that names it."""
    try:
        yield
    except (apsw.Error, OSError, LedgerError) as error:
        raise _named(file, error) from None


def _named(file: Path, error: Exception) -> LedgerError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return LedgerError(f"the ledger {file} cannot be used: {reason}")
