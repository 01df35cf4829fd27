"""The Host allowlist: what stops a web page whose name was rebound to this machine (DNS rebinding).

A page of evil.example that has made its name resolve to 127.0.0.1 still sends `Host: evil.example`. Accepted are
`localhost`, 127.0.0.0/8, `[::1]`, the address the connection arrived at, the bind address and the public names.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from ocserve import config
from ocserve.errors import InvalidRequest, MisdirectedRequest
from ocserve.http.exchange import Exchange, header_values

# RFC 3986 `host [":" port]`, without percent-encoding and sub-delimiters, which no accepted name contains.
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([A-Za-z0-9._-]{1,253}))(?::([0-9]{1,5}))?")
_WILDCARDS = ("0.0.0.0", "::", "")  # noqa: S104 - compared with, not bound to


@dataclass(frozen=True, slots=True)
class HostName:
    """A parsed Host: an IP address in canonical form or a lower-case name."""

    name: str
    port: int | None

    @property
    def is_local(self) -> bool:
        """Whether it can only mean this machine."""
        try:
            address = ipaddress.ip_address(self.name)
        except ValueError:
            return self.name == "localhost"
        return address.is_loopback and getattr(address, "ipv4_mapped", None) is None


def parse(value: str) -> HostName | None:
    """The Host in `value`, or None if it is not one."""
    found = _HOST.fullmatch(value)
    if found is None:
        return None
    literal, name, port = found.groups()
    if port is not None and int(port) > 65535:
        return None
    if literal is not None:
        try:
            name = str(ipaddress.IPv6Address(literal))
        except ValueError:
            return None
    return HostName(name.lower(), None if port is None else int(port))


class HostAllowlist:
    """Lets a request through if its Host names this machine."""

    def __init__(self, app: ASGIApp, settings: config.Server) -> None:
        self._app = app
        names = [*settings.public_hosts, *([] if settings.host in _WILDCARDS else [_bracketed(settings.host)])]
        self._accepted = frozenset(host for host in map(parse, names) if host is not None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        values = header_values(scope, b"host")
        if len(values) != 1 or not values[0]:
            raise InvalidRequest("The request must carry exactly one Host header.", param="host", code="invalid_host")
        host = parse(values[0].decode("latin-1"))
        if host is None:
            raise InvalidRequest("The Host header is malformed.", param="host", code="invalid_host")
        if not self._accepts(host, scope):
            raise MisdirectedRequest(
                "The Host header names another machine. Names that should reach this server are listed in "
                "`server.public_hosts`.",
                param="host",
            )
        if not host.is_local:
            Exchange.of(scope).local = False
        await self._app(scope, receive, send)

    def _accepts(self, host: HostName, scope: Scope) -> bool:
        """1. loopback; 2. configured, with its port or with any; 3. the very address this connection came in at."""
        if host.is_local:
            return True
        if host in self._accepted or HostName(host.name, None) in self._accepted:
            return True
        server = scope.get("server")
        return server is not None and host.name == str(server[0]).lower() and host.name not in _WILDCARDS


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
