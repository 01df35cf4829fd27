"""Finished responses that clients may come back to: in memory only, bounded in number and bytes, and forgotten in time.

Each caller sees its own and nothing of others. What does not fit pushes out the oldest of whoever holds the most, so
nobody can empty another's place. Nothing of it reaches a disk or a log. A response that its client did not want stored
is still remembered on the WebSocket that it was made on, until the next one is made or the connection ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ocserve import config
from ocserve.api.openai_responses import StoredResponse
from ocserve.api.openai_responses_items import Item

# Beside its JSON an item has what was read of it, about as long, and the objects that hold both.
_ITEM_OBJECTS_BYTES = 512


@dataclass(frozen=True, slots=True)
class _Entry:
    stored: StoredResponse
    size_bytes: int
    expires_at: float
    connection: str | None  # the only one that may recall it; None if its client may come back for it anywhere


@dataclass(slots=True)
class _Holding:
    """What one caller has stored, oldest first."""

    entries: dict[str, _Entry] = field(default_factory=dict)
    items: dict[str, dict[str, Item]] = field(default_factory=dict)  # by their ids, then by those of the responses
    size_bytes: int = 0

    @property
    def oldest(self) -> _Entry:
        """The entry that has been here longest; there must be one."""
        return next(iter(self.entries.values()))

    def add(self, entry: _Entry) -> None:
        self.entries[entry.stored.id] = entry
        for item in _own_items(entry.stored) if entry.connection is None else ():
            self.items.setdefault(item.id, {})[entry.stored.id] = item
        self.size_bytes += entry.size_bytes

    def remove(self, name: str) -> None:
        entry = self.entries.pop(name)
        self.size_bytes -= entry.size_bytes
        for item in _own_items(entry.stored):
            sharing = self.items.get(item.id, {})  # none left where a client has given an id twice
            sharing.pop(name, None)
            if not sharing:
                self.items.pop(item.id, None)

    def item(self, name: str) -> Item | None:
        """The item of this id, as the latest response that has it knows it."""
        found = self.items.get(name)
        return None if found is None else found[next(reversed(found))]


class ResponseStore:
    """The responses of all callers. `clock` tells seconds of any origin."""

    def __init__(
        self, *, most: int, max_bytes: int, lifetime_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most = most
        self._max_bytes = max_bytes
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._holdings: dict[str, _Holding] = {}
        self._timer: asyncio.TimerHandle | None = None

    @staticmethod
    def of(settings: config.Server) -> ResponseStore:
        """An empty store with the bounds of the settings."""
        return ResponseStore(
            most=settings.stored_responses,
            max_bytes=settings.stored_response_bytes,
            lifetime_s=settings.stored_response_s,
        )

    @property
    def keeps(self) -> bool:
        """Whether anything can be stored."""
        return self._most > 0 and self._max_bytes > 0

    @property
    def count(self) -> int:
        """Responses stored."""
        return sum(len(holding.entries) for holding in self._holdings.values())

    @property
    def size_bytes(self) -> int:
        """What they take, as if nothing was shared between them."""
        return sum(holding.size_bytes for holding in self._holdings.values())

    def shelf(self, owner: str, connection: str | None = None) -> Shelf:
        """What `owner` sees of the store, on one WebSocket `connection` or over HTTP."""
        return Shelf(self, owner, connection)

    def holding(self, owner: str) -> _Holding:
        """What `owner` has stored and has not expired."""
        self.forget_expired()
        return self._holdings.get(owner) or _Holding()

    def keep(self, owner: str, stored: StoredResponse, connection: str | None = None) -> bool:
        """Store a response, for one `connection` only if it is named; whether there was room for it."""
        self.forget_expired()
        size = _size_bytes(stored)
        if not self.keeps or size > self._max_bytes:
            return False
        holding = self._holdings.setdefault(owner, _Holding())
        holding.add(_Entry(stored, size, self._clock() + self._lifetime_s, connection))
        while self.count > self._most or self.size_bytes > self._max_bytes:
            heaviest = max(self._holdings, key=lambda name: self._holdings[name].size_bytes)
            self.remove(heaviest, self._holdings[heaviest].oldest.stored.id)
        self._set_timer()
        return stored.id in holding.entries

    def remove(self, owner: str, name: str) -> None:
        """Forget one response, which must be there."""
        holding = self._holdings[owner]
        holding.remove(name)
        if not holding.entries:
            del self._holdings[owner]

    def forget_expired(self) -> None:
        """Forget what has been here for its time."""
        now = self._clock()
        for owner, holding in list(self._holdings.items()):
            while holding.entries and holding.oldest.expires_at <= now:
                self.remove(owner, holding.oldest.stored.id)

    def _set_timer(self) -> None:
        """See to it that what expires is forgotten although nobody asks for anything again."""
        if self._timer is None and self._holdings:
            first = min(holding.oldest.expires_at for holding in self._holdings.values())
            self._timer = asyncio.get_running_loop().call_later(first - self._clock(), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.forget_expired()
        self._set_timer()


class Shelf:
    """One caller's part of the store: an `api.openai_responses.Memory`. `connection` is the WebSocket it is for."""

    def __init__(self, store: ResponseStore, owner: str, connection: str | None) -> None:
        self._store = store
        self._owner = owner
        self._connection = connection
        self._latest: str | None = None
        self.keeps = store.keeps

    def response(self, name: str) -> StoredResponse | None:
        """The response of this id."""
        entry = self._store.holding(self._owner).entries.get(name)
        return entry.stored if entry and entry.connection in (None, self._connection) else None

    def item(self, name: str) -> Item | None:
        """The item of this id, of the request or the output of any response."""
        return self._store.holding(self._owner).item(name)

    def keep(self, stored: StoredResponse, *, lasting: bool) -> bool:
        """Store a response; whether it can be come back to from anywhere. One that cannot replaces the one before."""
        if lasting and self._store.keep(self._owner, stored):
            return True
        if self._connection is not None:
            self.forget()
            self._store.keep(self._owner, stored, self._connection)
            self._latest = stored.id
        return False

    def remove(self, name: str) -> bool:
        """Forget the response of this id; whether it was there."""
        found = self.response(name) is not None
        if found:
            self._store.remove(self._owner, name)
        return found

    def forget(self) -> None:
        """Forget what only the connection may recall."""
        if self._latest is not None:
            self.remove(self._latest)


def _own_items(stored: StoredResponse) -> tuple[Item, ...]:
    return stored.input + stored.output


def _size_bytes(stored: StoredResponse) -> int:
    return len(stored.body) + sum(2 * len(item.wire) + _ITEM_OBJECTS_BYTES for item in stored.conversation)
