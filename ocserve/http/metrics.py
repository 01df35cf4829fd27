"""`GET /metrics`: what a monitoring system scrapes, and how it is gathered from its owners."""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

from ocserve import __version__, machine
from ocserve.api.operations import QUERIES
from ocserve.http import answers
from ocserve.http.exchange import Exchange
from ocserve.service import Service
from ocserve.telemetry.metrics import Meter
from ocserve.telemetry.readings import EngineReading, Reading


class Metrics:
    """`GET /metrics`, in Prometheus' text format: open to this machine, and to keys that may administer it."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = Exchange.of(scope).caller
        assert caller is not None
        if not caller.anonymous:
            caller.check_admin()
        from ocserve.telemetry import exposition  # the library takes time and memory, and many are never asked

        await answers.whole(send, 200, exposition.MEDIA_TYPE, exposition.write(self._meter.families()))


def meter(service: Service) -> Meter:
    """The meter of a server. At a scrape it asks the owners of what is so now, each for what it states anyway."""

    def read() -> Reading:
        ledger = service.billing.ledger
        return Reading(
            version=__version__,
            started=service.started,
            ready=service.ready,
            active=service.active,
            resident_bytes=machine.resident_bytes(),
            engines=tuple(_engine(service, model.id) for model in service.models),
            ledger_healthy=service.billing.ready,
            ledger_unwritten=0 if ledger is None else ledger.unwritten,
            checks=() if service.judge is None else service.judge.stats,
        )

    return Meter(read, {path for _, path in QUERIES}, service.fleet.engines)


def _engine(service: Service, name: str) -> EngineReading:
    engine = service.fleet.engines[name]
    return EngineReading(
        model=name,
        loaded=service.fleet.phase(name).value == "ready",
        owed=service.owed(name),
        restarts=engine.restarts,
        resident_bytes=None if engine.pid is None else machine.resident_bytes(engine.pid),
        stats=engine.stats,
    )
