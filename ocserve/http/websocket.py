"""A connection that has become a WebSocket: uvicorn's protocol with the deadlines that it lacks.

uvicorn waits without limit for a client that does not read and for the rest of a message, and treats what is said to a
client that has gone as a mistake. What is refused before the upgrade, and what a message means, is not known here.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame

if TYPE_CHECKING:
    from ocserve.http.connection import EdgeConfig, WatchedTransport
    from ocserve.http.write_deadline import WriteDeadline

# Often enough for the proxies that close what is silent for a minute.
PING_S = 20.0
# Pings that are answered while a client reads nothing, and frames of one message, which may all be empty: neither is
# counted against the limit of a message's bytes.
_MOST_UNREAD_PONGS = 16
_MOST_FRAMES = 1 << 14
# What the WebSocket library reads of a handshake; a larger one is not an upgrade.
_MAX_LINE_BYTES = 8190
_MAX_HEADERS = 128
_KEY_BYTES = 16
_TOKENS = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+(?:\s*,\s*[!#$%&'*+.^_`|~0-9A-Za-z-]+)*")
# At lower levels the library says what messages hold and what was wrong with a client's headers.
_LOGGER = logging.getLogger("ocserve.http.websocket")
_LOGGER.setLevel(logging.CRITICAL)


def is_handshake(method: str, target: bytes, headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether a request is a WebSocket's opening handshake in every respect (RFC 6455, 4.2.1). Names are lower-case."""

    def values(name: bytes) -> list[bytes]:
        return [value.strip() for key, value in headers if key == name]

    connection = [token.strip().lower() for value in values(b"connection") for token in value.split(b",")]
    if (
        method != "GET"
        or b"upgrade" not in connection
        or [each.lower() for each in values(b"upgrade")] != [b"websocket"]
    ):
        return False
    if values(b"sec-websocket-version") != [b"13"] or not _is_key(values(b"sec-websocket-key")):
        return False
    if values(b"content-length") or values(b"transfer-encoding"):
        return False
    if not all(_TOKENS.fullmatch(value) for value in values(b"sec-websocket-protocol")):
        return False
    lines = [len(target) + 16, *(len(name) + len(value) + 2 for name, value in headers)]
    return max(lines) <= _MAX_LINE_BYTES and len(headers) <= _MAX_HEADERS


def _is_key(values: list[bytes]) -> bool:
    try:
        return len(values) == 1 and len(base64.b64decode(values[0], validate=True)) == _KEY_BYTES
    except binascii.Error:
        return False


class WebSocket(WebSocketsSansIOProtocol):
    """Its transport is the HTTP connection's, with that one's write deadline."""

    def __init__(self, config: Any, *arguments: Any, **named: Any) -> None:
        super().__init__(config, *arguments, **named)
        self.logger = self.conn.logger = _LOGGER
        self.conn.debug = False
        self._message_timeout_s = cast("EdgeConfig", config).edge.body_timeout_s
        self._message_timer: asyncio.TimerHandle | None = None
        self._unread_pongs = 0

    @property
    def _write_deadline(self) -> WriteDeadline:
        return cast("WatchedTransport", self.transport).deadline

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_message_timer()
        self._write_deadline.stop()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_deadline.watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._write_deadline.stop()

    # What a client could have kept for it without end

    def handle_ping(self) -> None:
        self._unread_pongs = 0 if self.writable.is_set() else self._unread_pongs + 1
        if self._unread_pongs > _MOST_UNREAD_PONGS:
            self._fail(CloseCode.POLICY_VIOLATION, "answers to pings are not read")
        elif not self.transport.is_closing():
            super().handle_ping()

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) < _MOST_FRAMES:
            super().handle_cont(event)
        else:
            self._fail(CloseCode.MESSAGE_TOO_BIG, "the message has too many frames")

    # The deadline of a message: from its first byte to its last, however slowly bytes trickle in

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not (self.frames or self.conn.reader.buffer) or self.transport.is_closing():
            self._stop_message_timer()
        elif self._message_timer is None:
            self._message_timer = self.loop.call_later(self._message_timeout_s, self._message_late)

    def send_receive_event_to_app(self) -> None:
        self._stop_message_timer()
        super().send_receive_event_to_app()

    def _message_late(self) -> None:
        self._message_timer = None
        self._fail(CloseCode.POLICY_VIOLATION, "the message did not arrive in time")

    def _fail(self, code: CloseCode, reason: str) -> None:
        if not self.transport.is_closing():
            self.conn.fail(code, reason)
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()

    def _stop_message_timer(self) -> None:
        if self._message_timer is not None:
            self._message_timer.cancel()
            self._message_timer = None

    async def send(self, message: Any) -> None:
        """As over HTTP, what is said to a client that has gone is lost; that it has gone is for `receive` to tell."""
        await self.writable.wait()
        if not (self.disconnected or self.close_sent or self.transport.is_closing()):
            with suppress(ClientDisconnected):
                await super().send(message)
