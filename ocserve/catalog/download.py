"""Brings one remote file to disk, all or nothing: partial file, resume, checksum, fsync, atomic rename.

A download that is killed leaves `<name>.partial` and `<name>.partial.json`, which says whose bytes they are. The next
one goes on behind them if the identity is the same, after hashing them anew: nothing about the partial file is trusted.
The caller holds the model's lock.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from ocserve.catalog import transport
from ocserve.catalog.errors import ChecksumMismatch, DiskFull, SourceRefused, SourceUnreachable, StoreUnwritable
from ocserve.catalog.hub import RemoteFile
from ocserve.catalog.progress import OnProgress, Progress
from ocserve.decoding import resolved

SYNC_BYTES = 8 * 1024 * 1024  # what a kill or a power cut can cost, at most, with what lies in socket buffers
READ_BYTES = 1024 * 1024
STALL_S = 30.0
ATTEMPTS = 6  # in a row without a byte of progress
RESTARTS = 2  # from zero, after bytes that do not match the checksum
BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
REPORT_S = 0.1

_ETAG_SHA256 = re.compile(r"[0-9a-f]{64}")


@resolved
class _Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose bytes a partial file holds."""

    url: str
    size: int
    sha256: str


def free_bytes(directory: Path) -> int:
    """Free space for this user where `directory` lies."""
    return shutil.disk_usage(directory).free


@dataclass(slots=True)
class Download:
    """One file on its way to `target`."""

    remote: RemoteFile
    target: Path
    headers: Mapping[str, str]
    reserve_bytes: int
    on_progress: OnProgress
    free: Callable[[Path], int] = free_bytes
    stall_s: float = STALL_S
    sleep: Callable[[float], None] = time.sleep

    @property
    def partial(self) -> Path:
        return self.target.with_name(self.target.name + ".partial")

    @property
    def sidecar(self) -> Path:
        return self.target.with_name(self.target.name + ".partial.json")

    def run(self) -> None:
        """Bring the file to `target`. Raises `DiskFull`, `ChecksumMismatch`, `SourceUnreachable` or `SourceRefused`."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(RESTARTS + 1):
            with self._open_partial() as file:
                digest = self._hash_existing(file)
                self._check_space(self.remote.size - file.tell())
                self._fetch(file, digest)
                _sync(file)
            if digest.hexdigest() == self.remote.sha256:
                os.replace(self.partial, self.target)
                sync_directory(self.target.parent)
                self.sidecar.unlink(missing_ok=True)
                return
            self.partial.unlink()
            self.on_progress(
                Progress(phase="note", note=f"{self.remote.name}: wrong bytes were received, starting again")
            )
        raise ChecksumMismatch(
            f"{self.remote.name} was received {RESTARTS + 1} times with bytes that do not match its checksum",
            hint="a proxy may be altering it; nothing was installed",
        )

    def _open_partial(self) -> BinaryIO:
        """The partial file, emptied unless the sidecar says that its bytes are this file's."""
        identity = _Identity(url=self.remote.url, size=self.remote.size, sha256=self.remote.sha256)
        if self._recorded_identity() != identity:
            self.partial.unlink(missing_ok=True)
            write_durably(self.sidecar, msgspec.json.encode(identity))
        file = open(self.partial, "a+b", buffering=0)  # noqa: SIM115  the caller's `with` closes it
        if os.fstat(file.fileno()).st_size > self.remote.size:
            file.truncate(0)
        return file

    def _recorded_identity(self) -> _Identity | None:
        try:
            return msgspec.json.decode(self.sidecar.read_bytes(), type=_Identity)
        except (FileNotFoundError, msgspec.DecodeError):
            return None  # no partial download, or one of unknown origin: the same thing

    def _hash_existing(self, file: BinaryIO) -> hashlib._Hash:
        digest = hashlib.sha256()
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        while block := file.read(READ_BYTES):
            digest.update(block)
            self._report("checking", file.tell(), 0.0)
        if size:
            self._report("checking", size, 0.0)
        return digest

    def _check_space(self, wanted: int) -> None:
        free = self.free(self.target.parent)
        if free - wanted < self.reserve_bytes:
            raise DiskFull(
                f"{self.remote.name} needs {wanted:,} more bytes and {free:,} are free, "
                f"of which {self.reserve_bytes:,} are kept in reserve",
                hint="free some space or set store.directory to another disk, then pull again: it resumes",
            )

    def _fetch(self, file: BinaryIO, digest: hashlib._Hash) -> None:
        """Append to `file` until it is complete; gives up after ATTEMPTS connections in a row without a byte."""
        failures = 0
        while file.tell() < self.remote.size:
            before = file.tell()
            try:
                self._fetch_once(file, digest)
                failure = SourceUnreachable("the connection closed early")
            except SourceUnreachable as error:
                failure = error
            if file.tell() == self.remote.size:
                return
            failures = 0 if file.tell() > before else failures + 1
            if failures >= ATTEMPTS:
                raise SourceUnreachable(
                    f"{self.remote.name}: {failure.message}, {ATTEMPTS} times in a row",
                    hint="pull again later: it goes on where it stopped",
                )
            self.sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])

    def _fetch_once(self, file: BinaryIO, digest: hashlib._Hash) -> None:
        began, received, unsynced, reported = time.monotonic(), 0, 0, 0.0
        offset = file.tell()
        with transport.open_range(self.remote.url, offset, self.remote.size, self.headers, self.stall_s) as body:
            self._check_etag(body.etag)
            skip = offset - body.start  # the server sent the whole file: what is here already is passed over
            for chunk in body.chunks:
                if skip >= len(chunk):
                    skip -= len(chunk)
                    continue
                fresh = chunk[skip:]
                skip = 0
                if file.tell() + len(fresh) > self.remote.size:
                    raise SourceRefused(f"{self.remote.name} is longer than the hub announced")
                _write(file, fresh)
                digest.update(fresh)
                received += len(fresh)
                unsynced += len(fresh)
                now = time.monotonic()
                if now - reported >= REPORT_S:
                    self._report("downloading", file.tell(), received / max(now - began, 1e-3))
                    reported = now
                if unsynced >= SYNC_BYTES:
                    _sync(file)
                    unsynced = 0
                    self._check_space(self.remote.size - file.tell())
        self._report("downloading", file.tell(), received / max(time.monotonic() - began, 1e-3))

    def _check_etag(self, etag: str | None) -> None:
        """The hub's etag of a large file is its sha256, so another one means another file."""
        if etag is not None and _ETAG_SHA256.fullmatch(etag) and etag != self.remote.sha256:
            raise ChecksumMismatch(
                f"{self.remote.name} changed at the hub since it was looked up",
                hint="pull again to get what is there now",
            )

    def _report(self, phase: str, done: int, rate: float) -> None:
        self.on_progress(
            Progress(
                phase="checking" if phase == "checking" else "downloading",
                file=self.remote.name,
                done_bytes=done,
                total_bytes=self.remote.size,
                bytes_per_s=rate,
            )
        )


def write_durably(path: Path, content: bytes) -> None:
    """Replace `path` by `content` so that a crash leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make a rename in `directory` durable. Windows has no such call and needs none."""
    if sys.platform != "win32":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _sync(file: BinaryIO) -> None:
    os.fsync(file.fileno())


@contextmanager
def disk_errors(name: str) -> Iterator[None]:
    """Turns what the operating system says while `name` is written into `DiskFull` or `StoreUnwritable`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"the disk is full while {name} is pulled", hint="free some space, then pull again: it resumes"
            ) from error
        raise StoreUnwritable(
            f"{name} cannot be written: {error.strerror or type(error).__name__}",
            hint=f"check the permissions of {error.filename}, or set store.directory",
        ) from error
