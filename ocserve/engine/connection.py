"""The front's end of one engine process, from start to death: messages to it and from it, and its last words."""

from __future__ import annotations

import asyncio
import contextlib
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator

from ocserve.engine import wire

_EXIT_WAIT_S = 2.0
_STDERR_TAIL_BYTES = 4096


class Connection:
    """One engine process and the socket to it."""

    def __init__(self, process: Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.process = process
        self.reader = reader
        self.writer = writer
        self.last_heard = time.monotonic()
        self.completed = 0  # generations and answers that ended well; one is enough to call the engine healthy
        self.stderr = b""
        self.messages = self._messages()  # one iterator for the whole life: it holds the bytes of half a frame

    def send(self, message: wire.FrontMessage) -> None:
        self.writer.write(wire.encode(message))

    async def _messages(self) -> AsyncIterator[wire.EngineMessage]:
        """Messages until end-of-file, which is the engine's death."""
        frames = wire.Frames()
        while data := await self._read():
            self.last_heard = time.monotonic()
            for body in frames.feed(data):
                yield wire.decode_engine(body)

    async def _read(self) -> bytes:
        try:
            return await self.reader.read(1 << 16)
        except ConnectionError:
            return b""

    async def keep_stderr_tail(self) -> None:
        """Drain standard error so that the engine never blocks on it, keeping its last words."""
        assert self.process.stderr is not None
        while data := await self.process.stderr.read(1024):
            self.stderr = (self.stderr + data)[-_STDERR_TAIL_BYTES:]

    def last_words(self) -> str:
        """The line in which native code said why it aborted; other output is not repeated."""
        lines = self.stderr.decode(errors="replace").splitlines()
        return next((line for line in reversed(lines) if "GGML_ASSERT" in line or "ocserve-engine:" in line), "")[:300]

    async def end(self) -> int:
        """Close the socket, give the process a moment, then kill it. Returns its exit status."""
        self.writer.close()
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(self.process.wait(), _EXIT_WAIT_S)
        return await self.kill()

    async def kill(self) -> int:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        return await self.process.wait()
