"""Who calls: one extractor for every place a credential may stand in, one question to the key ring.

Every route needs a caller unless the route list says `public`, and one with the admin scope where it says `admin`;
unknown paths need a caller too. Nothing else of a request has been looked at when a bad key is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial

from starlette.types import ASGIApp, Receive, Scope, Send

from ocserve import config
from ocserve.accounts.billing import Billing
from ocserve.accounts.keys import KeyRing
from ocserve.accounts.keystore import KEY_PATTERN
from ocserve.accounts.limits import Limiter
from ocserve.api import queries
from ocserve.errors import AuthenticationFailed, KeysUnavailable, LedgerUnavailable
from ocserve.http import limit_headers
from ocserve.http.exchange import Exchange, header_values

_HEADERS = (b"authorization", b"x-api-key", b"x-goog-api-key")


class Auth:
    """Identifies the caller, and says what is left of their limits."""

    def __init__(self, app: ASGIApp, keys: KeyRing, limiter: Limiter, billing: Billing) -> None:
        self._app = app
        self._keys = keys
        self._limiter = limiter
        self._billing = billing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange.of(scope)
        route = exchange.match.route
        try:
            given = credential(scope, queries.key(scope["query_string"], exchange.takes))
            exchange.identify = partial(self._keys.identify, given, exchange.local)
            exchange.caller = exchange.identify()
            exchange.trace.key_id = exchange.caller.key_id
            exchange.tell_limits(self._limiter)
            if exchange.caller.account.prepaid:
                await self._tell_balance(exchange, exchange.caller.key_id)
            if route is not None and route.admin:
                exchange.caller.check_admin()
        except (AuthenticationFailed, KeysUnavailable):
            if route is None or not route.public:
                raise
        await self._app(scope, receive, send)

    async def _tell_balance(self, exchange: Exchange, key_id: str) -> None:
        with suppress(LedgerUnavailable):  # what needs the ledger is refused for it further in
            if (left := await self._billing.remaining(key_id)) is not None:
                exchange.set_headers(limit_headers.balance(left))


def credential(scope: Scope, in_query: Iterable[str] = ()) -> str | None:
    """The credential that the request carries in a header or `in_query`; None if it carries none.

    Two different ones are an attack on the order in which they are read, and so is one header sent twice.
    """
    found = set()
    for name, texts in carried(scope, in_query):
        if name is not None and len(texts) > 1:
            raise AuthenticationFailed("A credential header was sent twice.")
        found.update(texts)
    found.discard("")  # clients configured with an empty key send one
    if len(found) > 1:
        raise AuthenticationFailed("The request carries two different credentials.")
    return found.pop() if found else None


def carried(scope: Scope, in_query: Iterable[str] = ()) -> Iterator[tuple[bytes | None, list[str]]]:
    """What stands where a credential may: by header, and `in_query` without one."""
    yield None, list(in_query)
    for name in _HEADERS:
        texts = [value.decode("latin-1").strip() for value in header_values(scope, name)]
        yield name, [_bearer(text) for text in texts] if name == b"authorization" else texts


def reveals_key(text: str, scope: Scope, in_query: Iterable[str] = ()) -> bool:
    """Whether `text` has in it what looks like one of our keys, or a credential that the request carries."""
    if KEY_PATTERN.search(text):
        return True
    # What is too short for a key, such as the `x` or `none` that an open server is sent, may be a part of any id.
    given = (word for _, texts in carried(scope, in_query) for each in texts for word in each.split())
    return any(text == word or (len(word) >= config.MIN_KEY_LENGTH and word in text) for word in given)


def _bearer(value: str) -> str:
    """The token of `Bearer <token>`; another scheme's value is kept whole, and no key equals it."""
    scheme, _, token = value.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else value
