"""The published pages, each as JSON for whoever accepts only that: prices, privacy, content policy, support.

All are public. Prices are those of the price list, for whoever has no prices of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from ocserve.api.openai_wire import dumps
from ocserve.errors import NotFound
from ocserve.http import answers
from ocserve.http.exchange import wants_json
from ocserve.http.reference import CONTENT_SECURITY
from ocserve.pages import conduct, pricing, privacy, support
from ocserve.pages.publication import Publication, Published
from ocserve.service import Service

HEADERS = (CONTENT_SECURITY, (b"vary", b"accept"))


@dataclass(frozen=True, slots=True)
class Page:
    """One page. Both ways to write it raise `NotFound` where there is nothing to say."""

    html: Callable[[], bytes]
    document: Callable[[], dict[str, object]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if wants_json(scope):
            await answers.json(send, 200, dumps(self.document()), HEADERS)
        else:
            await answers.whole(send, 200, "text/html; charset=utf-8", self.html(), HEADERS)


def prices(service: Service, published: Published) -> Page:
    """`GET /pricing`."""

    def models() -> pricing.Lists:
        found = {model.id: service.billing.schedule(model.id) for model in service.models}
        return {name: prices for name, prices in found.items() if prices}

    def terms() -> pricing.Terms:
        billing = service.billing
        return pricing.Terms(billing.charges("cancelled"), billing.charges("failed"), billing.policy)

    return Page(
        lambda: pricing.html(models(), terms(), published.now),
        lambda: pricing.document(models(), terms(), published.now),
    )


def data(published: Published) -> Page:
    """`GET /privacy`."""
    return Page(lambda: privacy.html(published.now), lambda: privacy.document(published.now))


def content(published: Published) -> Page:
    """`GET /policy`."""

    def found() -> Publication:
        if not published.now.has_policy:
            raise NotFound("The operator of this server has published no content policy, and none is enforced.")
        return published.now

    return Page(lambda: conduct.html(found()), lambda: conduct.document(found()))


def contact(published: Published) -> Page:
    """`GET /support`."""

    def found() -> Publication:
        if not published.now.has_support:
            raise NotFound("The operator of this server has not stated how it is reached.")
        return published.now

    return Page(lambda: support.html(found()), lambda: support.document(found()))
