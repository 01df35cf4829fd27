"""Finds out which request makes the engine die, and refuses it.

Whatever was in flight at a crash is a suspect until it has completed once. A suspect that comes again runs beside no
other suspect, only beside work that is none; so at its second crash the cause is known, and its bystanders are victims.
The cause is refused to the key that it came from, and to everybody once it came from several keys.

Work is recognised by a keyed digest of what it asks for, since a client's retry carries a new id. The digests' key is
random and lives in memory only, so they say nothing about content.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

import msgspec
from msgspec.structs import replace

from ocserve.errors import RequestQuarantined
from ocserve.generation import GenerateRequest, Question

SEVERAL_KEYS = 2
FORGET_AFTER_S = 3600.0
CAPACITY = 4096

_encoder = msgspec.msgpack.Encoder()


@dataclass(frozen=True, slots=True)
class Mark:
    """What work is recognised by: what it asks for, and whose it is."""

    work: bytes
    tenant: bytes


class Quarantine:
    """Who is suspected and who is refused; bounded and expiring. The prompts of one request have a mark each."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._key = secrets.token_bytes(32)
        self._clock = clock
        self._suspects: OrderedDict[Mark, float] = OrderedDict()  # when they were last in flight at a crash
        self._refused: OrderedDict[bytes, dict[bytes, float]] = OrderedDict()  # by work: since when, by tenant

    def mark(self, work: GenerateRequest | Question) -> Mark:
        """What this work will be recognised by."""
        return Mark(self._digest(_encoder.encode(replace(work, request_id="", salt=b""))), self._digest(work.salt))

    def _digest(self, data: bytes) -> bytes:
        return hmac.new(self._key, data, hashlib.sha256).digest()

    def check(self, mark: Mark) -> None:
        """Raise `RequestQuarantined` for work that is known to stop the engine."""
        tenants = [tenant for tenant, since in self._refused.get(mark.work, {}).items() if self._recent(since)]
        if mark.tenant in tenants or len(tenants) >= SEVERAL_KEYS:
            raise RequestQuarantined(
                "The engine stopped twice while it worked on this request, which is not run again. Change it, or wait "
                f"{FORGET_AFTER_S / 60:.0f} minutes."
            )

    def suspects(self, mark: Mark) -> bool:
        """Whether this was in flight at a crash and has not completed since."""
        return mark in self._suspects and self._recent(self._suspects[mark])

    def crashed(self, marks: Collection[Mark]) -> None:
        """The engine died while these were in flight.

        1. Some were suspects: since suspects of different requests never run together, these are the cause.
        2. None was: each may be the cause.
        """
        known = [mark for mark in marks if self.suspects(mark)]
        for mark in known:  # 1
            del self._suspects[mark]
            self._refused.setdefault(mark.work, {})[mark.tenant] = self._clock()
            self._refused.move_to_end(mark.work)
        for mark in () if known else marks:  # 2
            self._suspects[mark] = self._clock()
            self._suspects.move_to_end(mark)
        for kept in (self._suspects, self._refused):
            while len(kept) > CAPACITY:
                kept.popitem(last=False)

    def completed(self, mark: Mark) -> None:
        """This work ran to its end, so it does not stop the engine by itself."""
        self._suspects.pop(mark, None)

    def _recent(self, since: float) -> bool:
        return self._clock() - since <= FORGET_AFTER_S
