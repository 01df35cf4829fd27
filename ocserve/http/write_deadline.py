"""The deadline for a client that does not read what was written for it."""

from __future__ import annotations

import asyncio
import socket
import struct
import sys

# The slowest reader that is waited for; HTTP.sys has the same figure (MinSendRate).
MIN_BYTES_PER_S = 150
_CHECKS_PER_DEADLINE = 4
# SO_LINGER's two numbers, which Windows has as shorts: the end is immediate.
_NOTHING_LEFT = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)


class WriteDeadline:
    """Watches one transport while it holds something that its peer has not taken."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        self._transport = transport
        self._loop = loop
        self._timeout_s = timeout_s
        self._timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """Cut the connection unless its peer reads on at a minimum rate. Nothing is written while this waits."""
        if self._timer is None:
            self._check(self._transport.get_write_buffer_size(), 0)

    def stop(self) -> None:
        """Watch no longer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self, size: int, checks: int) -> None:
        """Look several times within a deadline; the rate over the whole of it decides."""
        left = self._transport.get_write_buffer_size()
        if checks >= _CHECKS_PER_DEADLINE:
            if left and size - left < min(size, MIN_BYTES_PER_S * self._timeout_s):
                self._reset()
                return
            size, checks = left, 0
        self._timer = self._loop.call_later(self._timeout_s / _CHECKS_PER_DEADLINE, self._check, size, checks + 1)

    def _reset(self) -> None:
        """End the connection so that the system lets go of what it holds for the peer: megabytes, and for minutes."""
        connection = self._transport.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NOTHING_LEFT)
        self._transport.abort()
