"""Images from the addresses that requests name. Off unless the operator turns it on.

A request must not make this machine reach what its sender could not: a name is resolved once, every address that it has
must be public, and the connection is made to the very address that was checked, after a redirect as before it. What the
network says stays here: all failures read alike. Some requests fetch at a time, one image after the other, of each key
a part of them at most; the others wait for their turn, no longer than fetching may take altogether.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urljoin

from msgspec.structs import replace

from ocserve import __version__
from ocserve.api.images import MEDIA_TYPES
from ocserve.config import Images
from ocserve.errors import InvalidRequest, Overloaded
from ocserve.generation import ChatPrompt, Image

if TYPE_CHECKING:  # a server that fetches nothing does not load it
    import httpx2

_MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_DEFAULT_PORTS = {"http": 80, "https": 443}
# Requests that fetch at the same time: each has one connection or one name that is looked up.
_AT_ONCE, _MOST_OF_A_KEY = 8, 4
_MOST_WAITING = 32  # of a key
_RETRY_S = 2.0
_MOST_BYTES = 32 * 1024 * 1024  # of a request's images together, in a message to the engine

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Coroutine[None, None, list[str]]]


class _Refused(Exception):
    """An address that nothing is fetched from, or an answer that is no image."""


@dataclass(frozen=True, slots=True)
class _Target:
    """Where to connect to, and for whom."""

    url: httpx2.URL
    host: str
    address: str


class _Places:
    """Which requests fetch now, by their keys; the others in the order in which they came."""

    def __init__(self) -> None:
        self._taken: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    async def take(self, key: str) -> bool:
        """Wait for a place; True if it was there at once. Raises `Overloaded` where too many of the key wait."""
        if self._free(key):
            self._taken[key] += 1
            return True
        if sum(each == key for each, _ in self._waiting) >= _MOST_WAITING:
            raise _busy()
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((key, turn))
        try:
            await turn
            return False
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was given a place in the same moment
                self.give(key)
            self._waiting = [each for each in self._waiting if each[1] is not turn]
            raise

    def give(self, key: str) -> None:
        """Leave a place of this key to whoever waits longest and may have it."""
        self._taken[key] -= 1
        self._taken += Counter()  # without those that have none
        for other, turn in list(self._waiting):
            if not turn.done() and self._free(other):
                self._taken[other] += 1
                self._waiting.remove((other, turn))
                turn.set_result(None)

    def _free(self, key: str) -> bool:
        return self._taken.total() < _AT_ONCE and self._taken[key] < _MOST_OF_A_KEY


@dataclass(slots=True)
class _Visit:
    """A request whose images are fetched: at which of them it is, and which name is or was looked up last."""

    where: str
    alone: bool = False  # whether it has waited for no other
    lookup: asyncio.Future[list[str]] | None = None


class ImageFetcher:
    """Fetches images under the limits of `settings`."""

    def __init__(
        self, settings: Images, *, resolve: Resolve | None = None, context: ssl.SSLContext | None = None
    ) -> None:
        """`resolve` gives all addresses of a name; None: those that the system knows.

        `context` says whose certificates are believed; None: those that are well known.
        """
        self._settings = settings
        self._context = context
        self._resolve = resolve or self._looked_up
        self._places = _Places()
        # Looking up a name may take the system's resolver minutes, whoever waits for it.
        self._threads = ThreadPoolExecutor(_AT_ONCE, "names")

    def obey(self, settings: Images) -> None:
        """Go by other limits, for requests that come from now on."""
        self._settings = settings

    async def __call__(self, prompt: ChatPrompt, key: str) -> ChatPrompt:
        """The prompt with its images; `key` is whose request it is.

        Raises `InvalidRequest`, which names the image, and `Overloaded` for a request that had to wait for too long.
        """
        named = [image for message in prompt.messages for image in message.images if image.url is not None]
        if not named:
            return prompt
        if len(named) > self._settings.max_count:
            where, most = named[self._settings.max_count].where, self._settings.max_count
            raise InvalidRequest(f"Invalid '{where}': a request has at most {most} images.", param=where)
        visit = _Visit(named[0].where)
        try:
            async with asyncio.timeout(self._settings.fetch_timeout_s):
                visit.alone = await self._places.take(key)
                try:
                    fetched = await self._all(named, visit)
                finally:
                    self._end(visit, key)
        except TimeoutError:
            raise (self._failed(visit) if visit.alone else _busy()) from None
        return replace(
            prompt,
            messages=tuple(
                replace(message, images=tuple(_filled(image, fetched) for image in message.images))
                for message in prompt.messages
            ),
        )

    def _end(self, visit: _Visit, key: str) -> None:
        """Give the place back, once a name that was given up is not looked up any more: its thread is taken so long."""
        lookup = visit.lookup
        if lookup is None or lookup.done():
            self._places.give(key)
            return

        def ended(found: asyncio.Future[list[str]]) -> None:
            self._places.give(key)
            if not found.cancelled():
                found.exception()  # nobody else asks

        lookup.add_done_callback(ended)

    async def _all(self, named: Sequence[Image], visit: _Visit) -> dict[str, bytes]:
        """The images by their addresses, one fetched after the other."""
        fetched: dict[str, bytes] = {}
        size = 0
        for image in named:
            assert image.url is not None
            visit.where = image.where
            if image.url not in fetched:
                fetched[image.url] = await self._bytes(image.url, visit)
            size += len(fetched[image.url])
            if size > _MOST_BYTES:
                raise InvalidRequest(
                    f"Invalid '{image.where}': the images of a request have at most {_MOST_BYTES} bytes together.",
                    param=image.where,
                )
        return fetched

    async def _bytes(self, url: str, visit: _Visit) -> bytes:
        import httpx2

        try:
            return await self._fetch(url, visit)
        except (_Refused, OSError, ValueError, httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError):
            raise self._failed(visit) from None

    def _failed(self, visit: _Visit) -> InvalidRequest:
        return InvalidRequest(
            f"Invalid '{visit.where}': the image could not be fetched. It must be at a public https address, in one of "
            f"the formats {', '.join(MEDIA_TYPES)}, with at most {self._settings.max_file_bytes} bytes, and all images "
            f"of a request must come within {self._settings.fetch_timeout_s:g} seconds.",
            param=visit.where,
            code="image_download_failed",
        )

    async def _looked_up(self, host: str, port: int) -> list[str]:
        """All addresses of a name; raises `OSError`."""
        ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, ask)
        return [str(entry[4][0]) for entry in found]

    async def _fetch(self, url: str, visit: _Visit) -> bytes:
        import httpx2

        for _ in range(_MAX_REDIRECTS + 1):
            target = await self._target(url, visit)
            if self._context is None:
                make = partial(httpx2.create_ssl_context, trust_env=False)
                self._context = await asyncio.get_running_loop().run_in_executor(self._threads, make)
            async with httpx2.AsyncClient(trust_env=False, follow_redirects=False, verify=self._context) as client:
                answer = await client.send(_request(client, target), stream=True)
                try:
                    if answer.status_code not in _REDIRECTS:
                        return await self._image(answer)
                    url = urljoin(str(target.url), answer.headers.get("location", ""))
                finally:
                    await answer.aclose()
        raise _Refused

    async def _target(self, url: str, visit: _Visit) -> _Target:
        import httpx2

        parsed = httpx2.URL(url)
        host, port = parsed.host, parsed.port or _DEFAULT_PORTS.get(parsed.scheme, 0)
        trusted = bool({host, f"{host}:{port}"} & set(self._settings.fetch_hosts))
        if parsed.scheme not in _DEFAULT_PORTS or not host or parsed.userinfo:
            raise _Refused
        if not trusted and (self._settings.fetch == "off" or parsed.scheme != "https" or port != 443):
            raise _Refused
        visit.lookup = asyncio.ensure_future(self._resolve(host, port))
        addresses = await asyncio.shield(visit.lookup)
        if not addresses or not (trusted or all(is_public(each) for each in addresses)):
            raise _Refused
        return _Target(parsed, host, addresses[0])

    async def _image(self, answer: httpx2.Response) -> bytes:
        media_type = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
        encoded = answer.headers.get("content-encoding", "identity").lower() != "identity"
        if answer.status_code != 200 or media_type not in MEDIA_TYPES or encoded:
            raise _Refused
        most, data = self._settings.max_file_bytes, bytearray()
        async for part in answer.aiter_raw():
            data += part
            if len(data) > most:
                raise _Refused
        if not data:
            raise _Refused
        return bytes(data)


def _request(client: httpx2.AsyncClient, target: _Target) -> httpx2.Request:
    """The connection goes to the address; the name is for the certificate and the server."""
    return client.build_request(
        "GET",
        target.url.copy_with(host=target.address),
        headers={
            "host": target.url.netloc.decode(),
            "accept": ", ".join(MEDIA_TYPES),
            "accept-encoding": "identity",
            "user-agent": f"ocserve/{__version__}",
        },
        extensions={"sni_hostname": target.host},
    )


def _busy() -> Overloaded:
    return Overloaded("Images of too many requests are being fetched.", retry_after_s=_RETRY_S)


def _filled(image: Image, fetched: dict[str, bytes]) -> Image:
    return image if image.url is None else replace(image, data=fetched[image.url], url=None)


def is_public(text: str) -> bool:
    """Whether an address is one that anybody on the Internet could reach, through whatever it embeds too."""
    try:
        address: Address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address.is_site_local or any(each is not None and not _is_global(each) for each in inner):
            return False
        if address.ipv4_mapped is not None:
            return _is_global(address.ipv4_mapped)
    return _is_global(address)


def _is_global(address: Address) -> bool:
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)
