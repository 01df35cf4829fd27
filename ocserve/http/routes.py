"""Every route, in one list: one that is not in it does not exist, and one that is not `public` needs a caller."""

from __future__ import annotations

from ocserve import config
from ocserve.api import openai_chat, openai_completions
from ocserve.http.generate import Generate
from ocserve.http.listing import Health, ModelEntry, ModelList, Ready
from ocserve.http.route_table import Route
from ocserve.service import Service


def routes(service: Service, settings: config.Server) -> tuple[Route, ...]:
    """The list."""
    return (
        Route("POST", "/v1/chat/completions", Generate(service, openai_chat, settings)),
        Route("POST", "/v1/completions", Generate(service, openai_completions, settings)),
        Route("GET", "/v1/models", ModelList(service)),
        Route("GET", "/v1/models/{id:path}", ModelEntry(service)),
        Route("GET", "/health", Health(service), public=True),
        Route("GET", "/ready", Ready(service), public=True),
    )
