"""One HTTP request on its way through the guards: what each of them learnt, for those further in."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Iterable, Mapping
from typing import cast

from starlette.types import Scope

from ocserve.accounts.keys import Caller
from ocserve.accounts.limits import Limiter
from ocserve.accounts.line import Attempt
from ocserve.api import anthropic_wire
from ocserve.api.fields import Field, Values
from ocserve.api.json_body import NAME
from ocserve.api.operations import QUERIES
from ocserve.errors import ErrorInfo
from ocserve.generation import RequestRecord
from ocserve.http import limit_headers
from ocserve.http.answers import Header
from ocserve.http.route_table import SOCKET, Match
from ocserve.trace import Trace

# Names of ignored parameters in one header; a request may carry more of them than a proxy accepts in a header, and
# names that no header may hold.
_MAX_IGNORED = 32
_KEY = "ocserve.exchange"


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


class Exchange:
    """Made by the access record, filled in by the guards.

    `local` starts as: the socket's peer is this machine. Guards may take it away (forwarding header, proxy in the
    settings, public Host) and never give it. `query` is what was read of the path's query. `headers` are sent with
    whatever answer this request gets, a refusal included. `identify` asks again who calls, for connections that last;
    `on_end` takes the record of what has ended.
    """

    def __init__(
        self,
        trace: Trace,
        match: Match,
        *,
        local: bool,
        error_body: Callable[[ErrorInfo], bytes],
        on_end: Callable[[RequestRecord], None],
    ) -> None:
        self.trace = trace
        self.match = match
        self.local = local
        self.on_end = on_end
        self.caller: Caller | None = None
        self.identify: Callable[[], Caller] | None = None
        self.headers: list[Header] = []
        self.body = b""
        self.body_complete = False
        self.error_body = error_body
        self.query = Values({}, ())

    @property
    def takes(self) -> Mapping[str, Field]:
        """What may stand in the query of this request's route. A WebSocket's messages are what a POST's body is."""
        route = self.match.route
        if route is None:
            return {}
        return QUERIES["POST" if route.method == SOCKET else route.method, route.path]

    @staticmethod
    def of(scope: Scope) -> Exchange:
        """The exchange of the request that `scope` describes."""
        return cast(Exchange, scope[_KEY])

    def set_headers(self, headers: dict[bytes, bytes]) -> None:
        """Send these with the answer, in place of any of the same names."""
        self.headers = [header for header in self.headers if header[0] not in headers] + list(headers.items())

    def name_ignored(self, names: Iterable[str]) -> None:
        """Say which parameters have no effect on the answer, and how many more whose names cannot be told."""
        distinct = dict.fromkeys((*self.query.ignored, *names))
        told = [name for name in distinct if NAME.fullmatch(name)][:_MAX_IGNORED]
        if more := len(distinct) - len(told):
            told.append(f"and {more} more" if told else f"{more} more")
        if told:
            self.set_headers({b"x-ocserve-ignored": ", ".join(told).encode()})

    def tell_limits(self, limiter: Limiter) -> None:
        """Say what is left of the caller's limits."""
        assert self.caller is not None
        state = limiter.snapshot(self.caller.key_id, self.caller.limits, self.trace.model)
        self.set_headers(limit_headers.openai(state))
        if self.error_body is anthropic_wire.error_body:
            self.set_headers(limit_headers.anthropic(state, time.time()))
        self.tell_balance()

    def tell_balance(self) -> None:
        """Say what is left of a prepaid key's balance, if the request has held or cost anything of it."""
        if self.trace.bill is not None and self.trace.bill.remaining is not None:
            self.set_headers(limit_headers.balance(self.trace.bill.remaining))

    def bind(self, scope: Scope) -> None:
        """Make this the exchange of `scope`."""
        scope[_KEY] = self


def caller_of(scope: Scope) -> Caller:
    """Who calls a route that is not public."""
    caller = Exchange.of(scope).caller
    assert caller is not None
    return caller


def by_caller(scope: Scope) -> tuple[Header, ...]:
    """Headers of an answer that tells callers more than strangers, or each something else: no cache mixes them up."""
    headers = ((b"vary", b"accept, authorization, x-api-key, x-goog-api-key"),)
    return headers if Exchange.of(scope).caller is None else (*headers, (b"cache-control", b"private, no-store"))


def header_values(scope: Scope, name: bytes) -> list[bytes]:
    """All values of one request header; `name` is lower-case."""
    return [value for key, value in scope["headers"] if key == name]


def wants_json(scope: Scope) -> bool:
    """Browsers accept HTML, and most else accepts anything."""
    accepted = b",".join(header_values(scope, b"accept")).lower()
    return b"application/json" in accepted and b"text/html" not in accepted


def has_body(scope: Scope) -> bool:
    """Whether a body follows the headers."""
    return bool(header_values(scope, b"transfer-encoding")) or any(
        value.strip(b"0") for value in header_values(scope, b"content-length")
    )


def attempt(scope: Scope) -> Attempt:
    """What the request tells of earlier tries: their number, if it says so in a way that can be believed."""
    counts = header_values(scope, b"x-stainless-retry-count")
    number = int(counts[0]) if len(counts) == 1 and counts[0].isdigit() and len(counts[0]) <= 4 else None
    return Attempt(number, hash(Exchange.of(scope).body))  # salted in each process, so nobody can make two equal


def peer_address(scope: Scope) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address at the other end of the socket, an IPv4 one that was mapped into IPv6 as IPv4."""
    peer = scope.get("client")
    if not peer:
        return None
    try:
        address = ipaddress.ip_address(peer[0].partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
