"""Requests that are in an engine process, as the front's side of it sees them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from msgspec.structs import replace

from ocserve.engine import wire
from ocserve.engine.quarantine import Mark
from ocserve.generation import Failed, Finished, GenerateEvent, Started


@dataclass(eq=False, slots=True)
class Flight:
    """One request in the engine: waiting to be prepared, prepared, or started; or a question, which has no choices."""

    mark: Mark
    reply: asyncio.Future[wire.Prepared | wire.Told]
    choices: int
    unfinished: int  # choices whose `Finished` has not arrived
    events: asyncio.Queue[GenerateEvent] = field(default_factory=asyncio.Queue)
    started: bool = False


class Events:
    """A started request's events, up to the last. A cancelled wait loses nothing: the next one goes on from there."""

    def __init__(self, flight: Flight) -> None:
        self._queue = flight.events
        self._unfinished = flight.choices

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> GenerateEvent:
        if not self._unfinished:
            raise StopAsyncIteration
        event = await self._queue.get()
        self._unfinished = unfinished(self._unfinished, event)
        return event


def unfinished(choices: int, event: GenerateEvent) -> int:
    """How many of `choices` go on after `event`: `Finished` ends one of them, `Failed` all."""
    return 0 if isinstance(event, Failed) else choices - isinstance(event, Finished)


def numbered(event: GenerateEvent, first: int) -> GenerateEvent:
    """`event` with its choice's number among those of all prompts."""
    if not first or isinstance(event, Started | Failed):
        return event
    return replace(event, index=first + event.index)
