"""How many of a model's slots one key fills: what it has beyond its share waits here, so that others need not wait.

The engine serves waiting prompts fairly, but it interrupts nobody: a key whose answers have all the slots would have
another key's request wait for the end of one of them.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from ocserve.errors import ApiError, Overloaded


@dataclass(frozen=True, slots=True)
class _Waiter:
    slots: int
    most: int
    turn: asyncio.Future[None]


class Shares:
    """The slots that each key fills or waits for."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[_Waiter]] = {}

    @asynccontextmanager
    async def share(self, key_id: str, slots: int, most: int, within_s: float) -> AsyncIterator[None]:
        """Hold that many slots of the `most` that a key may fill; who asks for more has them all. First come, first
        served. Raises what `refuse_waiting` is given, and `Overloaded` where no turn comes in time."""
        slots = min(slots, most)
        if key_id in self._waiting or self._held[key_id] + slots > most:
            try:
                async with asyncio.timeout(within_s):
                    await self._turn(key_id, _Waiter(slots, most, asyncio.get_running_loop().create_future()))
            except TimeoutError:
                raise Overloaded("The request waited as long as it was allowed to run.") from None
        else:
            self._held[key_id] += slots
        try:
            yield
        finally:
            self._give_back(key_id, slots)

    def refuse_waiting(self, error: ApiError) -> None:
        """End every wait with `error`."""
        for waiters in self._waiting.values():
            for waiter in waiters:
                if not waiter.turn.done():
                    waiter.turn.set_exception(error)

    async def _turn(self, key_id: str, waiter: _Waiter) -> None:
        """Wait for a turn, after which the slots are held."""
        self._waiting.setdefault(key_id, deque()).append(waiter)
        try:
            await waiter.turn
        except BaseException:
            if waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
                self._give_back(key_id, waiter.slots)  # its client went in the moment of its turn
            else:
                with suppress(KeyError, ValueError):  # whoever gave back before has passed it over already
                    self._waiting[key_id].remove(waiter)
                self._wake(key_id)
            raise

    def _give_back(self, key_id: str, slots: int) -> None:
        self._held[key_id] -= slots
        self._wake(key_id)

    def _wake(self, key_id: str) -> None:
        """Whose turn it is has it; a key with nothing is forgotten."""
        waiting = self._waiting.get(key_id, deque())
        while waiting and (waiting[0].turn.done() or self._held[key_id] + waiting[0].slots <= waiting[0].most):
            waiter = waiting.popleft()
            if not waiter.turn.done():
                self._held[key_id] += waiter.slots
                waiter.turn.set_result(None)
        if not waiting:
            self._waiting.pop(key_id, None)
            if not self._held[key_id]:
                del self._held[key_id]
