"""Images from addresses: what is reached, what never is, and what of an answer is taken."""

from __future__ import annotations

import asyncio
import gzip
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ocserve.config import Images
from ocserve.errors import InvalidRequest, Overloaded
from ocserve.generation import ChatPrompt, Image, Message
from ocserve.http.fetch import ImageFetcher, is_public

BYTES = b"\x89PNG" + bytes(5000)


class Origin(ThreadingHTTPServer):
    """A server of images that remembers who was asked for what."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str]] = []
        self.elsewhere = ""

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server: Origin = self.server  # type: ignore[assignment]
        server.asked.append((self.headers["host"], self.path))
        kind, headers, body = self.path[1:].partition("?")[0], {"content-type": "image/png"}, BYTES
        if kind == "slow":
            time.sleep(0.5)
        if kind in ("loop", "away"):
            self.send_response(302)
            self.send_header("location", "/loop" if kind == "loop" else server.elsewhere)
            self.end_headers()
            return
        headers |= {"text": {"content-type": "text/html"}, "gzip": {"content-encoding": "gzip"}}.get(kind, {})
        body = {"gzip": gzip.compress(BYTES), "empty": b"", "large": BYTES * 100}.get(kind, body)
        self.send_response(404 if kind == "missing" else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(context: ssl.SSLContext | None = None) -> Iterator[Origin]:
    server = Origin()
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def origin() -> Iterator[Origin]:
    with serving() as server:
        yield server


class Names:
    """A resolver that says what it is told to, and counts."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        return self.addresses


async def fetched(fetcher: ImageFetcher, *urls: str, key: str = "key") -> list[bytes]:
    images = tuple(Image(data=b"", at=0, where=f"images[{index}]", url=url) for index, url in enumerate(urls))
    prompt = await fetcher(ChatPrompt(messages=(Message(role="user", images=images),)), key)
    assert all(image.url is None for image in prompt.messages[0].images)
    return [image.data for image in prompt.messages[0].images]


async def refused(fetcher: ImageFetcher, url: str) -> str:
    with pytest.raises(InvalidRequest) as caught:
        await fetched(fetcher, url)
    assert caught.value.param == "images[0]"
    assert "images.test" not in caught.value.message
    return caught.value.message


def trusting(origin: Origin, **rest: object) -> Images:
    return Images(fetch_hosts=(f"images.test:{origin.port}",), max_file_bytes=100_000, **rest)  # type: ignore[arg-type]


async def test_an_image_comes_from_the_address_that_was_checked(origin: Origin) -> None:
    names = Names("127.0.0.1")
    fetcher = ImageFetcher(trusting(origin), resolve=names)
    url = f"http://images.test:{origin.port}/good"
    assert await fetched(fetcher, url, url) == [BYTES, BYTES]
    assert names.asked == ["images.test"]
    assert origin.asked == [(f"images.test:{origin.port}", "/good")]


@pytest.mark.parametrize("kind", ["text", "gzip", "empty", "large", "missing", "loop", "away"])
async def test_what_is_no_image_in_time_is_refused_in_the_same_words(origin: Origin, kind: str) -> None:
    with serving() as private:
        origin.elsewhere = f"http://127.0.0.1:{private.port}/good"
        fetcher = ImageFetcher(trusting(origin, fetch="public", fetch_timeout_s=20.0), resolve=Names("127.0.0.1"))
        message = await refused(fetcher, f"http://images.test:{origin.port}/{kind}")
        assert message == await refused(fetcher, "https://10.0.0.1/")
        assert private.asked == []
    assert len(origin.asked) == (4 if kind == "loop" else 1)


async def test_an_image_that_takes_too_long_is_refused(origin: Origin) -> None:
    fetcher = ImageFetcher(trusting(origin, fetch_timeout_s=0.2), resolve=Names("127.0.0.1"))
    await refused(fetcher, f"http://images.test:{origin.port}/slow")


class Held(Names):
    """A resolver that knows no end for one name."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1")
        self.free = asyncio.Event()

    async def __call__(self, host: str, port: int) -> list[str]:
        await super().__call__(host, port)
        if host == "slow.test":
            await self.free.wait()
        return self.addresses


@pytest.mark.alone  # measures time
async def test_one_key_leaves_places_to_others_and_nobody_waits_for_long(origin: Origin) -> None:
    names = Held()
    hosts = (f"images.test:{origin.port}", f"slow.test:{origin.port}")
    fetcher = ImageFetcher(Images(fetch_hosts=hosts, fetch_timeout_s=1.0), resolve=names)
    good, slow = (f"http://{host}/good" for host in hosts)
    held = [asyncio.create_task(fetched(fetcher, slow)) for _ in range(4 + 32)]
    while len(names.asked) < 4:
        await asyncio.sleep(0.01)
    with pytest.raises(Overloaded) as caught:
        await fetched(fetcher, good)
    assert caught.value.retry_after_s
    assert await fetched(fetcher, good, key="other") == [BYTES]
    ends = await asyncio.gather(*held, return_exceptions=True)
    assert [type(end) for end in ends] == [InvalidRequest] * 4 + [Overloaded] * 32
    assert names.asked.count("slow.test") == 4
    with pytest.raises(Overloaded):  # names that are still looked up keep their places
        await fetched(fetcher, good)
    names.free.set()
    assert await fetched(fetcher, good) == [BYTES]


@pytest.mark.alone  # measures time
async def test_all_images_of_a_request_have_one_time(origin: Origin) -> None:
    fetcher = ImageFetcher(trusting(origin, fetch_timeout_s=1.2), resolve=Names("127.0.0.1"))
    url = f"http://images.test:{origin.port}/slow"
    with pytest.raises(InvalidRequest) as caught:
        await fetched(fetcher, *(f"{url}?{index}" for index in range(4)))
    assert caught.value.param != "images[0]"
    assert len(origin.asked) < 4


@pytest.mark.parametrize("scheme", ["http", "https", "file", "ftp", "gopher"])
async def test_nothing_private_is_reached(origin: Origin, scheme: str) -> None:
    for settings in (Images(), Images(fetch="public")):
        for addresses in (("127.0.0.1",), ("8.8.8.8", "127.0.0.1"), ("::ffff:127.0.0.1",), ()):
            fetcher = ImageFetcher(settings, resolve=Names(*addresses))
            for place in (f"images.test:{origin.port}", "images.test", "u:p@images.test"):
                await refused(fetcher, f"{scheme}://{place}/good")
    assert origin.asked == []


async def test_a_name_that_changes_its_address_is_not_asked_twice(origin: Origin) -> None:
    class Rebinding(Names):
        async def __call__(self, host: str, port: int) -> list[str]:
            await super().__call__(host, port)
            return ["8.8.8.8"] if len(self.asked) == 1 else ["127.0.0.1"]

    names = Rebinding()
    fetcher = ImageFetcher(Images(fetch="public", fetch_timeout_s=0.3), resolve=names)
    await refused(fetcher, "https://images.test/good")
    assert names.asked == ["images.test"]
    assert origin.asked == []


async def test_a_certificate_is_checked_against_the_name(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    options = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=images.test"]
    names = ["-addext", "subjectAltName=DNS:images.test", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", *options, *names], check=True, capture_output=True)
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(certificate, key)
    ours = ssl.create_default_context(cafile=str(certificate))
    with serving(theirs) as server:
        settings = Images(fetch_hosts=("images.test", "other.test"))
        fetcher = ImageFetcher(settings, resolve=Names("127.0.0.1"), context=ours)
        assert await fetched(fetcher, f"https://images.test:{server.port}/good") == [BYTES]
        await refused(fetcher, f"https://other.test:{server.port}/good")
        assert [host for host, _ in server.asked] == [f"images.test:{server.port}"]


async def test_the_number_of_images_is_bounded_before_any_is_fetched(origin: Origin) -> None:
    fetcher = ImageFetcher(trusting(origin, max_count=2), resolve=Names("127.0.0.1"))
    with pytest.raises(InvalidRequest) as caught:
        await fetched(fetcher, *(f"http://images.test:{origin.port}/{index}" for index in range(3)))
    assert caught.value.param == "images[2]"
    assert origin.asked == []


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0",
        "fc00::1", "fd12::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
        "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::", "2002:a00:1::", "fec0::1", "",
        "images.test",
    ],
)  # fmt: skip
def test_addresses_that_are_not_everybodys(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)
