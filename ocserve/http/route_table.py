"""What a route is, and how a request finds its own.

Clients disagree about the `/v1` prefix and about slashes: a base URL that ends with one makes `//v1/models` or
`/v1//models`. All forms find the same route. Nothing else looks at the path, so no guard can see another one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.routing import compile_path
from starlette.types import ASGIApp

from ocserve.api import openai_wire
from ocserve.errors import ErrorInfo

_SLASHES = re.compile(r"/{2,}")


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path. `{id:path}` matches the rest of the path, `error_body` writes what is refused here."""

    method: str
    path: str
    endpoint: ASGIApp
    public: bool = False
    error_body: Callable[[ErrorInfo], bytes] = openai_wire.error_body


@dataclass(frozen=True, slots=True)
class Match:
    """Where a request goes. Without a route, `allowed` are the methods that the path has; an unknown path has none."""

    route: Route | None = None
    params: dict[str, Any] = field(default_factory=dict)
    allowed: tuple[str, ...] = ()


class RouteTable:
    """Finds the route of a method and a path."""

    def __init__(self, listed: tuple[Route, ...]) -> None:
        self.routes = listed
        self._compiled = [(compile_path(route.path), route) for route in listed]

    def match(self, method: str, path: str) -> Match:
        """The route for `method` on `path`; HEAD is answered by GET's."""
        wanted = "GET" if method == "HEAD" else method
        trimmed = _SLASHES.sub("/", path).rstrip("/")
        for candidate in (trimmed, f"/v1{trimmed}"):
            allowed: list[str] = []
            for (regex, _, convertors), route in self._compiled:
                found = regex.match(candidate)
                if found is None:
                    continue
                if route.method == wanted:
                    params = {name: convertors[name].convert(value) for name, value in found.groupdict().items()}
                    return Match(route, params)
                allowed += ["GET", "HEAD"] if route.method == "GET" else [route.method]
            if allowed:
                return Match(allowed=(*allowed, "OPTIONS"))
        return Match()
