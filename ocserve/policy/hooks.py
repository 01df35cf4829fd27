"""The two ways to reach whoever judges content: a program that is started for each question, or a server.

Neither learns more than the question, and what they answer is bounded. A program gets no shell, an environment of two
variables and a process group of its own, which ends as a whole.
"""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
from contextlib import suppress
from ipaddress import ip_address
from typing import TYPE_CHECKING, Protocol, TypeAlias
from urllib.parse import urlsplit

from ocserve import __version__, config
from ocserve.config import ConfigError
from ocserve.policy.protocol import NoVerdict

if TYPE_CHECKING:  # a server without a hook does not load it
    import httpx2

_MOST_BYTES = 64 * 1024  # of an answer
_REAP_S = 1.0  # for a killed program to be gone


class Hook(Protocol):
    """Whoever judges."""

    async def ask(self, question: bytes) -> bytes:
        """The answer to one question; raises `NoVerdict`. Cancelling it ends whatever it has begun."""

    async def close(self) -> None:
        """Let go of what is kept between questions."""


class CommandHook:
    """A program, started for each question."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._command = command

    async def ask(self, question: bytes) -> bytes:
        """What the program writes to stdout before it ends with status 0."""
        transport, program = await self._start()
        try:
            stdin = transport.get_pipe_transport(0)
            assert isinstance(stdin, asyncio.WriteTransport)
            stdin.write(question)
            stdin.close()
            answer = await program.answer
        except BaseException:
            _kill(transport)
            with suppress(TimeoutError):
                await asyncio.wait_for(program.exited.wait(), _REAP_S)
            raise
        finally:
            transport.close()
        if (status := transport.get_returncode()) != 0:
            raise NoVerdict(f"the program ended with status {status}")
        return answer

    async def _start(self) -> _Started:
        loop = asyncio.get_running_loop()
        starting = asyncio.ensure_future(
            loop.subprocess_exec(
                _Program,
                *self._command,
                stderr=asyncio.subprocess.DEVNULL,  # it may repeat what was asked
                env=config.bare_environment(),
                cwd="/",
                start_new_session=True,
            )
        )
        try:
            # The library would end a start that is cancelled without the children that there may be already.
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(_end_started)
            raise
        except OSError as error:
            raise NoVerdict(f"the program cannot be started: {error.strerror}") from None

    async def close(self) -> None:
        """Nothing is kept."""


def _kill(transport: asyncio.SubprocessTransport) -> None:
    """End a program and its children."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(transport.get_pid(), signal.SIGKILL)


def _end_started(started: asyncio.Future[_Started]) -> None:
    """End a program that nobody waits for any more."""
    if not started.cancelled() and started.exception() is None:
        transport, _ = started.result()
        _kill(transport)
        transport.close()


class _Program(asyncio.SubprocessProtocol):
    """One run: `answer` is all that it has written once it has ended and nothing holds its stdout."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.exited = asyncio.Event()
        self._written = bytearray()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._written += data
        if len(self._written) > _MOST_BYTES and not self.answer.done():
            self.answer.set_exception(NoVerdict(f"the program wrote more than {_MOST_BYTES} bytes"))

    def process_exited(self) -> None:
        self.exited.set()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.answer.done():
            self.answer.set_result(bytes(self._written))


_Started: TypeAlias = tuple[asyncio.SubprocessTransport, _Program]


class UrlHook:
    """A server, over connections that are kept."""

    def __init__(self, url: str, token: str | None) -> None:
        self._url = url
        self._headers = {"content-type": "application/json", "accept": "application/json"}
        self._headers |= {"accept-encoding": "identity", "user-agent": f"ocserve/{__version__}"}
        if token is not None:
            self._headers["authorization"] = f"Bearer {token}"
        self._client: asyncio.Task[httpx2.AsyncClient] | None = None

    async def ask(self, question: bytes) -> bytes:
        """The body of an answer with status 200. How long it takes is the caller's matter."""
        if self._client is None:
            self._client = asyncio.create_task(_client())
        client = await asyncio.shield(self._client)
        import httpx2

        try:
            sent = client.build_request("POST", self._url, content=question, headers=self._headers)
            answer = await client.send(sent, stream=True)
            try:
                if answer.status_code != 200:
                    raise NoVerdict(f"the server answered with status {answer.status_code}")
                body = bytearray()
                async for piece in answer.aiter_raw():
                    body += piece
                    if len(body) > _MOST_BYTES:
                        raise NoVerdict(f"the server answered with more than {_MOST_BYTES} bytes")
                return bytes(body)
            finally:
                await answer.aclose()
        except (OSError, ValueError, httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as error:
            raise NoVerdict(f"the server cannot be asked ({type(error).__name__})") from None

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await (await self._client).aclose()


async def _client() -> httpx2.AsyncClient:
    context = await asyncio.to_thread(_ssl_context)
    import httpx2

    return httpx2.AsyncClient(trust_env=False, follow_redirects=False, verify=context, timeout=None)


def _ssl_context() -> ssl.SSLContext:
    """Reads the library and the well-known certificates from disk, which takes a while."""
    import httpx2

    return httpx2.create_ssl_context(trust_env=False)


def open_hook(settings: config.Policy) -> Hook | None:
    """Whoever the settings name to judge, None being nobody. Raises `ConfigError`."""
    if settings.command and settings.url is not None:
        raise ConfigError("policy.command and policy.url are both set, and one of them judges.", "Unset the other.")
    if not settings.command and settings.url is None:
        return None
    if not settings.checks:
        raise ConfigError("policy.checks is empty, so nothing would be judged.", "Name prompt, answer or both.")
    if settings.url is None:
        return CommandHook(settings.command)
    _check_url(settings.url, settings.http_hosts)
    return UrlHook(settings.url, settings.token)


def _check_url(url: str, http_hosts: tuple[str, ...]) -> None:
    try:
        parsed = urlsplit(url)
        host = parsed.hostname or ""
        has_user = parsed.username is not None or parsed.password is not None
        _ = parsed.port
    except ValueError:
        raise ConfigError("policy.url is not an address.", "for example https://moderation.example.com/check") from None
    if not host or parsed.scheme not in ("http", "https"):
        raise ConfigError("policy.url is not an address.", "for example https://moderation.example.com/check")
    if has_user:
        raise ConfigError("policy.url holds a name or a password.", "Set policy.token, which is never shown.")
    if parsed.scheme == "http" and not (_is_loopback(host) or host in http_hosts):
        raise ConfigError(
            "policy.url is plain http to another machine, which would show prompts to whoever is between.",
            "Use https, or name the host in policy.http_hosts.",
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
