"""Which web pages may call: none, unless their origin is listed.

A page can send a request without being allowed to read its answer, so CORS headers alone protect nothing: a request
from a foreign origin is refused before it has any effect. Listed origins get CORS headers and preflight answers.
The header's value is never echoed, `null` is never an origin, credentials (cookies) are never allowed.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from ocserve.errors import Forbidden
from ocserve.http import answers
from ocserve.http.edge.host import parse
from ocserve.http.exchange import Exchange, header_values

_METHODS = b"GET, POST, PUT, DELETE, OPTIONS"
_EXPOSED = b"x-request-id, request-id, x-ocserve-ignored, retry-after, retry-after-ms, x-should-retry, " + b", ".join(
    b"x-ratelimit-%b-%b" % (figure, unit)
    for figure in (b"limit", b"remaining", b"reset")
    for unit in (b"requests", b"tokens")
)
# What browser SDKs send; a preflight is answered with this list whatever it asked for.
_REQUEST_HEADERS = b"authorization, content-type, accept, x-api-key, x-goog-api-key, x-request-id, " + b", ".join(
    [b"idempotency-key", b"openai-organization", b"openai-project", b"openai-beta", b"user-agent", b"x-goog-api-client"]
    + [b"anthropic-%b" % name for name in (b"version", b"beta", b"dangerous-direct-browser-access")]
    + [
        b"x-stainless-%b" % name
        for name in (
            b"arch", b"async", b"helper-method", b"lang", b"os", b"package-version", b"poll-helper", b"raw-response",
            b"read-timeout", b"retry-count", b"runtime", b"runtime-version", b"timeout",
        )
    ]
)  # fmt: skip


class OriginAllowlist:
    """Refuses browser requests of foreign origins and answers preflights of listed ones."""

    def __init__(self, app: ASGIApp, allowed: tuple[str, ...]) -> None:
        self._app = app
        self._allowed = {origin.rstrip("/").lower().encode() for origin in allowed if origin not in ("*", "null")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origins = header_values(scope, b"origin")
        if len(origins) > 1:
            raise Forbidden("The request carries two Origin headers.", param="origin")
        if origins:
            await self._from_page(origins[0].lower(), scope, receive, send)
            return
        sites = header_values(scope, b"sec-fetch-site")
        if any(site.lower() not in (b"same-origin", b"none") for site in sites):
            raise _foreign()
        await self._app(scope, receive, send)

    async def _from_page(self, origin: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        if origin not in self._allowed:
            if not _is_own(origin, scope):
                raise _foreign()
            await self._app(scope, receive, send)
            return
        headers = Exchange.of(scope).headers
        headers += [(b"access-control-allow-origin", origin), (b"vary", b"origin")]
        if scope["method"] == "OPTIONS" and header_values(scope, b"access-control-request-method"):
            preflight = [
                (b"access-control-allow-methods", _METHODS),
                (b"access-control-allow-headers", _REQUEST_HEADERS),
                (b"access-control-max-age", b"600"),
            ]
            await answers.empty(send, preflight)
            return
        headers.append((b"access-control-expose-headers", _EXPOSED))
        await self._app(scope, receive, send)


def _is_own(origin: bytes, scope: Scope) -> bool:
    """Whether the page came from this server: its origin is the very Host that the Host guard has accepted."""
    scheme, separator, authority = origin.decode("latin-1").partition("://")
    if scheme not in ("http", "https") or not separator:
        return False
    host = parse(header_values(scope, b"host")[0].decode("latin-1"))
    return host is not None and parse(authority) == host


def _foreign() -> Forbidden:
    return Forbidden(
        "Web pages of other origins may not call this server. Origins that may are listed in `server.cors_origins`.",
        param="origin",
        code="origin_not_allowed",
    )
