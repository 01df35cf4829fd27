"""Streams: the only place that makes their bytes, and the heartbeat that keeps a silent stream alive.

Nothing is buffered here: a batch is sent when the one before has been taken, and the connection's write deadline ends a
client that takes nothing. Content is never logged.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from starlette.types import Send

from ocserve.api.dialect import SSE, Frame, Framing

_HEADERS = [
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the stream back
]


def encode(frame: Frame, framing: Framing) -> bytes:
    """One frame's bytes. `data` is one line: JSON escapes line breaks."""
    name = f"event: {frame.event}\n".encode() if frame.event else b""
    return b"%b%b%b%b" % (name, framing.prefix, frame.data, framing.suffix)


class _Line:
    """The outgoing side of one stream; knows when it last said something."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._spoke_at = self._loop.time()

    async def say(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._spoke_at = self._loop.time()

    async def keep_alive(self, what: bytes, every_s: float) -> None:
        """Say something harmless whenever nothing has been said for `every_s`."""
        while True:
            silent_s = self._loop.time() - self._spoke_at
            if silent_s >= every_s:
                await self.say(what)
            else:
                await asyncio.sleep(every_s - silent_s)


async def respond(
    send: Send, batches: AsyncIterator[Sequence[Frame]], framing: Framing = SSE, *, heartbeat_s: float
) -> None:
    """Send `batches` as one stream, to its end."""
    headers = [(b"content-type", framing.media_type.encode()), *_HEADERS]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    line = _Line(send)
    heartbeat = asyncio.create_task(line.keep_alive(framing.keep_alive, heartbeat_s))
    lead = b""
    try:
        if framing.opening:
            await line.say(framing.opening)
        async for batch in batches:
            if batch:
                await line.say(lead + framing.separator.join(encode(frame, framing) for frame in batch))
                lead = framing.separator
    finally:
        heartbeat.cancel()
    await send({"type": "http.response.body", "body": framing.closing})
