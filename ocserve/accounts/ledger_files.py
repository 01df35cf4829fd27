"""Whether the files that a connection to the ledger has open are still those that its path leads to, and whole.

SQLite does not ask. Where the database or its write-ahead log was moved, deleted or replaced beside a running server it
goes on in files that no other process finds, and no restart; where one was cut short it goes on in what is left.
"""

from __future__ import annotations

import os
from pathlib import Path

import apsw

from ocserve.accounts.ledger_schema import LedgerError

_DATABASE_HEADER = 100  # bytes
_PAGES_AT = slice(28, 32)  # of the header: how many pages the database has
_LOG_HEADER, _FRAME_HEADER = 32, 24  # bytes, before the log's frames and before the page in each


class OpenFiles:
    """The database of `file` and its log, as one connection after another has them open.

    A look costs two calls of stat(2), microseconds; files are read only where one has become shorter, as it may where
    another process cleans up. What was overwritten in place, with as much of anything, is not found this way.
    """

    def __init__(self, file: Path) -> None:
        """Nothing is open yet."""
        self.log_pages = 0  # in the log since it last began anew
        self._file = file
        self._log_file = ""
        self._connection: apsw.Connection | None = None
        self._page_size = 0
        self._database: tuple[int, int] | None = None  # the first that was opened; it stays the only right one
        self._log: tuple[int, int] | None = None
        self._size = 0  # of the database, bytes, when it was last looked at

    def opened(self, connection: apsw.Connection) -> None:
        """Go by this connection from now on; raises as `check`, also where it is to another database than the last."""
        self._connection = connection
        self._log_file = connection.filename_wal
        self._page_size = int(connection.pragma("page_size"))
        self.log_pages = 0
        connection.set_wal_hook(self._grown)
        if self._database is None:
            self._database = _which(os.stat(self._file))
        self._log = _which(os.stat(self._log_file))
        self.check()

    def closed(self) -> None:
        """There is no connection: the log may go, and no other database may come."""
        self._connection = self._log = None

    def check(self) -> None:
        """Raise `LedgerError`, `OSError` or `apsw.Error` where the path no longer leads to the open files, whole."""
        self._check_database()
        if self._connection is None:
            return
        log = _found(self._log_file)
        if log is None or _which(log) != self._log:
            raise LedgerError(_GONE.format(what="its write-ahead log", was=_MOVED))
        if log.st_size < self._log_size() and self._log_size_now(self._connection) > os.stat(self._log_file).st_size:
            raise LedgerError(_GONE.format(what="its write-ahead log", was=_SHORT))

    def may_end_log(self) -> bool:
        """Whether the log may go into the database and be deleted: the database is right, no other log is beside it."""
        try:
            self._check_database()
            log = _found(self._log_file)
        except (LedgerError, OSError, apsw.Error):
            return False
        return log is None or _which(log) == self._log

    def _check_database(self) -> None:
        found = _found(self._file)
        if self._database is not None and (found is None or _which(found) != self._database):
            raise LedgerError(_GONE.format(what="it", was=_MOVED))
        if self._connection is None or found is None:
            return
        if found.st_size < self._size and not self._is_whole(self._connection, found.st_size):
            raise LedgerError(_GONE.format(what="it", was=_SHORT))
        self._size = found.st_size

    def _grown(self, connection: apsw.Connection, database: str, pages: int) -> int:
        self.log_pages = pages
        return apsw.SQLITE_OK

    def _is_whole(self, connection: apsw.Connection, size: int) -> bool:
        """Whether a database that has become shorter is as long as it says: its pages may have become fewer.

        Read through SQLite: to close any other descriptor of the file would give up SQLite's locks on it.
        """
        whole, header = connection.read("main", 0, 0, _DATABASE_HEADER)
        pages = int.from_bytes(header[_PAGES_AT], "big")
        return whole and 0 < pages * self._page_size <= size

    def _log_size(self) -> int:
        return _LOG_HEADER + self.log_pages * (_FRAME_HEADER + self._page_size) if self.log_pages else 0

    def _log_size_now(self, connection: apsw.Connection) -> int:
        """The same of what all processes have written: another may have begun the log anew."""
        self.log_pages, _ = connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
        return self._log_size()


_MOVED, _SHORT = "moved, deleted or replaced", "cut short"
_GONE = (
    "{what} was {was} while this server used it; put it back, or start the server anew to go on with what is there now"
)


def _which(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _found(file: Path | str) -> os.stat_result | None:
    try:
        return os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
