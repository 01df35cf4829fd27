"""Notices a proxy in front of the server: without a key it would open the server to the world.

Nothing is read from forwarding headers: limits go by key, and whether a caller is on this machine goes by the socket.
A forwarded request never counts as coming from this machine.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from ocserve.errors import Forbidden
from ocserve.http.exchange import Exchange

_FORWARDING = (b"forwarded", b"via", b"x-real-ip", b"cf-connecting-ip", b"true-client-ip")


class ProxyGuard:
    """Refuses forwarded requests while no key is configured."""

    def __init__(self, app: ASGIApp, trusted_proxies: tuple[str, ...], *, has_key: bool) -> None:
        self._app = app
        self._trusted = frozenset(trusted_proxies)
        self._has_key = has_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        forwarded = any(name in _FORWARDING or name.startswith(b"x-forwarded") for name, _ in scope["headers"])
        if forwarded and not self._has_key:
            raise Forbidden(
                "This request came through a proxy, and the server has no key: anyone could use it. Set a key "
                "(`auth.api_key` or OCSERVE_AUTH_API_KEY) and restart, or connect without the proxy.",
                code="proxy_without_key",
            )
        peer = scope.get("client")
        if forwarded or (peer and peer[0] in self._trusted):
            Exchange.of(scope).local = False
        await self._app(scope, receive, send)
