"""The tree of settings: every value, its type, its default and what it is for.

Read through `ocserve.config`, which fills it; a layer is handed its own branch and never sees the whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from ocserve.kinds import (
    BatchTokens,
    BodyBytes,
    Natural,
    Port,
    Positive,
    Seconds,
    Section,
    Sequences,
    Text,
    Threads,
    Tokens,
)
from ocserve.operating import Operator, Otel, Policy

TEXT_BODY_BYTES = 4 * 1024 * 1024
IMAGE_BODY_BYTES = 32 * 1024 * 1024  # four photographs of five megabytes in base64, and what is said of them


class Server(Section, frozen=True):
    """The listening address and the guards at the edge. Times are seconds, sizes bytes."""

    host: Annotated[Text, Meta(description="address to listen on; any other than loopback needs a key")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="port to listen on; 0 takes any free one")] = 11711
    public_hosts: Annotated[
        tuple[Text, ...],
        Meta(
            description="host names accepted in Host beside loopback and the bound address; with any, every caller "
            "needs the key"
        ),
    ] = ()
    trusted_proxies: Annotated[
        tuple[Text, ...],
        Meta(
            description="addresses or networks of reverse proxies; with any, every caller needs the key and requests "
            "with forwarding headers from other peers are refused; the headers' content is never used"
        ),
    ] = ()
    cors_origins: Annotated[tuple[Text, ...], Meta(description="browser origins that may call")] = ()
    max_body_bytes: Annotated[
        BodyBytes | None,
        Meta(description="largest request body; unset: 4 MiB, or 32 MiB where a model that is served reads images"),
    ] = None
    max_json_depth: Annotated[Positive, Meta(description="deepest nesting of a JSON body")] = 64
    header_timeout_s: Annotated[Seconds, Meta(description="time for a request's headers to arrive")] = 10.0
    body_timeout_s: Annotated[Seconds, Meta(description="time for a request's body to arrive")] = 30.0
    write_timeout_s: Annotated[Seconds, Meta(description="time for a client to take a piece of the answer")] = 30.0
    keep_alive_s: Annotated[Seconds, Meta(description="how long an idle connection stays open")] = 15.0
    stream_heartbeat_s: Annotated[Seconds, Meta(description="silence in a stream before a comment is sent")] = 10.0
    socket_idle_s: Annotated[Seconds, Meta(description="how long a WebSocket stays open between two messages")] = 900.0
    drain_s: Annotated[Seconds, Meta(description="how long accepted requests may go on after SIGTERM")] = 30.0
    stored_responses: Annotated[
        Natural,
        Meta(description="most responses kept in memory for `previous_response_id` and retrieval; 0 keeps none"),
    ] = 1024
    stored_response_bytes: Annotated[Natural, Meta(description="memory for stored responses, over all keys")] = (
        64 * 1024 * 1024
    )
    stored_response_s: Annotated[Seconds, Meta(description="how long a response stays stored")] = 24 * 3600.0
    idempotent_answer_s: Annotated[
        Seconds, Meta(description="how long the answer to a request with an Idempotency-Key is kept for repeats of it")
    ] = 24 * 3600.0
    idempotent_answer_bytes: Annotated[Positive, Meta(description="memory for such answers, over all keys")] = (
        64 * 1024 * 1024
    )
    unknown_parameters: Annotated[
        Literal["refuse", "ignore"], Meta(description="what happens to request parameters that nobody knows")
    ] = "refuse"

    @property
    def most_body_bytes(self) -> int:
        """`max_body_bytes`; where it is unset and nobody has decided, that of servers without images."""
        return self.max_body_bytes or TEXT_BODY_BYTES


class Auth(Section, frozen=True):
    """Who may call. Without any key every loopback caller is the anonymous one."""

    api_key: Annotated[Text | None, Meta(description="a key that may do everything; wins over key_file")] = None
    key_file: Annotated[Path | None, Meta(description="file whose first line is such a key")] = None
    keys_file: Annotated[
        Path | None,
        Meta(description="file of the keys that `ocserve keys` makes; unset: `keys.json` in the user's data folder"),
    ] = None
    anonymous: Annotated[
        bool, Meta(description="whether loopback may still call and read /metrics without a key once there is one")
    ] = True


class Allowance(Section, frozen=True):
    """How much may be used; None is unlimited. A minute's or a day's worth may come at once."""

    requests_per_minute: Annotated[
        Positive | None, Meta(description="requests of a key per minute; a minute's worth may come at once")
    ] = None
    tokens_per_minute: Annotated[
        Positive | None,
        Meta(description="prompt and answer tokens of a key per minute; a minute's worth may come at once"),
    ] = None
    requests_per_day: Annotated[
        Positive | None, Meta(description="requests of a key per day; a day's worth may come at once")
    ] = None
    tokens_per_day: Annotated[
        Positive | None, Meta(description="prompt and answer tokens of a key per day; a day's worth may come at once")
    ] = None
    concurrent_requests: Annotated[Positive | None, Meta(description="requests of a key at the same time")] = None


class ModelLimits(Allowance, frozen=True, kw_only=True):
    """What each key may use of one model, beside what it may use of all."""

    model: Annotated[Text, Meta(description="the model's name, as `ocserve list` has it")]


class Limits(Allowance, frozen=True):
    """Limits of each key that has none of its own. `queue` is over all keys."""

    queue: Annotated[
        Natural,
        Meta(description="answers that may wait for a slot, per model; the last few are for who was told to come back"),
    ] = 64
    spare_slots: Annotated[
        Natural | None,
        Meta(
            description="slots of each model that no key alone fills, so that others' requests start at once; unset: "
            "one as soon as there are several keys"
        ),
    ] = None
    models: Annotated[
        tuple[ModelLimits, ...],
        Meta(
            description="limits of each key for one model: [[limits.models]] tables with `model` and any of the above"
        ),
    ] = ()


class Engine(Section, frozen=True):
    """The engine process. None means: from the model's card, or measured."""

    context: Annotated[Tokens | None, Meta(description="longest sequence, in tokens")] = None
    parallel: Annotated[Sequences | None, Meta(description="sequences decoded together")] = None
    pool_tokens: Annotated[Tokens | None, Meta(description="tokens of memory that all sequences share")] = None
    gpu_layers: Annotated[int, Meta(ge=-1, le=9999, description="layers to place on a GPU; -1 is all of them")] = -1
    require_gpu: Annotated[bool, Meta(description="whether to refuse to start without a GPU")] = False
    threads_decode: Annotated[Threads | None, Meta(description="threads that generate")] = None
    threads_prefill: Annotated[Threads | None, Meta(description="threads that read prompts")] = None
    batch_tokens: Annotated[BatchTokens, Meta(description="most tokens computed in one step")] = 256
    kv_type: Annotated[
        Literal["f16", "bf16", "q8_0", "q4_0", "f32"], Meta(description="how the KV cache stores numbers")
    ] = "f16"
    flash_attention: Annotated[
        Literal["auto", "on", "off"],
        Meta(
            description="flash attention; auto: on with a GPU, off on a processor where the scores of a batch fit "
            "into memory, which makes prompts beside running streams and long conversations faster there"
        ),
    ] = "auto"
    prefill_order: Annotated[
        Literal["serial", "joint"],
        Meta(description="prompts one after another, or all waiting prompts in equal shares (for comparison)"),
    ] = "serial"
    prefix_cache: Annotated[bool, Meta(description="whether computed prefixes are kept and shared within a key")] = True
    fast_forward: Annotated[
        bool, Meta(description="whether tokens that a schema forces are computed together where that is faster")
    ] = True
    speculation: Annotated[
        Literal["auto", "off"], Meta(description="draft tokens and verify them together where that is faster")
    ] = "auto"
    draft_model: Annotated[
        Text | None, Meta(description="a small model with the vocabulary of the first model served that drafts for it")
    ] = None
    heartbeat_timeout_s: Annotated[Seconds, Meta(description="silence after which the engine counts as hung")] = 10.0
    load_timeout_s: Annotated[Seconds, Meta(description="time for a model to load")] = 600.0
    restart_wait_s: Annotated[Seconds, Meta(description="how long a request waits for a restarting engine")] = 30.0


class Images(Section, frozen=True):
    """What images requests may have, for models that read them. Sizes are bytes, times seconds."""

    max_count: Annotated[Natural, Meta(description="most images of a request")] = 16
    max_file_bytes: Annotated[
        Positive, Meta(description="largest image file; `server.max_body_bytes` bounds it too")
    ] = 20 * 1024 * 1024
    max_pixels: Annotated[Positive, Meta(description="most pixels of an image, judged before it is decoded")] = (
        40_000_000
    )
    max_total_pixels: Annotated[Positive, Meta(description="most pixels of a request's images together")] = 100_000_000
    fetch: Annotated[
        Literal["off", "public"],
        Meta(description="whether images are fetched from the https addresses that requests name, if these are public"),
    ] = "off"
    fetch_hosts: Annotated[
        tuple[Text, ...],
        Meta(description="hosts (or host:port) that images are fetched from, also if private and by plain http"),
    ] = ()
    fetch_timeout_s: Annotated[
        Seconds,
        Meta(description="how long fetching a request's images may take, all together and with the wait for it"),
    ] = 15.0


class Cache(Section, frozen=True):
    """Where computed prefixes go when the device's KV pool needs their cells. Sizes are bytes; 0 turns a tier off."""

    host_bytes: Annotated[
        Natural, Meta(description="main memory of each engine for prefixes and for parked answers, half for each")
    ] = 512 * 1024 * 1024
    disk_bytes: Annotated[
        Natural, Meta(description="disk space for prefixes (files hold what prompts computed; mode 0600)")
    ] = 2 * 1024 * 1024 * 1024
    directory: Annotated[
        Path | None, Meta(description="folder for prefixes and measured profiles; unset: the user's cache folder")
    ] = None


class Model(Section, frozen=True):
    """Which models `ocserve run` serves when none is named, and how long they stay in memory. Times are seconds."""

    default: Annotated[Text | None, Meta(description="model to serve when none is named")] = None
    aliases: Annotated[tuple[Text, ...], Meta(description="further names that the default model answers to")] = ()
    projector: Annotated[
        Text | None,
        Meta(
            description="file that lets the default model read images; unset: an mmproj*.gguf beside the model's file"
        ),
    ] = None
    also: Annotated[tuple[Text, ...], Meta(description="further models, each loaded at its first request")] = ()
    serve_installed: Annotated[
        bool, Meta(description="whether models in the store are served too, each loaded at its first request")
    ] = True
    idle_unload_s: Annotated[
        Seconds | None, Meta(description="unload a model that nobody has used for so long; unset: never")
    ] = None
    most_loaded: Annotated[
        Positive | None, Meta(description="most models in memory at a time; unset: as many as fit")
    ] = None
    room_wait_s: Annotated[
        Seconds, Meta(description="how long a request waits until the loading of its model can begin")
    ] = 30.0


class Store(Section, frozen=True):
    """Where models lie and where they come from."""

    directory: Annotated[
        Path | None, Meta(description="folder for models; unset: `models` in the user's data folder")
    ] = None
    hub_endpoint: Annotated[Text, Meta(description="address of the model hub")] = "https://huggingface.co"
    hub_token: Annotated[Text | None, Meta(description="credential for the model hub")] = None
    hub_timeout_s: Annotated[Seconds, Meta(description="how long the hub may take to answer")] = 5.0
    reserve_bytes: Annotated[Natural, Meta(description="free disk space that a download leaves")] = 512 * 1024 * 1024


class Billing(Section, frozen=True):
    """What is charged. Without a price list nothing is."""

    prices: Annotated[Path | None, Meta(description="TOML file with the price of each model from a day on")] = None
    unpriced: Annotated[
        Literal["serve", "refuse"],
        Meta(description="what happens to requests for a model that the price list leaves out: served free, or 404"),
    ] = "serve"
    cancelled: Annotated[
        Literal["used", "free"],
        Meta(description="what a request costs whose client went away: what it used up to then, or nothing"),
    ] = "used"
    failed: Annotated[
        Literal["used", "free"],
        Meta(description="what a request costs that failed by the server's fault after it began"),
    ] = "free"


class Ledger(Section, frozen=True):
    """The record of what was used: a row for each request, with counts and never content."""

    use: Annotated[
        Literal["auto", "on", "off"],
        Meta(
            description="whether requests are recorded; auto: yes, and without a key and prices the server also runs "
            "where they cannot be, with a warning"
        ),
    ] = "auto"
    directory: Annotated[
        Path | None, Meta(description="folder of the ledger, on a local disk; unset: the user's data folder")
    ] = None
    retention_days: Annotated[Positive, Meta(description="how long rows are kept")] = 400


class Log(Section, frozen=True):
    """Logging to stderr or to a file; `auto` is readable on a terminal and JSON lines elsewhere."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="least important level that is logged")
    ] = "info"
    format: Annotated[Literal["auto", "json", "text"], Meta(description="how a log line looks")] = "auto"
    file: Annotated[
        Path | None, Meta(description="file to log to instead of stderr, made with mode 0600 and rotated")
    ] = None
    max_bytes: Annotated[Positive, Meta(description="size at which log.file is set aside for a new one")] = (
        64 * 1024 * 1024
    )
    backups: Annotated[Positive, Meta(description="how many files set aside are kept, as log.file.1 and so on")] = 5


class Config(Section, frozen=True):
    """The whole tree."""

    server: Server = Server()
    auth: Auth = Auth()
    limits: Limits = Limits()
    engine: Engine = Engine()
    images: Images = Images()
    cache: Cache = Cache()
    model: Model = Model()
    store: Store = Store()
    billing: Billing = Billing()
    ledger: Ledger = Ledger()
    log: Log = Log()
    policy: Policy = Policy()
    operator: Operator = Operator()
    otel: Otel = Otel()
