"""A real server in a thread, over a scripted engine, and a client that speaks raw bytes."""

from __future__ import annotations

import asyncio
import datetime
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from ocserve import config
from ocserve.accounts.billing import Billing
from ocserve.accounts.keys import KeyRing
from ocserve.accounts.keystore import KeyStore
from ocserve.accounts.past import NO_PAST, Past
from ocserve.errors import ModelNotFound
from ocserve.generation import RequestRecord
from ocserve.http.admin import Changed
from ocserve.http.application import build
from ocserve.http.edge.current import Edge
from ocserve.http.server import Stop, serve
from ocserve.modelcard import DatedPrices, ModelCard, Prices, SamplingDefaults, ServedModel, Tier
from ocserve.pages.frame import Text
from ocserve.pages.publication import Publication, Published, Texts
from ocserve.policy.hooks import open_hook
from ocserve.policy.judge import Judge
from ocserve.service import Service
from ocserve.telemetry import logs
from tests.scripted import ScriptedEngine, alone

KEY = "sk-test-0123456789abcdef"
MODEL = ServedModel(
    id="tiny",
    aliases=("default", "org/tiny:135m"),
    card=ModelCard(
        name="tiny",
        title="Tiny",
        family="llama",
        parameters=135_000_000,
        license="Apache-2.0",
        context_length=8192,
        variants=(),
    ),
    quantisation="Q4_1",
    created=1_790_000_000,
    context_length=8192,
    max_output_tokens=4096,
    default_output_tokens=256,
    wall_clock_s=60.0,
    parallel=8,
    sampling=SamplingDefaults(temperature=0.2, top_k=40),
)
# An operator who has stated so much that there is every page.
STATED = Publication(operator=config.Operator(email="help@acme.example"), texts=Texts(policy=Text.of("No spam.")))
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "Hi"}


@dataclass
class Answer:
    """One HTTP answer, taken apart."""

    status: int
    headers: dict[str, str]
    body: bytes
    raw: bytes = field(repr=False, default=b"")

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, after checking that it is one in OpenAI's shape."""
        assert self.headers["content-type"] == "application/json", self
        assert self.headers["x-request-id"]
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert isinstance(error["message"], str)
        assert error["message"]
        assert isinstance(error["type"], str)
        assert isinstance(error["code"], str)
        assert error["param"] is None or isinstance(error["param"], str)
        return error

    @property
    def code(self) -> str:
        """The code of a refusal, in whichever vendor's shape it is."""
        error = self.json["error"]
        if isinstance(error, str):
            error = self.json
        if "details" not in error:
            return str(error["code"])
        reason = error["details"][0]["reason"].lower()
        return "invalid_api_key" if reason == "api_key_invalid" else str(reason)

    @property
    def events(self) -> list[str]:
        """The `data:` payloads of an event stream."""
        return [
            block.removeprefix("data: ") for block in self.body.decode().split("\n\n") if block.startswith("data: ")
        ]


def parse(raw: bytes) -> Answer:
    """The first answer in `raw`; chunked bodies are joined."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            if not size or int(size, 16) == 0:
                break
            body += rest[: int(size, 16)]
            rest = rest[int(size, 16) + 2 :]
    else:
        body = rest[: int(headers["content-length"])] if "content-length" in headers else rest
    return Answer(int(lines[0].split()[1]), headers, body, raw)


class Control:
    """What administration asks of a scripted server: it has no store and no settings, and ends if `stop` is given."""

    settings: Mapping[str, object] = {"server.port": 0}
    drain_s = 5.0

    def __init__(self, stop: Stop | None = None) -> None:
        self._stop = stop

    async def include(self, reference: str, *, may_pull: bool) -> str:
        raise ModelNotFound("It is not installed.", param="model", code="model_not_installed")

    def may_forget(self, name: str) -> bool:
        return False

    def forget(self, name: str) -> None:
        raise AssertionError("nothing may be forgotten")

    async def reload(self) -> Changed:
        before, after = (Prices(prompt=price, completion="0.1") for price in ("0.1", "0.2"))
        tiered = replace(after, tiers=(Tier(above=10**6, completion="0.05"),))
        tomorrow = DatedPrices(since=datetime.date(2999, 1, 1), announced=True, steps=tiered.steps)
        today = DatedPrices(since=None, announced=False, steps=before.steps)
        dearer = replace(today, steps=replace(before, completion="0.3", request="0.5").steps)
        models = (
            config.ModelLimits(model="tiny", requests_per_minute=5, tokens_per_day=9),
            config.ModelLimits(model="other"),
        )
        return Changed(
            settings={"limits.queue": (64, 8), "limits.models": ((), models)},
            prices={
                "tiny": ((today,), (today, tomorrow)),
                "new": ((), (today,)),
                "dear": ((today,), (dearer,)),
                "gone": ((today,), ()),
            },
            more_prices=1234,
            notices=("a notice",),
        )

    def stop(self, deadline_s: float | None) -> None:
        if self._stop is not None:
            self._stop.ask()


class Served:
    """A running server."""

    def __init__(self, engine: ScriptedEngine, service: Service, port: int, stop: Callable[[], None]) -> None:
        self.engine = engine
        self.service = service
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.stop = stop
        self.thread: threading.Thread | None = None

    def connect(self, timeout: float = 5.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def raw(self, data: bytes, timeout: float = 5.0) -> bytes:
        """Send bytes and read until the server closes."""
        with self.connect(timeout) as peer:
            with suppress(OSError):  # refused before it was all sent; the answer is there all the same
                peer.sendall(data)
            return read_all(peer)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | list[tuple[str, str]] | None = None,
        timeout: float = 5.0,
    ) -> Answer:
        """One request on a connection of its own. A body that is not bytes is sent as JSON."""
        return parse(self.raw(self.compose(method, path, body, headers), timeout))

    def compose(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | list[tuple[str, str]] | None = None,
    ) -> bytes:
        given = list(headers.items()) if isinstance(headers, dict) else list(headers or [])
        names = {name.lower() for name, _ in given}
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        if "host" not in names:
            given.insert(0, ("Host", f"127.0.0.1:{self.port}"))
        if body is not None:
            if "content-type" not in names:
                given.append(("Content-Type", "application/json"))
            if "content-length" not in names and "transfer-encoding" not in names:
                given.append(("Content-Length", str(len(data))))
        given.append(("Connection", "close"))
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given if value != "(none)")]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + data

    def chat(self, timeout: float = 5.0, headers: dict[str, str] | None = None, **fields: Any) -> Answer:
        return self.request("POST", "/v1/chat/completions", {**CHAT, **fields}, headers, timeout)


def read_all(peer: socket.socket) -> bytes:
    data = b""
    with suppress(ConnectionResetError, TimeoutError):
        while piece := peer.recv(65536):
            data += piece
    return data


def read_one(peer: socket.socket) -> Answer:
    """The next answer on a connection that may stay open."""
    data = b""
    while piece := peer.recv(65536):
        data += piece
        head, separator, rest = data.partition(b"\r\n\r\n")
        if separator and len(rest) >= int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0):
            break
    return parse(data)


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Poll until `condition` holds; fails the test if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was never met"
        time.sleep(0.002)


@contextmanager
def serving(
    make_engine: Callable[[], ScriptedEngine] = ScriptedEngine,
    *,
    key: str | None = None,
    store: KeyStore | None = None,
    auth: config.Auth | None = None,
    limits: config.Limits | None = None,
    model: ServedModel = MODEL,
    billing: Billing | None = None,
    past: Past = NO_PAST,
    policy: config.Policy | None = None,
    publication: Publication = STATED,
    trace: Callable[[RequestRecord], None] | None = None,
    **settings: Any,
) -> Iterator[Served]:
    """A server on a free port, in a thread with its own loop. `policy` is the settings of its content policy."""
    server = replace(config.Server(), port=0, **settings)
    keys = KeyRing(key, auth or config.Auth(), store=store)
    ready = threading.Event()
    found: list[Served] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        engine = make_engine()
        branch = limits or config.Limits()
        hook = open_hook(policy) if policy else None
        judge = Judge(policy, hook, logs.event) if policy and hook else None
        service = alone(engine, model, branch, billing, past, judge, keys)
        stop = Stop()

        def on_ready(url: str) -> None:
            port = int(url.rpartition(":")[2])
            found.append(Served(engine, service, port, lambda: loop.call_soon_threadsafe(stop.ask)))
            ready.set()

        edge = Edge(server)
        app = build(service, keys, edge, Control(stop), Published(publication), trace)
        try:
            await serve(app, edge, on_ready, service.stop, stop=stop)
        finally:
            if judge:
                await judge.close()

    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:  # the test must see it
            failures.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    if failures:
        raise failures[0]
    served = found[0]
    served.thread = thread
    try:
        yield served
    finally:
        with suppress(RuntimeError):  # its loop may have closed already
            served.stop()
            served.stop()
        thread.join(10)
        assert not thread.is_alive(), "the server did not stop"
        if failures:
            raise failures[0]
