"""Paths that several vendors have, or none: a header that only one vendor's clients send says whose client asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from ocserve.api import anthropic_models, anthropic_wire, google_models, google_wire, openai_models, openai_wire
from ocserve.api.dialect import Catalogue
from ocserve.errors import ErrorInfo
from ocserve.http.exchange import header_values


@dataclass(frozen=True, slots=True)
class _Vendor:
    header: bytes
    catalogue: Catalogue
    error_body: Callable[[ErrorInfo], bytes]


_VENDORS = (
    _Vendor(b"anthropic-version", anthropic_models, anthropic_wire.error_body),
    _Vendor(b"x-goog-api-client", google_models, google_wire.error_body),
)


def by_vendor(make: Callable[[Catalogue], ASGIApp]) -> ASGIApp:
    """An endpoint for each vendor's clients as `make` makes it of that vendor's catalogue; for others of OpenAI's."""
    others = make(openai_models)
    endpoints = {vendor: make(vendor.catalogue) for vendor in _VENDORS}

    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        vendor = _asking(scope)
        await (others if vendor is None else endpoints[vendor])(scope, receive, send)

    return endpoint


def error_body(scope: Scope) -> Callable[[ErrorInfo], bytes]:
    """How errors are written for whose client asks."""
    vendor = _asking(scope)
    return openai_wire.error_body if vendor is None else vendor.error_body


def _asking(scope: Scope) -> _Vendor | None:
    return next((vendor for vendor in _VENDORS if header_values(scope, vendor.header)), None)
