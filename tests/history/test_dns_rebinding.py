"""CVE-2024-28224 (Ollama): a page rebinds its own name to 127.0.0.1 and drives the server from a browser.

Also the parser mistakes of others: `host.split(":")` (Starlette's TrustedHostMiddleware), `*.local` accepted (Ollama).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ocserve.http.edge.host import HostName, parse
from tests.http import harness
from tests.http.harness import Served, serving


@pytest.fixture(scope="module", params=["127.0.0.1", "0.0.0.0"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with serving(host=request.param, public_hosts=("api.example", "ported.example:8443")) as server:
        yield server


ALLOWED = [
    "localhost",
    "localhost:{p}",
    "LOCALHOST",
    "LocalHost:1",
    "127.0.0.1",
    "127.0.0.1:{p}",
    "127.9.8.7:{p}",
    "[::1]",
    "[::1]:{p}",
    "[0:0:0:0:0:0:0:1]:{p}",
    "api.example",
    "API.EXAMPLE:443",
    "ported.example:8443",
]
MISDIRECTED = [
    "evil.com",
    "evil.com:{p}",
    "localhost.evil.com",
    "127.0.0.1.evil.com",
    "127.1",
    "0.0.0.0",
    "0.0.0.0:{p}",
    "0",
    "2130706433",
    "0x7f.0.0.1",
    "0177.0.0.1",
    "127.0.0.1.",
    "localhost.",
    "a.local",
    "a.internal",
    "a.localhost",
    "[::]",
    "[::ffff:127.0.0.1]",
    "api.example.evil.com",
    "xapi.example",
    "ported.example",
    "ported.example:1",
    "192.168.1.1",
    "metadata.google.internal",
]
MALFORMED = [
    "localhost@evil",
    "localhost:99999",
    "localhost:",
    "localhost:80:80",
    "[::1",
    "::1",
    "[::1]x",
    "[v1.x]",
    "[fe80::1%25eth0]",
    "localhost/..;/x?",
    "local host",
    "localhost,evil.com",
    "http://localhost",
    "löcalhost",
    "%6cocalhost",
    "\\localhost",
]


@pytest.mark.parametrize("host", ALLOWED)
def test_names_of_this_machine_pass(served: Served, host: str) -> None:
    answer = served.request("GET", "/ready", None, {"Host": host.format(p=served.port)})
    assert answer.status == 200


@pytest.mark.parametrize("host", MISDIRECTED)
def test_other_names_are_421(served: Served, host: str) -> None:
    answer = served.request("GET", "/ready", None, {"Host": host.format(p=served.port)})
    assert (answer.status, answer.error["code"]) == (421, "misdirected_request")


@pytest.mark.parametrize("host", MALFORMED)
def test_what_is_no_host_is_400(served: Served, host: str) -> None:
    answer = served.request("GET", "/ready", None, {"Host": host.format(p=served.port)})
    assert answer.status == 400
    assert answer.error["message"]


@pytest.mark.parametrize(
    "head",
    [
        b"GET /ready HTTP/1.1\r\n",
        b"GET /ready HTTP/1.1\r\nHost:\r\n",
        b"GET /ready HTTP/1.0\r\n",
        b"GET /ready HTTP/1.1\r\nHost: localhost\r\nHost: evil.com\r\n",
        b"GET /ready HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n",
        b"GET http://localhost/ready HTTP/1.1\r\nHost: localhost\r\n",
        b"GET http://evil.com/ready HTTP/1.1\r\nHost: localhost\r\n",
    ],
    ids=["none", "empty", "1.0", "two", "twice", "absolute", "absolute evil"],
)
def test_no_two_or_hidden_hosts_are_400(served: Served, head: bytes) -> None:
    answer = harness.parse(served.raw(head + b"Connection: close\r\n\r\n"))
    assert answer.status == 400
    assert answer.error["message"]


def test_hosts_are_parsed_as_rfc_3986_says() -> None:
    assert parse("[::1]:8080") == HostName("::1", 8080)
    assert parse("A.b-c_d") == HostName("a.b-c_d", None)
    assert parse("[2001:DB8::0:1]") == HostName("2001:db8::1", None)
    assert parse("[1.2.3.4]") is None
    assert parse("x" * 254) is None
