"""Server-sent events: the only place that makes their bytes, and the heartbeat that keeps a silent stream alive.

Nothing is buffered here: a batch is sent when the one before has been taken, and the connection's write deadline ends a
client that takes nothing. Content is never logged.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from starlette.types import Send

from ocserve.api.dialect import Frame

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the stream back
]
_KEEP_ALIVE = b": keep-alive\n\n"


def encode(frame: Frame) -> bytes:
    """One frame's bytes. `data` is one line: JSON escapes line breaks."""
    name = f"event: {frame.event}\n".encode() if frame.event else b""
    return b"%bdata: %b\n\n" % (name, frame.data)


class _Line:
    """The outgoing side of one stream; knows when it last said something."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._spoke_at = self._loop.time()

    async def say(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._spoke_at = self._loop.time()

    async def keep_alive(self, every_s: float) -> None:
        """Say something harmless whenever nothing has been said for `every_s`."""
        while True:
            silent_s = self._loop.time() - self._spoke_at
            if silent_s >= every_s:
                await self.say(_KEEP_ALIVE)
            else:
                await asyncio.sleep(every_s - silent_s)


async def respond(send: Send, batches: AsyncIterator[Sequence[Frame]], *, heartbeat_s: float) -> None:
    """Send `batches` as one event stream, to its end."""
    await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
    line = _Line(send)
    heartbeat = asyncio.create_task(line.keep_alive(heartbeat_s))
    try:
        async for batch in batches:
            if batch:
                await line.say(b"".join(map(encode, batch)))
    finally:
        heartbeat.cancel()
    await send({"type": "http.response.body"})
