"""Token buckets: so much per minute, so much per day. A bucket holds one period's worth and refills continuously.

Time and use are integers (nanoseconds; units times the nanoseconds of the period), so arithmetic is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SECOND = 1_000_000_000
MINUTE = 60 * SECOND
DAY = 24 * 60 * MINUTE
_PERIODS = {MINUTE: "minute", DAY: "day"}


@dataclass(frozen=True, slots=True)
class Dimension:
    """A limit as a client sees it."""

    limit: int
    remaining: int
    full_in_ns: int


@dataclass(frozen=True, slots=True)
class LimitState:
    """What is left of a key's limits, of each kind by the limit that has least left; None is unlimited."""

    requests: Dimension | None
    tokens: Dimension | None


@dataclass(frozen=True, slots=True)
class Named:
    """A limit that refuses: the name of its setting, and what it is in words."""

    setting: str
    words: str


class Bucket:
    """A bucket of `limit` units per `period_ns`; None is unlimited. Starts full.

    It counts what has been used and is not refilled yet, also without a limit, so that whoever is given one later, or
    again, has used what they have used: it is refilled then as under the least limit that would have sufficed. Where a
    limit is lowered below what is used, the rest is not owed, for it was allowed. It counts again if the limit is
    raised, until it would have been refilled under the limit that allowed it.
    """

    def __init__(self, limit: int | None, period_ns: int) -> None:
        self.limit = limit
        self.period_ns = period_ns
        self._used = 0
        self._beyond = 0  # used too, and more than the limit was lowered to
        self._widest = limit or 0  # the limit that has allowed all that is used

    def resize(self, limit: int | None) -> None:
        """Change the limit; what has been used stays used, and what is owed is still owed."""
        self._widen()
        used = self._used + self._beyond
        if limit is None:
            self._used, self._beyond = used, 0
        else:
            owed = 0 if self.limit is None else max(0, self._used - self.limit * self.period_ns)
            self._used = min(used, limit * self.period_ns + owed)
            self._beyond = used - self._used
        self._widest = max(self._widest if used else 0, limit or 0)
        self.limit = limit

    def resume(self, spans: Sequence[tuple[int, int]]) -> None:
        """Have been empty before `spans`, each so long (ns) and with so many units taken at its end."""
        self._used = (self.limit or 0) * self.period_ns
        for lasted_ns, units in spans:
            self.refill(lasted_ns)
            self.take(units)

    def refill(self, elapsed_ns: int) -> None:
        """Let time pass."""
        if not elapsed_ns:
            return
        self._widen()
        rate = self._widest if self.limit is None else self.limit
        self._used = max(0, self._used - elapsed_ns * rate)
        self._beyond = max(0, self._beyond - elapsed_ns * (self._widest - rate))
        if self.full:
            self._widest = self.limit or 0

    def take(self, units: int) -> None:
        """Take units, which may leave the bucket in debt; give back with a negative number."""
        used = self._used + units * self.period_ns
        self._used = max(0, used)
        self._beyond = max(0, self._beyond + min(0, used))

    @property
    def full(self) -> bool:
        """Whether nothing is missing, nor would be under another limit."""
        return not self._used and not self._beyond

    def wait_ns(self, units: int) -> int:
        """How long until `units` are there; 0 if they are now."""
        if self.limit is None:
            return 0
        return max(0, -(-((units - self.limit) * self.period_ns + self._used) // self.limit))

    def state(self, promised: int) -> Dimension | None:
        """What a client sees, the promised units not counted."""
        if self.limit is None:
            return None
        left = max(0, self.limit - -(-self._used // self.period_ns) - promised)
        return Dimension(self.limit, left, self.wait_ns(self.limit + promised))

    def _widen(self) -> None:
        """Have `_widest` as of now; what is taken and given back at the same moment does not count."""
        if self.limit is None:
            self._widest = max(self._widest, -(-self._used // self.period_ns)) if self._used else 0
        elif not self._beyond:
            self._widest = self.limit


class Quota:
    """What may be used of one thing, `unit`s: per minute and per day."""

    def __init__(self, unit: str, per_minute: int | None, per_day: int | None) -> None:
        self._unit = unit
        self._buckets = (Bucket(per_minute, MINUTE), Bucket(per_day, DAY))

    @property
    def most(self) -> Bucket | None:
        """The bucket that holds least when it is full; None if nothing is limited."""
        limited = [bucket for bucket in self._buckets if bucket.limit is not None]
        return min(limited, key=lambda bucket: bucket.limit or 0, default=None)

    @property
    def full(self) -> bool:
        """Whether nothing is missing."""
        return all(bucket.full for bucket in self._buckets)

    def resize(self, per_minute: int | None, per_day: int | None) -> None:
        """Change the limits."""
        for bucket, limit in zip(self._buckets, (per_minute, per_day), strict=True):
            if bucket.limit != limit:
                bucket.resize(limit)

    def refill(self, elapsed_ns: int) -> None:
        """Let time pass."""
        for bucket in self._buckets:
            bucket.refill(elapsed_ns)

    def resume(self, spans: Sequence[tuple[int, int]]) -> None:
        """As `Bucket.resume`, of the day: what was used in a minute long ago is no longer known."""
        self._buckets[1].resume(spans)

    def take(self, units: int) -> None:
        """Take units; give back with a negative number."""
        for bucket in self._buckets:
            bucket.take(units)

    def wait_ns(self, units: int) -> int:
        """How long until `units` are there in both buckets; 0 if they are now."""
        return max(bucket.wait_ns(units) for bucket in self._buckets)

    def state(self, promised: int) -> Dimension | None:
        """What a client sees of the bucket that has least left."""
        states = [state for bucket in self._buckets if (state := bucket.state(promised))]
        return min(states, key=lambda state: (state.remaining, -state.full_in_ns), default=None)

    def named(self, bucket: Bucket) -> str:
        """A limit in words."""
        return f"{bucket.limit} {self._unit} per {_PERIODS[bucket.period_ns]}"

    def missing(self, units: int) -> Named:
        """The limit that has whoever wants `units` wait longest."""
        bucket = max(self._buckets, key=lambda bucket: bucket.wait_ns(units))
        return Named(f"{self._unit}_per_{_PERIODS[bucket.period_ns]}", self.named(bucket))
