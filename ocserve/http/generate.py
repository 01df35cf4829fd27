"""The one endpoint behind every dialect that generates: parse, admit, answer whole or as a stream.

Headers leave only after admission, so every refusal is a real status. The client's going away is watched from the first
moment to the last, queue and prefill included, and ends the work at once.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence

from starlette.types import Receive, Scope, Send

from ocserve import config
from ocserve.accounts import limits
from ocserve.api.dialect import Dialect, Encoder, Frame, Parsed, Reply
from ocserve.errors import ApiError, InternalError
from ocserve.generation import Failed
from ocserve.http import answers, sse
from ocserve.http.exchange import ClientGone, Exchange, header_values
from ocserve.service import Generation, Service, Trace

# Names of ignored parameters in one header; a request may carry more of them than a proxy accepts in a header.
_MAX_IGNORED = 32


class Generate:
    """Serves one dialect."""

    def __init__(self, service: Service, dialect: Dialect, settings: config.Server) -> None:
        self._service = service
        self._dialect = dialect
        self._refuse_unknown = settings.unknown_parameters == "refuse"
        self._heartbeat_s = settings.stream_heartbeat_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange.of(scope)
        parsed = self._dialect.parse(exchange.body, self._service.model, refuse_unknown=self._refuse_unknown)
        exchange.trace.model, exchange.trace.stream = parsed.model.id, parsed.stream
        _name_ignored(exchange, parsed.ignored)
        attempt = _attempt(header_values(scope, b"x-stainless-retry-count"))
        await self._unless_gone(receive, self._answer(exchange, parsed, send, attempt))

    async def _unless_gone(self, receive: Receive, answer: Coroutine[None, None, None]) -> None:
        """Run `answer` to its end, or cancel it the moment the client is gone."""
        work = asyncio.create_task(answer)
        watch = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            gone = not work.done()
            if gone:
                work.cancel()
                await asyncio.wait({work})  # settling is part of the work
        if gone and (work.cancelled() or work.exception() is None):
            raise ClientGone
        work.result()

    async def _answer(self, exchange: Exchange, parsed: Parsed, send: Send, attempt: int | None) -> None:
        assert exchange.caller is not None
        try:
            async with self._service.generation(
                parsed.request, exchange.caller, exchange.trace, attempt=attempt
            ) as generation:
                self._add_limit_headers(exchange)
                _name_ignored(exchange, (*parsed.ignored, *generation.ignored))
                encoder = self._dialect.encoder(_reply(parsed, exchange.trace))
                if parsed.stream:
                    frames = _frames(encoder, generation, exchange.trace)
                    await sse.respond(send, frames, parsed.framing, heartbeat_s=self._heartbeat_s)
                    return
                events = [event async for event in generation]
        except ApiError:
            self._add_limit_headers(exchange)
            raise
        if isinstance(events[-1], Failed):
            raise ApiError.from_info(events[-1].error)
        await answers.json(send, 200, encoder.complete(events, exchange.trace.usage))

    def _add_limit_headers(self, exchange: Exchange) -> None:
        assert exchange.caller is not None
        state = self._service.limiter.snapshot(exchange.caller.key_id)
        exchange.set_headers({name.encode(): value.encode() for name, value in limits.headers(state).items()})


def _reply(parsed: Parsed, trace: Trace) -> Reply:
    return Reply(
        id=secrets.token_hex(12),
        model=parsed.model.id,
        created=int(time.time()),
        choices=parsed.request.choices,
        include_usage=parsed.include_usage,
        show_reasoning=parsed.show_reasoning,
        prompt=trace.usage,
    )


def _name_ignored(exchange: Exchange, names: Sequence[str]) -> None:
    """Say which parameters have no effect on the answer."""
    distinct = list(dict.fromkeys(names))
    if len(distinct) > _MAX_IGNORED:
        distinct[_MAX_IGNORED:] = [f"and {len(distinct) - _MAX_IGNORED} more"]
    if distinct:
        exchange.set_headers({b"x-ocserve-ignored": ", ".join(distinct).encode()})


async def _frames(encoder: Encoder, generation: Generation, trace: Trace) -> AsyncIterator[Sequence[Frame]]:
    """What the stream says, an error of ours included: the status has left already."""
    yield encoder.open()
    try:
        async for event in generation:
            frames = encoder.event(event)
            finished = generation.ended and not isinstance(event, Failed)
            yield (*frames, *encoder.close(trace.usage)) if finished else frames
    except ApiError as error:
        yield encoder.event(Failed(error=error.info))
    except Exception:
        yield encoder.event(Failed(error=InternalError("The server made a mistake while generating.").info))
        raise


def _attempt(counts: list[bytes]) -> int | None:
    """How often the client has tried before, if it says so in a way that can be believed."""
    return int(counts[0]) if len(counts) == 1 and counts[0].isdigit() and len(counts[0]) <= 4 else None


async def _disconnected(receive: Receive) -> None:
    """Return when the client has gone. The body was read before, so nothing else arrives."""
    while (await receive())["type"] != "http.disconnect":
        pass
