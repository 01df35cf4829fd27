"""What can be read: the models, the server's health and its readiness."""

from __future__ import annotations

import msgspec
from starlette.types import Receive, Scope, Send

from ocserve.api import openai_models, openai_wire, openrouter
from ocserve.api.dialect import Catalogue
from ocserve.http import answers
from ocserve.http.admin import announcement
from ocserve.http.exchange import Exchange, by_caller, caller_of
from ocserve.service import Service


class ModelList:
    """`GET /v1/models`, in the form that `catalogue` gives it."""

    def __init__(self, service: Service, catalogue: Catalogue = openai_models) -> None:
        self._service = service
        self._catalogue = catalogue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answers.json(send, 200, self._catalogue.listing(self._service.open_to(caller_of(scope)).models))


class ModelEntry:
    """`GET /v1/models/{id}`; an id may contain slashes."""

    def __init__(self, service: Service, catalogue: Catalogue = openai_models) -> None:
        self._service = service
        self._catalogue = catalogue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        model = self._service.open_to(caller_of(scope)).model(Exchange.of(scope).match.params["id"])
        await answers.json(send, 200, self._catalogue.one(model))


class ProviderFeed:
    """`GET /openrouter/models`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answers.json(send, 200, openrouter.feed(self._service.open_to(caller_of(scope)).models))


class Health:
    """`GET /health`: 200 while the front process lives. Who may use the server also sees the engines' figures.

    `engine`, `restarts` and `stats` are the default model's, for who may use it. `owed` are answers being generated or
    waited for.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        report: dict[str, object] = {"status": "ok"}
        if (maintenance := announcement(self._service)) is not None:
            report["maintenance"] = maintenance
        if (caller := Exchange.of(scope).caller) is not None:
            names = [model.id for model in self._service.open_to(caller).models]
            report |= {
                "ready": self._service.ready,
                "active": self._service.active,
                "ledger": self._service.billing.state,
                **(self._default() if self._service.default in names else {}),
                "models": {name: self._state(name) for name in names},
            }
        await answers.json(send, 200, openai_wire.dumps(report), by_caller(scope))

    def _default(self) -> dict[str, object]:
        engine = self._service.engine
        return {
            "restarts": engine.restarts,
            "engine": msgspec.to_builtins(engine.facts),
            "stats": msgspec.to_builtins(engine.stats),
        }

    def _state(self, name: str) -> dict[str, object]:
        fleet = self._service.fleet
        engine = fleet.engines[name]
        return {
            "state": fleet.phase(name).value,
            "owed": self._service.owed(name),
            "restarts": engine.restarts,
            "stats": msgspec.to_builtins(engine.stats),
        }


class Ready:
    """`GET /ready`: 200 when a request for the default model that arrives now would be taken, else 503 and why."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.billing.check()
        self._service.doors.check()
        self._service.keys.check()
        if (obstacle := self._service.fleet.obstacle(self._service.default)) is not None:
            raise obstacle
        await answers.json(send, 200, openai_wire.dumps({"status": "ready"}))
