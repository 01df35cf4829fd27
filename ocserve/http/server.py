"""Listening, serving and stopping: uvicorn as a library, with the order of a stop that does not break streams.

A first SIGTERM or SIGINT: readiness goes and new work is refused while the listener still answers, accepted work
finishes, then the listener closes. A second one: whatever still runs is ended at once, with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from ocserve.http.connection import EdgeConfig
from ocserve.http.edge.current import Edge

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """The wish to stop; the second wish is impatient. Signals set it, and so may a test."""

    def __init__(self) -> None:
        self.wanted = asyncio.Event()
        self.at_once = asyncio.Event()
        self.deadline_s: float | None = None  # of the drain; None: as the settings say

    def ask(self) -> None:
        """Once: drain. Twice: now."""
        (self.at_once if self.wanted.is_set() else self.wanted).set()


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handling, which would close the listener before the drain."""

    def __init__(self, settings: uvicorn.Config) -> None:
        super().__init__(settings)
        self.accepting = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.accepting.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class CannotListen(Exception):
    """The address cannot be had; the text names it and says why."""


def bind(host: str, port: int) -> list[socket.socket]:
    """Bound sockets for `host`, all on one port, not listening yet: nobody waits while a model loads."""
    sockets: list[socket.socket] = []
    try:
        for family, _, _, _, address in socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            shared = sockets[0].getsockname()[1] if sockets else port
            sockets.append(_bind(family, (address[0], shared, *address[2:])))
    except (OSError, UnicodeError) as error:  # an impossible name fails in its IDNA encoding
        for bound in sockets:
            bound.close()
        reason = getattr(error, "strerror", None) or "not a host name"
        raise CannotListen(f"cannot listen on {host or 'any address'} port {port}: {reason}") from None
    return sockets


def _bind(family: int, address: tuple[object, ...]) -> socket.socket:
    # The protocol is named because asyncio sets TCP_NODELAY only on sockets that say they are TCP; without it every
    # answer on a kept-alive connection waits 40 ms for a delayed acknowledgement.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if hasattr(socket, "SO_REUSEPORT"):  # on Windows SO_REUSEADDR would let two servers share the port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    bound.setblocking(False)
    return bound


async def serve(
    app: ASGIApp,
    edge: Edge,
    on_ready: Callable[[str], None],
    drain: Callable[[float], Awaitable[None]],
    *,
    reload: Callable[[], Awaitable[None]] | None = None,
    sockets: list[socket.socket] | None = None,
    stop: Stop | None = None,
) -> None:
    """Serve until asked to stop, on `sockets` from `bind`.

    `on_ready` gets the base URL once connections are accepted; `drain(deadline_s)` returns when accepted work is done.
    `reload` is what SIGHUP asks for; without one it does what it did.
    """
    stop = stop or Stop()
    settings = edge.now
    sockets = sockets or bind(settings.host, settings.port)
    server = _Server(EdgeConfig(app, settings))
    with _signals(stop), _hangups(reload, stop):
        serving = asyncio.create_task(server.serve(sockets=sockets))
        try:
            await _first(serving, server.accepting.wait())
            on_ready(_url(settings.host, sockets[0].getsockname()[1]))
            await _first(serving, stop.wanted.wait())
            draining = asyncio.ensure_future(drain(edge.now.drain_s if stop.deadline_s is None else stop.deadline_s))
            await _first(draining, stop.at_once.wait())
            if stop.at_once.is_set():
                draining.cancel()
                await drain(0.0)  # what still runs ends with an error that its client can read
        finally:
            server.should_exit = True
            server.force_exit = stop.at_once.is_set()
            await serving


async def _first(main: asyncio.Future[None], other: Awaitable[object]) -> None:
    """Wait for `main` or `other`, whichever comes first; a failure of `main` is raised."""
    second = asyncio.ensure_future(other)
    both: set[asyncio.Future[Any]] = {main, second}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        second.cancel()
    if main.done():
        main.result()


@contextlib.contextmanager
def _signals(stop: Stop) -> Iterator[None]:
    """Route SIGINT and SIGTERM to `stop` where signals arrive at all: in the main thread.

    Once a stop was asked for, a further signal may not cut off what closes after this: engines and the ledger.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.ask)) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if stop.wanted.is_set() else handler)


def ignore_hangups() -> None:
    """Until `serve` obeys it, SIGHUP ends nothing: what is being loaded has read its settings a moment ago."""
    number = getattr(signal, "SIGHUP", None)
    if number is not None and threading.current_thread() is threading.main_thread():
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _hangups(reload: Callable[[], Awaitable[None]] | None, stop: Stop) -> Iterator[None]:
    """Have SIGHUP reload, one after another, where there is such a signal and it arrives here.

    As with the others it may not cut off what closes after this.
    """
    number = getattr(signal, "SIGHUP", None)
    if reload is None or number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()

    async def obey() -> None:
        while True:
            await asked.wait()
            asked.clear()
            await reload()

    obeying = asyncio.create_task(obey(), name="reload-at-hangup")
    before = signal.signal(number, lambda *_: loop.call_soon_threadsafe(asked.set))
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_IGN if stop.wanted.is_set() else before)
        obeying.cancel()


def _url(host: str, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{shown}:{port}"
