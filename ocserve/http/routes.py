"""Every route, in one list: one that is not in it does not exist, and one that is not `public` needs a caller."""

from __future__ import annotations

from ocserve import config
from ocserve.api import anthropic, openai_chat, openai_completions
from ocserve.api.dialect import Dialect
from ocserve.http.generate import Generate
from ocserve.http.listing import Health, ModelEntry, ModelList, ProviderFeed, Ready
from ocserve.http.route_table import Route
from ocserve.service import Service


def routes(service: Service, settings: config.Server) -> tuple[Route, ...]:
    """The list."""

    def generates(path: str, dialect: Dialect) -> Route:
        return Route("POST", path, Generate(service, dialect, settings), error_body=dialect.error_body)

    return (
        generates("/v1/chat/completions", openai_chat),
        generates("/v1/completions", openai_completions),
        generates("/v1/messages", anthropic),
        Route("GET", "/v1/models", ModelList(service)),
        Route("GET", "/v1/models/{id:path}", ModelEntry(service)),
        Route("GET", "/openrouter/models", ProviderFeed(service)),
        Route("GET", "/health", Health(service), public=True),
        Route("GET", "/ready", Ready(service), public=True),
    )
