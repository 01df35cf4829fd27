"""Every setting, once: a frozen tree of structs, and the only reader of the environment.

A value comes from, weakest first: the default here, `config.toml` in the user's configuration folder, an environment
variable `OCSERVE_<SECTION>_<NAME>`, a command-line flag. `Settings` is the tree with, for each value, where it came
from. A layer is handed its own branch and never sees the whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Port = Annotated[int, Meta(ge=0, le=65535)]
Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]


class _Branch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Server(_Branch):
    """The listening address and the guards at the edge. Times are seconds, sizes bytes."""

    host: str = "127.0.0.1"
    port: Port = 11711
    public_hosts: tuple[str, ...] = ()  # host names accepted in Host beside loopback and the bound address
    trusted_proxies: tuple[str, ...] = ()  # peers whose forwarding headers are accepted
    cors_origins: tuple[str, ...] = ()  # browser origins that may call; none by default
    max_body_bytes: Positive = 4 * 1024 * 1024
    max_json_depth: Positive = 64
    header_timeout_s: Seconds = 10.0
    body_timeout_s: Seconds = 30.0
    write_timeout_s: Seconds = 30.0
    keep_alive_s: Seconds = 15.0  # an idle connection between requests
    stream_heartbeat_s: Seconds = 10.0  # an SSE comment while no token comes
    drain_s: Seconds = 30.0  # how long accepted requests may finish after SIGTERM
    unknown_parameters: Literal["refuse", "ignore"] = "refuse"


class Auth(_Branch):
    """Who may call. Without a key every loopback caller is the anonymous one."""

    api_key: str | None = None
    key_file: Path | None = None
    anonymous: bool = True  # with a key set: whether loopback may still call without one


class Limits(_Branch):
    """Limits of each key; None is unlimited. `queue` bounds accepted generations that wait for a slot, over all keys."""

    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    concurrent_requests: Positive | None = None
    queue: Natural = 64


class Engine(_Branch):
    """The engine process. None means: from the model's card, or measured."""

    context: Positive | None = None
    parallel: Positive | None = None
    pool_tokens: Positive | None = None
    gpu_layers: Annotated[int, Meta(ge=-1)] = -1  # -1: all, when the installed llama.cpp can use a GPU
    require_gpu: bool = False
    threads_decode: Positive | None = None
    threads_prefill: Positive | None = None
    batch_tokens: Positive = 256  # most tokens computed in one step
    heartbeat_timeout_s: Seconds = 5.0
    load_timeout_s: Seconds = 600.0
    restart_wait_s: Seconds = 30.0  # how long a request waits for a restarting engine


class Model(_Branch):
    """Which model `ocserve run` serves when none is named, and further names it answers to."""

    default: str | None = None
    aliases: tuple[str, ...] = ()


class Store(_Branch):
    """Where models lie and where they come from."""

    directory: Path | None = None  # default: `models` under the user's data folder
    hub_endpoint: str = "https://huggingface.co"
    hub_token: str | None = None
    hub_timeout_s: Seconds = 5.0
    reserve_bytes: Natural = 512 * 1024 * 1024  # free disk space that a download leaves


class Log(_Branch):
    """Logging to stderr; `auto` is readable on a terminal and JSON lines elsewhere."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text"] = "auto"


class Config(_Branch):
    """The whole tree."""

    server: Server = Server()
    auth: Auth = Auth()
    limits: Limits = Limits()
    engine: Engine = Engine()
    model: Model = Model()
    store: Store = Store()
    log: Log = Log()
