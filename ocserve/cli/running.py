"""How commands reach a running server: where it is, which key it gets, and what its refusals say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ocserve.cli import Failure

if TYPE_CHECKING:
    from ocserve.config import Server

F = TypeVar("F", bound=Callable[..., Any])

_ANSWER_S = 30.0


class Running:
    """A server that is asked for administration."""

    def __init__(self, url: str | None, key_from: str | None) -> None:
        """`url` None: the one on this machine. Nobody else gets the key of the settings."""
        from ocserve import config

        settings = config.load().config
        own = address(settings.server)
        self._named = url is not None
        self.url = (url or own).rstrip("/").removesuffix("/v1")
        self._key = config.key_variable(key_from) if key_from else None
        if self._key is None and self.url == own:
            self._key = config.resolve_key(settings.auth)

    def ask(self, method: str, path: str, body: dict[str, object] | None = None, *, within_s: float = 0.0) -> Any:
        """The answer to a request that may take `within_s` seconds longer than others. Raises `Failure`."""
        return asyncio.run(self._ask(method, path, body, _ANSWER_S + within_s))

    async def _ask(self, method: str, path: str, body: dict[str, object] | None, timeout_s: float) -> Any:
        import httpx2

        from ocserve import peer

        try:
            async with peer.connection(self._key, timeout_s) as client:
                answer = await client.request(method, self.url + path, json=body)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            hint = "`ocserve run` starts a server; --url names one that is elsewhere"
            if not self._named:
                hint += ", or at the port that it had before server.port was changed"
            raise Failure(
                f"no server answers at {peer.without_userinfo(self.url)} ({type(error).__name__})", hint
            ) from None
        try:
            found = answer.json()
        except (json.JSONDecodeError, UnicodeDecodeError):
            found = None
        if answer.status_code >= 400 or not isinstance(found, dict):
            raise _refused(found, answer.status_code)
        return found


def address(server: Server) -> str:
    """Where a server with these settings answers on this machine."""
    host = "127.0.0.1" if server.host in ("0.0.0.0", "::", "") else server.host  # noqa: S104
    return f"http://{f'[{host}]' if ':' in host else host}:{server.port}"


def _refused(found: Any, status: int) -> Failure:
    error = found.get("error") if isinstance(found, dict) else None
    if not isinstance(error, dict):
        return Failure(f"what answers there is no ocserve (status {status})", "--url names the server to ask")
    hint = None
    if error.get("code") in ("admin_scope_needed", "invalid_api_key"):
        hint = "name the variable that has an admin key, such as --key-from OCSERVE_API_KEY"
    return Failure(str(error.get("message")), hint)


def options(function: F) -> F:
    """Which server, with which key; and whether the answer is shown as JSON."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--key-from", metavar="NAME", help="Environment variable with an admin key."),
        click.option("--url", metavar="URL", help="The server (default: the one on this machine)."),
    ):  # fmt: skip
        function = option(function)
    return function


def show(answer: dict[str, Any], line: str, *, as_json: bool) -> None:
    """The answer as JSON, or a line for people."""
    click.echo(json.dumps(answer) if as_json else line)
