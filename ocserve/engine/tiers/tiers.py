"""The tiers below the device's KV pool as one: host memory in front of disk.

Used from the engine's loop thread only. Keys are those of `blocks`; what the bytes mean is the caller's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from ocserve.engine.tiers.disk import DiskStats, DiskTier
from ocserve.engine.tiers.host import Buffer, HostStats, HostTier

# Reads ahead of need: memory that no limit counts, as the disk tier's queue.
PREFETCHED = 8


@dataclass(frozen=True, slots=True)
class TierStats:
    """`disk` is None when that tier was not asked for. The hits count buffers."""

    host: HostStats
    disk: DiskStats | None
    host_hits: int
    disk_hits: int


class Tiers:
    """What was computed and is no longer, or not only, on the device.

    Where blocks are stored each by itself a prefix is worth what its leading blocks are: `longest` and `touch` keep
    the beginning of a prefix more recently used than its end, so that the end goes first.
    """

    def __init__(self, host: HostTier, disk: DiskTier | None) -> None:
        self._host = host
        self._disk = disk
        self._reader = ThreadPoolExecutor(1, "prefixes from disk")
        self._reads: dict[bytes, Future[Buffer | None]] = {}
        self._host_hits = self._disk_hits = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._host or (self._disk is not None and key in self._disk)

    def longest(self, keys: Sequence[bytes], *, whole: bool) -> int:
        """How many leading blocks of a prompt with `keys` can be had.

        `whole` False: each block is stored by itself, so all before it must be there. `whole` True: a key stores the
        whole sequence so far, so the last one that is there is enough.
        """
        if whole:
            return next((count for count in range(len(keys), 0, -1) if keys[count - 1] in self), 0)
        count = next((index for index, key in enumerate(keys) if key not in self), len(keys))
        self.touch(keys[:count])
        return count

    def touch(self, keys: Sequence[bytes]) -> None:
        """The prefix with `keys` is in use: its blocks are the last to go, the first of them last."""
        self._host.touch(reversed(keys))
        if self._disk is not None and keys:
            self._reader.submit(self._disk.touch, keys)

    def get(self, key: bytes) -> tuple[Buffer, Literal["host", "disk"]] | None:
        """The bytes under `key` and where they were; those from disk are in host memory from now on.

        Waits for the disk unless `ready`. None if they are gone or damaged, whatever `longest` said before.
        """
        if (buffer := self._host.get(key)) is not None:
            self._reads.pop(key, None)
            self._host_hits += 1
            return buffer, "host"
        if self._disk is None:
            return None
        read = self._reads.pop(key, None)
        loaded = read.result() if read is not None else self._disk.get(key)
        if loaded is None:
            return None
        self._host.put(key, loaded)
        self._disk_hits += 1
        return loaded, "disk"

    def put(self, key: bytes, buffer: Buffer) -> None:
        """Keep `buffer`, which must not change any more: in host memory now, on disk soon.

        Of a prefix stored in blocks put the last block first.
        """
        self._host.put(key, buffer)
        if self._disk is not None:
            self._disk.put(key, buffer)

    def prefetch(self, keys: Sequence[bytes]) -> None:
        """Begin to read the first of `keys` that are not in host memory, and forget reads that nobody claimed."""
        if self._disk is None:
            return
        wanted = [key for key in keys if key not in self._host][:PREFETCHED]
        for key in [key for key in self._reads if key not in wanted]:
            self._reads.pop(key).cancel()
        for key in wanted:
            if key not in self._reads:
                self._reads[key] = self._reader.submit(self._disk.get, key)

    def ready(self, key: bytes) -> bool:
        """Whether `get` would answer without waiting for the disk."""
        return self._disk is None or key in self._host or (key in self._reads and self._reads[key].done())

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was put is on disk; False if that took longer."""
        return self._disk is None or self._disk.flush(timeout_s)

    def stats(self) -> TierStats:
        disk = self._disk.stats() if self._disk is not None else None
        return TierStats(self._host.stats(), disk, self._host_hits, self._disk_hits)

    def close(self) -> None:
        """Stop the threads; what is not yet on disk is lost unless flushed before."""
        self._reader.shutdown(cancel_futures=True)
        if self._disk is not None:
            self._disk.close()
