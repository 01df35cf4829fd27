"""The files of the disk tier: one folder for each identity, one file for each key, shared by several processes.

The file system is the only truth: nothing is remembered between calls, any file may vanish at any time, and no link is
followed. Every file is complete or has a temporary name. Errors of the system are raised as `OSError`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ocserve.engine.tiers import layout
from ocserve.engine.tiers.host import Buffer

_SUFFIX, _TEMPORARY = ".kv", ".tmp"
# A write of this age was cut off; a running one changes its file far more often.
ABANDONED_S = 600.0
# An identity that was written so long ago is an old build or a model that is not served now.
IDLE_IDENTITY_S = 3600.0
_STEP_NS = 1_000
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # a pipe in place of a file must not stop us


class Damaged(Exception):
    """What lay under a key was not what had been stored there."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A file of ours as a scan found it; `idle` if it is of an identity that nobody writes."""

    path: str
    size_bytes: int
    used_at: float
    idle: bool


class Folder:
    """The files of one identity below `directory`, and the sizes of all others there."""

    def __init__(self, directory: Path, identity: bytes) -> None:
        """Makes both folders with mode 0700; raises `OSError` if another user could reach them."""
        self._directory = directory
        self._identity = layout.identity_hash(identity)
        self._own = directory / self._identity.hex()
        self._make()

    def _make(self) -> None:
        for folder in (self._directory, self._own):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.lstat()
            foreign = os.name == "posix" and (found.st_uid != os.geteuid() or found.st_mode & 0o077)
            if not stat.S_ISDIR(found.st_mode) or foreign:
                raise PermissionError(errno.EPERM, "not a folder that only this user can reach", str(folder))

    def path(self, key: bytes) -> Path:
        return self._own / (key.hex() + _SUFFIX)

    def __contains__(self, key: bytes) -> bool:
        return os.path.lexists(self.path(key))

    def read(self, key: bytes, most_bytes: int) -> memoryview | None:
        """The payload under `key`, verified, which counts as a use of it; None if there is none.

        Raises `Damaged` if something else has its name or it is larger than `most_bytes`; it is then removed.
        """
        try:
            file = _read(self.path(key), most_bytes)
        except FileNotFoundError:
            return None
        payload = layout.payload_of(file, self._identity, key) if file is not None else None
        if payload is None:
            remove(self.path(key))
            raise Damaged
        return payload

    def write(self, key: bytes, payload: Buffer) -> None:
        """Put `payload` under `key` at once or not at all. Not synced: the checksum tells what a power cut left."""
        self._make()
        temporary = self._own / f"{key.hex()}.{secrets.token_hex(8)}{_TEMPORARY}"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o600)
            with open(descriptor, "wb", buffering=0) as file:
                for part in (layout.header(self._identity, key, payload), payload):
                    rest = memoryview(part).cast("B")
                    while rest:
                        rest = rest[file.write(rest) or 0 :]
            temporary.replace(self.path(key))
        except OSError:
            remove(temporary)
            raise

    def mark_used(self, keys: Sequence[bytes]) -> None:
        """Count as a use of the files of `keys` that are here, of the first as the latest."""
        now_ns = time.time_ns()
        for age, key in enumerate(keys):
            # A step apart, or a clock that ticks in milliseconds would lose the order.
            used_ns = now_ns - age * _STEP_NS
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.path(key), ns=(used_ns, used_ns))

    def announce(self) -> None:
        """Show to other processes that this identity is in use."""
        self._make()
        os.utime(self._own)

    def scan(self) -> list[Stored]:
        """All files of ours, of every identity, the first to give up first; removes what dead writers left.

        Those of idle identities come first, then the least recently used.
        """
        now = time.time()
        found = []
        for folder in _entries(self._directory):
            if not folder.is_dir(follow_symlinks=False) or len(folder.name) != len(self._own.name):
                continue
            idle = folder.name != self._own.name and _changed_at(folder) < now - IDLE_IDENTITY_S
            for entry in _entries(Path(folder.path)):
                if stored := _stored(entry, now, idle=idle):
                    found.append(stored)
        return sorted(found, key=lambda stored: (not stored.idle, stored.used_at))

    def remove(self, stored: Stored) -> None:
        """Remove a file, and its folder if that is now empty and of an idle identity."""
        file = Path(stored.path)
        remove(file)
        if stored.idle:
            with contextlib.suppress(OSError):  # not empty yet, or gone
                os.utime(file.parent, (0, 0))  # the removal was a change: still idle
                file.parent.rmdir()


def remove(path: Path) -> None:
    """Remove a file or link that may already be gone."""
    path.unlink(missing_ok=True)


def _read(path: Path, most_bytes: int) -> memoryview | None:
    """A whole file, marked as used now; None if it is not a file or larger than `most_bytes`. Raises `OSError`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | _NO_FOLLOW | _NO_WAIT)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):  # a link (EMLINK on FreeBSD)
            return None
        raise
    with open(descriptor, "rb", buffering=0) as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > most_bytes:
            return None
        buffer = bytearray(found.st_size)
        rest = memoryview(buffer)
        while rest and (count := file.readinto(rest)):
            rest = rest[count:]
        # The time of change stands for that of use: the system often does not keep that of access.
        with contextlib.suppress(FileNotFoundError):
            os.utime(descriptor if os.utime in os.supports_fd else path)
        return memoryview(buffer)


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError):
        return


def _changed_at(entry: os.DirEntry[str]) -> float:
    try:
        return entry.stat(follow_symlinks=False).st_mtime
    except FileNotFoundError:
        return 0.0


def _stored(entry: os.DirEntry[str], now: float, *, idle: bool) -> Stored | None:
    """What `entry` is to the limit; None for what is not ours or was just removed."""
    if not entry.name.endswith((_SUFFIX, _TEMPORARY)):
        return None
    try:
        found = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    if entry.name.endswith(_TEMPORARY) and found.st_mtime < now - ABANDONED_S:
        remove(Path(entry.path))
        return None
    return Stored(entry.path, found.st_size, found.st_mtime, idle)
