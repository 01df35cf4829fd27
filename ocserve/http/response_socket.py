"""OpenAI's Responses over a WebSocket: one connection, on which responses are made one after another.

A message is served as a request over HTTP is: the same limits, checks, record and refusals, except that a refusal is an
event and the connection goes on. Messages that come early wait, within bounds.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

from starlette.types import Receive, Scope, Send

from ocserve.api import json_body, openai_responses_socket
from ocserve.api.dialect import Frame
from ocserve.api.openai_responses import ResponseDialect
from ocserve.errors import ErrorInfo, InvalidRequest, Overloaded
from ocserve.http.answers import Header, error_headers
from ocserve.http.edge.current import Edge
from ocserve.http.exchange import Exchange
from ocserve.http.generate import answering, frames
from ocserve.http.last_word import CLIENT_GONE, last_word
from ocserve.http.presence import unless_gone
from ocserve.http.response_store import ResponseStore
from ocserve.service import Service
from ocserve.trace import Trace

# Each of a caller's agents has one connection.
_MOST_CONNECTIONS = 64
_MOST_WAITING = 16
_LONGEST_ID = 100
_RETRY_S = 1.0
_GOING_AWAY = 1001


class ResponseSocket:
    """`/v1/responses` as a WebSocket."""

    def __init__(self, service: Service, store: ResponseStore, edge: Edge) -> None:
        self._service = service
        self._store = store
        self._edge = edge
        self._open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange.of(scope)
        assert exchange.caller is not None
        with self._place(exchange.caller.key_id):
            await send({"type": "websocket.accept"})
            conversation = _Conversation(self._service, self._store, self._edge, exchange, send)
            try:
                await unless_gone(conversation.listen(receive), conversation.serve())
            finally:
                conversation.shelf.forget()

    @contextmanager
    def _place(self, key_id: str) -> Iterator[None]:
        """Hold one of the connections that a caller may have."""
        if self._open[key_id] >= _MOST_CONNECTIONS:
            raise Overloaded(
                f"There are {_MOST_CONNECTIONS} WebSocket connections with this key, which is all that one may have.",
                code="too_many_connections",
                retry_after_s=_RETRY_S,
            )
        self._open[key_id] += 1
        try:
            yield
        finally:
            self._open[key_id] -= 1
            if not self._open[key_id]:
                del self._open[key_id]


class _Conversation:
    """What is said on one connection. `exchange` is that of its handshake."""

    def __init__(self, service: Service, store: ResponseStore, edge: Edge, exchange: Exchange, send: Send) -> None:
        assert exchange.caller is not None
        self._service = service
        self._edge = edge
        self._handshake = exchange
        self._send = send
        self.shelf = store.shelf(exchange.caller.key_id, secrets.token_hex(8))
        self._numbers = count(1)
        self._waiting: asyncio.Queue[bytes] = asyncio.Queue()
        self._waiting_bytes = 0

    async def listen(self, receive: Receive) -> None:
        """Take messages until the client has gone."""
        while (message := await receive())["type"] != "websocket.disconnect":
            if message["type"] != "websocket.receive":
                continue
            text = message.get("text")
            data = b"" if text is None else text.encode()
            if (
                self._waiting.qsize() >= _MOST_WAITING
                or self._waiting_bytes + len(data) > self._edge.now.most_body_bytes
            ):
                await self._turn(None)
                continue
            self._waiting_bytes += len(data)
            self._waiting.put_nowait(data)

    async def serve(self) -> None:
        """Answer messages in their order, until none has come for as long as a connection may be idle."""
        while True:
            try:
                async with asyncio.timeout(self._edge.now.socket_idle_s):
                    data = await self._waiting.get()
            except TimeoutError:
                await self._send({"type": "websocket.close", "code": _GOING_AWAY, "reason": "idle"})
                return
            self._waiting_bytes -= len(data)
            await self._turn(data)

    async def _turn(self, data: bytes | None) -> None:
        """One message from its arrival to the last event of its answer; None is one that was not taken."""
        before = self._handshake
        trace = Trace(f"{before.trace.request_id[:_LONGEST_ID]}-{next(self._numbers)}", before.trace.route)
        exchange = Exchange(trace, before.match, local=before.local, error_body=before.error_body, on_end=before.on_end)
        exchange.caller, exchange.identify, trace.key_id = before.caller, before.identify, before.trace.key_id
        trace.traceparent = before.trace.traceparent
        answer = _Answer(exchange, self._send)
        try:
            await last_word(self._respond(data, exchange, answer), answer.refuse, trace)
        finally:
            exchange.on_end(trace.record(answer.status))

    async def _respond(self, data: bytes | None, exchange: Exchange, answer: _Answer) -> None:
        if data is None:
            raise Overloaded("Too many messages wait on this connection.", retry_after_s=_RETRY_S)
        assert exchange.identify is not None
        exchange.caller = exchange.identify()  # the key may have been revoked since the handshake
        if not data:
            raise InvalidRequest("A message must be text that holds a JSON object.", code="invalid_json")
        json_body.check_shape(data, self._edge.now.max_json_depth)
        dialect = ResponseDialect(self.shelf, secrets.token_hex(12), lambda: int(time.time()))
        parsed = openai_responses_socket.parse(
            dialect,
            data,
            self._service.open_to(exchange.caller).generator,
            refuse_unknown=self._edge.refuse_unknown,
        )
        exchange.trace.model, exchange.trace.stream = parsed.model.id, True
        async with answering(self._service, dialect, parsed, exchange) as (encoder, generation):
            async for batch in frames(encoder, generation, exchange.trace):
                for frame in batch:
                    await answer.say(frame)


class _Answer:
    """The outgoing side of one message: the events of its response, or one that refuses it."""

    def __init__(self, exchange: Exchange, send: Send) -> None:
        self._exchange = exchange
        self._send = send
        self.status = CLIENT_GONE

    async def say(self, frame: Frame) -> None:
        """Send an event; the first has the headers."""
        first, self.status = self.status == CLIENT_GONE, 200
        await self._text((openai_responses_socket.with_headers(frame, self._headers()) if first else frame).data)

    async def refuse(self, info: ErrorInfo) -> None:
        """Say why there is no response. One that has begun has ended with an event of its own."""
        if self.status == CLIENT_GONE:
            self.status = info.status
            await self._text(openai_responses_socket.error(info, self._headers(*error_headers(info))))

    def _headers(self, *more: Header) -> dict[str, str]:
        request_id = (b"x-request-id", self._exchange.trace.request_id.encode())
        return {name.decode(): value.decode() for name, value in (*self._exchange.headers, *more, request_id)}

    async def _text(self, data: bytes) -> None:
        await self._send({"type": "websocket.send", "text": data.decode()})
