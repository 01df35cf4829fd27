"""How our instruments reach a server over HTTP: a connection, and the events of a stream.

Knows no endpoint and no vendor; `ocserve bench` and `ocserve check` share it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl

    import httpx2

CONNECT_TIMEOUT_S = 10.0


def connection(key: str | None, timeout_s: float) -> httpx2.AsyncClient:
    """A client that presents `key`, without a limit on connections and without the environment's proxies."""
    import httpx2  # slow to import; `ocserve --help` does not need it

    return httpx2.AsyncClient(
        headers={"authorization": f"Bearer {key}"} if key else {},
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        timeout=httpx2.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
        verify=_trusted(),
        trust_env=False,
    )


@functools.cache
def _trusted() -> ssl.SSLContext:
    """Whose certificates are accepted; read once, since that takes longer than a request."""
    import httpx2

    return httpx2.create_ssl_context(trust_env=False)


class EventLines:
    """The lines of an event stream out of pieces of bytes that may end anywhere."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The lines that `data` completes, without their ends; empty ones are left out."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return (line.rstrip(b"\r") for line in lines if line.strip())


def payload(line: bytes) -> bytes | None:
    """What a `data:` line carries; None for any other line."""
    return line[5:].strip() if line.startswith(b"data:") else None


def without_userinfo(url: str) -> str:
    """The address as it may stand in a report."""
    scheme, separator, rest = url.rpartition("://")
    host, slash, path = rest.partition("/")
    return scheme + separator + host.rpartition("@")[2] + slash + path
