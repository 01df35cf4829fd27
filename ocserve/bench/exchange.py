"""POSTs over HTTP/1.1 whose answers are read as their bytes arrive, with nothing but h11 between them and asyncio.

A general client spends about a millisecond of a core on each piece of a stream: on a small machine the load generator
would take from the server what it is to measure.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self
from urllib.parse import SplitResult, unquote, urlsplit

import h11

from ocserve.peer import CONNECT_TIMEOUT_S

_PIECE_BYTES = 1 << 16
_PORTS = {"http": 80, "https": 443}


class ExchangeFailed(Exception):
    """There is no whole answer; the text names the kind of failure."""


@dataclass(slots=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    http: h11.Connection

    @property
    def usable(self) -> bool:
        """Whether another request can be sent on it."""
        idle = self.http.our_state is h11.IDLE and self.http.their_state is h11.IDLE
        return idle and not self.reader.at_eof() and not self.writer.is_closing()


class Exchange:
    """Connections to the server at `url`, as many as there are requests at a time; kept until `close`.

    `timeout_s` is how long the server may be silent. Raises `ExchangeFailed` for what is no address of HTTP.
    """

    def __init__(self, url: str, key: str | None, timeout_s: float) -> None:
        self._url = urlsplit(url)
        if self._url.scheme not in _PORTS or not self._url.hostname or not url.isascii():
            raise ExchangeFailed("not an HTTP address")
        try:
            self._port = self._url.port or _PORTS[self._url.scheme]
        except ValueError:
            raise ExchangeFailed("not an HTTP address") from None
        self._timeout_s = timeout_s
        self._headers = [
            ("host", self._url.netloc.rpartition("@")[2]),
            ("content-type", "application/json"),
            ("accept-encoding", "identity"),
            *_authorization(self._url, key),
        ]
        self._idle: list[_Connection] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().writer.close()

    async def post(self, path: str, body: bytes, feed: Callable[[bytes], None]) -> tuple[int, bytes]:
        """Send `body` to `path` below the URL; `feed` gets each piece of an answer of status 200 as it arrives.

        Returns the status, and what any other answer says. Raises `ExchangeFailed`, and what `feed` raises.
        """
        connection = await self._connection()
        try:
            async with asyncio.timeout(self._timeout_s) as silence:
                connection.writer.write(self._request(connection.http, path, body))
                status, rest = await self._answer(connection, silence, feed)
            if connection.http.our_state is connection.http.their_state is h11.DONE:
                connection.http.start_next_cycle()
        except TimeoutError:
            raise ExchangeFailed("timeout") from None
        except (OSError, h11.ProtocolError) as error:
            raise ExchangeFailed(f"broken connection ({type(error).__name__})") from None
        finally:
            if connection.usable:
                self._idle.append(connection)
            else:
                connection.writer.close()
        return status, rest

    async def _connection(self) -> _Connection:
        while self._idle:
            if (connection := self._idle.pop()).usable:
                return connection
            connection.writer.close()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(
                    self._url.hostname, self._port, ssl=self._url.scheme == "https" or None
                )
        except TimeoutError:
            raise ExchangeFailed("timeout") from None
        except OSError:
            raise ExchangeFailed("cannot connect") from None
        return _Connection(reader, writer, h11.Connection(h11.CLIENT))

    def _request(self, http: h11.Connection, path: str, body: bytes) -> bytes:
        headers = [*self._headers, ("content-length", str(len(body)))]
        head = http.send(h11.Request(method="POST", target=self._url.path + path, headers=headers))
        sent = (head, http.send(h11.Data(data=body)), http.send(h11.EndOfMessage()))
        return b"".join(part for part in sent if part)

    async def _answer(
        self, connection: _Connection, silence: asyncio.Timeout, feed: Callable[[bytes], None]
    ) -> tuple[int, bytes]:
        http, status, rest = connection.http, 0, bytearray()
        now = asyncio.get_running_loop().time
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                http.receive_data(await connection.reader.read(_PIECE_BYTES))
                silence.reschedule(now() + self._timeout_s)
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                if status == 200:
                    feed(bytes(event.data))
                else:
                    rest += event.data
            elif isinstance(event, h11.EndOfMessage):
                return status, bytes(rest)


def _authorization(url: SplitResult, key: str | None) -> list[tuple[str, str]]:
    if key is not None:
        return [("authorization", f"Bearer {key}")]
    if url.username is None:
        return []
    user = f"{unquote(url.username)}:{unquote(url.password or '')}"
    return [("authorization", f"Basic {base64.b64encode(user.encode()).decode()}")]
