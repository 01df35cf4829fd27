"""The composition root: builds every object from the settings, in order, and closes them in reverse.

Nothing else constructs parts across layers, and no module holds an instance.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from msgspec.structs import replace

from ocserve import config
from ocserve.accounts.keys import KeyRing
from ocserve.accounts.limits import Limiter
from ocserve.catalog.store import Installed
from ocserve.engine.handle import EngineHandle, Supervision
from ocserve.engine.handle import LoadError as LoadError  # what a start can fail with, for the command line
from ocserve.engine.process import raise_descriptor_limit
from ocserve.engine.wire import EngineFacts, EngineSpec
from ocserve.http import application, server
from ocserve.http.server import CannotListen as CannotListen  # likewise
from ocserve.modelcard import ServedModel
from ocserve.service import Service
from ocserve.telemetry import logs


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running server's parts."""

    model: ServedModel
    facts: EngineFacts
    engine: EngineHandle
    service: Service
    asgi: application.App


async def serve(settings: config.Settings, installed: Installed, on_ready: Callable[[Daemon, str], None]) -> None:
    """Serve `installed` until a signal asks to stop. `on_ready` gets the base URL once requests are answered."""
    raise_descriptor_limit()
    address = settings.config.server
    sockets = server.bind(address.host, address.port)  # before the model is loaded: a taken port is known at once
    try:
        async with running(settings, installed) as daemon:
            await server.serve(
                daemon.asgi,
                address,
                on_ready=lambda url: on_ready(daemon, url),
                drain=daemon.service.drain,
                sockets=sockets,
            )
    finally:
        for bound in sockets:
            bound.close()


@asynccontextmanager
async def running(settings: config.Settings, installed: Installed) -> AsyncIterator[Daemon]:
    """Everything but the listening socket, from a loaded model to the ASGI application."""
    tree = settings.config
    key = config.resolve_key(tree.auth)
    refuse_exposure(tree.server, has_key=key is not None)
    engine = EngineHandle(
        engine_spec(tree.engine, tree.cache, installed),
        config.engine_environment(),
        Supervision(
            heartbeat_timeout_s=tree.engine.heartbeat_timeout_s,
            load_timeout_s=tree.engine.load_timeout_s,
            restart_wait_s=tree.engine.restart_wait_s,
            on_event=logs.event,
        ),
    )
    try:
        facts = await engine.open()
        model = served_model(tree, installed, facts)
        limiter = Limiter(tree.limits)
        service = Service(engine, (model,), limiter, tree.limits)
        asgi = application.build(service, KeyRing(key, tree.auth), tree.server)
        yield Daemon(model, facts, engine, service, asgi)
    finally:
        await engine.close()


def engine_spec(engine: config.Engine, cache: config.Cache, installed: Installed) -> EngineSpec:
    """What the engine process is told: the settings where they speak, the model's card elsewhere."""
    defaults = installed.card.defaults
    if engine.context is not None:
        defaults = replace(defaults, context=engine.context, pool_tokens=None)
    return EngineSpec(
        path=installed.path,
        context=defaults.context,
        parallel=engine.parallel or defaults.parallel,
        pool_tokens=engine.pool_tokens or defaults.pool,
        gpu_layers=engine.gpu_layers,
        require_gpu=engine.require_gpu,
        threads_decode=engine.threads_decode,
        threads_prefill=engine.threads_prefill,
        batch_tokens=engine.batch_tokens,
        chat_template=installed.card.chat_template,
        model_digest=_content_digest(installed),
        kv_type=engine.kv_type,
        prefill_order=engine.prefill_order,
        prefix_cache=engine.prefix_cache,
        fast_forward=engine.fast_forward,
        speculation=engine.speculation,
        draft_path=engine.draft_model,
        host_cache_bytes=cache.host_bytes if engine.prefix_cache else 0,
        disk_cache_bytes=cache.disk_bytes if engine.prefix_cache else 0,
        cache_directory=str(config.cache_directory(cache)),
    )


def _content_digest(installed: Installed) -> str:
    """Names the content of a model's files: their digests, or of a user's own file its identity and last change."""
    if installed.source != "file":
        return ",".join(file.sha256 or "" for file in installed.files)
    status = os.stat(installed.path)
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def served_model(tree: config.Config, installed: Installed, facts: EngineFacts) -> ServedModel:
    """The model as answered for, once the engine has said what it could do."""
    asked = tree.engine.context
    if asked is not None and asked > facts.context:
        raise config.ConfigError(
            f"engine.context is {asked}, but this model was trained for {facts.trained_context} tokens.",
            hint=f"Set it to at most {facts.trained_context}.",
        )
    defaults = installed.card.defaults
    most = min(defaults.max_output_tokens or facts.context, facts.context)
    reference = () if installed.source == "file" else (installed.reference,)  # a path is nobody's business
    names = ("default", *reference, *installed.card.aliases, *tree.model.aliases)
    return ServedModel(
        id=installed.name,
        aliases=tuple(dict.fromkeys(name for name in names if name != installed.name)),
        card=installed.card,
        quantisation=installed.quantisation,
        created=int(installed.installed_at.timestamp()),
        context_length=facts.context,
        max_output_tokens=most,
        default_output_tokens=min(defaults.default_output_tokens, most),
        wall_clock_s=defaults.wall_clock_s,
        parallel=facts.parallel,
        sampling=defaults.sampling,
        capabilities=("chat", "completion") if facts.has_chat_template else ("completion",),
    )


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
            hint="Set OCSERVE_API_KEY to a secret of at least 16 characters (or auth.key_file), or bind 127.0.0.1.",
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
