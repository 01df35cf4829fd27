"""Answers for what is not there: unknown paths, wrong methods, and OPTIONS."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from ocserve.errors import MethodNotAllowed, NotFound
from ocserve.http import answers
from ocserve.http.exchange import Exchange


class RouteExists:
    """Lets a request through if it has a route."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange.of(scope)
        match = exchange.match
        if match.route is not None:
            await self._app(scope, receive, send)
            return
        if not match.allowed:
            raise NotFound("There is no such route. GET /v1/models and POST /v1/chat/completions are a start.")
        exchange.headers.append((b"allow", ", ".join(match.allowed).encode()))
        if scope["method"] == "OPTIONS":
            await answers.empty(send)
            return
        raise MethodNotAllowed(f"This route answers {', '.join(match.allowed)} only.")
