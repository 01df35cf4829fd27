"""The composition root: builds every object from the settings, in order, and closes them in reverse.

Nothing else constructs parts across layers, and no module holds an instance.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from msgspec.structs import replace

from ocserve import config, headstart
from ocserve.accounts import pricing
from ocserve.accounts.billing import Billing
from ocserve.accounts.keys import KeyRing, lasting_secret
from ocserve.accounts.keystore import KeyStore
from ocserve.accounts.ledger import Ledger, LedgerError
from ocserve.accounts.limits import Limiter
from ocserve.catalog import cards, planning
from ocserve.catalog.fit import Fit
from ocserve.catalog.need import Plan
from ocserve.catalog.projectors import ProjectorFile, projector
from ocserve.catalog.store import Installed
from ocserve.engine import devices
from ocserve.engine.devices import ProbeFailed as ProbeFailed  # likewise
from ocserve.engine.devices import probe as probe
from ocserve.engine.fleet import Fleet
from ocserve.engine.handle import EngineHandle, Supervision
from ocserve.engine.handle import LoadError as LoadError  # what a start can fail with, for the command line
from ocserve.engine.process import Spare, raise_descriptor_limit
from ocserve.engine.residency import Memory, Rules
from ocserve.engine.wire import EngineFacts, EngineSpec
from ocserve.http import application, server
from ocserve.http.fetch import ImageFetcher
from ocserve.http.server import CannotListen as CannotListen  # likewise
from ocserve.machine import Device, HostMemory, host_memory
from ocserve.modelcard import Capability, ServedModel
from ocserve.pages.publication import Publication
from ocserve.policy.hooks import open_hook
from ocserve.policy.judge import Judge
from ocserve.service import Service
from ocserve.telemetry import logs
from ocserve.telemetry.traces import open_traces

NO_PROJECTORS: Mapping[str, ProjectorFile] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running server's parts. `facts` are the default model's engine's, `edge` the settings that its guards obey."""

    facts: EngineFacts
    service: Service
    asgi: application.App
    edge: config.Server


async def serve(
    settings: config.Settings,
    models: Sequence[Installed],
    on_ready: Callable[[Daemon, str], None],
    spare: Spare | None = None,
) -> None:
    """Serve `models` until a signal asks to stop: the first is loaded now, the others at their first request.

    `on_ready` gets the base URL once requests are answered. `spare` is the first model's engine process.
    """
    raise_descriptor_limit()
    address = settings.config.server
    sockets = server.bind(address.host, address.port)  # before the model is loaded: a taken port is known at once
    try:
        async with running(settings, models, spare) as daemon:
            await server.serve(
                daemon.asgi,
                daemon.edge,
                on_ready=lambda url: on_ready(daemon, url),
                drain=daemon.service.drain,
                sockets=sockets,
            )
    finally:
        for bound in sockets:
            bound.close()


@asynccontextmanager
async def running(
    settings: config.Settings, models: Sequence[Installed], spare: Spare | None = None
) -> AsyncIterator[Daemon]:
    """Everything but the listening socket, from the first model's load to the ASGI application.

    Raises `DoesNotFit`, `LoadError`, and `ProbeFailed` where llama.cpp cannot say which GPUs there are.
    """
    tree = settings.config
    key = config.resolve_key(tree.auth)
    store = KeyStore(config.keys_file(tree.auth))
    has_key = key is not None or store.has_keys
    refuse_exposure(tree.server, has_key=has_key)
    stores = tree.engine.prefix_cache and tree.cache.disk_bytes
    secret = lasting_secret(config.cache_directory(tree.cache)) if stores else None
    installed = by_name(models)
    refuse_limits(tree.limits, installed)
    hook, publication, traces = open_hook(tree.policy), Publication.of(tree), open_traces(tree.otel)
    for model in models:
        if model is models[0] or model.header.pooling == "none":  # a longest input is lowered, a conversation is not
            refuse_context(tree.engine, model, model.header.context_length)
    default = models[0]
    environment = headstart.environment(tree)
    gpus = devices.usable_gpus(environment) if tree.engine.gpu_layers else ()
    projectors = find_projectors(tree, installed)
    fits = plans(tree, installed, gpus, projectors)
    fleet = build_fleet(tree, installed, fits, gpus, environment, projectors, spare)
    billing = open_billing(tree, has_key=has_key)
    judge = Judge(tree.policy, hook, logs.event) if hook is not None else None
    try:
        facts = await fleet.open(default.name)
        refuse_context(tree.engine, default, facts.trained_context)
        described = {
            name: partial(served_model, tree, model, fits[name].plan, model is default, name in projectors)
            for name, model in installed.items()
        }
        limiter, images = Limiter(tree.limits), ImageFetcher(tree.images)
        service = Service(fleet, described, limiter, tree.limits, images, billing, judge)
        edge = sized(tree.server, reads_images=bool(projectors))
        observe = None if traces is None else traces.observe
        asgi = application.build(service, KeyRing(key, tree.auth, secret, store), edge, publication, observe)
        yield Daemon(facts, service, asgi, edge)
    finally:
        await fleet.close()
        if billing.ledger is not None and (lost := await asyncio.to_thread(billing.ledger.close)):
            logs.event("ledger_rows_lost", level="error", count=lost)
        if judge is not None:
            await judge.close()
        if traces is not None:
            await asyncio.to_thread(traces.close)


def open_billing(tree: config.Config, *, has_key: bool) -> Billing:
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
    return Billing(tree.billing, tariff, ledger)


def sized(edge: config.Server, *, reads_images: bool) -> config.Server:
    """The edge with a limit of bodies: usual photographs are a few megabytes each, in base64."""
    unset = edge.max_body_bytes is None
    return replace(edge, max_body_bytes=config.IMAGE_BODY_BYTES) if unset and reads_images else edge


def by_name(models: Sequence[Installed]) -> dict[str, Installed]:
    """The models by the name that requests use; raises `ConfigError` where two of them share one."""
    found: dict[str, Installed] = {}
    for model in models:
        other = found.setdefault(model.name, model)
        if other.path != model.path:
            raise config.ConfigError(
                f"Two of the models to serve are called {model.name}.", hint="Rename the file of one of them."
            )
    return found


def build_fleet(
    tree: config.Config,
    installed: Mapping[str, Installed],
    fits: Mapping[str, Fit],
    gpus: Sequence[Device],
    environment: Mapping[str, str],
    projectors: Mapping[str, ProjectorFile] = NO_PROJECTORS,
    spare: Spare | None = None,
) -> Fleet:
    """An engine for each model, none of them started, and the memory that they share."""
    default = next(iter(installed))
    undrafted = replace(tree.engine, draft_model=None)  # a draft model has the vocabulary of one model
    specs = {
        name: replace(
            engine_spec(tree.engine if name == default else undrafted, tree.cache, model, fits[name].plan),
            projector_path=projectors[name].path if name in projectors else None,
            projector_digest=projectors[name].digest if name in projectors else "",
            images=tree.images,
        )
        for name, model in installed.items()
    }
    engines = {
        name: EngineHandle(
            spec,
            environment,
            Supervision(
                heartbeat_timeout_s=tree.engine.heartbeat_timeout_s,
                load_timeout_s=tree.engine.load_timeout_s,
                restart_wait_s=tree.engine.restart_wait_s,
                on_event=partial(logs.event, model=name),
            ),
            spare=spare if name == default else None,
        )
        for name, spec in specs.items()
    }
    memory = Memory(
        need={
            name: (found.need.host_bytes + projector_bytes(projectors.get(name)), *found.need.gpu_bytes)
            for name, found in fits.items()
        },
        capacity=(host_memory().available_bytes, *(gpu.memory_free for gpu in gpus)),
        available=lambda: host_memory().available_bytes,
    )
    rules = Rules(idle_s=tree.model.idle_unload_s, most_loaded=tree.model.most_loaded)
    return Fleet(engines, memory, rules, wait_s=tree.model.room_wait_s, on_event=logs.event)


def plan_here(tree: config.Config, model: Installed) -> Plan:
    """How `model` would be loaded alone on this machine. Raises as `running` does."""
    gpus = devices.usable_gpus(config.engine_environment()) if tree.engine.gpu_layers else ()
    return plans(tree, {model.name: model}, gpus)[model.name].plan


def find_projectors(tree: config.Config, installed: Mapping[str, Installed]) -> dict[str, ProjectorFile]:
    """The projectors of the models that have one; raises `GgufInvalid` for a setting that names no such file."""
    default = next(iter(installed))
    named = {default: tree.model.projector}
    found = {name: projector(model, named.get(name)) for name, model in installed.items()}
    return {name: file for name, file in found.items() if file is not None}


def projector_bytes(file: ProjectorFile | None) -> int:
    """Memory that a projector takes: its weights, and as much again for what it computes with."""
    return 2 * file.size_bytes if file is not None else 0


def host_memory_beside(file: ProjectorFile) -> HostMemory:
    """Main memory now, without what a projector will take."""
    memory = host_memory()
    return replace(memory, available_bytes=max(0, memory.available_bytes - projector_bytes(file)))


def plans(
    tree: config.Config,
    installed: Mapping[str, Installed],
    gpus: Sequence[Device],
    projectors: Mapping[str, ProjectorFile] = NO_PROJECTORS,
) -> dict[str, Fit]:
    """How each model is loaded so that it fits this machine alone; what had to be lowered for it is logged.

    Raises `DoesNotFit`.
    """
    found = {}
    for name, model in installed.items():
        memory = host_memory_beside(projectors[name]) if name in projectors else None
        found[name] = planning.plan(model, tree.engine, tree.cache, gpus=gpus, memory=memory)
        for note in found[name].notes:
            logs.event("notice", level="warning", detail=f"{name}: {note.text}")
    return found


def engine_spec(
    engine: config.Engine, cache: config.Cache, installed: Installed, plan: Plan | None = None
) -> EngineSpec:
    """What the engine process is told: the settings and the plan; without one, what settings and card ask for."""
    plan = plan or planning.wanted(engine, cache, installed.card.defaults, installed.header).plan
    return EngineSpec(
        path=installed.path,
        context=plan.context,
        parallel=plan.parallel,
        pool_tokens=plan.pool_tokens,
        gpu_layers=plan.gpu_layers,
        require_gpu=engine.require_gpu,
        threads_decode=engine.threads_decode,
        threads_prefill=engine.threads_prefill,
        batch_tokens=plan.batch_tokens,
        sequences=plan.sequences,
        outputs=plan.outputs,
        chat_template=installed.card.chat_template,
        model_digest=_content_digest(installed),
        kv_type=engine.kv_type,
        flash_attention=plan.flash_attention,
        prefill_order=engine.prefill_order,
        prefix_cache=engine.prefix_cache,
        fast_forward=engine.fast_forward,
        speculation=engine.speculation,
        draft_path=engine.draft_model,
        host_cache_bytes=plan.host_cache_bytes,
        disk_cache_bytes=cache.disk_bytes if engine.prefix_cache else 0,
        cache_directory=str(config.cache_directory(cache)),
    )


def _content_digest(installed: Installed) -> str:
    """Names the content of a model's files: their digests, or of a user's own file its identity and last change."""
    if installed.source != "file":
        return ",".join(file.sha256 or "" for file in installed.files)
    states = [os.stat(os.path.join(installed.directory, file.name)) for file in installed.files]
    return ",".join(f"{each.st_dev}:{each.st_ino}:{each.st_size}:{each.st_mtime_ns}" for each in states)


def refuse_context(engine: config.Engine, installed: Installed, trained: int) -> None:
    """A context that was asked for and that the model was not trained for is refused; `trained` 0 is unknown."""
    asked = engine.context
    if asked is not None and 0 < trained < asked:
        raise config.ConfigError(
            f"engine.context is {asked}, but {installed.name} was trained for {trained} tokens.",
            hint=f"Set it to at most {trained}.",
        )


def served_model(
    tree: config.Config,
    installed: Installed,
    plan: Plan,
    is_default: bool,
    has_projector: bool,
    facts: EngineFacts | None,
) -> ServedModel:
    """The model as answered for: by what its engine said when it was last loaded, before that by its file and plan."""
    defaults = installed.card.defaults
    if facts is not None:
        context, parallel, has_chat = facts.context, facts.parallel, facts.has_chat_template
    else:
        context, parallel = min(plan.context, installed.header.context_length or plan.context), plan.parallel
        has_chat = installed.header.has_chat_template or installed.card.chat_template is not None
    capabilities, modalities = cards.abilities(installed.header, has_chat_template=has_chat)
    reads_images = "chat" in capabilities and (facts.images if facts is not None else has_projector)
    if "chat" in capabilities:
        capabilities = (*capabilities, *_of_chat(installed, facts), *(("vision",) if reads_images else ()))
    generates = "completion" in capabilities
    if generates and (facts.fim if facts is not None else installed.header.has_fim_tokens):
        capabilities = (*capabilities, "fim")
    most = min(defaults.max_output_tokens or context, context) if generates else 0
    reference = () if installed.source == "file" else (installed.reference,)  # a path is nobody's business
    ours = ("default", *tree.model.aliases) if is_default else ()
    names = (*ours, *reference, *installed.card.aliases)
    return ServedModel(
        id=installed.name,
        aliases=tuple(dict.fromkeys(name for name in names if name != installed.name)),
        card=installed.card,
        quantisation=installed.quantisation,
        created=int(installed.installed_at.timestamp()),
        context_length=context,
        max_output_tokens=most,
        default_output_tokens=min(defaults.default_output_tokens, most),
        wall_clock_s=defaults.wall_clock_s,
        parallel=parallel,
        sampling=defaults.sampling,
        architecture=installed.architecture,
        size_bytes=installed.size_bytes,
        digest=installed.sha256,
        capabilities=capabilities,
        input_modalities=("text", "image") if reads_images else ("text",),
        countries=tree.operator.locations,
        image_urls=tree.images.fetch != "off" or bool(tree.images.fetch_hosts),
        output_modalities=modalities,
        dimensions=(facts.dimensions if facts else installed.header.embedding_length) * ("embedding" in capabilities),
    )


def _of_chat(installed: Installed, facts: EngineFacts | None) -> tuple[Capability, ...]:
    """Whatever chats can be given tools; whether it thinks its template tells, once an engine has read that."""
    thinks = facts.reasoning if facts is not None else "reasoning" in installed.card.capabilities
    return ("tools", "reasoning") if thinks else ("tools",)


def refuse_limits(limits: config.Limits, installed: Mapping[str, Installed]) -> None:
    """Limits of a model that is not served would quietly limit nothing; raises `ConfigError`."""
    for each in limits.models:
        if each.model not in installed:
            raise config.ConfigError(
                f"limits.models has limits for {each.model}, which is not served.",
                hint=f"Served are: {', '.join(installed)}.",
            )


def has_key(auth: config.Auth) -> bool:
    """Whether callers can have a key; raises `ConfigError` for one that cannot be used."""
    return config.resolve_key(auth) is not None or KeyStore(config.keys_file(auth)).has_keys


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
