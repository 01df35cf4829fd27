"""Remembers which requests were in flight when the engine died, and refuses those that were there twice.

A request is recognised by a keyed digest of what it asks for, since a client's retry carries a new id. The key is
random and lives in memory only, so the digests say nothing about content. A request that later completes is cleared.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

import msgspec
from msgspec.structs import replace

from ocserve.errors import RequestQuarantined
from ocserve.generation import GenerateRequest, Question

CRASHES = 2
FORGET_AFTER_S = 3600.0
CAPACITY = 4096

_encoder = msgspec.msgpack.Encoder()


class Quarantine:
    """Counts crashes per request digest; bounded and expiring."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._key = secrets.token_bytes(32)
        self._clock = clock
        self._suspects: OrderedDict[bytes, tuple[int, float]] = OrderedDict()

    def digest(self, work: GenerateRequest | Question) -> bytes:
        """What identifies the work that is asked for, whoever asks."""
        anonymous = {"request_id": "", "salt": b""}
        named = {name: value for name, value in anonymous.items() if name in work.__struct_fields__}
        return hmac.new(self._key, _encoder.encode(replace(work, **named)), hashlib.sha256).digest()

    def check(self, digest: bytes) -> None:
        """Raise `RequestQuarantined` for work that was in flight at two crashes."""
        crashes, last = self._suspects.get(digest, (0, 0.0))
        if self._clock() - last > FORGET_AFTER_S:
            self._suspects.pop(digest, None)
        elif crashes >= CRASHES:
            raise RequestQuarantined(
                "This request was in flight at two crashes of the engine and is not run again. Change it, or wait "
                f"{FORGET_AFTER_S / 60:.0f} minutes."
            )

    def crashed(self, digests: Iterable[bytes]) -> None:
        """The engine died while these were in flight."""
        now = self._clock()
        for digest in digests:
            crashes, _ = self._suspects.pop(digest, (0, 0.0))
            self._suspects[digest] = (crashes + 1, now)
        while len(self._suspects) > CAPACITY:
            self._suspects.popitem(last=False)

    def completed(self, digest: bytes) -> None:
        """This work ran to its end, so it does not crash the engine by itself."""
        self._suspects.pop(digest, None)
