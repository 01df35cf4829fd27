"""`Idempotency-Key`: the same request, sent again with the same key, gets the same answer and is charged once.

The scheme is Stripe's. A caller's key names one request: another body under it is a 422. While the first is answered a
repeat waits for it; afterwards it gets the bytes that the first one got. Only whole answers (status 200, without an
error in their stream) are kept, since what was refused or failed is free and may be tried again. Because a repeat
usually follows a lost connection, a request with a key is finished even if its client goes away.

Answers live in memory only, for a while and within a bound; a restart forgets them. What goes first is the
oldest of the caller who has most kept, so that nobody pushes out what another may ask for again.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ocserve import config
from ocserve.errors import IdempotencyKeyReused, InvalidRequest
from ocserve.http.answers import Header
from ocserve.http.exchange import Exchange, header_values
from ocserve.http.presence import disconnected, unless_gone

_NAME = b"idempotency-key"
_KEY = re.compile(rb"[\x21-\x7e]{1,255}")
_MOST_KEPT = 4096
_REPLAYED: Header = (b"idempotent-replayed", b"true")
# No part of the answer: with a repeat goes what holds then.
_OF_THE_MOMENT = (b"x-ratelimit-", b"anthropic-ratelimit-", b"x-balance-", b"x-maintenance")

Name: TypeAlias = tuple[str, bytes]


@dataclass(slots=True)
class _Entry:
    """One request: until `ended` it is being answered; `answer` is what it got, if that is kept."""

    digest: bytes
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    answer: _Answer | None = None


@dataclass(frozen=True, slots=True)
class _Answer:
    """A whole answer. `told` are the headers that the exchange adds."""

    headers: tuple[Header, ...]
    told: tuple[Header, ...]
    body: bytes
    expires_at: float


@dataclass(slots=True)
class _Share:
    """What one caller has kept, the oldest first; `bytes` are of these and of what is being recorded."""

    kept: dict[Name, None] = field(default_factory=dict)
    bytes: int = 0


class Idempotency:
    """Answers repeats of requests that carry a key; other requests pass."""

    def __init__(self, app: ASGIApp, settings: config.Server) -> None:
        self._app = app
        self._keep_s = settings.idempotent_answer_s
        self._most_bytes = settings.idempotent_answer_bytes
        self._bytes = 0
        self._entries: dict[Name, _Entry] = {}
        self._shares: defaultdict[str, _Share] = defaultdict(_Share)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange.of(scope)
        key = _key(scope) if scope["method"] == "POST" and exchange.caller is not None else None
        if key is None:
            await self._app(scope, receive, send)
            return
        assert exchange.caller is not None
        name, digest = (exchange.caller.key_id, key), _digest(scope, exchange.body)
        while (entry := self._found(name)) is not None:
            if entry.digest != digest:
                raise IdempotencyKeyReused(
                    "This Idempotency-Key was used for another request.", param="idempotency-key"
                )
            if entry.answer is not None:
                await _replay(entry.answer, exchange, send)
                return
            await unless_gone(disconnected(receive), _wait(entry))
        await self._first(name, digest, scope, send)

    async def _first(self, name: Name, digest: bytes, scope: Scope, send: Send) -> None:
        """Answer a request, and keep its answer if there is one."""
        entry = self._entries[name] = _Entry(digest)
        recorder = _Recorder(Exchange.of(scope), send, partial(self._hold, name[0]))
        try:
            await self._app(scope, _never, recorder.send)
            if recorder.whole:
                self._keep(name, entry, recorder.answer(time.monotonic() + self._keep_s))
        finally:
            if entry.answer is None:
                self._hold(name[0], -recorder.held)
            entry.ended.set()
            if entry.answer is None:
                self._entries.pop(name, None)

    def _keep(self, name: Name, entry: _Entry, answer: _Answer) -> None:
        entry.answer = answer
        self._shares[name[0]].kept[name] = None
        if sum(len(share.kept) for share in self._shares.values()) > _MOST_KEPT:
            self._forget(next(iter(max(self._shares.values(), key=lambda share: len(share.kept)).kept)))

    def _hold(self, caller: str, count: int) -> bool:
        """Remember so many more bytes of a caller's, for which what is kept may have to go; False: there is no room.

        What is being recorded counts as what is kept: it takes the same memory.
        """
        self._count(caller, count)
        while count > 0 and self._bytes > self._most_bytes:
            largest = max(self._shares.values(), key=lambda share: share.bytes)
            if not largest.kept:
                self._count(caller, -count)
                return False
            self._forget(next(iter(largest.kept)))
        return True

    def _found(self, name: Name) -> _Entry | None:
        entry = self._entries.get(name)
        if entry is not None and entry.answer is not None and entry.answer.expires_at <= time.monotonic():
            self._forget(name)
            return None
        return entry

    def _forget(self, name: Name) -> None:
        answer = self._entries.pop(name).answer
        assert answer is not None
        del self._shares[name[0]].kept[name]
        self._count(name[0], -len(answer.body))

    def _count(self, caller: str, count: int) -> None:
        share = self._shares[caller]
        share.bytes += count
        self._bytes += count
        if not share.bytes and not share.kept:
            del self._shares[caller]


class _Recorder:
    """Passes an answer on and remembers it, as long as `hold` finds room for more of it."""

    def __init__(self, exchange: Exchange, send: Send, hold: Callable[[int], bool]) -> None:
        self._exchange = exchange
        self._send = send
        self._hold = hold
        self._status = 0
        self._headers: tuple[Header, ...] = ()
        self._body = bytearray()
        self._fits = True
        self._complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status, self._headers = message["status"], tuple(message.get("headers", ()))
        elif self._fits:
            body = message.get("body", b"")
            self._complete = not message.get("more_body", False)
            self._fits = self._hold(len(body))
            if self._fits:
                self._body += body
            else:
                self._hold(-self.held)
                self._body = bytearray()
        await self._send(message)

    @property
    def held(self) -> int:
        """Bytes remembered."""
        return len(self._body)

    @property
    def whole(self) -> bool:
        """Whether this was an answer, to its end."""
        trace = self._exchange.trace
        return self._complete and self._fits and self._status == 200 and trace.error_code is None and trace.keepable

    def answer(self, expires_at: float) -> _Answer:
        told = tuple(each for each in self._exchange.headers if not each[0].startswith(_OF_THE_MOMENT))
        return _Answer(self._headers, told, bytes(self._body), expires_at)


def _key(scope: Scope) -> bytes | None:
    values = header_values(scope, _NAME)
    if not values:
        return None
    if len(values) > 1 or not _KEY.fullmatch(values[0]):
        raise InvalidRequest(
            "Idempotency-Key must be sent once, as 1 to 255 visible ASCII characters.", param="idempotency-key"
        )
    return values[0]


def _digest(scope: Scope, body: bytes) -> bytes:
    """Names what is asked: answers are kept, requests are not."""
    asked = hashlib.sha256(scope["path"].encode("utf-8", "surrogateescape") + b"?" + scope["query_string"] + b"\0")
    asked.update(body)
    return asked.digest()


async def _replay(answer: _Answer, exchange: Exchange, send: Send) -> None:
    exchange.set_headers(dict((*answer.told, _REPLAYED)))
    await send({"type": "http.response.start", "status": 200, "headers": list(answer.headers)})
    await send({"type": "http.response.body", "body": answer.body})


async def _wait(entry: _Entry) -> None:
    await entry.ended.wait()


async def _never() -> Message:
    """A client that stays: what follows on its connection is nobody's business."""
    never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
    return await never
