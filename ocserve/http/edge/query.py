"""Reads what stands behind the path's `?`, by the table of the route: nothing of it is passed over in silence."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from ocserve.api import queries
from ocserve.http.edge.current import Edge
from ocserve.http.exchange import Exchange


class Query:
    """Refuses unknown parameters, as bodies' are, and names those without effect.

    A public route answers anybody who asks, monitors with a time in their query too: there they are only named.
    """

    def __init__(self, app: ASGIApp, edge: Edge) -> None:
        self._app = app
        self._edge = edge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange.of(scope)
        route = exchange.match.route
        assert route is not None
        refuse = self._edge.refuse_unknown and not route.public
        exchange.query = queries.read(scope["query_string"], exchange.takes, refuse_unknown=refuse)
        exchange.name_ignored(())
        await self._app(scope, receive, send)
