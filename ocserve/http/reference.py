"""The API reference, as a document and as a page, and the limits. All are public; names of models are for callers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from starlette.types import Receive, Scope, Send

from ocserve import __version__
from ocserve.accounts.keystore import AS_SETTINGS
from ocserve.api import openapi
from ocserve.api.openai_wire import dumps
from ocserve.http import answers
from ocserve.http.exchange import Exchange, by_caller, wants_json
from ocserve.modelcard import ServedModel
from ocserve.pages import limits, reference
from ocserve.pages.frame import Link
from ocserve.pages.publication import Published
from ocserve.service import Service

# The page has a style of its own and nothing else: whatever were smuggled into it, no browser would run or fetch it.
CONTENT_SECURITY = (
    b"content-security-policy",
    b"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
)


class Reference:
    """`GET /openapi.json` and `GET /docs`. What was last written is kept while what it tells is the same.

    That is models, prices and the pages that there are.
    """

    def __init__(
        self, service: Service, media_type: str, write: Callable[[openapi.Document], bytes], published: Published
    ) -> None:
        self._service = service
        self._published = published
        self._media_type = media_type
        self._write = write
        self._written: dict[tuple[tuple[ServedModel, ...], str, Sequence[Link]], bytes] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = Exchange.of(scope).caller
        models = self._service.open_to(caller).models if caller is not None else ()
        about = models, self._service.billing.policy, self._published.now.links
        if about not in self._written:
            self._written = {about: self._write(openapi.document(models, __version__, about[1]))}
        await answers.whole(send, 200, self._media_type, self._written[about], (CONTENT_SECURITY, *by_caller(scope)))


class PublishedLimits:
    """`GET /limits`: a page, or JSON for who asks for that; with a key, the limits of that key."""

    def __init__(self, service: Service, published: Published) -> None:
        self._service = service
        self._published = published

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = Exchange.of(scope).caller
        models = self._service.open_to(caller).models if caller is not None else ()
        held = self._service.limits
        own = None if caller is None or caller.limits == AS_SETTINGS else caller.limits.over(held)
        headers = (CONTENT_SECURITY, *by_caller(scope))
        if wants_json(scope):
            await answers.json(send, 200, dumps(limits.document(held, own, models, self._published.now)), headers)
            return
        page = limits.page(held, own, models, self._published.now)
        await answers.whole(send, 200, "text/html; charset=utf-8", page, headers)


def document(service: Service, published: Published) -> Reference:
    """The endpoint of the document."""
    return Reference(service, "application/json", dumps, published)


def page(service: Service, published: Published) -> Reference:
    """The endpoint of the page."""

    def write(found: openapi.Document) -> bytes:
        return reference.page(found, published.now.links)

    return Reference(service, "text/html; charset=utf-8", write, published)
