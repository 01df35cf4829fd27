"""One client connection: uvicorn's h11 protocol with the deadlines and answers that it lacks.

uvicorn arms no timer before the first request and disarms the keep-alive timer at the first byte, waits without limit
for a client that does not read, answers malformed HTTP as text, and stops reading while it answers when another request
follows on the same connection, so that it does not notice the client's going. Each of these is made good here. A
WebSocket's opening handshake ends the life of this object: the connection goes on as a `WebSocket`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from ocserve import config
from ocserve.api import openai_wire
from ocserve.errors import ApiError, HeadersTooLarge, InvalidRequest, RequestTimeout
from ocserve.http import websocket
from ocserve.http.write_deadline import WriteDeadline
from ocserve.telemetry import logs

# nginx allows 4 x 8 KiB, node.js 16 KiB, h11's own default is 16 KiB.
MAX_HEADER_BYTES = 32 * 1024
# More connections than this, and the one that has been idle longest makes room for the newest.
MAX_CONNECTIONS = 8192
# What a client may send behind a request that is still being answered.
_MAX_PIPELINED = 64 * 1024
# What is kept for a client that does not read before its stream waits; the system keeps more.
_UNSENT_BYTES = 16 * 1024
# How long a refused client may take to read its answer while the rest of its body is thrown away. Closing at once would
# reset the connection, and the answer would be lost with it.
_LINGER_S = 2.0
_LINGER_BODY_BYTES = 16 * 1024 * 1024
_LINGER_HEADER_BYTES = 256 * 1024
# uvicorn's warning about each malformed request says less than the event that is logged here.
_LOGGER = logging.getLogger("ocserve.http.connection")
_LOGGER.setLevel(logging.ERROR)


class EdgeConfig(uvicorn.Config):
    """uvicorn's settings, and ours beside them for the connections."""

    def __init__(self, app: Any, edge: config.Server) -> None:
        self.edge = edge
        super().__init__(
            app,
            http=Connection,
            ws=websocket.WebSocket,
            ws_max_size=edge.most_body_bytes,
            ws_per_message_deflate=False,  # a small message could unpack to a huge one
            ws_ping_interval=websocket.PING_S,
            ws_ping_timeout=None,  # some clients answer pings only while they wait for a message
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_keep_alive=edge.keep_alive_s,  # type: ignore[arg-type]  # any number of seconds works
            timeout_graceful_shutdown=1,
        )


class Connection(H11Protocol):
    """States: awaiting headers (deadline), answering (the guards have timers), idle (keep-alive), lingering."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._edge = cast(EdgeConfig, config).edge
        self.logger = _LOGGER
        self._header_timer: asyncio.TimerHandle | None = None
        self._upgraded = False
        self._pipelined = bytearray()
        self._lingering = False
        self._linger_bytes = 0
        self.idle_since = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        watched = WatchedTransport(transport, self, WriteDeadline(transport, self.loop, self._edge.write_timeout_s))
        self._deadline = watched.deadline
        transport.set_write_buffer_limits(high=_UNSENT_BYTES)
        super().connection_made(cast(asyncio.Transport, watched))
        self._await_headers()
        if len(self.connections) > MAX_CONNECTIONS:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """1. Refused: thrown away. 2. Behind a request being answered: kept, within a bound. 3. Else: to h11."""
        if self._lingering:  # 1
            self._linger_bytes -= len(data)
            if self._linger_bytes < 0:
                self.transport.abort()
            return
        if self._answering and self.conn.their_state is h11.DONE:  # 2
            self._pipelined += data
            if len(self._pipelined) > _MAX_PIPELINED:
                self.transport.abort()
            return
        super().data_received(data)  # 3
        self._update_header_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.idle_since = self.loop.time()
        if self._pipelined and not self.transport.is_closing():
            data, self._pipelined = bytes(self._pipelined), bytearray()
            self.data_received(data)
        self._update_header_timer()

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is h11.DONE:
            self.flow.resume_reading()  # else the client's going would not be seen; what it sends is bounded above

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # The header deadline

    def _await_headers(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self._edge.header_timeout_s, self._headers_late)

    def _update_header_timer(self) -> None:
        """The timer runs from a request's first byte to the end of its headers, however slowly bytes trickle in."""
        if self._answering or self._upgraded or self.transport.is_closing():
            self._cancel_header_timer()
        elif self.conn.trailing_data[0] or self.timeout_keep_alive_task is None:
            self._unset_keepalive_if_required()
            self._await_headers()

    def _headers_late(self) -> None:
        self._header_timer = None
        if self._answering or self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            self._refuse(
                RequestTimeout(f"The request headers did not arrive within {self._edge.header_timeout_s:g} s.")
            )
        else:
            self.transport.close()

    def _cancel_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    # The write deadline

    def pause_writing(self) -> None:
        super().pause_writing()
        self._deadline.watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._deadline.stop()

    def _cancel_timers(self) -> None:
        self._cancel_header_timer()
        self._deadline.stop()

    # Upgrades

    def _should_upgrade(self) -> bool:
        """What does not ask for an upgrade properly is answered as the plain request that it also is."""
        return websocket.is_handshake(self.scope["method"], self.scope["raw_path"], self.headers)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._upgraded = True
        self._cancel_timers()
        super().handle_websocket_upgrade(event)

    # Refusals of what is not HTTP

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this while it handles h11's error, which knows whether the headers were too large."""
        error = sys.exc_info()[1]
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            self._refuse(HeadersTooLarge(f"The request headers exceed {MAX_HEADER_BYTES} bytes."))
        else:
            self._refuse(InvalidRequest("The request is not valid HTTP/1.1.", code="malformed_http"))

    def _refuse(self, error: ApiError) -> None:
        """Answer outside of any ASGI cycle, in the usual shape, and end the connection."""
        self._cancel_timers()
        if self._answering:
            started = self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if started:
                self.transport.abort()
                return
        request_id = logs.request_id(None)
        logs.event("malformed_request", request_id=request_id, status=error.status, code=error.code)
        body = openai_wire.error_body(error.info)
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", request_id.encode()),
            (b"connection", b"close"),
        ]
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        response = h11.Response(status_code=error.status, headers=headers, reason=b"")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    # The end of a connection

    @property
    def lingering(self) -> bool:
        """Whether the answer is out and the rest of what the peer sends is thrown away."""
        return self._lingering

    def linger(self) -> bool:
        """Whether the close may not be immediate: the peer is still sending, so closing now would lose the answer."""
        if self._lingering or self.conn.their_state not in (h11.SEND_BODY, h11.ERROR, h11.IDLE):
            return False
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            return False
        self._lingering = True
        in_body = self.conn.their_state is h11.SEND_BODY
        self._linger_bytes = _LINGER_BODY_BYTES if in_body else _LINGER_HEADER_BYTES
        self.flow.resume_reading()
        self.loop.call_later(_LINGER_S, self.transport.close)
        return True

    def _make_room(self) -> None:
        """Close the connection that has been idle longest. Only looked for when there are too many."""
        idle = [peer for peer in self.connections if isinstance(peer, Connection) and not peer._answering]
        if idle:
            min(idle, key=lambda peer: peer.idle_since).transport.abort()


class WatchedTransport:
    """The transport with another `close`: it lingers where the answer would be lost, and never waits for ever."""

    def __init__(self, transport: asyncio.Transport, connection: Connection, deadline: WriteDeadline) -> None:
        self._transport = transport
        self._connection = connection
        self.deadline = deadline

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._connection.lingering or self._transport.is_closing()

    def close(self) -> None:
        if self._transport.is_closing():
            return
        if self._connection.linger():
            if self._transport.can_write_eof():
                self._transport.write_eof()
            return
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self.deadline.watch()
