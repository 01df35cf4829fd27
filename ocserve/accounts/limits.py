"""How much a key may do: requests and tokens per minute and per day, requests at once; of all models and of one.

`admit` takes a request and a slot at once, `reserve` takes the most tokens a request can use, `settle` gives back what
was not used. A request that a model's own limits bind stands in two lines, the key's and that of the key's use of the
model: it passes if both have room, and a refusal is a ticket in both, for the later of the two times.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ocserve import config
from ocserve.accounts.buckets import MINUTE, SECOND, Dimension, LimitState, Named
from ocserve.accounts.crowd import Crowd, Room, Stay
from ocserve.accounts.keystore import AS_SETTINGS, OwnLimits
from ocserve.accounts.line import LONGEST_TOLD, Attempt, Durations, Line, Place, Ticket
from ocserve.accounts.past import NO_PAST, Past
from ocserve.errors import InsufficientQuota, InvalidRequest, Overloaded, RateLimited


class Lease:
    """An admitted request: it holds one request and one slot of its key, from `enter` on a place at its model, and
    from `reserve` on its tokens."""

    def __init__(self, limiter: Limiter, places: tuple[Place, ...], attempt: Attempt) -> None:
        self._limiter = limiter
        self._places = places
        self._attempt = attempt
        self._stay: Stay | None = None
        self._over = False

    @property
    def by_day(self) -> bool:
        """Whether it counts among so many requests per day."""
        return any(place.line.limits.requests_per_day is not None for place in self._places)

    @property
    def by_token(self) -> bool:
        """Whether its tokens are limited."""
        return any(place.line.tokens.most is not None for place in self._places)

    def has_room(self, tokens: int) -> bool:
        """Whether so many tokens could be held now."""
        self._limiter.tick(*(place.line for place in self._places))
        return not any(place.line.never(tokens) or place.line.tokens_wait_ns(place, tokens) for place in self._places)

    def enter(self, room: Room, key_id: str) -> None:
        """Take a place among all who use a model, or raise `Overloaded`, which gives everything back."""
        assert not self._over
        self._limiter.tick(*(place.line for place in self._places))
        found = self._limiter.crowds[room.model].enter(room, key_id, self._attempt, self._limiter.now_ns)
        if isinstance(found, Stay):
            self._stay = found
            return
        self.give_back()
        for place in self._places:
            place.line.expect(place, found, self._attempt)
        told_s = (found // 1_000_000 + 1) / 1000  # never early
        raise Overloaded(
            f"{room.slots} answers of {room.model} are generated or waited for, which is all that may be. "
            f"Please try again in {told_s} s.",
            retry_after_s=told_s,
        )

    def reserve(self, tokens: int, param: str = "max_tokens") -> None:
        """Hold the most tokens that the request can use. A refusal gives everything back and ends the lease.

        `param` is what makes the tokens so many.
        """
        assert not self._over
        self._limiter.tick(*(place.line for place in self._places))
        if never := next(filter(None, (place.line.never(tokens) for place in self._places)), None):
            self.give_back()
            raise InvalidRequest(
                f"This request may use {tokens} tokens (those of its input included), and {never}, so it can never "
                "pass. Please ask for less.",
                param=param,
                code="rate_limit_exceeded",
            )
        waits = [place.line.tokens_wait_ns(place, tokens) for place in self._places]
        if wait_ns := max(waits):
            self.give_back()
            limit = self._places[waits.index(wait_ns)].line.tokens_limit(tokens)
            told_s = _promised_s(wait_ns, [(place.line, tokens) for place in self._places], self._attempt)
            if self._stay is not None:  # and at the model
                self._stay.crowd.expect(self._stay, self._attempt, round(told_s * SECOND), self._limiter.now_ns)
            raise _limited(limit, "tokens", told_s)
        for place in self._places:
            place.line.hold(place, tokens)

    def settle(self, used_tokens: int) -> bool:
        """End the lease and give back what was reserved and not used; whether it had not ended before."""
        if self._over:
            return False
        self._over = True
        self._limiter.tick(*(place.line for place in self._places))
        for place in self._places:
            place.line.end(place, used_tokens)
        self._leave(served=True)
        return True

    @contextmanager
    def given_back_unless_paid(self) -> Iterator[None]:
        """End the lease where what is tried inside finds that the request cannot be paid for."""
        try:
            yield
        except InsufficientQuota:
            self.give_back()
            raise

    def _leave(self, *, served: bool) -> None:
        if self._stay is not None:
            self._stay.crowd.leave(self._stay, self._limiter.now_ns, served=served)

    def give_back(self) -> None:
        """End the lease of a request that was not served: all of it is there for others at once."""
        self._over = True
        self._leave(served=False)
        for place in self._places:
            place.line.undo(place)


@dataclass(frozen=True, slots=True)
class _Claim:
    """What an attempt finds in one line: the ticket that it may use, whether it is its own, and how long to wait."""

    line: Line
    ticket: Ticket | None
    own: bool
    wait_ns: int

    @staticmethod
    def of(line: Line, attempt: Attempt) -> _Claim:
        ticket, own = line.claim(attempt)
        refusals = (ticket.refusals if ticket is not None and own else attempt.number or 0) + 1
        wait_ns = line.admission_wait_ns(ticket, refusals)
        if wait_ns and not own:  # somebody else's, lapsed: it stays for the next one
            return _Claim(line, None, False, line.admission_wait_ns(None, refusals))
        return _Claim(line, ticket, own, wait_ns)

    def give_up(self) -> int:
        """Hand the own ticket back, for another one at another time; the tokens that it was for."""
        if self.ticket is None or not self.own:
            return 0
        self.line.tickets.remove(self.ticket)
        return self.ticket.tokens


class Limiter:
    """The limits of every key. Not thread-safe; each call is immediate."""

    def __init__(
        self,
        limits: config.Limits,
        clock: Callable[[], float] = time.monotonic,
        past: Past = NO_PAST,
    ) -> None:
        """`past` is what keys used before this process, as of now."""
        self._past = past
        self._defaults = AS_SETTINGS.over(limits)
        self._of_models = {each.model: AS_SETTINGS.over(each) for each in limits.models}
        self._clock = clock
        self._durations: defaultdict[str, Durations] = defaultdict(Durations)  # by model, and of all
        self._reading_ns = round(clock() * SECOND)
        self.now_ns = 0  # our own time, as of the last tick
        self._swept_ns = 0
        self.crowds: defaultdict[str, Crowd] = defaultdict(Crowd)  # by model
        self._lines: dict[tuple[str, str], Line] = {}  # by key and model, and of a key with no model

    def reset(self, limits: config.Limits) -> None:
        """Other limits from now on, for keys that are here as well: what has been used stays used.

        The use of a model that has limits no more is counted on, for they may come back.
        """
        self._defaults = AS_SETTINGS.over(limits)
        no_more = dict.fromkeys(self._of_models, config.Allowance())
        self._of_models = no_more | {each.model: AS_SETTINGS.over(each) for each in limits.models}

    def admit(
        self,
        key_id: str,
        *,
        retry: int | None = None,
        own: OwnLimits = AS_SETTINGS,
        model: str | None = None,
        body: int | None = None,
    ) -> Lease:
        """Take one request and one slot, or raise `RateLimited`.

        `retry` is how often the client says it has been refused before (0 is a first attempt), None if it does not say.
        `own` are the key's own limits. `body` is a hash of what the client sends, None where that is not known.
        """
        attempt = Attempt(retry, body)
        claims = [_Claim.of(line, attempt) for line in self._lines_of(key_id, own, model)]
        longest = max(claims, key=lambda claim: claim.wait_ns)
        if longest.wait_ns:
            told_s = _promised_s(longest.wait_ns, [(claim.line, claim.give_up()) for claim in claims], attempt)
            raise _limited(longest.line.admission_limit(), "requests", told_s)
        return Lease(self, tuple(claim.line.begin(claim.ticket) for claim in claims), attempt)

    def snapshot(self, key_id: str, own: OwnLimits = AS_SETTINGS, model: str | None = None) -> LimitState:
        """What a client with no ticket finds now."""
        states = [line.state for line in self._lines_of(key_id, own, model)]
        return LimitState(_least([each.requests for each in states]), _least([each.tokens for each in states]))

    def __len__(self) -> int:
        """Lines that are remembered: those that are not as fresh ones."""
        return len(self._lines)

    def tick(self, *lines: Line) -> None:
        """Bring lines up to date, by our own time, which ignores a clock that jumps back."""
        reading = round(self._clock() * SECOND)
        self.now_ns += max(0, reading - self._reading_ns)
        self._reading_ns = reading
        for line in lines:
            line.advance(self.now_ns)

    def _lines_of(self, key_id: str, own: OwnLimits, model: str | None) -> list[Line]:
        """The lines that a request stands in, up to date."""
        self._sweep()
        lines = [self._line((key_id, ""), "this key", own.over(self._defaults))]
        if model is not None and model in self._of_models:
            lines.append(self._line((key_id, model), f"this key for the model {model}", self._of_models[model]))
        return lines

    def _line(self, name: tuple[str, str], subject: str, limits: config.Allowance) -> Line:
        line = self._lines.get(name)
        if line is None:
            line = self._lines[name] = Line(subject, limits, self._durations[name[1]], self.now_ns)
            line.resume(self._past.taken(*name, self.now_ns))
        line.advance(self.now_ns)
        line.allow(limits)
        return line

    def _sweep(self) -> None:
        """Once a minute forget idle keys."""
        self.tick()
        if self.now_ns - self._swept_ns >= MINUTE:
            self._swept_ns = self.now_ns
            self.tick(*self._lines.values())
            self._lines = {name: line for name, line in self._lines.items() if not line.idle}


def _least(states: list[Dimension | None]) -> Dimension | None:
    known = [state for state in states if state is not None]
    return min(known, key=lambda state: (state.remaining, -state.full_in_ns), default=None)


def _promised_s(wait_ns: int, lines: list[tuple[Line, int]], attempt: Attempt) -> float:
    """Promise a place in each of `lines`, with so many tokens, `wait_ns` from now; when to come for it, in seconds."""
    promised = [line.promise(wait_ns, attempt, tokens) for line, tokens in lines]
    # Whoever would not wait so long comes at the latest that they obey, and is told the rest.
    told_ns = min(wait_ns, LONGEST_TOLD) if all(promised) else wait_ns
    return (told_ns // 1_000_000 + 1) / 1000  # never early


def _limited(limit: Named, kind: str, told_s: float) -> RateLimited:
    error = RateLimited(f"{limit.words} Please try again in {told_s} s.", retry_after_s=told_s)
    error.type, error.limit = kind, limit.setting
    return error
