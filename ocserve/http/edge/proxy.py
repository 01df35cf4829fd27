"""Notices a proxy in front of the server: without a key it would open the server to the world.

No forwarding header is ever believed: limits go by key, and whether a caller is on this machine goes by the socket.
What such a header does is take anonymity away, and so does a configuration that speaks of a proxy: a proxy on this
machine may add no header and send a loopback Host, and its callers must not pass for this machine.

1. No key: a request with a forwarding header is refused.
2. A key, and `public_hosts` or `trusted_proxies` is set: every caller needs the key.
3. `trusted_proxies` is set: a request with a forwarding header is refused unless its peer is one of them.
4. A key, and neither is set: a request with a forwarding header needs the key, and others go by the socket and Host.
"""

from __future__ import annotations

import ipaddress

from starlette.types import ASGIApp, Receive, Scope, Send

from ocserve import config
from ocserve.accounts.keys import KeyRing
from ocserve.errors import Forbidden
from ocserve.http.exchange import Exchange, peer_address

_FORWARDING = (b"forwarded", b"via", b"x-real-ip", b"cf-connecting-ip", b"true-client-ip")


class ProxyGuard:
    """Refuses forwarded requests that nobody expects, and has the expected ones present the key."""

    def __init__(self, app: ASGIApp, settings: config.Server, keys: KeyRing) -> None:
        self._app = app
        self._trusted = [ipaddress.ip_network(proxy, strict=False) for proxy in settings.trusted_proxies]
        self._behind_proxy = bool(settings.public_hosts or settings.trusted_proxies)
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        forwarded = any(name in _FORWARDING or name.startswith(b"x-forwarded") for name, _ in scope["headers"])
        if forwarded and not self._keys.has_key:
            raise Forbidden(
                "This request came through a proxy, and the server has no key: anyone could use it. Set a key "
                "(OCSERVE_API_KEY or `ocserve keys create`) and restart, or connect without the proxy.",
                code="proxy_without_key",
            )
        if forwarded and self._trusted and not self._trusts(scope):
            raise Forbidden(
                "This request carries forwarding headers, and whoever sent it is not one of the proxies in "
                "`server.trusted_proxies`.",
                code="untrusted_proxy",
            )
        if forwarded or (self._behind_proxy and self._keys.has_key):
            Exchange.of(scope).local = False
        await self._app(scope, receive, send)

    def _trusts(self, scope: Scope) -> bool:
        peer = peer_address(scope)
        return peer is not None and any(peer in network for network in self._trusted)
