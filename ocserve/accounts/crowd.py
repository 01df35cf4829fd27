"""Who may use a model when more want to than it can answer: everybody else is told a moment of their own to come back.

As with a key's limits a refusal is a ticket. But under overload most of those who are refused go elsewhere, so tickets
are overbooked by the share of them that is used, which is learnt, and no slot waits for one longer than it takes:

1. A ticket is claimed by the same key's next attempt, from its moment on, or by the same request again from a client
   that does not count (rule 1 of a key's line). Its holder passes if the slots are free that it asks for.
2. Whoever holds none passes if slots are left for those whose tickets are due about now, as many as usually come.
   Those that the end of the queue takes need none: a slot that is kept free serves nobody.
3. Who has more than an even part of the slots leaves the rest to those who have less and whose tickets are due.
4. Tickets are given out at the pace at which their holders can be served: that of the measured durations, less what
   chance needs (the fewer slots, the more), over the share that is used. Each key has a line of its own, the slower the
   more there are; only who has less than an even part of the slots is told to come for the next free ones. No ticket is
   for later than clients wait: whom none can be given is told more than they wait, so that no retry is spent in vain.
5. An unclaimed ticket lapses after a grace period; what it teaches is how many of its key come.
6. Some slots are spare: for keys that have no more than that here. So nobody who asks for much shuts out who asks for
   little.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from ocserve.accounts.buckets import SECOND
from ocserve.accounts.line import LONGEST_TOLD, Attempt, Durations, Numbered

_GRACE = 2 * SECOND  # clients add up to a quarter to what they are told, and round it up to a second
_MOST_TICKETS = 16_000  # a quarter of them of one key
_NO_PROMISE = LONGEST_TOLD + 2 * SECOND  # longer than clients wait: who cannot be promised anything is not told to come
_WEIGHT = 0.05  # of one ticket in the share that is used
_LEAST_SHARE = 0.02
_LATE = 0.25  # how likely somebody still comes whose moment has passed, against one whose moment is to come
# Of c slots about the square root of c are free by chance at any time if arrivals are at random (Erlang's loss formula
# at a few per cent). Twice that much of the pace is left out: newcomers take what is left, and if more of those who are
# served were holders of tickets, more would find every slot taken and wait for the next end of an answer.
_CHANCE = 2.0
_CHANCE_AMONG_OTHERS = 1.0
_LEAST_PACE = 0.3
_MOST_HOLDERS = 10_000  # that are remembered
_ROUNDING = 1e-9


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


@dataclass(eq=False, slots=True)
class _Holder:
    """One key here: the slots it has, those that its tickets are for, when the last of these is due, and the share of
    its tickets that is used.
    """

    running: int = 0
    waiting: int = 0
    last_due_ns: int = 0
    share_used: float = 1.0

    def learn(self, used: bool) -> None:
        """One of its tickets was used, or not."""
        self.share_used = max(_LEAST_SHARE, self.share_used + _WEIGHT * (used - self.share_used))


@dataclass(frozen=True, slots=True)
class _Ticket:
    due_ns: int
    holder: _Holder
    width: int
    expected: Attempt


@dataclass(eq=False, slots=True)
class Stay:
    """A request that has a place in the crowd."""

    crowd: Crowd
    holder: _Holder
    width: int
    begun_ns: int


class Crowd:
    """Those who use one model, and the tickets of those who are to come."""

    def __init__(self) -> None:
        self._stays: set[Stay] = set()
        self._tickets: list[_Ticket] = []  # in the order of their moments
        self._holders: dict[str, _Holder] = {}
        self._present: set[_Holder] = set()  # those of them that have slots or tickets
        self._durations = Durations()
        self._numbered = Numbered()

    def enter(self, room: Room, key: str, attempt: Attempt, now_ns: int) -> Stay | int:
        """A place, or the nanoseconds after which to come for one."""
        self._forget_lapsed(now_ns)
        holder = self._holder(key)
        has_ticket = self._claim(holder, attempt, room.width, now_ns)
        if self._passes(room, holder, now_ns, has_ticket=has_ticket):
            stay = Stay(self, holder, room.width, now_ns)
            self._stays.add(stay)
            self._change(holder, running=room.width)
            return stay
        wait_ns = self._wait_ns(room, holder, now_ns, has_ticket=has_ticket)
        hopeless = bool(self._tickets) and room.width > room.slots // 2 > 0  # so many are not free while others come
        if hopeless or not self._promise(holder, room.width, attempt, wait_ns, now_ns):
            return max(wait_ns, _NO_PROMISE)
        return wait_ns

    def expect(self, stay: Stay, attempt: Attempt, wait_ns: int, now_ns: int) -> None:
        """Have room for a request that had a place here and was refused elsewhere, when it comes back."""
        self._promise(stay.holder, stay.width, attempt, wait_ns, now_ns)

    def _promise(self, holder: _Holder, width: int, attempt: Attempt, wait_ns: int, now_ns: int) -> bool:
        """Give out a ticket for `wait_ns` from now, if a client would wait for it and there are not too many."""
        full = len(self._tickets) >= _MOST_TICKETS or holder.waiting >= _MOST_TICKETS // 4
        if wait_ns > LONGEST_TOLD or full:
            return False
        made = _Ticket(now_ns + wait_ns, holder, width, attempt.following())
        self._tickets.insert(bisect_right(self._tickets, made.due_ns, key=_due), made)
        holder.last_due_ns = max(made.due_ns, holder.last_due_ns if holder.waiting else 0)
        self._change(holder, waiting=width)
        return True

    def _change(self, holder: _Holder, *, running: int = 0, waiting: int = 0) -> None:
        """Give a key so many more slots and tickets."""
        holder.running += running
        holder.waiting += waiting
        (self._present.add if holder.running or holder.waiting else self._present.discard)(holder)

    def leave(self, stay: Stay, now_ns: int, *, served: bool) -> None:
        """A request has ended; from one that was not served nothing is learnt of how long requests take."""
        if stay in self._stays:
            self._stays.remove(stay)
            self._change(stay.holder, running=-stay.width)
        if served:
            self._durations.ended(now_ns - stay.begun_ns)

    def _holder(self, key: str) -> _Holder:
        """What is known of a key; when there are too many, those that are not here are forgotten."""
        known = self._holders.get(key)
        if known is None:
            if len(self._holders) >= _MOST_HOLDERS:
                self._holders = {each: holder for each, holder in self._holders.items() if holder in self._present}
            known = self._holders[key] = _Holder()
        return known

    def _claim(self, holder: _Holder, attempt: Attempt, width: int, now_ns: int) -> bool:
        """Use up the ticket that this attempt has; whether it has one (rule 1)."""
        self._numbered.learn(attempt)
        due = self._tickets[: bisect_right(self._tickets, now_ns, key=_due)]
        mine = [ticket for ticket in due if ticket.holder is holder and ticket.width >= width]
        own = [ticket for ticket in mine if attempt.matches(ticket.expected)]
        own = own or [ticket for ticket in mine if self._numbered.begun_anew(attempt, ticket.expected)]
        if not own:
            return False
        self._tickets.remove(own[0])
        self._change(holder, waiting=-own[0].width)
        holder.learn(used=True)
        return True

    def _forget_lapsed(self, now_ns: int) -> None:
        """Drop tickets whose holders did not come, and learn from it (rule 5)."""
        lapsed = bisect_right(self._tickets, now_ns - _GRACE, key=_due)
        for ticket in self._tickets[:lapsed]:
            self._change(ticket.holder, waiting=-ticket.width)
            ticket.holder.learn(used=False)
        del self._tickets[:lapsed]

    def _passes(self, room: Room, holder: _Holder, now_ns: int, *, has_ticket: bool) -> bool:
        taken = sum(stay.width for stay in self._stays)
        free = room.slots - taken - room.width
        spare = min(max(room.spare, room.slots // 8), room.slots - 1) if room.spare else 0
        if free >= 0 and holder.running + room.width <= spare:
            return True  # 6
        held_back = spare
        if not has_ticket:
            held_back += max(room.returning, self._kept(room, now_ns), self._owed(room, holder, now_ns))
        return free >= min(held_back, room.slots - room.width)  # who wants them all has them when nobody is here

    def _kept(self, room: Room, now_ns: int) -> int:
        """Slots for those whose tickets are due (rule 2).

        Half a request's time is how long one would be missed, and less where its holder may wait.
        """
        missed_ns = self._mean_ns(now_ns) // (3 if room.returning else 2)
        expected = 0.0
        for ticket in self._tickets[: bisect_right(self._tickets, now_ns + missed_ns, key=_due)]:
            likely = ticket.holder.share_used * (1 if ticket.due_ns > now_ns else _LATE)
            expected += ticket.width * likely
        return math.ceil(expected - _ROUNDING)

    def _owed(self, room: Room, holder: _Holder, now_ns: int) -> int:
        """Slots that one with more than its part leaves to those with less whose tickets are due (rule 3)."""
        part = self._part(room, holder)
        if holder.running + room.width <= part:
            return 0
        due: dict[_Holder, float] = {}
        for ticket in self._tickets[: bisect_right(self._tickets, now_ns + self._mean_ns(now_ns), key=_due)]:
            if ticket.holder is not holder:
                due[ticket.holder] = due.get(ticket.holder, 0) + ticket.width * ticket.holder.share_used
        return math.ceil(sum(min(max(0, part - each.running), due[each]) for each in due) - _ROUNDING)

    def _part(self, room: Room, holder: _Holder) -> float:
        """An even part of the slots for each who is here."""
        return room.slots / (1 + self._others(holder))

    def _others(self, holder: _Holder) -> int:
        return len(self._present) - (holder in self._present)

    def _wait_ns(self, room: Room, holder: _Holder, now_ns: int, *, has_ticket: bool) -> int:
        """When slots will be free for one more (rule 4); who had a ticket comes before all others."""
        slots = room.slots - room.returning
        mean_ns, others = self._mean_ns(now_ns), self._others(holder)
        if others and holder.running + holder.waiting + room.width <= self._part(room, holder):
            return max(1, mean_ns * (holder.waiting + room.width) // slots)
        # Alone, its newcomers take what its line leaves; beside others the line is all that it gets.
        pace = max(_LEAST_PACE, 1 - (_CHANCE_AMONG_OTHERS if others else _CHANCE) / math.sqrt(slots))
        soonest = int(mean_ns / slots / pace) * room.width
        if has_ticket or not holder.waiting:
            return max(1, soonest)
        return max(1, soonest, holder.last_due_ns - now_ns + int(soonest * holder.share_used * (1 + others)))

    def _mean_ns(self, now_ns: int) -> int:
        return int(self._durations.mean_ns([now_ns - stay.begun_ns for stay in self._stays]))


def _due(ticket: _Ticket) -> int:
    return ticket.due_ns
