"""What keys used before this process began, by the hour, so that a restart gives nobody a second day's worth.

A key's daily buckets are filled anew when it is first used: they are taken to have been empty three days before the
start, refilled since, and what was used in an hour to have been used at its end. Both are at least as strict as what
happened: the level is never higher than it would be without the restart, if it was not in debt at that time, and the
same if the bucket has been full since. Requests that were still being looked at when the process was killed, before
they had a row, are the only ones that nobody remembers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ocserve.accounts.balances import Hour
from ocserve.accounts.ledger_schema import HOUR_US, RECENT_HOURS, now_us

_US = 1000  # nanoseconds


class Used(NamedTuple):
    """What was used in a part of the past that lasted so many nanoseconds."""

    lasted_ns: int
    requests: int
    tokens: int


class Past:
    """The last hours of every key, as of the making. Each of them is handed out once."""

    def __init__(self, hours: Iterable[Hour] = (), as_of_us: int | None = None) -> None:
        self._as_of_us = now_us() if as_of_us is None else as_of_us
        self._taken: dict[tuple[str, str], dict[int, tuple[int, int]]] = {}
        for each in hours:
            for model in ("", each.model):  # those of all models, and of this one
                taken = self._taken.setdefault((each.key_id, model), {})
                requests, tokens = taken.get(each.hour, (0, 0))
                taken[each.hour] = requests + each.requests, tokens + each.tokens

    def taken(self, key_id: str, model: str, since_ns: int) -> list[Used]:
        """What a key used of a model, or of all (empty), up to `since_ns` after the making; nothing the second time."""
        taken = self._taken.pop((key_id, model), None)
        if taken is None:
            return []
        now = self._as_of_us + since_ns // _US
        current = now // HOUR_US
        first = self._as_of_us // HOUR_US - RECENT_HOURS
        # What a clock that was set back puts into the future has been used all the same.
        late = [used for hour, used in taken.items() if hour > current]
        return [
            *(Used(HOUR_US * _US, *taken.get(hour, (0, 0))) for hour in range(first, current)),
            Used(now % HOUR_US * _US, *taken.get(current, (0, 0))),
            *(Used(0, *used) for used in late),
        ]


NO_PAST = Past(as_of_us=0)
