"""Requests that are in an engine process, as the front's side of it sees them, and when others may join them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from msgspec.structs import replace

from ocserve.engine import wire
from ocserve.engine.quarantine import Mark, Quarantine
from ocserve.generation import Failed, Finished, GenerateEvent, Started

# A request is new until it has generated for that long; for a suspect it doubles with each crash.
TRIAL_S, LONGEST_TRIAL_S = 0.3, 2.4
_QUIET = 10  # trials; after so long a request is new no more, though it has generated nothing
# How long the first of the suspects waits for an empty engine (shared by all that wait), and for one without new work.
_EMPTYING_S, _SETTLING_S = 2.0, 3.0
_FRESH_WAIT_S = 5.0  # how long work that is not suspect waits for trials


@dataclass(eq=False, slots=True)
class Flight:
    """One request in the engine: waiting to be prepared, prepared, or started; or a question, which has no choices.

    It stays until the engine is done with it, though nobody may wait for it any more. `request` is the request that
    it is a prompt of, `begun` and `generating` when it came and when its first token did, monotonic seconds.
    """

    request: str
    mark: Mark
    reply: asyncio.Future[wire.Prepared | wire.Told]
    choices: int
    unfinished: int  # choices whose `Finished` has not arrived
    begun: float = 0.0
    trial_s: float = TRIAL_S
    suspect: bool = False
    events: asyncio.Queue[GenerateEvent] = field(default_factory=asyncio.Queue)
    answered: bool = False  # whether the engine has prepared it
    started: bool = False
    generating: float | None = None

    @property
    def settles(self) -> float:
        """When it is new no more."""
        latest = self.begun + _QUIET * self.trial_s
        return latest if self.generating is None else min(latest, self.generating + self.trial_s)


@dataclass(eq=False, slots=True)
class Turn:
    """A request that waits to be let into the engine. `since` is when nothing but others' trials was in its way."""

    request: str
    mark: Mark
    since: float | None = None


class Turns:
    """Who may join those in flight, and when: suspects one at a time, first come first served, and by themselves.

    1. The prompts of one request go together.
    2. Work that is no suspect waits while suspects wait or are on trial, some seconds at most.
    3. A suspect waits for an empty engine for a moment; then until nothing new is in it, for seconds at most.
    4. A suspect that must be alone waits for an empty engine, beside the queue: it keeps nobody waiting.
    """

    def __init__(
        self, flights: Mapping[str, Flight], quarantine: Quarantine, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._flights = flights
        self._quarantine = quarantine
        self._clock = clock
        self._queue: list[Turn] = []  # suspects
        self._changed = asyncio.Event()  # set for a moment

    @property
    def expected_s(self) -> float:
        """In how long a suspect that comes now may have its turn."""
        return _SETTLING_S + 2 * TRIAL_S * len(self._queue)

    def come(self, mark: Mark, request: str) -> Turn:
        """Queue; to be left with `leave`."""
        turn = Turn(request, mark)
        self._place(turn)
        return turn

    def leave(self, turn: Turn) -> None:
        if turn in self._queue:
            self._queue.remove(turn)
        self.changed()

    def changed(self) -> None:
        """Have everybody look again."""
        self._changed.set()
        self._changed.clear()

    async def change(self, within_s: float) -> None:
        """Return when something has changed, or after `within_s`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), within_s if within_s < math.inf else None)

    def _place(self, turn: Turn) -> bool:
        """Have suspects stand in the queue and nobody else; whether this one does."""
        suspicion = self._quarantine.suspicion(turn.mark)
        queues = suspicion is not None and not suspicion.alone
        if queues and turn not in self._queue:
            self._queue.append(turn)
            turn.since = None
        elif not queues and turn in self._queue:
            self._queue.remove(turn)
            turn.since = None
        return queues

    def delay(self, turn: Turn) -> float:
        """Seconds after which this may go unless something changes before; 0: now."""
        others = [flight for flight in self._flights.values() if flight.request != turn.request]
        queues = self._place(turn)
        if len(others) < len(self._flights):  # 1
            return 0.0
        if not queues and self._quarantine.suspicion(turn.mark):  # 4
            return math.inf if others else 0.0
        now = self._clock()
        if queues and self._queue[0].request != turn.request:
            return math.inf
        trials_s = max((flight.settles - now for flight in others if flight.suspect or queues), default=0.0)
        if not (others if queues else self._queue or trials_s > 0):
            return 0.0
        turn.since = now if turn.since is None else turn.since
        waited_s = now - turn.since
        if not queues:  # 2
            return max(0.0, min(_FRESH_WAIT_S - waited_s, math.inf if self._queue else trials_s))
        emptying_s = _EMPTYING_S / len(self._queue) - waited_s
        return max(0.0, min(_SETTLING_S - waited_s, max(emptying_s, trials_s)))  # 3

    def flight(self, turn: Turn, reply: asyncio.Future[wire.Prepared | wire.Told], choices: int) -> Flight:
        """What goes into the engine now."""
        suspicion = self._quarantine.suspicion(turn.mark)
        crashes = suspicion.crashes if suspicion else 1
        return Flight(
            turn.request,
            turn.mark,
            reply,
            choices=choices,
            unfinished=choices,
            begun=self._clock(),
            trial_s=min(TRIAL_S * 2 ** (crashes - 1), LONGEST_TRIAL_S),
            suspect=suspicion is not None,
        )

    def generates(self, flight: Flight) -> None:
        """A token came."""
        if flight.generating is None:
            flight.generating = self._clock()
            self.changed()

    def crashed(self) -> None:
        """The engine died with all that is in flight."""
        flights = self._flights.values()
        requests = {flight.request for flight in flights}
        if len(requests) > 1:
            requests = {flight.request for flight in flights if self._clock() < flight.settles}
        tried = {flight.mark for flight in flights if flight.request in requests} if len(requests) == 1 else ()
        self._quarantine.crashed({flight.mark for flight in flights}, tried)


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
