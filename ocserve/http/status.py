"""`GET /status`: whether the server serves, for everybody. Names of models are for callers."""

from __future__ import annotations

import time
from collections.abc import Callable

from msgspec import UNSET
from starlette.types import Receive, Scope, Send

from ocserve.api import admin, openai_wire
from ocserve.http import answers
from ocserve.http.admin import announcement
from ocserve.http.exchange import Exchange, by_caller, wants_json
from ocserve.http.reference import CONTENT_SECURITY
from ocserve.pages import status
from ocserve.pages.publication import Published
from ocserve.service import Service


class PublicStatus:
    """As the published pages. `availability` tells the share of requests that did not fail."""

    def __init__(self, service: Service, availability: Callable[[], float | None], published: Published) -> None:
        self._service = service
        self._availability = availability
        self._published = published

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = Exchange.of(scope).caller
        models = () if caller is None else tuple(model.id for model in self._service.open_to(caller).models)
        found = admin.Status(
            ready=self._service.ready,
            models=UNSET if caller is None else models,
            uptime_s=round(time.time() - self._service.started, 3),
            availability=self._availability(),
            maintenance=announcement(self._service),
        )
        headers = (CONTENT_SECURITY, *by_caller(scope))
        if wants_json(scope):
            await answers.json(send, 200, openai_wire.dumps(found), headers)
            return
        page = status.page(
            ready=found.ready,
            models=models,
            uptime_s=found.uptime_s,
            availability=found.availability,
            maintenance=self._service.doors.announced,
            links=self._published.now.links,
        )
        await answers.whole(send, 200, "text/html; charset=utf-8", page, headers)
