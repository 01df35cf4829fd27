"""Stored prefixes on disk: a bounded folder that is written behind the engine's back and outlives it.

A write goes to a queue and from there to disk on a thread of its own, so that the engine's loop never waits for one.
What is still queued can be read. Any failure of the system turns the tier off, says why once and never reaches the
loop: a prefix that is not stored is only computed again.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ocserve.engine.tiers.folder import Damaged, Folder
from ocserve.engine.tiers.host import Buffer, size_bytes
from ocserve.engine.tiers.layout import HEADER_BYTES

# Buffers waiting for the disk are memory that no limit of the host tier counts: about 40 blocks of a 135M model.
QUEUE_BYTES = 128 * 1024 * 1024
# When the limit is reached this share stays, so that not every write looks through the folder.
_KEPT_SHARE = 0.9
# Other processes write too: look at what is really there after this share of the limit was written.
_RESCAN_SHARE = 1 / 16


@dataclass(frozen=True, slots=True)
class DiskStats:
    """`bytes` on disk by the last look, of all identities, `queued_bytes` on their way; the rest counts files so far.

    `dropped` were not written: the queue was full, the file larger than the tier, or the tier off. `rejected` were
    damaged or not ours when read. `disabled` says why the tier is off.
    """

    bytes: int
    queued_bytes: int
    written: int
    dropped: int
    evicted: int
    rejected: int
    disabled: str | None


class DiskTier:
    """At most `limit_bytes` of files below `directory`, over all identities and processes.

    Processes that write at the same time may exceed the limit by a sixteenth each until their next look. `on_disabled`
    is called once, from any thread, with the reason. Any thread may
    call `get`, `touch` and `in`; all else is for one.
    """

    def __init__(
        self,
        directory: Path,
        identity: bytes,
        limit_bytes: int,
        on_disabled: Callable[[str], None],
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        self._limit_bytes = limit_bytes
        self._queue_bytes = queue_bytes
        self._on_disabled = on_disabled
        self._turn = threading.Condition()  # guards all below
        self._queue: OrderedDict[bytes, Buffer] = OrderedDict()  # oldest first; what is being written stays in it
        self._queued_bytes = 0
        self._writing: bytes | None = None
        self._stopping = False
        self._disabled: str | None = None
        self._stored_bytes = self._unseen_bytes = 0
        self._written = self._dropped = self._evicted = self._rejected = 0
        self._folder: Folder | None = None
        self._writer = threading.Thread(target=self._write_behind, name="prefixes to disk", daemon=True)
        with self._failures():
            self._folder = Folder(directory, identity)
            self._writer.start()

    def __contains__(self, key: bytes) -> bool:
        with self._turn:
            if key in self._queue:
                return True
        return self._folder is not None and self._disabled is None and key in self._folder

    def get(self, key: bytes) -> Buffer | None:
        """The bytes that were put under `key`, verified, or None. Reads the disk; marks the file as used."""
        with self._turn:
            if (queued := self._queue.get(key)) is not None:
                return queued
        if self._folder is None or self._disabled is not None:
            return None
        with self._failures():
            try:
                return self._folder.read(key, self._limit_bytes)
            except Damaged:
                with self._turn:
                    self._rejected += 1
        return None

    def put(self, key: bytes, buffer: Buffer) -> None:
        """Write `buffer`, which must not change, under `key` later; the oldest that wait are dropped for it if need be.

        Of a prefix stored in blocks the last block is put first: what is oldest is dropped, and given up, first.
        """
        if key in self:
            return
        size = size_bytes(buffer)
        with self._turn:
            if self._off or size + HEADER_BYTES > self._limit_bytes:
                self._dropped += 1
                return
            waiting = [other for other in self._queue if other != self._writing]
            for oldest in waiting:
                if self._queued_bytes + size <= self._queue_bytes:
                    break
                self._unqueue(oldest)
                self._dropped += 1
            self._queue[key] = buffer
            self._queued_bytes += size
            self._turn.notify_all()

    def touch(self, keys: Sequence[bytes]) -> None:
        """Count as a use of the files of `keys`, of the first as the latest."""
        if self._folder is not None and self._disabled is None:
            with self._failures():
                self._folder.mark_used(keys)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was put is on disk or dropped; False if that took longer than `timeout_s`."""
        with self._turn:
            return self._turn.wait_for(lambda: not self._queue, timeout_s)

    def close(self) -> None:
        """Stop after the file that is being written; what still waits is dropped."""
        with self._turn:
            self._stop()
        if self._writer.is_alive():
            self._writer.join()

    def stats(self) -> DiskStats:
        with self._turn:
            return DiskStats(
                bytes=self._stored_bytes,
                queued_bytes=self._queued_bytes,
                written=self._written,
                dropped=self._dropped,
                evicted=self._evicted,
                rejected=self._rejected,
                disabled=self._disabled,
            )

    @property
    def _off(self) -> bool:
        return self._stopping or self._disabled is not None

    def _unqueue(self, key: bytes) -> None:
        self._queued_bytes -= size_bytes(self._queue.pop(key))

    def _stop(self) -> None:
        self._stopping = True
        for key in [key for key in self._queue if key != self._writing]:
            self._unqueue(key)
            self._dropped += 1
        self._turn.notify_all()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn the tier off when the system refuses something. That a file is gone is no failure: others remove too."""
        try:
            yield
        except FileNotFoundError:
            return
        except OSError as error:
            # Not str(error): a path tells nobody what to do and names users.
            reason = error.strerror or type(error).__name__
            with self._turn:
                first, self._disabled = self._disabled is None, self._disabled or reason
                self._stop()
            if first:
                self._on_disabled(reason)

    # The writer's thread.

    def _write_behind(self) -> None:
        folder = self._folder
        assert folder is not None
        with self._failures():
            self._make_room(folder, 0)
        while (key := self._next()) is not None:
            with self._turn:
                buffer = self._queue[key]
            written = False
            with self._failures():
                self._write(folder, key, buffer)
                written = True
            with self._turn:
                self._written += written
                self._dropped += not written
                self._writing = None
                self._unqueue(key)
                self._turn.notify_all()

    def _next(self) -> bytes | None:
        """Wait for something to write and return its key; None once the tier is off."""
        with self._turn:
            self._turn.wait_for(lambda: self._queue or self._off)
            if not self._off:
                self._writing = next(iter(self._queue))
            return self._writing

    def _write(self, folder: Folder, key: bytes, buffer: Buffer) -> None:
        size = size_bytes(buffer) + HEADER_BYTES
        full = self._stored_bytes + size > self._limit_bytes
        if full or self._unseen_bytes + size > self._limit_bytes * _RESCAN_SHARE:
            self._make_room(folder, size)
        folder.write(key, buffer)
        with self._turn:
            self._stored_bytes += size
            self._unseen_bytes += size

    def _make_room(self, folder: Folder, size: int) -> None:
        """Look at all files, and remove those to give up first if `size` bytes more would exceed the limit."""
        folder.announce()
        files = folder.scan()
        stored, evicted = sum(file.size_bytes for file in files), 0
        if stored + size > self._limit_bytes:
            room = min(self._limit_bytes * _KEPT_SHARE, self._limit_bytes - size)
            for file in files:
                if stored <= room:
                    break
                folder.remove(file)
                stored -= file.size_bytes
                evicted += 1
        with self._turn:
            self._stored_bytes, self._unseen_bytes = stored, 0
            self._evicted += evicted
