"""What editors read of a server before they use it, in the words of Ollama, LM Studio and llama-server.

And Ollama's way of asking for a model to be loaded: a request for an answer without anything to answer to.
"""

from __future__ import annotations

import time
from typing import Protocol

from starlette.types import Receive, Scope, Send

from ocserve import __version__
from ocserve.api import llama_server, lmstudio, ollama_models
from ocserve.api.dialect import Dialect, Models
from ocserve.api.llama_server import Properties
from ocserve.api.ollama_request import Load
from ocserve.generation import EncodeRequest, TextPrompt
from ocserve.http import answers
from ocserve.http.edge.current import Edge
from ocserve.http.exchange import Exchange, caller_of
from ocserve.http.generate import Generate
from ocserve.http.presence import disconnected, unless_gone
from ocserve.modelcard import ServedModel
from ocserve.service import Service

# A request that asks for nothing but a load is a few fields; a larger one is not looked at twice.
_MAX_LOAD_BYTES = 4096


def loaded(service: Service, name: str) -> bool:
    """Whether a model is in memory."""
    return service.fleet.phase(name).value == "ready"


class OllamaTags:
    """`GET /api/tags`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answers.json(send, 200, ollama_models.listing(self._service.open_to(caller_of(scope)).models))


class OllamaRunning:
    """`GET /api/ps`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        offered = self._service.open_to(caller_of(scope)).models
        running = [model for model in offered if loaded(self._service, model.id)]
        await answers.json(send, 200, ollama_models.running((model, self._on_gpu(model)) for model in running))

    def _on_gpu(self, model: ServedModel) -> bool:
        facts = self._service.fleet.engines[model.id].facts
        return facts is not None and facts.gpu_layers > 0


class OllamaVersion:
    """`GET /api/version`: nothing about this machine, so that clients may see whom they talk to before they log in."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answers.json(send, 200, ollama_models.version())


class OllamaShow:
    """`POST /api/show`."""

    def __init__(self, service: Service, edge: Edge) -> None:
        self._service = service
        self._edge = edge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange.of(scope)
        models = self._service.open_to(caller_of(scope)).model
        body, ignored = ollama_models.show(exchange.body, models, refuse_unknown=self._edge.refuse_unknown)
        exchange.name_ignored(ignored)
        await answers.json(send, 200, body)


class LoadingDialect(Dialect, Protocol):
    """A dialect in which a request without a prompt asks for its model to be loaded."""

    def load(self, body: bytes, models: Models, *, refuse_unknown: bool) -> Load | None:
        """The load that `body` asks for; None if it is to be answered."""

    def loaded(self, model: ServedModel, now: int) -> bytes:
        """What is said when the model is there."""


class OllamaGenerate:
    """`POST /api/chat` and `/api/generate`."""

    def __init__(self, service: Service, dialect: LoadingDialect, edge: Edge) -> None:
        self._service = service
        self._dialect = dialect
        self._edge = edge
        self._generate = Generate(service, dialect, edge)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange.of(scope)
        load = None
        if len(exchange.body) <= _MAX_LOAD_BYTES:
            models = self._service.open_to(caller_of(scope)).model
            load = self._dialect.load(exchange.body, models, refuse_unknown=self._edge.refuse_unknown)
        if load is None:
            await self._generate(scope, receive, send)
        else:
            exchange.name_ignored(load.ignored)
            await unless_gone(disconnected(receive), self._load(exchange, load.model, send))

    async def _load(self, exchange: Exchange, model: ServedModel, send: Send) -> None:
        """Have the engine look at an empty text, for which it must be there."""
        assert exchange.caller is not None
        nothing = EncodeRequest(request_id="", model=model.id, prompt=TextPrompt(text=""), count_only=True)
        try:
            await self._service.ask(nothing, exchange.caller, exchange.trace)
        finally:
            exchange.tell_limits(self._service.limiter)
        await answers.json(send, 200, self._dialect.loaded(model, int(time.time())))


class LmStudioModels:
    """`GET /api/v0/models`, and one of them where the path names it."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = Exchange.of(scope).match.params.get("id")
        offer = self._service.open_to(caller_of(scope))
        if name is None:
            body = lmstudio.listing(offer.models, self._loaded)
        else:
            body = lmstudio.one(offer.model(name), self._loaded)
        await answers.json(send, 200, body)

    def _loaded(self, name: str) -> bool:
        return loaded(self._service, name)


class LlamaServerProps:
    """`GET /props`: of the default model, or of the one that `?model=` names."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        model = llama_server.model_of(Exchange.of(scope).query, self._service.open_to(caller_of(scope)).model)
        facts = self._service.fleet.engines[model.id].facts
        known = Properties()
        if facts is not None:
            known = Properties(chat_template=facts.chat_template or "", bos=facts.bos, eos=facts.eos)
        await answers.json(send, 200, llama_server.props(model, known, f"ocserve-{__version__}"))
