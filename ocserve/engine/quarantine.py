"""Finds out which request makes the engine die, and refuses it to the key that it came from.

1. Whatever was in the engine at a crash is a suspect until it has completed once, or for some minutes.
2. A suspect that comes again is on trial: it is let in by itself, so that nothing else in the engine is as new
   (`flights.Turns` says when). What has generated for a while beside a trial stays where it is.
3. A suspect is refused once it was in the engine with nothing else at another crash. Nothing less is proof: beside it
   may have been work that never came before and never comes again.
4. A suspect that was on trial at a crash, but not by itself, is let only into an empty engine from then on.

So a poison that is tried again as it is crashes the engine twice, or three times where answers that take long go on
beside its trial. One that lets a trial pass is tried for longer after each crash; one that is worded anew each time is
never recognised, and condemns nobody.

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

SUSPECT_S = 600.0
REFUSE_S = 3600.0
CAPACITY = 4096

_encoder = msgspec.msgpack.Encoder()


@dataclass(frozen=True, slots=True)
class Mark:
    """What work is recognised by: what it asks for, and whose it is."""

    work: bytes
    tenant: bytes


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Why work is let in with care: how many crashes it has been in, and whether it runs in an empty engine only."""

    crashes: int
    alone: bool
    since: float


class Quarantine:
    """Who is suspected and who is refused; bounded and expiring. The prompts of one request have a mark each."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._key = secrets.token_bytes(32)
        self._clock = clock
        self._suspects: OrderedDict[Mark, Suspicion] = OrderedDict()
        self._refused: OrderedDict[Mark, float] = OrderedDict()  # since when

    def mark(self, work: GenerateRequest | Question) -> Mark:
        """What this work will be recognised by."""
        return Mark(self._digest(_encoder.encode(replace(work, request_id="", salt=b""))), self._digest(work.salt))

    def _digest(self, data: bytes) -> bytes:
        return hmac.new(self._key, data, hashlib.sha256).digest()

    def check(self, mark: Mark) -> None:
        """Raise `RequestQuarantined` for work that is known to stop the engine."""
        if mark in self._refused and self._clock() - self._refused[mark] <= REFUSE_S:
            raise RequestQuarantined(
                "The engine stopped twice while it worked on this request, which is not run again. Change it, or wait "
                f"{REFUSE_S / 60:.0f} minutes."
            )

    def suspicion(self, mark: Mark) -> Suspicion | None:
        """What is held against work that was in the engine at a crash and has not completed since."""
        found = self._suspects.get(mark)
        return found if found is not None and self._clock() - found.since <= SUSPECT_S else None

    def crashed(self, marks: Collection[Mark], tried: Collection[Mark] = ()) -> None:
        """The engine died with these in it; the prompts `tried` are of the one request that was new, if there was one.

        1. They are suspects, and nothing else was there: they are the cause.
        2. They are suspects, and other work was there: they will be alone next time.
        3. Whatever else was there may be the cause.
        """
        proven = bool(tried) and all(map(self.suspicion, tried))
        if proven and set(tried) == set(marks):  # 1
            for mark in tried:
                self._suspects.pop(mark, None)
                self._refused[mark] = self._clock()
                self._refused.move_to_end(mark)
        else:
            for mark in marks:
                known = self.suspicion(mark) or Suspicion(crashes=0, alone=False, since=0.0)
                alone = known.alone or (proven and mark in tried)  # 2
                self._suspects[mark] = Suspicion(crashes=known.crashes + 1, alone=alone, since=self._clock())  # 3
                self._suspects.move_to_end(mark)
        for kept in (self._suspects, self._refused):
            while len(kept) > CAPACITY:
                kept.popitem(last=False)

    def completed(self, mark: Mark) -> None:
        """This work ran to its end, so it does not stop the engine by itself."""
        self._suspects.pop(mark, None)
