"""The one endpoint behind every dialect that generates: parse, admit, answer whole or as a stream.

Headers leave only after admission, so every refusal is a real status. The client's going away is watched from the first
moment to the last, queue and prefill included, and ends the work at once.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.types import Receive, Scope, Send

from ocserve.accounts.line import UNKNOWN, Attempt
from ocserve.api.dialect import Dialect, Encoder, Frame, Parsed, Reply
from ocserve.errors import ApiError, InternalError
from ocserve.generation import Failed
from ocserve.http import answers, sse
from ocserve.http.edge.current import Edge
from ocserve.http.exchange import Exchange, attempt, caller_of
from ocserve.http.presence import disconnected, unless_gone
from ocserve.http.words import in_clients_words
from ocserve.service import Service
from ocserve.telling import Generation
from ocserve.trace import Trace


class Generate:
    """Serves one dialect."""

    def __init__(self, service: Service, dialect: Dialect, edge: Edge) -> None:
        self._service = service
        self._dialect = dialect
        self._edge = edge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange.of(scope)
        models = self._service.open_to(caller_of(scope)).generator
        parsed = self._dialect.parse(exchange.body, models, refuse_unknown=self._edge.refuse_unknown)
        exchange.trace.model, exchange.trace.stream = parsed.model.id, parsed.stream
        exchange.name_ignored(parsed.ignored)
        await unless_gone(disconnected(receive), self._answer(exchange, parsed, send, attempt(scope)))

    async def _answer(self, exchange: Exchange, parsed: Parsed, send: Send, tries: Attempt) -> None:
        async with answering(self._service, self._dialect, parsed, exchange, tries) as (encoder, generation):
            if parsed.stream:
                batches = frames(encoder, generation, exchange.trace)
                await sse.respond(send, batches, parsed.framing, heartbeat_s=self._edge.now.stream_heartbeat_s)
                return
            events = [event async for event in generation]
        if isinstance(events[-1], Failed):
            raise ApiError.from_info(events[-1].error)
        await answers.json(send, 200, encoder.complete(events, exchange.trace.usage))


@asynccontextmanager
async def answering(
    service: Service, dialect: Dialect, parsed: Parsed, exchange: Exchange, tries: Attempt = UNKNOWN
) -> AsyncIterator[tuple[Encoder, Generation]]:
    """The admitted request and the encoder of its answer. What is refused is named as the client named it."""
    assert exchange.caller is not None
    try:
        with in_clients_words(parsed.paths):
            async with service.generation(
                parsed.request, exchange.caller, exchange.trace, attempt=tries, more=parsed.more
            ) as generation:
                exchange.tell_limits(service.limiter)
                exchange.name_ignored((*parsed.ignored, *parsed.named(generation.ignored)))
                yield (parsed.encoder or dialect.encoder)(_reply(parsed, exchange.trace)), generation
        exchange.tell_balance()  # settled by now, as an answer that leaves whole says
    except ApiError:
        exchange.tell_limits(service.limiter)
        raise


def _reply(parsed: Parsed, trace: Trace) -> Reply:
    return Reply(
        id=secrets.token_hex(12),
        model=parsed.model.id,
        created=int(time.time()),
        choices=sum(request.choices for request in parsed.requests),
        include_usage=parsed.include_usage,
        show_reasoning=parsed.show_reasoning,
        prompt=trace.usage,
    )


async def frames(encoder: Encoder, generation: Generation, trace: Trace) -> AsyncIterator[Sequence[Frame]]:
    """What the stream says, an error of ours included: the status has left already."""
    yield encoder.open()
    try:
        async for event in generation:
            frames = encoder.event(event)
            finished = generation.ended and not isinstance(event, Failed)
            yield (*frames, *encoder.close(trace.usage)) if finished else frames
    except ApiError as error:
        trace.error_code = error.code
        yield encoder.event(Failed(error=error.info))
    except Exception:
        yield encoder.event(Failed(error=InternalError("The server made a mistake while generating.").info))
        raise
