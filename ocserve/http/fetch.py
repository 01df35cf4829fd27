"""Images from the addresses that requests name. Off unless the operator turns it on.

A request must not make this machine reach what its sender could not: a name is resolved once, every address that it has
must be public, and the connection is made to the very address that was checked, after a redirect as before it. What the
network says stays here: all failures read alike.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urljoin

from msgspec.structs import replace

from ocserve import __version__
from ocserve.api.images import MEDIA_TYPES
from ocserve.config import Images
from ocserve.errors import InvalidRequest
from ocserve.generation import ChatPrompt, Image

if TYPE_CHECKING:  # a server that fetches nothing does not load it
    import httpx2

_MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_AT_ONCE = 8  # connections to other servers
_MOST_BYTES = 32 * 1024 * 1024  # of a request's images together, in a message to the engine

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]


class _Refused(Exception):
    """An address that nothing is fetched from, or an answer that is no image."""


@dataclass(frozen=True, slots=True)
class _Target:
    """Where to connect to, and for whom."""

    url: httpx2.URL
    host: str
    address: str


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name; raises `OSError`."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class ImageFetcher:
    """Fetches images under the limits of `settings`."""

    def __init__(self, settings: Images, *, resolve: Resolve = resolve, context: ssl.SSLContext | None = None) -> None:
        """`context` says whose certificates are believed; None: those that are well known."""
        self._settings = settings
        self._context = context
        self._resolve = resolve
        self._places = asyncio.Semaphore(_AT_ONCE)

    async def __call__(self, prompt: ChatPrompt) -> ChatPrompt:
        """The prompt with its images, one fetched after the other; raises `InvalidRequest`, which names the image."""
        named = [image for message in prompt.messages for image in message.images if image.url is not None]
        if not named:
            return prompt
        if len(named) > self._settings.max_count:
            where, most = named[self._settings.max_count].where, self._settings.max_count
            raise InvalidRequest(f"Invalid '{where}': a request has at most {most} images.", param=where)
        fetched: dict[str, bytes] = {}
        size = 0
        for image in named:
            assert image.url is not None
            if image.url not in fetched:
                fetched[image.url] = await self._bytes(image.url, image.where)
            size += len(fetched[image.url])
            if size > _MOST_BYTES:
                raise InvalidRequest(
                    f"Invalid '{image.where}': the images of a request have at most {_MOST_BYTES} bytes together.",
                    param=image.where,
                )
        return replace(
            prompt,
            messages=tuple(
                replace(message, images=tuple(_filled(image, fetched) for image in message.images))
                for message in prompt.messages
            ),
        )

    async def _bytes(self, url: str, where: str) -> bytes:
        import httpx2

        try:
            async with self._places, asyncio.timeout(self._settings.fetch_timeout_s):
                return await self._fetch(url)
        except (_Refused, TimeoutError, OSError, ValueError, httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError):
            raise InvalidRequest(
                f"Invalid '{where}': the image could not be fetched. It must be at a public https address, in one of "
                f"the formats {', '.join(MEDIA_TYPES)}, with at most {self._settings.max_file_bytes} bytes, and come "
                f"within {self._settings.fetch_timeout_s:g} seconds.",
                param=where,
                code="image_download_failed",
            ) from None

    async def _fetch(self, url: str) -> bytes:
        import httpx2

        for _ in range(_MAX_REDIRECTS + 1):
            target = await self._target(url)
            if self._context is None:
                self._context = await asyncio.to_thread(httpx2.create_ssl_context, trust_env=False)
            async with httpx2.AsyncClient(trust_env=False, follow_redirects=False, verify=self._context) as client:
                answer = await client.send(_request(client, target), stream=True)
                try:
                    if answer.status_code not in _REDIRECTS:
                        return await self._image(answer)
                    url = urljoin(str(target.url), answer.headers.get("location", ""))
                finally:
                    await answer.aclose()
        raise _Refused

    async def _target(self, url: str) -> _Target:
        import httpx2

        parsed = httpx2.URL(url)
        host, port = parsed.host, parsed.port or _DEFAULT_PORTS.get(parsed.scheme, 0)
        trusted = bool({host, f"{host}:{port}"} & set(self._settings.fetch_hosts))
        if parsed.scheme not in _DEFAULT_PORTS or not host or parsed.userinfo:
            raise _Refused
        if not trusted and (self._settings.fetch == "off" or parsed.scheme != "https" or port != 443):
            raise _Refused
        addresses = await self._resolve(host, port)
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
