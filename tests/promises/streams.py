"""A client that reads streams to their ends, whatever these are, and says what it was told."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Ending:
    """What a client was told: deltas that it was given, the last usage, an error's code, whether `[DONE]` came."""

    request_id: str
    status: int = 0
    deltas: int = 0
    usage: dict[str, Any] | None = None
    error: str | None = None
    done: bool = False
    arrivals: list[float] = field(default_factory=list)  # of deltas, by the monotonic clock
    ended: float = 0.0

    @property
    def structured(self) -> bool:
        """Whether it ended as the interface says: whole, refused, or with an error event."""
        whole = self.done and self.usage is not None
        return whole if self.error is None else not self.done


def head(body: dict[str, Any], request_id: str, path: str = "/v1/completions") -> bytes:
    """A request's bytes."""
    data = json.dumps(body).encode()
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"X-Request-Id: {request_id}",
        f"Content-Length: {len(data)}",
        "Connection: close",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


async def ask(port: int, prompt: str, request_id: str, **fields: Any) -> Ending:
    """Ask for a completion, streamed unless `stream` is False, and read to its end."""
    ending = Ending(request_id)
    body = {"model": "tiny", "prompt": prompt, "stream": True, "max_tokens": 4000, **fields}
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head(body, request_id))
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await _read(reader, ending)
        writer.close()
    except OSError:
        pass
    ending.ended = time.monotonic()
    return ending


async def _read(reader: asyncio.StreamReader, ending: Ending) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    ending.status = int(head.split()[1])
    if b"text/event-stream" not in head:
        told = json.loads(await reader.read())
        ending.error = told["error"]["code"] if "error" in told else None
        ending.usage, ending.done = told.get("usage"), ending.error is None
        return
    while line := await reader.readline():
        if line.startswith(b"data: "):
            _take(line[6:].strip(), ending)


def _take(data: bytes, ending: Ending) -> None:
    if data == b"[DONE]":
        ending.done = True
        return
    told = json.loads(data)
    if "error" in told:
        ending.error = told["error"]["code"]
        return
    ending.usage = told.get("usage") or ending.usage
    if any(choice.get("text") for choice in told["choices"]):
        ending.deltas += 1
        ending.arrivals.append(time.monotonic())
