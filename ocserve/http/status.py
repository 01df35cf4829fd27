"""`GET /status`: whether the server serves, for everybody. Names of models are for callers."""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.types import Receive, Scope, Send

from ocserve.api import admin, openai_wire
from ocserve.http import answers
from ocserve.http.admin import announcement
from ocserve.http.exchange import Exchange, header_values
from ocserve.http.reference import POLICY
from ocserve.pages import status
from ocserve.service import Service

_VARY = (b"vary", b"accept")


class PublicStatus:
    """A page where a browser asks, JSON elsewhere. `availability` tells the share of requests that did not fail."""

    def __init__(self, service: Service, availability: Callable[[], float | None]) -> None:
        self._service = service
        self._availability = availability

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = Exchange.of(scope).caller
        models = self._service.open_to(caller).models if caller is not None else ()
        found = admin.Status(
            ready=self._service.ready,
            models=tuple(model.id for model in models),
            uptime_s=round(time.time() - self._service.started, 3),
            availability=self._availability(),
            maintenance=announcement(self._service),
        )
        if any(b"text/html" in value for value in header_values(scope, b"accept")):
            page = status.page(
                ready=found.ready,
                models=found.models,
                uptime_s=found.uptime_s,
                availability=found.availability,
                maintenance=self._service.doors.announced,
            )
            await answers.whole(send, 200, "text/html; charset=utf-8", page, (POLICY, _VARY))
        else:
            await answers.json(send, 200, openai_wire.dumps(found), (_VARY,))
