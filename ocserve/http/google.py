"""Google's surface: the path names the model and, behind a colon, what to do with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from ocserve.api import google, google_wire
from ocserve.api.dialect import Dialect
from ocserve.api.fields import Values
from ocserve.api.google_embed import EmbedContent
from ocserve.api.questions import QuestionDialect
from ocserve.http.ask import Ask
from ocserve.http.edge.current import Edge
from ocserve.http.exchange import Exchange
from ocserve.http.generate import Generate
from ocserve.service import Service

_FRAMINGS = {"sse": google_wire.EVENTS, "json": google_wire.ARRAY}


class _OfModel:
    """`POST /v1beta/models/{model}:{method}`; a model's id may contain slashes and colons."""

    def __init__(self, make: Callable[[str, Values], ASGIApp]) -> None:
        self._make = make

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange.of(scope)
        await self._make(exchange.match.params["model"], exchange.query)(scope, receive, send)


def model_calls(service: Service, edge: Edge) -> Mapping[str, ASGIApp]:
    """What can be done with a model, by the method's name."""

    def generates(make: Callable[[str, Values], Dialect]) -> ASGIApp:
        return _OfModel(lambda model, query: Generate(service, make(model, query), edge))

    def answers(make: Callable[[str], QuestionDialect]) -> ASGIApp:
        return _OfModel(lambda model, _: Ask(service, make(model), edge))

    return {
        "generateContent": generates(lambda model, _: google.GenerateContent(model)),
        "streamGenerateContent": generates(
            lambda model, query: google.GenerateContent(model, _FRAMINGS[query.get("alt", str) or "json"])
        ),
        "countTokens": answers(google.CountTokens),
        "embedContent": answers(lambda model: EmbedContent(model, batch=False)),
        "batchEmbedContents": answers(lambda model: EmbedContent(model, batch=True)),
    }
