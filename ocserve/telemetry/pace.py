"""When the pieces of one request's answers came: to the first, and from one token to the next."""

from __future__ import annotations

import time
from bisect import bisect_left

from ocserve.generation import GAP_BOUNDS_S


class Pace:
    """Taken as pieces are handed on, so a client that reads slowly shows. A piece costs one reading of the clock."""

    def __init__(self) -> None:
        self.gaps = [0] * (len(GAP_BOUNDS_S) + 1)
        self.gaps_s = 0.0
        self._first: float | None = None
        self._last: dict[int, float] = {}

    def took(self, choice: int, tokens: int) -> None:
        """A piece of a choice was handed on; tokens that came together share the time since the piece before."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
        before = self._last.get(choice)
        if before is not None and tokens:
            self.gaps[bisect_left(GAP_BOUNDS_S, (now - before) / tokens)] += tokens
            self.gaps_s += now - before
        if before is None or tokens:
            self._last[choice] = now

    def first_ms(self, since: float) -> float | None:
        """Milliseconds from `since` on the monotonic clock to the first piece; None while there is none."""
        return None if self._first is None else (self._first - since) * 1000
