"""The outermost layer: request id, the one record per request, and the last word on anything that was raised."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ocserve.errors import ApiError, EngineUnavailable, ErrorInfo, InternalError
from ocserve.http import answers, vendor
from ocserve.http.exchange import ClientGone, Exchange, has_body, header_values, peer_address
from ocserve.http.route_table import RouteTable
from ocserve.service import Trace
from ocserve.telemetry import logs

_CLIENT_GONE = 499  # nginx's word for it; no client ever sees it


class Access:
    """Gives every request an id, which every answer carries, and writes one line at the end."""

    def __init__(self, app: ASGIApp, table: RouteTable) -> None:
        self._app = app
        self._table = table

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        match = self._table.match(scope["method"], scope["path"])
        given = header_values(scope, b"x-request-id")
        request_id = logs.request_id(given[0].decode("latin-1") if len(given) == 1 else None)
        trace = Trace(request_id, match.route.path if match.route else "-")
        peer = peer_address(scope)  # no header has a say in it
        exchange = Exchange(
            trace,
            match,
            local=peer is not None and peer.is_loopback,
            error_body=match.error_body or vendor.error_body(scope),
        )
        exchange.bind(scope)
        answer = _Answer(exchange, scope, send)
        try:
            await self._run(exchange, scope, receive, answer)
        finally:
            logs.request_line(trace.record(answer.status))

    async def _run(self, exchange: Exchange, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            await self._app(scope, receive, answer.send)
        except ApiError as error:
            await answer.refuse(error.info)
        except ClientGone:
            pass
        except asyncio.CancelledError:
            await answer.refuse(EngineUnavailable("The server is shutting down.", code="shutting_down").info)
            raise
        except Exception as error:  # noqa: BLE001 - the last place that can answer; it is logged, without its message
            logs.failure("internal_error", error, request_id=exchange.trace.request_id)
            await answer.refuse(InternalError("The server made a mistake. The log has the details.").info)


class _Answer:
    """The outgoing side: adds the exchange's headers, remembers the status."""

    def __init__(self, exchange: Exchange, scope: Scope, send: Send) -> None:
        self._exchange = exchange
        self._scope = scope
        self._send = send
        self.status = _CLIENT_GONE

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message["headers"], *self._exchange.headers]
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
        self._exchange.trace.error_code = info.code
        if self.status == _CLIENT_GONE:
            await answers.error(self.send, info, self._exchange.error_body)
