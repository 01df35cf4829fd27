"""Every route, in one list: one that is not in it does not exist, and one that is not `public` needs a caller."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp

from ocserve.api import (
    anthropic,
    anthropic_count,
    anthropic_wire,
    google,
    google_models,
    google_wire,
    llama_completion,
    llama_infill,
    llama_tokens,
    ollama_chat,
    ollama_embed,
    ollama_generate,
    ollama_wire,
    openai_chat,
    openai_completions,
    openai_embeddings,
    openai_wire,
    rerank,
)
from ocserve.api.dialect import Catalogue, Dialect
from ocserve.api.questions import QuestionDialect
from ocserve.http import admin, credit, published, reference
from ocserve.http.admin import Control
from ocserve.http.ask import Ask
from ocserve.http.edge.current import Edge
from ocserve.http.editors import (
    LlamaServerProps,
    LmStudioModels,
    OllamaGenerate,
    OllamaRunning,
    OllamaShow,
    OllamaTags,
    OllamaVersion,
)
from ocserve.http.generate import Generate
from ocserve.http.google import model_calls
from ocserve.http.listing import Health, ModelEntry, ModelList, ProviderFeed, Ready
from ocserve.http.metrics import Metrics
from ocserve.http.response_socket import ResponseSocket
from ocserve.http.response_store import ResponseStore
from ocserve.http.responses import (
    CancelResponse,
    CountInputTokens,
    CreateResponse,
    DeleteResponse,
    InputItems,
    RetrieveResponse,
)
from ocserve.http.route_table import SOCKET, ErrorBody, Route
from ocserve.http.status import PublicStatus
from ocserve.http.vendor import by_vendor
from ocserve.pages.publication import Published
from ocserve.service import Service
from ocserve.telemetry.metrics import Meter


def routes(service: Service, edge: Edge, meter: Meter, control: Control, pages: Published) -> tuple[Route, ...]:
    """The list."""

    def generates(path: str, dialect: Dialect) -> Route:
        return Route("POST", path, Generate(service, dialect, edge), error_body=dialect.error_body)

    def answers(path: str, dialect: QuestionDialect) -> Route:
        return Route("POST", path, Ask(service, dialect, edge), error_body=dialect.error_body)

    stored = ResponseStore.of(edge.now)
    made = CreateResponse(service, stored, edge)
    return (
        generates("/v1/chat/completions", openai_chat),
        generates("/v1/completions", openai_completions),
        Route("POST", "/v1/responses", made),
        Route(SOCKET, "/v1/responses", ResponseSocket(service, stored, edge)),
        Route("POST", "/v1/responses/input_tokens", CountInputTokens(service, stored, edge)),
        Route("GET", "/v1/responses/{id}", RetrieveResponse(stored), looks=False),
        Route("DELETE", "/v1/responses/{id}", DeleteResponse(stored), looks=False),
        Route("GET", "/v1/responses/{id}/input_items", InputItems(stored), looks=False),
        Route("POST", "/v1/responses/{id}/cancel", CancelResponse(stored), looks=False),
        generates("/v1/messages", anthropic),
        answers("/v1/messages/count_tokens", anthropic_count),
        answers("/v1/embeddings", openai_embeddings),
        answers("/v1/rerank", rerank),
        answers("/v2/rerank", rerank),
        *(
            Route("POST", f"/{version}/models/{{model:path}}:{method}", endpoint, error_body=google.error_body)
            for version in ("v1", "v1beta")
            for method, endpoint in model_calls(service, edge).items()
        ),
        Route("GET", "/v1beta/models", ModelList(service, google_models), error_body=google.error_body),
        Route("GET", "/v1beta/models/{id:path}", ModelEntry(service, google_models), error_body=google.error_body),
        _shared("/v1/models", lambda catalogue: ModelList(service, catalogue)),
        _shared("/v1/models/{id:path}", lambda catalogue: ModelEntry(service, catalogue)),
        _ollama("POST", "/api/chat", OllamaGenerate(service, ollama_chat, edge)),
        _ollama("POST", "/api/generate", OllamaGenerate(service, ollama_generate, edge)),
        answers("/api/embed", ollama_embed),
        _ollama("POST", "/api/show", OllamaShow(service, edge)),
        _ollama("GET", "/api/tags", OllamaTags(service)),
        _ollama("GET", "/api/ps", OllamaRunning(service)),
        Route("GET", "/api/version", OllamaVersion(), public=True, looks=False),
        generates("/api/v0/chat/completions", openai_chat),
        generates("/api/v0/completions", openai_completions),
        answers("/api/v0/embeddings", openai_embeddings),
        Route("GET", "/api/v0/models", LmStudioModels(service)),
        Route("GET", "/api/v0/models/{id:path}", LmStudioModels(service)),
        generates("/completion", llama_completion),
        generates("/infill", llama_infill),
        answers("/tokenize", llama_tokens.TOKENIZER),
        answers("/detokenize", llama_tokens.DETOKENIZER),
        answers("/apply-template", llama_tokens.TEMPLATE),
        Route("GET", "/props", LlamaServerProps(service)),
        *credit.routes(service, edge),
        *_of_the_server(service, meter, pages),
        *admin.routes(service, control),
    )


# Whose the paths below these are, those without a route too.
VENDORS: tuple[tuple[str, ErrorBody], ...] = (
    ("/v1/messages", anthropic_wire.error_body),
    ("/v1beta", google_wire.error_body),
    ("/api/v0", openai_wire.error_body),
    ("/api", ollama_wire.error_body),
)


def _of_the_server(service: Service, meter: Meter, pages: Published) -> tuple[Route, ...]:
    """What the server says of itself."""
    return (
        Route("GET", "/openrouter/models", ProviderFeed(service)),
        Route("GET", "/openapi.json", reference.document(service, pages), public=True),
        Route("GET", "/docs", reference.page(service, pages), public=True),
        Route("GET", "/metrics", Metrics(meter), looks=False),
        Route("GET", "/status", PublicStatus(service, meter.availability, pages), public=True),
        Route("GET", "/limits", reference.PublishedLimits(service, pages), public=True),
        Route("GET", "/pricing", published.prices(service, pages), public=True),
        Route("GET", "/privacy", published.data(pages), public=True, looks=False),
        Route("GET", "/policy", published.content(pages), public=True, looks=False),
        Route("GET", "/support", published.contact(pages), public=True, looks=False),
        Route("GET", "/health", Health(service), public=True, looks=False),
        Route("GET", "/ready", Ready(service), public=True, looks=False),
    )


def _shared(path: str, make: Callable[[Catalogue], ASGIApp]) -> Route:
    return Route("GET", path, by_vendor(make), error_body=None)


def _ollama(method: str, path: str, endpoint: ASGIApp) -> Route:
    return Route(method, path, endpoint, error_body=ollama_wire.error_body)
