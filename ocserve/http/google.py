"""Google's surface: the path names the model and, behind a colon, what to do with it."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from ocserve import config
from ocserve.api import google, google_embed, google_wire
from ocserve.api.fields import unsupported
from ocserve.errors import NotFound
from ocserve.http.ask import Ask
from ocserve.http.exchange import Exchange
from ocserve.http.generate import Generate
from ocserve.service import Service

_FRAMINGS = {"sse": google_wire.EVENTS, "json": google_wire.ARRAY}


class ModelCall:
    """`POST /v1beta/models/{model}:{method}`; a model's id may contain slashes and colons."""

    def __init__(self, service: Service, settings: config.Server) -> None:
        self._service = service
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        model, _, method = Exchange.of(scope).match.params["call"].rpartition(":")
        await self._endpoint(Exchange.of(scope).query.get("alt", str), model, method)(scope, receive, send)

    def _endpoint(self, alt: str | None, model: str, method: str) -> ASGIApp:
        """`alt` is how the client wants a stream, as events or as one JSON array; all else is JSON."""
        if method != "streamGenerateContent" and alt == "sse":
            raise unsupported("alt", "only 'streamGenerateContent' answers with events.")
        match method:
            case "generateContent":
                return Generate(self._service, google.GenerateContent(model), self._settings)
            case "streamGenerateContent":
                dialect = google.GenerateContent(model, _FRAMINGS[alt or "json"])
                return Generate(self._service, dialect, self._settings)
            case "countTokens":
                return Ask(self._service, google.CountTokens(model), self._settings)
            case "embedContent" | "batchEmbedContents":
                embed = google_embed.EmbedContent(model, batch=method == "batchEmbedContents")
                return Ask(self._service, embed, self._settings)
        raise NotFound("There is no such method of a model.")
