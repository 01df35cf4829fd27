"""Stored prefixes in main memory: a bounded map from keys to buffers that gives up the least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class HostStats:
    """`bytes` in `blocks` buffers now; `evicted` buffers so far."""

    bytes: int
    blocks: int
    evicted: int


class HostTier:
    """At most `limit_bytes` of buffers, which it shares with whoever put them: nobody may change them afterwards."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._buffers: OrderedDict[bytes, Buffer] = OrderedDict()  # least recently used first
        self._bytes = 0
        self._evicted = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._buffers

    def get(self, key: bytes) -> Buffer | None:
        """The buffer under `key`, which is now the most recently used."""
        buffer = self._buffers.get(key)
        if buffer is not None:
            self._buffers.move_to_end(key)
        return buffer

    def touch(self, keys: Iterable[bytes]) -> None:
        """Make those of `keys` that are here the most recently used, the last of them most."""
        for key in keys:
            if key in self._buffers:
                self._buffers.move_to_end(key)

    def put(self, key: bytes, buffer: Buffer) -> bool:
        """Hold `buffer`, in place of what was under `key`; False if it is larger than the whole tier."""
        self.remove(key)
        size = size_bytes(buffer)
        if size > self._limit_bytes:
            return False
        while self._bytes + size > self._limit_bytes:
            self.remove(next(iter(self._buffers)))
            self._evicted += 1
        self._buffers[key] = buffer
        self._bytes += size
        return True

    def remove(self, key: bytes) -> None:
        """Let go of the buffer under `key`, if there is one."""
        buffer = self._buffers.pop(key, None)
        if buffer is not None:
            self._bytes -= size_bytes(buffer)

    def stats(self) -> HostStats:
        return HostStats(self._bytes, len(self._buffers), self._evicted)


def size_bytes(buffer: Buffer) -> int:
    """How many bytes `buffer` has, whatever its items are."""
    return memoryview(buffer).nbytes
