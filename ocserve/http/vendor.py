"""A path that several vendors have: a header that only one vendor's clients send says whose client asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from ocserve.api import anthropic_models, anthropic_wire, google_models, google_wire, openai_models
from ocserve.api.dialect import Catalogue
from ocserve.errors import ErrorInfo
from ocserve.http.exchange import Exchange, header_values


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
        for vendor, own in endpoints.items():
            if header_values(scope, vendor.header):
                Exchange.of(scope).error_body = vendor.error_body
                await own(scope, receive, send)
                return
        await others(scope, receive, send)

    return endpoint
