"""The outermost layer: request id, the one record per request, and the last word on anything that was raised."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ocserve.api import queries
from ocserve.errors import EngineUnavailable, ErrorInfo
from ocserve.generation import RequestRecord
from ocserve.http import answers, vendor
from ocserve.http.auth import reveals_key
from ocserve.http.exchange import Exchange, has_body, header_values, peer_address
from ocserve.http.last_word import CLIENT_GONE, last_word
from ocserve.http.route_table import SOCKET, RouteTable
from ocserve.telemetry import logs
from ocserve.trace import Trace


class Access:
    """Gives every request an id, which every answer carries, and tells `on_end` of it at the end."""

    def __init__(
        self,
        app: ASGIApp,
        table: RouteTable,
        on_end: Callable[[RequestRecord], None],
        announced: Callable[[], bytes | None],
    ) -> None:
        """`announced` tells the window of maintenance that every answer names."""
        self._app = app
        self._table = table
        self._on_end = on_end
        self._announced = announced

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        match = self._table.match(scope["method"], scope["path"])
        trace = Trace(_request_id(scope), match.route.path if match.route else "-")
        parents = header_values(scope, b"traceparent")
        trace.traceparent = parents[0].decode("latin-1") if len(parents) == 1 else None
        peer = peer_address(scope)  # no header has a say in it
        exchange = Exchange(
            trace,
            match,
            local=peer is not None and peer.is_loopback,
            error_body=match.error_body or vendor.error_body(scope),
            on_end=self._on_end,
        )
        exchange.body_complete = scope["method"] == SOCKET  # what arrives are messages
        exchange.bind(scope)
        answer = _Answer(exchange, scope, send)
        try:
            await last_word(self._inside(exchange, scope, receive, answer.send), answer.refuse, trace)
        except asyncio.CancelledError:
            trace.error_code = "shutting_down"
            await answer.refuse(EngineUnavailable("The server is shutting down.", code=trace.error_code).info)
            raise
        finally:
            exchange.on_end(trace.record(answer.status))

    async def _inside(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        if (window := self._announced()) is not None:
            exchange.headers.append((b"x-maintenance", window))
        await self._app(scope, receive, send)


def _request_id(scope: Scope) -> str:
    """The client's id if it may be written everywhere: an id goes to the log, the ledger and traces, a key to none."""
    given = header_values(scope, b"x-request-id")
    offered = given[0].decode("latin-1") if len(given) == 1 else None
    # In the query of any path: one that takes no key there may have been sent one all the same.
    if offered is not None and reveals_key(offered, scope, queries.sent_keys(scope["query_string"])):
        offered = None
    return logs.request_id(offered)


class _Answer:
    """The outgoing side: adds the exchange's headers, remembers the status."""

    def __init__(self, exchange: Exchange, scope: Scope, send: Send) -> None:
        self._exchange = exchange
        self._scope = scope
        self._send = send
        self.status = CLIENT_GONE

    async def send(self, message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.accept"):
            self.status = message.get("status", 101)
            headers = [*message.get("headers", ()), *self._exchange.headers]
            request_id = self._exchange.trace.request_id.encode()
            headers += [
                (b"x-request-id", request_id),
                (b"request-id", request_id),
            ]  # Anthropic's clients read the other
            if has_body(self._scope) and not self._exchange.body_complete:
                headers.append((b"connection", b"close"))  # the rest of the body is not wanted
            message = {**message, "headers": headers}
        await self._send(message)

    async def refuse(self, info: ErrorInfo) -> None:
        """Answer with `info` if nothing has been answered yet; else the connection is cut, so nothing looks whole."""
        if self.status == CLIENT_GONE:
            await answers.error(self.send, info, self._exchange.error_body)
