"""`/admin/*`: how the server is, and what its administrator may have it do. Every route needs the admin scope.

What only the composition root can do (settings, files, the end of the process) it is asked for through `Control`.
"""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec
from starlette.types import Receive, Scope, Send

from ocserve import __version__, machine
from ocserve.api import admin, openai_wire
from ocserve.doors import CannotKeep, Maintenance
from ocserve.errors import Conflict, InternalError, ModelNotFound
from ocserve.http import answers
from ocserve.http.exchange import Exchange
from ocserve.http.route_table import Route
from ocserve.modelcard import KINDS, DatedPrices, Prices, ServedModel
from ocserve.service import Service

Act = Callable[[bytes], Awaitable[msgspec.Struct]]
PriceChanges = Mapping[str, tuple[tuple[DatedPrices, ...], ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """What a reload has changed: settings by name, the listed prices by model; each before and after.

    The prices of `more_prices` models have changed as well. `notices` are what the operator should know of the settings
    as they are now.
    """

    settings: Mapping[str, tuple[object, object]]
    prices: PriceChanges
    more_prices: int = 0
    notices: tuple[str, ...] = ()


class Control(Protocol):
    """What the server's owner does for its administrator."""

    @property
    def settings(self) -> Mapping[str, object]:
        """The settings that are not as by default, secrets masked."""

    @property
    def drain_s(self) -> float:
        """How long a drain takes at most where nobody says."""

    async def include(self, reference: str, *, may_pull: bool) -> str:
        """Serve one more model, by its name, reference or path; its id. Raises `ApiError`."""

    def may_forget(self, name: str) -> bool:
        """Whether a model was added by its path since the start."""

    def forget(self, name: str) -> None:
        """Serve such a model no more."""

    async def reload(self) -> Changed:
        """Read the settings and prices anew; what has changed. Raises `ApiError`: nothing has."""

    def stop(self, deadline_s: float | None) -> None:
        """End the server soon, as a signal does."""


class Administration:
    """What the routes do."""

    def __init__(self, service: Service, control: Control) -> None:
        self._service = service
        self._control = control

    async def state(self, body: bytes) -> admin.State:
        """`GET /admin/state`."""
        service, doors = self._service, self._service.doors
        return admin.State(
            version=__version__,
            started=_moment(service.started),
            uptime_s=round(time.time() - service.started, 3),
            ready=service.ready,
            draining=doors.draining,
            stopping=doors.stopping,
            active=service.active,
            ledger=service.billing.state,
            maintenance=announcement(service),
            settings={name: msgspec.to_builtins(value, enc_hook=str) for name, value in self._control.settings.items()},
            models={model.id: self._model(model) for model in service.models},
        )

    async def load(self, body: bytes) -> admin.Moved:
        """`POST /admin/models/load`."""
        asked = admin.load(body)
        found = self._named(asked.model)
        name = found.id if found else await self._control.include(asked.model, may_pull=asked.pull)
        await self._service.load(name)
        return self._moved(name)

    async def unload(self, body: bytes) -> admin.Moved:
        """`POST /admin/models/unload`."""
        asked = admin.unload(body)
        found = self._named(asked.model)
        if found is None:
            raise ModelNotFound("No model of this name is served. GET /admin/state lists them.", param="model")
        if asked.forget and not self._control.may_forget(found.id):
            raise Conflict(
                f"{found.id} was named when the server started, is named in its settings or is in the store: only a "
                "model that was loaded by its path can be forgotten.",
                param="forget",
                code="model_stays",
            )
        await self._service.unload(found.id, asked.wait_s)
        moved = self._moved(found.id)
        if asked.forget:
            self._control.forget(found.id)
        return moved

    async def drain(self, body: bytes) -> admin.DoorState:
        """`POST /admin/drain`."""
        asked = admin.deadline_s(body)
        await self._service.drain(self._control.drain_s if asked is None else asked)
        return self._doors()

    async def resume(self, body: bytes) -> admin.DoorState:
        """`POST /admin/resume`."""
        admin.nothing(body)
        self._service.doors.resume()
        return self._doors()

    async def stop(self, body: bytes) -> admin.DoorState:
        """`POST /admin/stop`."""
        self._control.stop(admin.deadline_s(body))
        self._service.doors.stop()
        return self._doors()

    async def announce(self, body: bytes) -> admin.Announcement:
        """`PUT /admin/maintenance`."""
        asked = admin.maintenance(body)
        maintenance = Maintenance(starts=asked.starts, ends=asked.ends, message=asked.message)
        await _kept(lambda: self._service.doors.announce(maintenance))
        return announcement(self._service) or asked  # as it is kept, in UTC

    async def take_back(self, body: bytes) -> admin.DoorState:
        """`DELETE /admin/maintenance`."""
        await _kept(self._service.doors.take_back)
        return self._doors()

    async def reload(self, body: bytes) -> admin.Reloaded:
        """`POST /admin/reload`."""
        admin.nothing(body)
        found = await self._control.reload()
        return admin.Reloaded(
            {
                name: admin.Change(*(msgspec.to_builtins(value, enc_hook=str) for value in values))
                for name, values in found.settings.items()
            },
            {model: admin.Change(*map(_listed, schedules)) for model, schedules in found.prices.items()},
            found.more_prices,
            found.notices,
        )

    def _named(self, name: str) -> ServedModel | None:
        return next((model for model in self._service.models if model.answers_to(name)), None)

    def _moved(self, name: str) -> admin.Moved:
        return admin.Moved(name, self._service.state(name))

    def _doors(self) -> admin.DoorState:
        doors = self._service.doors
        return admin.DoorState(draining=doors.draining, stopping=doors.stopping, active=self._service.active)

    def _model(self, model: ServedModel) -> admin.ModelState:
        fleet, loop = self._service.fleet, asyncio.get_running_loop()
        engine, standing = fleet.engines[model.id], fleet.standing(model.id)

        def at(clock: float | None) -> datetime.datetime | None:
            return None if clock is None else _moment(time.time() + clock - loop.time())

        return admin.ModelState(
            default=model.id == self._service.default,
            state=standing.phase.value,
            leases=standing.leases,
            owed=self._service.owed(model.id),
            restarts=engine.restarts,
            need_bytes=standing.need,
            resident_bytes=None if engine.pid is None else machine.resident_bytes(engine.pid),
            context=model.context_length,
            parallel=model.parallel,
            last_used=at(standing.used_at),
            unload_at=at(standing.goes_at),
        )


def announcement(service: Service) -> admin.Announcement | None:
    """The maintenance that is announced."""
    if (found := service.doors.announced) is None:
        return None
    return admin.Announcement(starts=found.starts, ends=found.ends, message=found.message)


def routes(service: Service, control: Control) -> tuple[Route, ...]:
    """The routes of administration."""
    does = Administration(service, control)
    return (
        _route("GET", "/admin/state", does.state),
        _route("POST", "/admin/models/load", does.load),
        _route("POST", "/admin/models/unload", does.unload),
        _route("POST", "/admin/drain", does.drain, looks=False),
        _route("POST", "/admin/resume", does.resume, looks=False),
        _route("PUT", "/admin/maintenance", does.announce, looks=False),
        _route("DELETE", "/admin/maintenance", does.take_back, looks=False),
        _route("POST", "/admin/reload", does.reload, looks=False),
        _route("POST", "/admin/stop", does.stop, status=202, looks=False),
    )


def _route(method: str, path: str, act: Act, *, status: int = 200, looks: bool = True) -> Route:
    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        answer = await act(Exchange.of(scope).body)
        await answers.json(send, status, openai_wire.dumps(answer))

    return Route(method, path, endpoint, admin=True, looks=looks)


async def _kept(change: Callable[[], None]) -> None:
    """Make a change that is written to disk."""
    try:
        await asyncio.to_thread(change)
    except CannotKeep as error:
        raise InternalError(str(error), code="maintenance_not_kept") from None


def _listed(schedule: tuple[DatedPrices, ...]) -> list[admin.Listed]:
    """A model's prices, a row for each day from which there are others and for each tier."""
    return [
        admin.Listed(since=dated.since, above=above, prices=_named(prices))
        for dated in schedule
        for above, prices in dated.steps
    ]


def _named(prices: Prices) -> dict[str, str]:
    return {kind: price for kind in KINDS if (price := getattr(prices, kind)) is not None}


def _moment(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)
