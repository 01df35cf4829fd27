"""What a refused client is promised: a place in a line of its own, so that whoever waits as told is served.

Clients wait exactly as long as a refusal says, and give up after a few attempts, so a refusal that names the same
moment to a hundred clients loses most of them. Here every refusal is a ticket for units of its own: it stands in line
behind the tickets before it, `Retry-After` is when its turn comes, and its units are withheld from newcomers until
then. Clients say how often they have tried; that number and their key are all that ties a ticket to its holder:

1. A ticket is for one attempt: one that refused attempt n is claimed by an attempt n + 1 at or after the time told.
   Clients that do not number their attempts are known by the very same request. So are some that number them and begin
   anew each time, as a client does whose own retries are off, unless requests like theirs are seen to be numbered, or
   nobody comes with the ticket's number who has the usual retries.
2. A claim whose turn has come passes. One that came early, since clients obey no wait above 120 s, is told the rest.
3. Whoever holds no ticket passes only if every ticket can still be served.
4. A ticket not claimed within a grace period lapses: its units go to whoever comes first. So tickets of clients that do
   not come back cost a key nothing in the long run.
5. Slots become free when requests end, which nobody can know: their times are estimated from measured durations, more
   carefully with every refusal, and a free slot is kept for those who have been refused more often than the caller:
   for as many of them as have lately come when they were told.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ocserve import config
from ocserve.accounts.buckets import MINUTE, SECOND, LimitState, Named, Quota
from ocserve.accounts.past import Used

LONGEST_TOLD = 119 * SECOND  # the usual SDKs give up when told to wait more than 120 s
_GRACE = 5 * SECOND
_KEPT_LAPSED = MINUTE
_USUAL_RETRIES = 2
_MOST_NUMBERED = 64  # requests of which is remembered that they were numbered
_MOST_TICKETS = 1000  # of one line; beyond it waits are told and not promised

# Requests end at random. Someone who comes when on average a slot is free finds none about every second time, so the
# line is planned with a multiple of the mean duration: the larger one for those who have been refused before.
_CAUTION = 2
_CAUTION_AGAIN = 3

# A free slot that is kept for a client that does not come serves nobody, so little is staked on those that are late,
# and each of them halves what is expected of the others.
_MISSED = int(1.25 * SECOND)  # clients that know only whole seconds come up to one later
_WEIGHT = 0.5


class Durations:
    """How long requests last, learnt over all keys: the mean of recent ones, running ones counted with their age."""

    _WEIGHT_KEPT = 0.95  # of the past, with each request that ends: some twenty requests count

    def __init__(self) -> None:
        self._total_ns: float = SECOND  # a first guess that soon weighs little
        self._ended: float = 1.0

    def ended(self, lasted_ns: int) -> None:
        """Learn from a request that was served."""
        self._total_ns = self._total_ns * self._WEIGHT_KEPT + lasted_ns
        self._ended = self._ended * self._WEIGHT_KEPT + 1

    def mean_ns(self, ages_ns: list[int]) -> float:
        """Time in slots for each request that ends. Ages count, or long requests would be seen too late."""
        return (self._total_ns + sum(ages_ns)) / self._ended


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a request tells of itself: how often it was refused before (0 at first, None if the client does not say),
    and a hash of its body that equals only that of the very same request (None: not known).
    """

    number: int | None = None
    body: int | None = None

    def following(self) -> Attempt:
        """What it will tell when it comes back."""
        return self if self.number is None else Attempt(self.number + 1, self.body)

    def matches(self, expected: Attempt) -> bool:
        """Whether it is the one that is expected, by its number or else by its body where both are known (rule 1)."""
        if self.number is not None or None in (self.body, expected.body):
            return self.number == expected.number
        return expected.number is None and self.body == expected.body


# Of a request that tells nothing.
UNKNOWN = Attempt()


class Numbered:
    """Which requests were last seen to come back with a number: their clients count, so a first one is a newcomer."""

    def __init__(self) -> None:
        self._bodies: deque[int] = deque(maxlen=_MOST_NUMBERED)

    def learn(self, attempt: Attempt) -> None:
        """Have seen this attempt."""
        if attempt.number and attempt.body is not None and attempt.body not in self._bodies:
            self._bodies.append(attempt.body)

    def begun_anew(self, attempt: Attempt, expected: Attempt) -> bool:
        """Whether this is the request that is `expected`, though it says another number (rule 1)."""
        if attempt.number is None or expected.number is None or attempt.body is None or attempt.body != expected.body:
            return False
        return expected.number > _USUAL_RETRIES or attempt.body not in self._bodies


@dataclass(frozen=True, slots=True)
class Ticket:
    """A promise: one request, one slot and `tokens` tokens at `due_ns`, to a client told to come at `told_ns`.

    `expected` is what the client will come with.
    """

    expected: Attempt
    told_ns: int
    due_ns: int
    tokens: int

    def lapsed(self, now_ns: int) -> bool:
        """Whether anyone may have it."""
        return now_ns > self.due_ns + _GRACE

    @property
    def refusals(self) -> int:
        """How often its holder has been refused; at least once."""
        return self.expected.number or 1


@dataclass(eq=False, slots=True)
class Place:
    """A request that runs, or is about to: it holds one request, one slot and `reserved` tokens of a line.

    `promised` is whether it came with a ticket.
    """

    line: Line
    begun_ns: int
    promised: bool = False
    reserved: int = 0


class Line:
    """One limit holder's state, a key's or that of one model of a key: quotas, places taken, and the tickets out.

    `subject` names it in refusals.
    """

    def __init__(self, subject: str, limits: config.Allowance, durations: Durations, now_ns: int) -> None:
        self._subject = subject
        self.limits = limits
        self.requests = Quota("requests", limits.requests_per_minute, limits.requests_per_day)
        self.tokens = Quota("tokens", limits.tokens_per_minute, limits.tokens_per_day)
        self.running: set[Place] = set()
        self.tickets: list[Ticket] = []
        self._numbered = Numbered()
        self._durations = durations
        self._now_ns = now_ns
        self._share_used = 1.0  # of tickets

    def allow(self, limits: config.Allowance) -> None:
        """Change the limits, at once: what has been used stays used; what was promised is not."""
        if limits == self.limits:
            return
        self.tickets = []  # made under other limits, they might be for more than these allow
        self.limits = limits
        self.requests.resize(limits.requests_per_minute, limits.requests_per_day)
        self.tokens.resize(limits.tokens_per_minute, limits.tokens_per_day)

    def resume(self, hours: Sequence[Used]) -> None:
        """Have been used before this process, so much in each of the last hours, oldest first; none: a fresh start."""
        if hours:
            self.requests.resume([(each.lasted_ns, each.requests) for each in hours])
            self.tokens.resume([(each.lasted_ns, each.tokens) for each in hours])

    def advance(self, now_ns: int) -> None:
        """Let time pass: refill, and forget tickets that lapsed long ago."""
        elapsed, self._now_ns = now_ns - self._now_ns, now_ns
        self.requests.refill(elapsed)
        self.tokens.refill(elapsed)
        if self.tickets:
            missed = sum(now_ns - elapsed <= ticket.due_ns + _MISSED < now_ns for ticket in self.tickets)
            self._share_used *= (1 - _WEIGHT) ** missed
            self.tickets = [ticket for ticket in self.tickets if now_ns <= ticket.due_ns + _GRACE + _KEPT_LAPSED]

    @property
    def idle(self) -> bool:
        """Whether it equals a fresh one."""
        return not self.running and not self.tickets and self.requests.full and self.tokens.full

    @property
    def state(self) -> LimitState:
        """What a client with no ticket finds now."""
        return LimitState(self.requests.state(len(self.tickets)), self.tokens.state(self.promised_tokens()))

    def begin(self, ticket: Ticket | None) -> Place:
        """Take one request, one slot and what the ticket has promised, which is then served."""
        place = Place(self, self._now_ns, promised=ticket is not None)
        if ticket is not None:
            self.tickets.remove(ticket)
            if ticket.due_ns + _MISSED >= self._now_ns:
                self._share_used += _WEIGHT * (1 - self._share_used)
            place.reserved = ticket.tokens
            self.tokens.take(ticket.tokens)
        self.requests.take(1)
        self.running.add(place)
        return place

    def end(self, place: Place, used_tokens: int) -> None:
        """Free the slot of a request that was served, and give back what it did not use."""
        self.tokens.take(used_tokens - place.reserved)
        self.running.discard(place)
        self._durations.ended(self._now_ns - place.begun_ns)

    def undo(self, place: Place) -> None:
        """Give everything back: the request was not served."""
        self.requests.take(-1)
        self.tokens.take(-place.reserved)
        self.running.discard(place)

    def hold(self, place: Place, tokens: int) -> None:
        """Have a place hold that many tokens, which must be there."""
        self.tokens.take(tokens - place.reserved)
        place.reserved = tokens

    def tokens_wait_ns(self, place: Place, tokens: int) -> int:
        """How long until a place could hold that many tokens; 0 if it can now."""
        missing = tokens - place.reserved
        return self.tokens.wait_ns(missing + self.promised_tokens()) if missing > 0 else 0

    def promised_tokens(self) -> int:
        return sum(ticket.tokens for ticket in self.tickets)

    def claim(self, attempt: Attempt) -> tuple[Ticket | None, bool]:
        """The ticket that this attempt may use, and whether it is its own or else a lapsed one (rules 1 and 4)."""
        now = self._now_ns
        self._numbered.learn(attempt)
        told = [ticket for ticket in self.tickets if ticket.told_ns <= now]
        own = [ticket for ticket in told if attempt.matches(ticket.expected)]
        own = own or [ticket for ticket in told if self._numbered.begun_anew(attempt, ticket.expected)]
        if attempt.number is None:  # one client's requests may differ each time
            own = own or [ticket for ticket in told if ticket.expected.number is None]
        candidates = own or [ticket for ticket in told if ticket.lapsed(now)]
        return min(candidates, key=lambda ticket: ticket.due_ns, default=None), bool(own)

    def admission_wait_ns(self, ticket: Ticket | None, refusals: int) -> int:
        """0 if a request may pass now, by its ticket or without one (rules 2 and 3); else how long until it may."""
        if ticket is None:
            return max(self.requests.wait_ns(1 + len(self.tickets)), self._slot_wait_ns(refusals))
        if ticket.due_ns > self._now_ns:
            return ticket.due_ns - self._now_ns
        slots = self.limits.concurrent_requests
        if ticket.lapsed(self._now_ns) and (slots is None or len(self.running) < slots):
            return self.requests.wait_ns(1)
        return max(self.requests.wait_ns(1), self._slot_wait_ns(refusals))

    def _slot_wait_ns(self, refusals: int) -> int:
        """How long someone refused that often, this time included, waits for a slot: 0, or an estimate (rule 5).

        Plays the future: what runs ends, and those with tickets as good take a slot each when their turn comes.
        """
        slots = self.limits.concurrent_requests
        if slots is None:
            return 0
        ages = [self._now_ns - place.begun_ns for place in self.running]
        caution = _CAUTION if refusals == 1 else _CAUTION_AGAIN
        lasts = int(self._durations.mean_ns(ages)) * caution
        rivals = [ticket for ticket in self.tickets if ticket.refusals >= refusals and not ticket.lapsed(self._now_ns)]
        turns = sorted(max(0, ticket.due_ns - self._now_ns) for ticket in rivals)
        # Clients that do not number their attempts come when they like: for them a slot is kept only when it is due.
        # Most clients never make a further attempt than the usual: kept slots would idle, and have others refused.
        kept = sorted(
            max(0, ticket.due_ns - self._now_ns)
            for ticket in rivals
            if ticket.refusals <= _USUAL_RETRIES
            and ticket.due_ns + _MISSED >= self._now_ns
            and (ticket.expected.number is not None or ticket.due_ns <= self._now_ns)
        )
        kept = kept[: math.ceil(len(kept) * self._share_used - 0.5)]
        # A request that outlasts the plan is taken to go on for a quarter of its age.
        free_in = [max(lasts - age, age // 4, 1) for age in ages]
        unused = max(0, slots - len(ages))  # fewer than none where the limit has just been lowered
        if unused and _served_in_time(kept, [lasts, *[0] * (unused - 1), *free_in], lasts):
            return 0
        free_in += [0] * unused
        free_in = sorted(free_in)[len(free_in) - slots :]
        heapq.heapify(free_in)
        for turn in turns:
            heapq.heapreplace(free_in, max(free_in[0], turn) + lasts)
        # Caution alone must not make a wait so long that clients give up.
        return max(1, min(free_in[0], max(LONGEST_TOLD, free_in[0] // caution)))

    def promise(self, wait_ns: int, attempt: Attempt, tokens: int) -> bool:
        """Give out a ticket for `wait_ns` from now if a client would wait for it; whether that was done."""
        if wait_ns > LONGEST_TOLD * (2 if attempt.number == 0 else 1) or len(self.tickets) >= _MOST_TICKETS:
            return False
        told_ns = self._now_ns + min(wait_ns, LONGEST_TOLD)
        self.tickets.append(Ticket(attempt.following(), told_ns, self._now_ns + wait_ns, tokens))
        return True

    def expect(self, place: Place, wait_ns: int, attempt: Attempt) -> None:
        """Keep what was promised to a request that was refused elsewhere, for when it comes back."""
        if place.promised and wait_ns <= LONGEST_TOLD:
            self.promise(wait_ns, attempt, place.reserved)

    def admission_limit(self) -> Named:
        """Why a request may not pass."""
        wanted = 1 + len(self.tickets)
        if self.requests.wait_ns(wanted):
            return self._mine(self.requests.missing(wanted))
        slots = self.limits.concurrent_requests
        return self._mine(Named("concurrent_requests", f"{slots} requests at the same time"))

    def tokens_limit(self, tokens: int) -> Named:
        """Why a request may not have that many more tokens."""
        return self._mine(self.tokens.missing(tokens + self.promised_tokens()))

    def _mine(self, limit: Named) -> Named:
        return Named(limit.setting, f"The limit of {self._subject} is {limit.words}.")

    def never(self, tokens: int) -> str | None:
        """The limit that lets no request have that many tokens, in words; None if there is none."""
        least = self.tokens.most
        if least is None or least.limit is None or tokens <= least.limit:
            return None
        return f"the limit of {self._subject} is {self.tokens.named(least)}"


def _served_in_time(turns: list[int], free_in: list[int], lasts: int) -> bool:
    """Whether at each of the sorted `turns` a slot is free, if everyone keeps one for `lasts`."""
    heapq.heapify(free_in)
    for turn in turns:
        if free_in[0] > turn:
            return False
        heapq.heapreplace(free_in, turn + lasts)
    return True
