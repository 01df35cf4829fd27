"""How much a key may do: requests and tokens per minute, requests at once; and what a refused client is promised.

**Buckets.** Each per-minute limit is a token bucket that holds one minute's worth (that is the burst) and refills
continuously. Time and levels are integers (nanoseconds; units times the nanoseconds of a minute), so arithmetic is
exact. `admit` takes a request and a slot at once, `reserve` takes the most tokens a request can use, `settle` gives
back what was not used.

**Tickets.** Clients wait exactly as long as a refusal says, and give up after a few attempts, so a refusal that names
the same moment to a hundred clients loses most of them. Here every refusal is a ticket for units of its own: it stands
in line behind the tickets before it, `Retry-After` is when its turn comes, and its units are withheld from newcomers
until then. Clients say how often they have tried; that number is all that ties a ticket to its holder:

1. A ticket is for one attempt: one that refused attempt n is claimed by an attempt n + 1 at or after the time told.
   Clients that do not number their attempts claim the tickets of their own kind.
2. A claim whose turn has come passes. One that came early, since clients obey no wait above 120 s, is told the rest.
3. Whoever holds no ticket passes only if every ticket can still be served.
4. A ticket not claimed within a grace period lapses: its units go to whoever comes first. So tickets of clients that do
   not come back cost a key nothing in the long run.
5. Slots become free when requests end, which nobody can know: their times are estimated from measured durations, more
   carefully with every refusal, and a free slot is kept for those who have been refused more often than the caller.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass

from ocserve import config
from ocserve.errors import InvalidRequest, RateLimited

_SECOND = 1_000_000_000
_MINUTE = 60 * _SECOND
_LONGEST_TOLD = 119 * _SECOND  # the usual SDKs give up when told to wait more than 120 s
_GRACE = 5 * _SECOND
_KEPT_LAPSED = _MINUTE
_USUAL_RETRIES = 2
_MOST_TICKETS = 1000  # of one key; beyond it waits are told and not promised

# Requests end at random. Someone who comes when on average a slot is free finds none about every second time, so the
# line is planned with a multiple of the mean duration: the larger one for those who have been refused before.
_CAUTION = 2
_CAUTION_AGAIN = 3


class Durations:
    """How long requests last, learnt over all keys: the mean of recent ones, running ones counted with their age."""

    _WEIGHT_KEPT = 0.95  # of the past, with each request that ends: some twenty requests count

    def __init__(self) -> None:
        self._total_ns: float = _SECOND  # a first guess that soon weighs little
        self._ended: float = 1.0

    def ended(self, lasted_ns: int) -> None:
        """Learn from a request that was served."""
        self._total_ns = self._total_ns * self._WEIGHT_KEPT + lasted_ns
        self._ended = self._ended * self._WEIGHT_KEPT + 1

    def mean_ns(self, ages_ns: list[int]) -> float:
        """Time in slots for each request that ends. Ages count, or long requests would be seen too late."""
        return (self._total_ns + sum(ages_ns)) / self._ended


class Bucket:
    """A token bucket of `per_minute` units; None is unlimited. Starts full."""

    def __init__(self, per_minute: int | None) -> None:
        self.per_minute = per_minute
        self._level = (per_minute or 0) * _MINUTE

    def refill(self, elapsed_ns: int) -> None:
        """Let time pass."""
        self._add(elapsed_ns * (self.per_minute or 0))

    def take(self, units: int) -> None:
        """Take units, which may leave the bucket in debt; give back with a negative number."""
        self._add(-units * _MINUTE)

    def wait_ns(self, units: int) -> int:
        """How long until `units` are there; 0 if they are now."""
        if self.per_minute is None:
            return 0
        return max(0, -(-(units * _MINUTE - self._level) // self.per_minute))

    def state(self, promised: int) -> Dimension | None:
        """What a client sees, the promised units not counted."""
        if self.per_minute is None:
            return None
        left = max(0, self._level // _MINUTE - promised)
        return Dimension(self.per_minute, left, self.wait_ns(self.per_minute + promised))

    def _add(self, amount: int) -> None:
        self._level = min(self._level + amount, (self.per_minute or 0) * _MINUTE)


@dataclass(frozen=True, slots=True)
class Ticket:
    """A promise: one request, one slot and `tokens` tokens at `due_ns`, to a client told to come at `told_ns`.

    `attempt` is the number the client will come with, None if it does not number its attempts.
    """

    attempt: int | None
    told_ns: int
    due_ns: int
    tokens: int

    def lapsed(self, now_ns: int) -> bool:
        """Whether anyone may have it."""
        return now_ns > self.due_ns + _GRACE

    @property
    def refusals(self) -> int:
        """How often its holder has been refused; at least once."""
        return self.attempt or 1


@dataclass(frozen=True, slots=True)
class Dimension:
    """A per-minute limit as a client sees it."""

    limit: int
    remaining: int
    full_in_ns: int


@dataclass(frozen=True, slots=True)
class LimitState:
    """What is left of a key's limits; None is unlimited."""

    requests: Dimension | None
    tokens: Dimension | None


class _Account:
    """The state of one key: its buckets, its running leases and the tickets out."""

    def __init__(self, limits: config.Limits, durations: Durations, now_ns: int) -> None:
        self.requests = Bucket(limits.requests_per_minute)
        self.tokens = Bucket(limits.tokens_per_minute)
        self.slots = limits.concurrent_requests
        self.running: dict[Lease, int] = {}
        self.tickets: list[Ticket] = []
        self._durations = durations
        self._now_ns = now_ns

    def advance(self, now_ns: int) -> None:
        """Let time pass: refill, and forget tickets that lapsed long ago."""
        elapsed, self._now_ns = now_ns - self._now_ns, now_ns
        self.requests.refill(elapsed)
        self.tokens.refill(elapsed)
        if self.tickets:
            self.tickets = [ticket for ticket in self.tickets if now_ns <= ticket.due_ns + _GRACE + _KEPT_LAPSED]

    @property
    def idle(self) -> bool:
        """Whether it equals a fresh one."""
        full = self.requests.wait_ns(self.requests.per_minute or 0) + self.tokens.wait_ns(self.tokens.per_minute or 0)
        return not self.running and not self.tickets and full == 0

    def end(self, lease: Lease) -> None:
        """Free the slot of a lease that was served."""
        self._durations.ended(self._now_ns - self.running.pop(lease))

    def promised_tokens(self) -> int:
        return sum(ticket.tokens for ticket in self.tickets)

    def claim(self, attempt: int | None) -> Ticket | None:
        """The ticket that this attempt may use: one of its own, or else a lapsed one (rules 1 and 4)."""
        now = self._now_ns
        own = [ticket for ticket in self.tickets if ticket.attempt == attempt and ticket.told_ns <= now]
        candidates = own or [ticket for ticket in self.tickets if ticket.lapsed(now)]
        return min(candidates, key=lambda ticket: ticket.due_ns, default=None)

    def admission_wait_ns(self, ticket: Ticket | None, refusals: int) -> int:
        """0 if a request may pass now, by its ticket or without one (rules 2 and 3); else how long until it may."""
        if ticket is None:
            return max(self.requests.wait_ns(1 + len(self.tickets)), self._slot_wait_ns(refusals))
        if ticket.due_ns > self._now_ns:
            return ticket.due_ns - self._now_ns
        if ticket.lapsed(self._now_ns) and (self.slots is None or len(self.running) < self.slots):
            return self.requests.wait_ns(1)
        return max(self.requests.wait_ns(1), self._slot_wait_ns(refusals))

    def _slot_wait_ns(self, refusals: int) -> int:
        """How long someone refused that often, this time included, waits for a slot: 0, or an estimate (rule 5).

        Plays the future: what runs ends, and those with tickets as good take a slot each when their turn comes.
        """
        if self.slots is None:
            return 0
        ages = [self._now_ns - started for started in self.running.values()]
        caution = _CAUTION if refusals == 1 else _CAUTION_AGAIN
        lasts = int(self._durations.mean_ns(ages)) * caution
        rivals = [ticket for ticket in self.tickets if ticket.refusals >= refusals and not ticket.lapsed(self._now_ns)]
        turns = sorted(max(0, ticket.due_ns - self._now_ns) for ticket in rivals)
        # Clients that do not number their attempts come when they like: for them a slot is kept only when it is due.
        # Most clients never make a further attempt than the usual: kept slots would idle, and have others refused.
        kept = sorted(
            max(0, ticket.due_ns - self._now_ns)
            for ticket in rivals
            if ticket.refusals <= _USUAL_RETRIES and (ticket.attempt is not None or ticket.due_ns <= self._now_ns)
        )
        # A request that outlasts the plan is taken to go on for a quarter of its age.
        free_in = [max(lasts - age, age // 4, 1) for age in ages]
        unused = self.slots - len(ages)
        if unused and _served_in_time(kept, [lasts, *[0] * (unused - 1), *free_in], lasts):
            return 0
        free_in += [0] * unused
        heapq.heapify(free_in)
        for turn in turns:
            heapq.heapreplace(free_in, max(free_in[0], turn) + lasts)
        # Caution alone must not make a wait so long that clients give up.
        return max(1, min(free_in[0], max(_LONGEST_TOLD, free_in[0] // caution)))

    def refuse(self, wait_ns: int, attempt: int | None, tokens: int = 0, *, for_tokens: bool = False) -> RateLimited:
        """Promise a place `wait_ns` from now, if clients would wait for it, and say when to come for it."""
        if for_tokens:
            name, limit = "tokens_per_minute", f"{self.tokens.per_minute} tokens per minute"
        elif self.requests.wait_ns(1 + len(self.tickets)):
            name, limit = "requests_per_minute", f"{self.requests.per_minute} requests per minute"
        else:
            name, limit = "concurrent_requests", f"{self.slots} requests at the same time"
        longest = _LONGEST_TOLD * (2 if attempt == 0 else 1)
        if wait_ns <= longest and len(self.tickets) < _MOST_TICKETS:
            due_ns, wait_ns = self._now_ns + wait_ns, min(wait_ns, _LONGEST_TOLD)
            following = None if attempt is None else attempt + 1
            self.tickets.append(Ticket(following, self._now_ns + wait_ns, due_ns, tokens))
        told_s = (wait_ns // 1_000_000 + 1) / 1000  # never early
        error = RateLimited(f"The limit of this key is {limit}. Please try again in {told_s} s.", retry_after_s=told_s)
        error.type, error.limit = "tokens" if for_tokens else "requests", name
        return error


def _served_in_time(turns: list[int], free_in: list[int], lasts: int) -> bool:
    """Whether at each of the sorted `turns` a slot is free, if everyone keeps one for `lasts`."""
    heapq.heapify(free_in)
    for turn in turns:
        if free_in[0] > turn:
            return False
        heapq.heapreplace(free_in, turn + lasts)
    return True


class Lease:
    """An admitted request: it holds one request and one slot of its key, and from `reserve` on its tokens."""

    def __init__(self, limiter: Limiter, key_id: str, attempt: int | None, reserved: int) -> None:
        self._limiter = limiter
        self._key_id = key_id
        self._attempt = attempt
        self._reserved = reserved
        self._over = False

    def reserve(self, tokens: int, param: str = "max_tokens") -> None:
        """Hold the most tokens that the request can use. A refusal gives everything back and ends the lease.

        `param` is what makes the tokens so many.
        """
        assert not self._over
        account = self._limiter.account(self._key_id)
        limit = account.tokens.per_minute
        if limit is not None and tokens > limit:
            self._give_back(account)
            raise InvalidRequest(
                f"This request may use {tokens} tokens (those of its input included), and the limit of this key is "
                f"{limit} tokens per minute, so it can never pass. Please ask for less.",
                param=param,
                code="rate_limit_exceeded",
            )
        missing = tokens - self._reserved
        wait_ns = account.tokens.wait_ns(missing + account.promised_tokens()) if missing > 0 else 0
        if wait_ns:
            self._give_back(account)
            raise account.refuse(wait_ns, self._attempt, tokens, for_tokens=True)
        account.tokens.take(missing)
        self._reserved = tokens

    def settle(self, used_tokens: int) -> None:
        """End the lease and give back what was reserved and not used. Only the first call counts."""
        if self._over:
            return
        self._over = True
        account = self._limiter.account(self._key_id)
        account.tokens.take(used_tokens - self._reserved)
        account.end(self)

    def _give_back(self, account: _Account) -> None:
        self._over = True
        account.requests.take(-1)
        account.tokens.take(-self._reserved)
        del account.running[self]


class Limiter:
    """The limits of every key. Not thread-safe; each call is immediate."""

    def __init__(self, limits: config.Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._durations = Durations()
        self._reading_ns = round(clock() * _SECOND)
        self._now_ns = 0
        self._swept_ns = 0
        self._accounts: dict[str, _Account] = {}

    def admit(self, key_id: str, *, retry: int | None = None) -> Lease:
        """Take one request and one slot, or raise `RateLimited`.

        `retry` is how often the client says it has been refused before (0 is a first attempt), None if it does not say.
        """
        account = self.account(key_id)
        ticket = account.claim(retry)
        refusals = (ticket.refusals if ticket is not None and ticket.attempt == retry else retry or 0) + 1
        wait_ns = account.admission_wait_ns(ticket, refusals)
        if wait_ns:
            if ticket is None or ticket.attempt != retry:  # somebody else's, lapsed: it stays for the next one
                raise account.refuse(account.admission_wait_ns(None, refusals), retry)
            account.tickets.remove(ticket)
            raise account.refuse(wait_ns, retry, ticket.tokens)
        reserved = 0
        if ticket is not None:
            account.tickets.remove(ticket)
            account.tokens.take(reserved := ticket.tokens)
        account.requests.take(1)
        lease = Lease(self, key_id, retry, reserved)
        account.running[lease] = self._now_ns
        return lease

    def snapshot(self, key_id: str) -> LimitState:
        """What a client with no ticket finds now."""
        account = self.account(key_id)
        return LimitState(account.requests.state(len(account.tickets)), account.tokens.state(account.promised_tokens()))

    def __len__(self) -> int:
        """Keys that are remembered: those that are not as fresh ones."""
        return len(self._accounts)

    def account(self, key_id: str) -> _Account:
        """The state of a key, up to date."""
        self._tick()
        account = self._accounts.get(key_id)
        if account is None:
            account = self._accounts[key_id] = _Account(self._limits, self._durations, self._now_ns)
        account.advance(self._now_ns)
        return account

    def _tick(self) -> None:
        """Advance our own time, which ignores a clock that jumps back; once a minute forget idle keys."""
        reading = round(self._clock() * _SECOND)
        self._now_ns += max(0, reading - self._reading_ns)
        self._reading_ns = reading
        if self._now_ns - self._swept_ns >= _MINUTE:
            self._swept_ns = self._now_ns
            for account in self._accounts.values():
                account.advance(self._now_ns)
            self._accounts = {key_id: account for key_id, account in self._accounts.items() if not account.idle}


def headers(state: LimitState) -> dict[str, str]:
    """The state as `x-ratelimit-*` headers; an unlimited dimension has none."""
    fields: dict[str, str] = {}
    for unit, dimension in (("requests", state.requests), ("tokens", state.tokens)):
        if dimension is not None:
            fields[f"x-ratelimit-limit-{unit}"] = str(dimension.limit)
            fields[f"x-ratelimit-remaining-{unit}"] = str(dimension.remaining)
            fields[f"x-ratelimit-reset-{unit}"] = duration(dimension.full_in_ns)
    return fields


def duration(nanoseconds: int) -> str:
    """A duration as Go writes it, in whole milliseconds, rounded up: `12ms`, `1.5s`, `6m0s`, `1h2m3s`."""
    milliseconds = -(-nanoseconds // 1_000_000)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    seconds = f"{rest // 1000}.{rest % 1000:03}".rstrip("0").rstrip(".") + "s"
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + seconds
