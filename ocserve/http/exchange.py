"""One HTTP request on its way through the guards: what each of them learnt, for those further in."""

from __future__ import annotations

import ipaddress
from typing import cast

from starlette.types import Scope

from ocserve.accounts.keys import Caller
from ocserve.api import openai_wire
from ocserve.http.answers import Header
from ocserve.http.route_table import Match
from ocserve.service import Trace

_KEY = "ocserve.exchange"


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


class Exchange:
    """Made by the access record, filled in by the guards.

    `local` starts as: the socket's peer is this machine. Guards may take it away (forwarding header, proxy in the
    settings, public Host) and never give it. `headers` are sent with whatever answer this request gets, a refusal
    included.
    """

    def __init__(self, trace: Trace, match: Match, *, local: bool) -> None:
        self.trace = trace
        self.match = match
        self.local = local
        self.caller: Caller | None = None
        self.headers: list[Header] = []
        self.body = b""
        self.body_complete = False
        self.error_body = match.route.error_body if match.route else openai_wire.error_body

    @staticmethod
    def of(scope: Scope) -> Exchange:
        """The exchange of the request that `scope` describes."""
        return cast(Exchange, scope[_KEY])

    def set_headers(self, headers: dict[bytes, bytes]) -> None:
        """Send these with the answer, in place of any of the same names."""
        self.headers = [header for header in self.headers if header[0] not in headers] + list(headers.items())

    def bind(self, scope: Scope) -> None:
        """Make this the exchange of `scope`."""
        scope[_KEY] = self


def header_values(scope: Scope, name: bytes) -> list[bytes]:
    """All values of one request header; `name` is lower-case."""
    return [value for key, value in scope["headers"] if key == name]


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
