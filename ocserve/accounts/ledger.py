"""The ledger: one row for each admitted request, on disk before its client is told that it has ended.

The protocol is the least that loses nothing and bills nothing twice:

1. *Admission* queues the row as `open` and waits for nothing. What this server serves it has written down by then or
   within milliseconds, and until the end nobody has been told of an end.
2. *Settlement* queues the whole row again with its counts, and the answer's last piece leaves when that is on disk:
   in SQLite's WAL, synced. Rows have an id of ours, so that writing one twice, as after a failure that may have
   succeeded, changes nothing.
3. What a key may spend is *held* before it is served: a request of a key with a balance or a cap waits until its row is
   written, which happens only if the most that it can cost fits beside all that is charged and held. Whether it fits is
   decided in the transaction that writes the row, so it holds for every daemon that shares the file.
4. *Start* finds what stayed `open` under processes that are gone and makes it `lost`, with nothing charged. Should its
   process live after all, settling overwrites that.

One thread owns the one connection. It takes whatever waits, writes it in one transaction and syncs once, so that
requests that end together share the cost; the event loop only ever waits for a future. Checkpoints come after the
waiting ones have been released. Several daemons may share the file: SQLite's locks keep their transactions apart.

If a write fails, the connection is made anew and the batch written again at once. If that fails too, those who wait are
let go (what is in flight finishes), `healthy` is False, which ends admission, and the rows are kept in memory and tried
again every second until the disk takes them. Before each batch, and every second where there is none, it is looked
whether the path still leads to the open file (`ledger_files`). If not, that is such a failure; nothing is opened anew
then, since what is there now is another ledger, and service goes on when the right file is back.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import apsw
import msgspec
import psutil

from ocserve.accounts import balances
from ocserve.accounts.balances import Account, Credit, Hold, Hour, Standing
from ocserve.accounts.ledger_files import OpenFiles
from ocserve.accounts.ledger_schema import (
    DAY_US,
    HOUR_US,
    RECENT_HOURS,
    LedgerError,
    connect,
    named,
    now_us,
    transaction,
)

Outcome = Literal["open", "completed", "cancelled", "failed", "lost"]
T = TypeVar("T")

_SLOWEST_S = 10.0  # a write that takes longer has met a disk that does not answer
_LOOK_S = 1.0  # between looks at a disk that failed, and at the files of a server that has nothing to write
_HOUSEKEEPING_S = 3600.0
_CLOSING_S = 30.0  # how long a disk that does not answer holds up a stop
_CHECKPOINT_PAGES = 1000  # of 4 KiB, as SQLite's own default
_RETIRED_AT_ONCE = 5000  # rows: what is deleted in one transaction keeps nobody waiting for long
_SAME_START_S = 2.0  # where only the clock says when a process began, and it may be set a little between two looks
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One request. `id` is ours, `request_id` what its client knows. Times are microseconds since 1970, UTC.

    Prices and `cost` are picodollars; prices are those of the moment of admission, None where nothing is charged, and
    `tier` is how many tokens of the month they need. Of an open or lost row `held` is the most that it can cost, where
    that is held, and `reserved_tokens` the most tokens that it can use; what is settled has neither.
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
    tier: int = 0
    cost: int = 0
    held: int = 0
    reserved_tokens: int = 0


_COLUMNS = Row.__struct_fields__
_FIXED = frozenset({"id", "request_id", "key_id", "model", "route", "admitted_us"})  # at admission, for good
_INSERT = f"INSERT INTO requests (process, {', '.join(_COLUMNS)}) VALUES (?{', ?' * len(_COLUMNS)})"  # noqa: S608
_OPEN = f"{_INSERT} ON CONFLICT (id) DO NOTHING"
_SETTLE = f"{_INSERT} ON CONFLICT (id) DO UPDATE SET " + ", ".join(
    f"{name} = excluded.{name}" for name in _COLUMNS if name not in _FIXED
)

OnEvent = Callable[..., None]


class Ledger:
    """The ledger of this process. All but `close` may be used from any thread and never block."""

    def __init__(
        self, file: Path, *, retention_days: int, on_event: OnEvent = lambda *_, **__: None, vfs: str | None = None
    ) -> None:
        """Open or make `file`; raises `LedgerError`. `on_event` hears of failures and of their ends.

        `vfs` is the SQLite VFS to reach the disk through.
        """
        self._file = file
        self._retention_us = retention_days * DAY_US
        self._on_event = on_event
        self._vfs = vfs
        self._process = _this_process()
        self._waiting: queue.SimpleQueue[_Task[Any] | None] = queue.SimpleQueue()
        self._unwritten: list[_Task[Any]] = []
        self._healthy = True
        self._writing_since: float | None = None
        self._closing = False
        self._kept_at = 0.0
        self._files = OpenFiles(file)
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
        self._waiting.put(_Task(partial(self._put, _OPEN, row), otherwise=False))

    def settle(self, row: Row) -> Future[bool]:
        """Write down how a request ended: True once that is on disk, False as soon as it is known to have to wait."""
        return self._asked(_Task(partial(self._put, _SETTLE, row), otherwise=False))

    def hold(self, row: Row, account: Account) -> Future[Hold]:
        """Write down that a request was admitted, if what it can cost at most (`row.held`) fits; `LedgerError`.

        Who gives up waiting, or is told of a failure, settles the row: it may have been written.
        """
        return self._asked(_Task(partial(self._hold, row, account)))

    def standing(self, key_id: str, month: str, model: str = "") -> Future[Standing]:
        """What a key has been credited and charged, and the month's tokens of a model; `LedgerError`."""
        return self._asked(_Task(lambda connection: balances.standing(connection, key_id, month, model)))

    def credit(self, credit: Credit) -> Future[Credit]:
        """Add to a balance: the credit as it is once on disk. Raises `balances.Declined` and `LedgerError`."""
        return self._asked(_Task(lambda connection: balances.credit(connection, credit)))

    def tally(self, key_id: str, model: str) -> None:
        """Count a request that was admitted and is in no row, soon."""
        hour = now_us() // HOUR_US
        self._waiting.put(
            _Task(lambda connection: balances.tally(connection, key_id, hour, model), otherwise=None, lasting=False)
        )

    def recent(self) -> list[Hour]:
        """What each key used in each of the last hours, as of the start; blocks. Raises `LedgerError`."""
        return self._asked(_Task(balances.hours)).result()

    def close(self) -> int:
        """Write what waits and end the thread; how many rows could not be written, or not in time."""
        self._waiting.put(None)
        self._thread.join(_CLOSING_S)
        return len(self._unwritten) + (self._waiting.qsize() if self._thread.is_alive() else 0)

    def _asked(self, task: _Task[T]) -> Future[T]:
        self._waiting.put(task)
        return task.done

    # All below runs in the thread

    def _run(self, opened: Future[None]) -> None:
        try:
            self._connect()
            self._keep()
        except (apsw.Error, OSError, LedgerError) as error:
            opened.set_exception(named(self._file, error))
            return
        opened.set_result(None)
        while not self._closing:
            batch = self._take()
            self._writing_since = time.monotonic()
            self._write(batch)
            self._writing_since = None
        with suppress(apsw.Error):
            if not self._files.may_end_log():
                self._connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            self._connection.close()

    def _connect(self) -> None:
        self._connection = connect(self._file, self._vfs)
        self._files.opened(self._connection)

    def _take(self) -> list[_Task[Any]]:
        """What waits, at least one unless it is time for another look."""
        taken: list[_Task[Any]] = []
        with suppress(queue.Empty):
            given = self._waiting.get(timeout=_LOOK_S)
            while given is not None:
                taken.append(given)
                given = self._waiting.get_nowait()
            self._closing = True
        return taken

    def _write(self, batch: list[_Task[Any]]) -> None:
        """Have `batch`, and what could not be written before, on disk, and release who waits for it."""
        self._unwritten += batch
        failure = self._misplaced() or (self._attempt() and self._attempt(reconnect=True))
        tried = self._unwritten
        self._unwritten = [] if failure is None else [each for each in tried if each.lasting]
        if failure is not None:  # before anybody goes on: nothing more is to be taken on
            self._note(failure)
        for each in batch:
            each.tell(failure)
        if failure is None:
            if lost := sum(each.lasting and each.refused is not None for each in tried):
                self._on_event("ledger_rows_lost", level="error", count=lost)
            self._note(self._housekeeping())

    def _note(self, failure: Exception | None) -> None:
        """Say so when the disk begins to fail and when it has recovered."""
        if (failure is None) != self._healthy:
            self._healthy = failure is None
            if failure is None:
                self._on_event("ledger_recovered")
            else:
                self._on_event("ledger_failed", level="error", reason=str(failure), count=len(self._unwritten))

    def _misplaced(self) -> Exception | None:
        """Why what is open is no longer the ledger, if it is not."""
        try:
            self._files.check()
        except (apsw.Error, OSError, LedgerError) as error:
            return named(self._file, error)
        return None

    def _attempt(self, *, reconnect: bool = False) -> Exception | None:
        """Do everything that is undone in one transaction; what went wrong, if anything did."""
        try:
            if reconnect:
                with suppress(apsw.Error):
                    self._connection.close(True)
                self._files.closed()
                self._connect()
            if self._unwritten:
                with transaction(self._connection):
                    for each in self._unwritten:
                        each.attempt(self._connection)
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing may go on unrecorded
            return named(self._file, error)
        return None

    def _put(self, statement: str, row: Row, connection: apsw.Connection) -> bool:
        """Write a row."""
        connection.execute(statement, (self._process, *(getattr(row, name) for name in _COLUMNS)))
        return True

    def _hold(self, row: Row, account: Account, connection: apsw.Connection) -> Hold:
        """Write an open row if it fits. After a commit that failed and may have succeeded it is there already."""
        found = balances.standing(connection, row.key_id, balances.month_of(row.admitted_us))
        if connection.execute("SELECT 1 FROM requests WHERE id = ?", (row.id,)).fetchall():
            return Hold(standing=found, granted=True)
        left = found.left(account)
        if left is not None and row.held > left:
            return Hold(standing=found, granted=False)
        self._put(_OPEN, row, connection)
        return Hold(standing=found.with_hold(row.held), granted=True)

    def _housekeeping(self) -> Exception | None:
        """What nobody waits for: checkpoints, and once in a while what is old goes."""
        try:
            if self._files.log_pages >= _CHECKPOINT_PAGES:
                self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)  # waits for nobody
                self._files.check()  # the database has grown: from now on it is as long
            if time.monotonic() - self._kept_at > _HOUSEKEEPING_S:
                self._keep()
        except apsw.BusyError:  # another process is at it; next time
            return None
        except Exception as error:  # noqa: BLE001 - as above
            return named(self._file, error)
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
                        "UPDATE requests SET outcome = 'lost', held = 0, settled_us = ? "
                        "WHERE outcome = 'open' AND process = ?",
                        (now, process),
                    )
        with transaction(self._connection):
            balances.forget(
                self._connection,
                before_hour=now // HOUR_US - RECENT_HOURS,
                before_month=balances.month_of(now - self._retention_us),
            )
        if retire_some(self._connection, now - self._retention_us):
            self._kept_at = -_HOUSEKEEPING_S  # there is more: after what waits has been written


class _Task(Generic[T]):
    """Something to be done in a transaction, and who waits for it.

    With `otherwise`, what is told of a failure, it is tried again until the disk takes it, if it is `lasting`.
    """

    def __init__(self, do: Callable[[apsw.Connection], T], otherwise: T | None = None, *, lasting: bool | None = None):
        self._do = do
        self._otherwise = otherwise
        self._found: list[T] = []
        self.lasting = otherwise is not None if lasting is None else lasting
        self.refused: Exception | None = None
        self.done: Future[T] = Future()
        self.done.set_running_or_notify_cancel()  # who waits may give up; it is done all the same

    def attempt(self, connection: apsw.Connection) -> None:
        """Do it; what goes wrong with the disk is raised.

        What is refused has changed nothing: a statement by which a row or a sum becomes what no column takes is undone.
        """
        self.refused = None
        try:
            self._found = [self._do(connection)]
        except balances.Declined as declined:
            self.refused = declined
        except (OverflowError, UnicodeError, apsw.ConstraintError) as error:  # no disk would take it; others go on
            self.refused = LedgerError(f"no ledger takes this row: {error}")

    def tell(self, failure: Exception | None) -> None:
        """Release who waits, now that it is on disk or known not to be."""
        reason = failure or self.refused
        if reason is None:
            self.done.set_result(*self._found)
        elif self._otherwise is not None:
            self.done.set_result(self._otherwise)
        else:
            self.done.set_exception(reason)


def retire_some(connection: apsw.Connection, before_us: int) -> bool:
    """Delete some of the rows that were admitted before then; whether there are more."""
    with transaction(connection):
        connection.execute(
            "DELETE FROM requests WHERE rowid IN "
            "(SELECT rowid FROM requests WHERE admitted_us < ? AND outcome <> 'open' LIMIT ?)",
            (before_us, _RETIRED_AT_ONCE),
        )
        return connection.changes() == _RETIRED_AT_ONCE


def _this_process() -> str:
    pid = os.getpid()
    return f"{pid}@{_began(pid) or f'{psutil.Process(pid).create_time():.2f}'}"


def _began(pid: int) -> str | None:
    """In which boot and how many ticks after it a process began, which no setting of the clock changes.

    None where the system does not say: it is not Linux, or the process has ended.
    """
    try:
        after_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return f"{_BOOT_ID.read_text(encoding='ascii').strip()}/{int(after_name[19])}"  # field 22 of proc(5)
    except (OSError, ValueError, IndexError):
        return None


def _lives(process: object) -> bool:
    """Whether the process that wrote a row still runs. Where that cannot be known it does: what it holds is money."""
    number, _, began = str(process).partition("@")
    if not number.isdecimal() or not psutil.pid_exists(pid := int(number)):
        return False
    found = _began(pid)
    if "/" in began:
        return found is None or found == began
    if found is not None:  # an earlier version wrote it, by a clock that may have been set since
        return pid != os.getpid()
    try:
        return abs(psutil.Process(pid).create_time() - float(began)) < _SAME_START_S
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, ValueError):
        return True
