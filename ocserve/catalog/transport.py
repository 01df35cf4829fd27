"""One ranged GET with redirects followed by hand, because where a request may go and what it may carry is decided here.

Credentials stay with the configured hub's own host; a redirect may lead to another http(s) host, never from https down
to http, never to a link-local address, and to a private address only where the hub itself is at one.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from ocserve.catalog.errors import SourceRefused, SourceUnreachable

if TYPE_CHECKING:
    import httpx2

MAX_REDIRECTS = 5
CONNECT_TIMEOUT_S = 10.0
DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Body:
    """The answer to a ranged GET: where its bytes start in the file, and its chunks as they arrive."""

    start: int
    etag: str | None
    chunks: Iterator[bytes]


@contextmanager
def open_range(url: str, offset: int, size: int, headers: Mapping[str, str], stall_s: float) -> Iterator[Body]:
    """The file's bytes from `offset` on, or from 0 if the server answers a range with the whole file.

    Raises `SourceUnreachable` for anything that may pass, `SourceRefused` for what will not.
    """
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        with _follow(url, offset, headers, stall_s) as (response, etag):
            yield Body(_start(response, offset, size), etag, response.iter_raw())
    except httpx2.TimeoutException as error:
        raise SourceUnreachable("the download stalled") from error
    except (httpx2.HTTPError, httpx2.StreamError) as error:
        raise SourceUnreachable(f"the download broke off ({type(error).__name__})") from error
    except OfflineModeIsEnabled as error:
        raise SourceUnreachable("huggingface_hub is in offline mode", hint="unset HF_HUB_OFFLINE") from error


@contextmanager
def _follow(
    url: str, offset: int, headers: Mapping[str, str], stall_s: float
) -> Iterator[tuple[httpx2.Response, str | None]]:
    import httpx2
    from huggingface_hub import get_session

    timeout = httpx2.Timeout(CONNECT_TIMEOUT_S, read=stall_s)
    session = get_session()
    home, etag = url, None
    for _ in range(MAX_REDIRECTS + 1):
        at_home = _origin(url) == _origin(home)
        # Built anew for each hop: only a plain, credential-free request leaves the hub's host.
        sent = dict(headers) if at_home else {"user-agent": headers.get("user-agent", "ocserve")}
        sent["accept-encoding"] = "identity"
        if offset:
            sent["range"] = f"bytes={offset}-"
        with session.stream("GET", url, headers=sent, follow_redirects=False, timeout=timeout) as response:
            if at_home:
                etag = _plain_etag(response.headers.get("x-linked-etag") or response.headers.get("etag")) or etag
            if not response.has_redirect_location:
                yield response, etag
                return
            target = urljoin(url, response.headers["location"])
        _check_redirect(url, target, home)
        url = target
    raise SourceRefused("the hub redirects too often")


def _start(response: httpx2.Response, offset: int, size: int) -> int:
    """Where the body starts in the file; refuses a body that cannot belong to it."""
    status = response.status_code
    if status == 200:
        return 0
    if status == 206:
        unit, _, rest = response.headers.get("content-range", "").partition(" ")
        span, _, total = rest.partition("/")
        if unit == "bytes" and span.partition("-")[0] == str(offset) and total in (str(size), "*"):
            return offset
        raise SourceRefused("the hub answered with another range than the one asked for")
    if status in (401, 403):
        raise SourceRefused("the hub refused access to the file", hint="set HF_TOKEN for a private or gated model")
    if status in (404, 410):
        raise SourceRefused("the hub no longer has the file")
    if status == 416:
        raise SourceRefused("the hub says the file is shorter than announced")
    raise SourceUnreachable(f"the hub answered with status {status}")


def _check_redirect(url: str, target: str, home: str) -> None:
    scheme, host, _ = _origin(target)
    if scheme not in DEFAULT_PORTS or not host or "@" in urlsplit(target).netloc:
        raise SourceRefused("the hub redirects to something that is not a web address")
    if _origin(url)[0] == "https" and scheme == "http":
        raise SourceRefused("the hub redirects from https to http")
    address, own = _literal_address(host), _literal_address(_origin(home)[1])
    if address is None:
        return
    if address.is_link_local or (address.is_private and (own is None or not own.is_private)):
        raise SourceRefused("the hub redirects to an internal address")


def _literal_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    if host == "localhost":
        return ipaddress.IPv4Address("127.0.0.1")
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None  # a name


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        raise SourceRefused("the hub redirects to an address with an invalid port") from None
    return parts.scheme, parts.hostname or "", port or DEFAULT_PORTS.get(parts.scheme, 0)


def _plain_etag(etag: str | None) -> str | None:
    return etag.removeprefix("W/").strip('"') if etag else None
