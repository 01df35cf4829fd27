"""Who may use a model when more want to than it can answer: everybody else is told a moment of their own to come back.

As with a key's limits a refusal is a ticket. But under overload most of those who are refused go elsewhere, so tickets
are overbooked by the share of them that is used, which is learnt, and no slot waits for one longer than it takes:

1. A ticket is claimed by the same key's next attempt, from its moment on, or by the same request again from a client
   that does not count (rule 1 of a key's line). Its holder passes if any slot is free.
2. Whoever holds none passes if slots are left for those whose tickets are due about now, as many as usually come.
   Those that the end of the queue takes need none: a slot that is kept free serves nobody.
3. Tickets are given out at the pace at which their holders can be served: that of the measured durations, less what
   chance needs (the fewer slots, the more), over the share that is used. None is for later than clients wait: whom
   none can be given is told more than they wait, so that no retry is spent in vain.
4. An unclaimed ticket lapses after a grace period; what it teaches is how many come.
5. Some slots are spare: for keys that have no more than that here. So nobody who asks for much shuts out who asks for
   little.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from ocserve.accounts.buckets import SECOND
from ocserve.accounts.line import LONGEST_TOLD, Attempt, Durations, Numbered

_GRACE = 2 * SECOND  # clients add up to a quarter to what they are told, and round it up to a second
_MOST_TICKETS = 4000
_NO_PROMISE = LONGEST_TOLD + 2 * SECOND  # longer than clients wait: who cannot be promised anything is not told to come
_WEIGHT = 0.05  # of one ticket in the share that is used
_LEAST_SHARE = 0.02
_LATE = 0.25  # how likely somebody still comes whose moment has passed, against one whose moment is to come
# Of c slots about the square root of c are free by chance at any time if arrivals are at random (Erlang's loss formula
# at a few per cent). Twice that much of the pace is left out: newcomers take what is left, and if more of those who are
# served were holders of tickets, more would find every slot taken and wait for the next end of an answer.
_CHANCE = 2.0
_LEAST_PACE = 0.3


@dataclass(frozen=True, slots=True)
class Room:
    """How many answers of a model may be generated or waited for, and how many a request asks for.

    With `spare` slots, that many or an eighth of all are for keys that have no more than that. The last `returning` are
    for holders of tickets: a moment in the queue makes a promise good that chance would break.
    """

    model: str
    slots: int
    returning: int = 0
    spare: int = 0
    width: int = 1


@dataclass(frozen=True, slots=True)
class _Ticket:
    due_ns: int
    holder: str
    expected: Attempt


@dataclass(eq=False, slots=True)
class Stay:
    """A request that has a place in the crowd."""

    crowd: Crowd
    holder: str
    width: int
    begun_ns: int


class Crowd:
    """Those who use one model, and the tickets of those who are to come."""

    def __init__(self) -> None:
        self._stays: set[Stay] = set()
        self._tickets: list[_Ticket] = []  # in the order of their moments
        self._durations = Durations()
        self._share_used = 1.0
        self._numbered = Numbered()

    def enter(self, room: Room, holder: str, attempt: Attempt, now_ns: int) -> Stay | int:
        """A place, or the nanoseconds after which to come for one."""
        self._forget_lapsed(now_ns)
        ticket = self._claimed(holder, attempt, now_ns)
        if self._passes(room, holder, now_ns, has_ticket=ticket is not None):
            stay = Stay(self, holder, room.width, now_ns)
            self._stays.add(stay)
            return stay
        wait_ns = self._wait_ns(room, now_ns, has_ticket=ticket is not None)
        if wait_ns > LONGEST_TOLD or len(self._tickets) >= _MOST_TICKETS:
            return max(wait_ns, _NO_PROMISE)
        made = _Ticket(now_ns + wait_ns, holder, attempt.following())
        self._tickets.insert(bisect_right(self._tickets, made.due_ns, key=_due), made)
        return wait_ns

    def leave(self, stay: Stay, now_ns: int, *, served: bool) -> None:
        """A request has ended; from one that was not served nothing is learnt of how long requests take."""
        self._stays.discard(stay)
        if served:
            self._durations.ended(now_ns - stay.begun_ns)

    def _claimed(self, holder: str, attempt: Attempt, now_ns: int) -> _Ticket | None:
        """Take the ticket that this attempt has, if it has one (rule 1)."""
        self._numbered.learn(attempt)
        due = self._tickets[: bisect_right(self._tickets, now_ns, key=_due)]
        mine = [ticket for ticket in due if ticket.holder == holder]
        own = [ticket for ticket in mine if attempt.matches(ticket.expected)]
        own = own or [ticket for ticket in mine if self._numbered.begun_anew(attempt, ticket.expected)]
        if not own:
            return None
        self._tickets.remove(own[0])
        self._share_used += _WEIGHT * (1 - self._share_used)
        return own[0]

    def _forget_lapsed(self, now_ns: int) -> None:
        """Drop tickets whose holders did not come, and learn from it (rule 4)."""
        lapsed = bisect_right(self._tickets, now_ns - _GRACE, key=_due)
        if lapsed:
            del self._tickets[:lapsed]
            self._share_used = max(_LEAST_SHARE, self._share_used * (1 - _WEIGHT) ** lapsed)

    def _passes(self, room: Room, holder: str, now_ns: int, *, has_ticket: bool) -> bool:
        taken = sum(stay.width for stay in self._stays)
        free = room.slots - taken - room.width
        spare = min(max(room.spare, room.slots // 8), room.slots - 1) if room.spare else 0
        own = sum(stay.width for stay in self._stays if stay.holder == holder) + room.width
        if free >= 0 and own <= spare:
            return True  # 5
        held_back = spare + (0 if has_ticket else max(room.returning, self._kept(room, now_ns)))
        return free >= min(held_back, room.slots - room.width)  # who wants them all has them when nobody is here

    def _kept(self, room: Room, now_ns: int) -> int:
        """Slots for those whose tickets are due (rule 2).

        Half a request's time is how long one would be missed, and less where its holder may wait.
        """
        missed_ns = self._mean_ns(now_ns) // (3 if room.returning else 2)
        late = bisect_right(self._tickets, now_ns, key=_due)
        soon = bisect_right(self._tickets, now_ns + missed_ns, key=_due) - late
        return math.ceil((soon + late * _LATE) * self._share_used)

    def _wait_ns(self, room: Room, now_ns: int, *, has_ticket: bool) -> int:
        """When a slot will be free for one more (rule 3); who had a ticket comes before all others."""
        pace = max(_LEAST_PACE, 1 - _CHANCE / math.sqrt(room.slots - room.returning))
        turn_ns = int(self._mean_ns(now_ns) / (room.slots - room.returning) / pace)
        soonest = turn_ns * room.width
        if has_ticket or not self._tickets:
            return max(1, soonest)
        return max(1, soonest, self._tickets[-1].due_ns - now_ns + int(soonest * self._share_used))

    def _mean_ns(self, now_ns: int) -> int:
        return int(self._durations.mean_ns([now_ns - stay.begun_ns for stay in self._stays]))


def _due(ticket: _Ticket) -> int:
    return ticket.due_ns
