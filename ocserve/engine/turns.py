"""The token ids of assistant turns, so that a conversation's next prompt begins with the very tokens that are cached.

A text can be divided into tokens in many ways, and what a model samples need not be how the tokenizer would divide it.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence

_KEY_BYTES = 16
_TOKEN_BYTES = 4


class Turns:
    """The least recently used turns go first. Called by the loop's thread and the preparing one.

    Texts are known by keyed digests only, and never across tenants.
    """

    def __init__(self, *, most_turns: int = 4096, most_bytes: int = 8 * 1024 * 1024) -> None:
        self._most_turns = most_turns
        self._most_bytes = most_bytes
        self._secret = secrets.token_bytes(_KEY_BYTES)
        self._lock = threading.Lock()
        self._turns: OrderedDict[bytes, array[int]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._turns)

    def remember(self, salt: bytes, text: str, ids: Sequence[int]) -> None:
        """`text` was generated for a tenant as `ids`."""
        key, turn = self._key(salt, text), array("i", ids)
        with self._lock:
            self._forget(key)
            self._turns[key] = turn
            self._bytes += len(turn) * _TOKEN_BYTES
            while len(self._turns) > self._most_turns or self._bytes > self._most_bytes:
                self._forget(next(iter(self._turns)))

    def recall(self, salt: bytes, text: str) -> tuple[int, ...] | None:
        """The ids as which `text` was last generated for this tenant, if that is still known."""
        key = self._key(salt, text)
        with self._lock:
            turn = self._turns.get(key)
            if turn is None:
                return None
            self._turns.move_to_end(key)
            return tuple(turn)

    def _forget(self, key: bytes) -> None:
        turn = self._turns.pop(key, None)
        if turn is not None:
            self._bytes -= len(turn) * _TOKEN_BYTES

    def _key(self, salt: bytes, text: str) -> bytes:
        framed = len(salt).to_bytes(8, "little") + salt + text.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(framed, key=self._secret, digest_size=_KEY_BYTES).digest()
