"""The ASGI application: the guards, outermost first, around the routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from starlette.types import ASGIApp, Receive, Scope, Send

from ocserve.accounts.keys import KeyRing
from ocserve.generation import RequestRecord
from ocserve.http import metrics
from ocserve.http.admin import Control
from ocserve.http.auth import Auth
from ocserve.http.edge.access import Access
from ocserve.http.edge.body import BodyLimits
from ocserve.http.edge.content import JsonOnly
from ocserve.http.edge.current import Edge
from ocserve.http.edge.framing import Framing
from ocserve.http.edge.handshake import Handshake
from ocserve.http.edge.host import HostAllowlist
from ocserve.http.edge.idempotency import Idempotency
from ocserve.http.edge.json_depth import JsonDepth
from ocserve.http.edge.origin import OriginAllowlist
from ocserve.http.edge.proxy import ProxyGuard
from ocserve.http.edge.query import Query
from ocserve.http.edge.routing import RouteExists
from ocserve.http.exchange import Exchange
from ocserve.http.route_table import RouteTable
from ocserve.http.routes import VENDORS, routes
from ocserve.pages.publication import Published
from ocserve.service import Service
from ocserve.telemetry import logs

App: TypeAlias = ASGIApp
Guard = Callable[[ASGIApp], ASGIApp]


def build(
    service: Service,
    keys: KeyRing,
    edge: Edge,
    control: Control,
    pages: Published,
    trace: Callable[[RequestRecord], None] | None = None,
) -> ASGIApp:
    """The whole server as a value. `trace` is told of every request that has ended."""
    settings = edge.now
    meter = metrics.meter(service)

    def on_end(record: RequestRecord) -> None:
        logs.request_line(record)
        meter.observe(record)
        if trace is not None:
            trace(record)

    def announced() -> bytes | None:
        found = service.doors.announced
        return None if found is None else found.window.encode()

    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        """The route that was found, inside all guards."""
        route = Exchange.of(scope).match.route
        assert route is not None
        if route.looks:
            await service.look()
        await route.endpoint(scope, receive, send)

    table = RouteTable(routes(service, edge, meter, control, pages), VENDORS)
    guards: tuple[Guard, ...] = (
        lambda app: Handshake(app, table),
        lambda app: Access(app, table, on_end, announced),
        Framing,
        lambda app: HostAllowlist(app, settings),
        lambda app: OriginAllowlist(app, settings.cors_origins),
        lambda app: ProxyGuard(app, settings, keys),
        lambda app: Auth(app, keys, service.limiter, service.billing),
        RouteExists,
        lambda app: Query(app, edge),
        JsonOnly,
        lambda app: BodyLimits(app, edge),
        lambda app: JsonDepth(app, settings.max_json_depth),
        lambda app: Idempotency(app, settings),
    )
    app: ASGIApp = endpoint
    for guard in reversed(guards):
        app = guard(app)
    return app
