"""Clients that hold connections open: `python -m tests.http.slow_clients <port> <idle> <headers> <bodies>`.

Prints how long each connection was left open, per kind, once the server has cut all of them.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

HEAD = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: " + b"a" * 1000
BODY = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
)


async def held(port: int, first: bytes, trickle: bytes, kind: str, start: float) -> tuple[str, float, int]:
    """(kind, seconds until the server ended it, status of the answer or 0)."""
    await asyncio.sleep(start)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    begun = time.monotonic()
    writer.write(first)

    async def drip() -> None:
        for byte in trickle:
            await asyncio.sleep(1)
            writer.write(bytes([byte]))

    dripping = asyncio.create_task(drip())
    try:
        answer = await reader.read()
    except ConnectionResetError:
        answer = b""
    seconds = time.monotonic() - begun
    dripping.cancel()
    writer.close()
    return kind, seconds, int(answer.split()[1]) if answer else 0


async def main(port: int, idle: int, headers: int, bodies: int) -> None:
    spread = 2.0
    clients = [
        *(held(port, b"", b"", "idle", spread * number / idle) for number in range(idle)),
        *(held(port, HEAD[:20], HEAD[20:], "headers", spread * number / headers) for number in range(headers)),
        *(held(port, BODY, b"{" * 900, "bodies", spread * number / bodies) for number in range(bodies)),
    ]
    results = await asyncio.gather(*clients)
    print(json.dumps(results))


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
