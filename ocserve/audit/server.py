"""The server under audit as its probes see it: requests, whole answers and streams, each noted with its id and times.

What a server sends is not trusted to be JSON, or of any shape: `dig` looks into it without raising.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from ocserve import peer
from ocserve.audit.verdict import Fault, Refused, clean

if TYPE_CHECKING:
    import httpx2

_LONGEST_WAIT_S = 60.0  # for a limit to give way
_ATTEMPTS = 4
_ID_HEADERS = ("x-request-id", "request-id", "x-generation-id")


def dig(value: Any, *path: str | int) -> Any:
    """The value at `path` in decoded JSON, None if it is not there."""
    for step in path:
        if isinstance(step, str):
            value = value.get(step) if isinstance(value, dict) else None
        else:
            value = value[step] if isinstance(value, list) and -len(value) <= step < len(value) else None
    return value


def decoded(data: bytes, what: str) -> Any:
    """JSON, or `Fault`."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Fault(f"{what} is not JSON") from None


@dataclass(frozen=True, slots=True)
class Reply:
    """One whole answer."""

    what: str
    status: int
    headers: dict[str, str]
    body: bytes
    took_s: float

    @property
    def json(self) -> Any:
        """The body; raises `Fault` if it is not JSON."""
        return decoded(self.body, f"the answer of {self.what}")

    @property
    def error(self) -> dict[str, Any]:
        """The error object, empty if there is none."""
        try:
            found = dig(msgspec.json.decode(self.body), "error")
        except (msgspec.DecodeError, UnicodeDecodeError):
            return {}
        return found if isinstance(found, dict) else {}

    def ok(self) -> Reply:
        """Itself if its status is 200, else `Refused`."""
        if self.status != 200:
            raise Refused(self.what, self.status, self.error, self.headers)
        return self

    @property
    def choices(self) -> list[Any]:
        found = dig(self.json, "choices")
        return found if isinstance(found, list) else []

    @property
    def text(self) -> str:
        """The first choice's text, of either endpoint."""
        found = dig(self.choices, 0, "message", "content")
        return str(found if found is not None else dig(self.choices, 0, "text") or "")

    @property
    def finish(self) -> Any:
        return dig(self.choices, 0, "finish_reason")

    @property
    def calls(self) -> list[Any]:
        found = dig(self.choices, 0, "message", "tool_calls")
        return found if isinstance(found, list) else []

    def used(self, name: str) -> int:
        """A count of the usage; `Fault` if it is not there."""
        return _count(dig(self.json, "usage"), name)


def _count(usage: Any, name: str) -> int:
    found = dig(usage, name)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise Fault(f"usage.{name} is missing or no count")
    return found


@dataclass(slots=True)
class Stream:
    """One streamed answer. `arrived` has a time for each chunk, in seconds after the request was sent."""

    what: str
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[Any] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)
    comments: int = 0
    named_events: int = 0
    done: bool = False
    after_done: int = 0
    took_s: float = 0.0

    @property
    def first_text_s(self) -> float | None:
        """Seconds to the first chunk that carries text or a call."""
        return next((at for at, chunk in zip(self.arrived, self.chunks, strict=True) if _carries(chunk)), None)

    def texts(self, index: int = 0) -> list[str]:
        """The pieces of a choice's text."""
        pieces = (
            dig(choice, "delta", "content") or dig(choice, "text")
            for chunk in self.chunks
            for choice in dig(chunk, "choices") or []
            if dig(choice, "index") == index
        )
        return [piece for piece in pieces if isinstance(piece, str) and piece]

    @property
    def text(self) -> str:
        return "".join(self.texts())

    @property
    def finishes(self) -> list[Any]:
        """The finish reasons that are not null, in order."""
        reasons = (dig(choice, "finish_reason") for chunk in self.chunks for choice in dig(chunk, "choices") or [])
        return [reason for reason in reasons if reason is not None]

    @property
    def usage(self) -> Any:
        """The last usage object, None if there is none."""
        return next((found for chunk in reversed(self.chunks) if (found := dig(chunk, "usage")) is not None), None)

    def used(self, name: str) -> int:
        """A count of the usage; `Fault` if it is not there."""
        return _count(self.usage, name)


def _carries(chunk: Any) -> bool:
    choice = dig(chunk, "choices", 0)
    delta = dig(choice, "delta")
    return bool(
        dig(delta, "content") or dig(delta, "reasoning_content") or dig(delta, "tool_calls") or dig(choice, "text")
    )


@dataclass(frozen=True, slots=True)
class Exchange:
    """What is kept of a request for the evidence; nothing of its content."""

    request_id: str | None
    status: int
    error_shaped: bool
    code: str = ""


class Server:
    """A server by its base URL, which ends before `/chat/completions`. Ends with `aclose`."""

    def __init__(self, url: str, key: str | None, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self.root = self.url.removesuffix("/v1")
        self.key = key
        self.timeout_s = timeout_s
        self.exchanges: list[Exchange] = []
        self._http = peer.connection(key, timeout_s)
        self._public: httpx2.AsyncClient | None = None  # made for the first page, since it takes a while

    async def aclose(self) -> None:
        await self._http.aclose()
        if self._public is not None:
            await self._public.aclose()

    async def send(
        self,
        method: str,
        path: str,
        content: Any = None,
        *,
        at_root: bool = False,
        headers: Mapping[str, str] | None = None,
        patient: bool = True,
    ) -> Reply:
        """One request; `content` goes as it is if it is bytes, else as JSON. A limit is waited for if `patient`.

        Raises `Fault` where no answer came.
        """
        for attempt in range(_ATTEMPTS):
            began = time.perf_counter()
            async with self._open(method, path, content, at_root, headers) as answer:
                body = await answer.aread()
            reply = Reply(
                f"{method} {path}", answer.status_code, dict(answer.headers), body, time.perf_counter() - began
            )
            self._note(reply)
            if reply.status != 429 or not patient or attempt == _ATTEMPTS - 1:
                return reply
            await asyncio.sleep(_wait_s(reply.headers))
        raise AssertionError

    async def post(self, path: str, fields: Mapping[str, Any]) -> Reply:
        """A request under the base URL that has to succeed; raises `Fault`."""
        return (await self.send("POST", path, fields)).ok()

    async def stream(self, path: str, fields: Mapping[str, Any], *, leave_after: int | None = None) -> Stream:
        """A streamed answer, read to its end or left after so many chunks. Raises `Fault`; a limit is waited for."""
        for attempt in range(_ATTEMPTS):
            try:
                return await self._stream(path, fields, leave_after)
            except Refused as refused:
                if refused.status != 429 or attempt == _ATTEMPTS - 1:
                    raise
                await asyncio.sleep(_wait_s(refused.headers))
        raise AssertionError

    async def _stream(self, path: str, fields: Mapping[str, Any], leave_after: int | None) -> Stream:
        found = Stream(f"POST {path}")
        began = time.perf_counter()
        async with self._open("POST", path, {**fields, "stream": True}, False, None) as answer:
            found.headers = dict(answer.headers)
            if answer.status_code != 200:
                body = await answer.aread()
                refusal = Reply(found.what, answer.status_code, found.headers, body, time.perf_counter() - began)
                self._note(refusal)
                refusal.ok()
            self.exchanges.append(Exchange(_request_id(found.headers), 200, True))
            lines = peer.EventLines()
            async for data in answer.aiter_raw():
                now = time.perf_counter() - began
                for line in lines.feed(data):
                    _take(found, line, now)
                if leave_after is not None and len(found.chunks) >= leave_after:
                    break
        found.took_s = time.perf_counter() - began
        return found

    async def page(self, address: str, headers: Mapping[str, str] | None = None) -> str:
        """The text of a page anywhere, fetched without the server's key. Raises `Fault`."""
        import httpx2

        self._public = self._public or peer.connection(None, self.timeout_s)
        try:
            answer = await self._public.get(address, headers=headers, follow_redirects=True)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise Fault(f"{clean(address, 120)} cannot be fetched ({type(error).__name__})") from None
        if answer.status_code != 200:
            raise Fault(f"{clean(address, 120)} answers with status {answer.status_code}")
        return answer.text

    @asynccontextmanager
    async def _open(
        self, method: str, path: str, content: Any, at_root: bool, headers: Mapping[str, str] | None
    ) -> AsyncIterator[httpx2.Response]:
        import httpx2

        data = content if isinstance(content, bytes) or content is None else msgspec.json.encode(content)
        kind = {} if data is None else {"content-type": "application/json"}
        try:
            async with self._http.stream(
                method,
                (self.root if at_root else self.url) + path,
                content=data,
                headers={"accept-encoding": "identity", **kind, **(headers or {})},
            ) as answer:
                yield answer
        except httpx2.TimeoutException:
            raise Fault(f"{method} {path}: no answer within {self.timeout_s:g} s") from None
        except httpx2.HTTPError as error:
            raise Fault(f"{method} {path}: the connection broke ({type(error).__name__})") from None

    def _note(self, reply: Reply) -> None:
        shaped = isinstance(reply.error.get("message"), str) and isinstance(reply.error.get("type"), str)
        code = clean(reply.error.get("code") or reply.error.get("type") or "", 60)
        self.exchanges.append(Exchange(_request_id(reply.headers), reply.status, shaped, code))


def _take(found: Stream, line: bytes, now: float) -> None:
    if line.startswith(b":"):
        found.comments += 1
        return
    if line.startswith(b"event:"):
        found.named_events += 1
    payload = peer.payload(line)
    if payload is None:
        return
    if found.done:
        found.after_done += 1
    elif payload == b"[DONE]":
        found.done = True
    else:
        chunk = decoded(payload, f"an event of {found.what}")
        if error := dig(chunk, "error"):
            raise Fault(f"{found.what}: the stream broke off with error {clean(dig(error, 'code'), 60)}")
        found.chunks.append(chunk)
        found.arrived.append(now)


def _request_id(headers: Mapping[str, str]) -> str | None:
    return next((clean(headers[name], 80) for name in _ID_HEADERS if name in headers), None)


def _wait_s(headers: Mapping[str, str]) -> float:
    """What `Retry-After` asks for; a second where it says nothing that can be read."""
    try:
        return min(max(float(headers.get("retry-after", "1")), 0.05), _LONGEST_WAIT_S)
    except ValueError:
        return 1.0
