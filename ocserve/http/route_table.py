"""What a route is, and how a request finds its own.

Clients disagree about the `/v1` prefix and about slashes: a base URL that ends with one makes `//v1/models` or
`/v1//models`. All forms find the same route. Nothing else looks at the path, so no guard can see another one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.routing import compile_path
from starlette.types import ASGIApp

from ocserve.api import openai_wire
from ocserve.errors import ErrorInfo

ErrorBody = Callable[[ErrorInfo], bytes]
# The method of a route that is a WebSocket. No HTTP method is spelt so, and none is offered in its place.
SOCKET = "websocket"
_SLASHES = re.compile(r"/{2,}")
_PARAMETER = re.compile(r"\{[^}]*\}")


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path. `{id:path}` matches the rest of the path.

    Whoever is let in may call it, unless it is `public` (everybody may) or for `admin` keys only. `looks`: it names or
    lists models, so which ones are served is looked at first.
    `error_body` writes what is refused here; None: whose client asks decides.
    """

    method: str
    path: str
    endpoint: ASGIApp
    public: bool = False
    admin: bool = False
    looks: bool = True
    error_body: ErrorBody | None = openai_wire.error_body


@dataclass(frozen=True, slots=True)
class Match:
    """Where a request goes. Without a route, `allowed` are the methods that the path has; an unknown path has none.

    `error_body` is the route's, or that of the vendor whose paths begin so.
    """

    route: Route | None = None
    params: dict[str, Any] = field(default_factory=dict)
    allowed: tuple[str, ...] = ()
    error_body: ErrorBody | None = None


class RouteTable:
    """Finds the route of a method and a path. `vendors` say whose all paths below a prefix are; the first counts."""

    def __init__(self, listed: tuple[Route, ...], vendors: tuple[tuple[str, ErrorBody], ...] = ()) -> None:
        self.routes = listed
        self._vendors = vendors
        # With how many characters of each path are no parameter's, most first.
        spelt = [(len(_PARAMETER.sub("", route.path)), route) for route in listed]
        spelt.sort(key=lambda each: each[0], reverse=True)
        self._compiled = [(count, compile_path(route.path), route) for count, route in spelt]

    def match(self, method: str, path: str) -> Match:
        """The route for `method` on `path`; HEAD is answered by GET's."""
        wanted = "GET" if method == "HEAD" else method
        trimmed = _SLASHES.sub("/", path).rstrip("/")
        for candidate in (trimmed, f"/v1{trimmed}"):
            allowed: list[str] = []
            for route, params in self._of_path(candidate):
                if route.method == wanted:
                    return Match(route, params, error_body=route.error_body)
                if route.method != SOCKET:
                    allowed += ["GET", "HEAD"] if route.method == "GET" else [route.method]
            if allowed:
                return Match(allowed=(*allowed, "OPTIONS"), error_body=self._vendor(trimmed))
        return Match(error_body=self._vendor(trimmed))

    def _of_path(self, path: str) -> Iterator[tuple[Route, dict[str, Any]]]:
        """The routes of a path: of those that match it, the ones that spell out the most of it.

        `/v1/models/x:countTokens` has no GET, though `/v1/models/{id:path}` matches it too.
        """
        most = -1
        for spelt, (regex, _, convertors), route in self._compiled:
            if spelt < most:
                return
            found = regex.match(path)
            if found is None:
                continue
            most = spelt
            yield route, {name: convertors[name].convert(value) for name, value in found.groupdict().items()}

    def _vendor(self, path: str) -> ErrorBody | None:
        for prefix, error_body in self._vendors:
            if any(f"{candidate}/".startswith(f"{prefix}/") for candidate in (path, f"/v1{path}")):
                return error_body
        return None
