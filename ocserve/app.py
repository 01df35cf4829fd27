"""The composition root: builds every object from the settings, in order, and closes them in reverse.

Nothing else constructs parts across layers, and no module holds an instance.
"""

from __future__ import annotations

import asyncio
import ipaddress
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from msgspec.structs import replace

from ocserve import config, headstart
from ocserve.accounts import pricing
from ocserve.accounts.billing import Billing
from ocserve.accounts.keys import KeyRing, lasting_secret
from ocserve.accounts.keystore import KeyStore
from ocserve.accounts.ledger import Ledger
from ocserve.accounts.ledger_schema import LedgerError
from ocserve.accounts.limits import Limiter
from ocserve.accounts.past import NO_PAST, Past
from ocserve.catalog.need import Plan
from ocserve.catalog.store import Installed, Store
from ocserve.doors import CannotKeep, Doors
from ocserve.engine import devices
from ocserve.engine.desk import Describe
from ocserve.engine.devices import ProbeFailed as ProbeFailed  # likewise
from ocserve.engine.devices import probe as probe
from ocserve.engine.handle import LoadError as LoadError  # what a start can fail with, for the command line
from ocserve.engine.process import Spare, raise_descriptor_limit
from ocserve.engine.wire import EngineFacts
from ocserve.generation import RequestRecord
from ocserve.http import application, server
from ocserve.http.edge.current import Edge
from ocserve.http.fetch import ImageFetcher
from ocserve.http.server import CannotListen as CannotListen  # likewise
from ocserve.machine import host_memory
from ocserve.pages.publication import Publication, Published
from ocserve.policy.hooks import open_hook
from ocserve.policy.judge import Judge
from ocserve.service import Service
from ocserve.serving.control import Control, say, unpriced, unserved
from ocserve.serving.lineup import Lineup, Place
from ocserve.serving.planned import engine_spec as engine_spec  # for the command line
from ocserve.serving.planned import fit_alone, refuse_context
from ocserve.telemetry import logs
from ocserve.telemetry.traces import open_traces


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running server's parts. `facts` are the default model's engine's, `edge` the settings that its guards obey."""

    facts: EngineFacts
    service: Service
    asgi: application.App
    edge: Edge
    control: Control
    stop: server.Stop


async def serve(
    settings: config.Settings,
    models: Sequence[Installed],
    on_ready: Callable[[Daemon, str], None],
    spare: Spare | None = None,
    *,
    reread: Callable[[], config.Settings] | None = None,
) -> None:
    """Serve `models` until a signal asks to stop: the first is loaded now, the others at their first request.

    `on_ready` gets the base URL once requests are answered. `spare` is the first model's engine process. `reread` reads
    the settings again; without it they stay as they are.
    """
    raise_descriptor_limit()
    on_terminal = sys.stderr.isatty()  # where that goes away, its programs are to end
    if not on_terminal:
        server.ignore_hangups()
    address = settings.config.server
    sockets = server.bind(address.host, address.port)  # before the model is loaded: a taken port is known at once
    try:
        async with running(settings, models, spare, reread=reread) as daemon:
            await server.serve(
                daemon.asgi,
                daemon.edge,
                on_ready=lambda url: on_ready(daemon, url),
                drain=daemon.service.stop,
                reload=None if on_terminal else daemon.control.reload_at_hangup,
                sockets=sockets,
                stop=daemon.stop,
            )
    finally:
        for bound in sockets:
            bound.close()


@asynccontextmanager
async def running(
    settings: config.Settings,
    models: Sequence[Installed],
    spare: Spare | None = None,
    *,
    reread: Callable[[], config.Settings] | None = None,
) -> AsyncIterator[Daemon]:
    """Everything but the listening socket, from the first model's load to the ASGI application.

    Raises `DoesNotFit`, `LoadError`, and `ProbeFailed` where llama.cpp cannot say which GPUs there are.
    """
    tree = settings.config
    key = config.resolve_key(tree.auth)
    store = KeyStore(config.keys_file(tree.auth))
    has_key = store.has_keys or key is not None  # the file is read in any case: one that cannot be used is refused
    refuse_exposure(tree.server, has_key=has_key)
    stores = tree.engine.prefix_cache and tree.cache.disk_bytes
    secret = lasting_secret(config.cache_directory(tree.cache)) if stores else None
    doors, published = open_doors(tree), Published(Publication.of(tree))
    for model in models:
        if model is models[0] or model.header.pooling == "none":  # a longest input is lowered, a conversation is not
            refuse_context(tree.engine, model, model.header.context_length)
    environment = headstart.environment(tree)
    gpus = devices.usable_gpus(environment) if tree.engine.gpu_layers else ()
    async with (
        _tracing(tree.otel) as observe,
        _judging(tree.policy) as judge,
        _charging(open_billing(tree, has_key=has_key, store=store)) as billing,
        _loading(Lineup(tree, models, Store(tree.store), Place(gpus, host_memory(), environment), spare)) as lineup,
    ):
        facts, _ = await asyncio.gather(lineup.fleet.open(models[0].name), lineup.look())
        refuse_context(tree.engine, models[0], facts.trained_context)
        say([*unserved(tree.limits, billing, lineup.described), *unpriced(billing, lineup.described)])

        fetcher = ImageFetcher(tree.images)
        past = Past(await asyncio.to_thread(billing.ledger.recent)) if billing.ledger is not None else NO_PAST
        edge = Edge(sized(tree.server, reads_images=lineup.reads_images))
        limiter = Limiter(tree.limits, past=past)
        keys = KeyRing(key, tree.auth, secret, store)
        service = Service(
            lineup.fleet, lineup.described, limiter, tree.limits, fetcher, billing, doors, lineup.look, judge, keys
        )

        def changed(models: Mapping[str, Describe]) -> None:
            say(unpriced(billing, models.keys() - {model.id for model in service.models}))
            service.offer(models)
            readers = sized(tree.server, reads_images=lineup.reads_images)
            edge.now = replace(edge.now, max_body_bytes=readers.max_body_bytes)

        lineup.tell(changed)
        stop = server.Stop()
        control = Control(settings, reread or (lambda: settings), lineup, service, edge, fetcher, published, stop)
        asgi = application.build(service, keys, edge, control, published, observe)
        yield Daemon(facts, service, asgi, edge, control, stop)


@asynccontextmanager
async def _loading(lineup: Lineup) -> AsyncIterator[Lineup]:
    """`lineup`, whose engines end with the block."""
    try:
        yield lineup
    finally:
        await lineup.fleet.close()
        lineup.release()


@asynccontextmanager
async def _charging(billing: Billing) -> AsyncIterator[Billing]:
    """`billing`, whose ledger has everything when the block has ended, or the log says what it has not."""
    try:
        yield billing
    finally:
        if billing.ledger is not None and (lost := await asyncio.to_thread(billing.ledger.close)):
            logs.event("ledger_rows_lost", level="error", count=lost)


@asynccontextmanager
async def _judging(settings: config.Policy) -> AsyncIterator[Judge | None]:
    """Who judges content, if anybody does."""
    hook = open_hook(settings)
    judge = Judge(settings, hook, logs.event) if hook is not None else None
    try:
        yield judge
    finally:
        if judge is not None:
            await judge.close()


@asynccontextmanager
async def _tracing(settings: config.Otel) -> AsyncIterator[Callable[[RequestRecord], None] | None]:
    """Who is told of every request that has ended, if traces are sent."""
    traces = open_traces(settings)
    try:
        yield None if traces is None else traces.observe
    finally:
        if traces is not None:
            await asyncio.to_thread(traces.close)


def open_doors(tree: config.Config) -> Doors:
    """The doors, with the maintenance that was announced. Raises `ConfigError`."""
    file = config.maintenance_file(tree.auth)
    try:
        return Doors(file)
    except CannotKeep as error:
        raise config.ConfigError(f"{error}.", hint=f"Remove {file} if no maintenance is to come.") from None


def open_billing(tree: config.Config, *, has_key: bool, store: KeyStore | None = None) -> Billing:
    """Prices, policy and ledger. Raises `ConfigError` where the ledger cannot be opened and is needed."""
    tariff = pricing.load(tree.billing.prices)
    ledger = None
    if tree.ledger.use != "off":
        days = tree.ledger.retention_days
        try:
            ledger = Ledger(config.ledger_file(tree.ledger), retention_days=days, on_event=logs.event)
        except LedgerError as error:
            if tree.ledger.use == "on" or has_key or tariff:
                raise config.ConfigError(
                    f"{error}.", hint="Name another folder with ledger.directory, or set ledger.use to off."
                ) from None
            logs.event("notice", level="warning", detail=f"Requests are not recorded: {error}.")
    billing = Billing(tree.billing, tariff, ledger, keys=store)
    billing.check_tariff(tariff)
    return billing


def sized(edge: config.Server, *, reads_images: bool) -> config.Server:
    """The edge with a limit of bodies: usual photographs are a few megabytes each, in base64."""
    unset = edge.max_body_bytes is None
    return replace(edge, max_body_bytes=config.IMAGE_BODY_BYTES) if unset and reads_images else edge


def plan_here(tree: config.Config, model: Installed) -> Plan:
    """How `model` would be loaded alone on this machine. Raises as `running` does."""
    gpus = devices.usable_gpus(config.engine_environment()) if tree.engine.gpu_layers else ()
    return fit_alone(tree, model, gpus).plan


def has_key(auth: config.Auth) -> bool:
    """Whether callers can have a key; raises `ConfigError` for one that cannot be used."""
    found = KeyStore(config.keys_file(auth)).has_keys  # also beside a key of the settings: the file must be sound
    return config.resolve_key(auth) is not None or found


def refuse_exposure(server_settings: config.Server, *, has_key: bool) -> None:
    """Without a key nobody but this machine may reach the server; raises `ConfigError` with what to do."""
    if has_key:
        return
    reasons = []
    if not _is_loopback(server_settings.host):
        reasons.append(f"server.host is {server_settings.host}, which other machines can reach")
    if server_settings.public_hosts:
        reasons.append("server.public_hosts names public host names")
    if server_settings.trusted_proxies:
        reasons.append("server.trusted_proxies names a proxy")
    if reasons:
        raise config.ConfigError(
            f"Refusing to serve without a key: {'; '.join(reasons)}.",
            hint="Make one with `ocserve keys create --name NAME`, or set OCSERVE_API_KEY, or bind 127.0.0.1.",
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
