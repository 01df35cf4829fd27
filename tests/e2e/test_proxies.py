"""P21: behind the real nginx, Caddy and HAProxy, with the samples of `packaging/`: the same requests, unbuffered."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog

from ocserve import config
from ocserve.telemetry import logs
from tests.e2e import desync
from tests.http import harness
from tests.http.harness import CHAT, KEY, Served, parse, serving
from tests.scripted import Script, ScriptedEngine

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"
HOST = desync.HOST.decode()
STEP_S = 0.1
LAG_S = 0.05
_NUMBERED = re.compile(r"/v1/models/([csp]\d+)")


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Proxy:
    """A running proxy, or with `log` None the server itself: how it is reached and what it has logged."""

    name: str
    port: int
    log: Path | None

    def connect(self, timeout: float = 5.0) -> socket.socket:
        peer = socket.create_connection(("127.0.0.1", self.port), timeout)
        if self.log is None:
            return peer
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context.wrap_socket(peer, server_hostname=HOST)

    def send(self, data: bytes, first_s: float = 1.0, then_s: float = 0.15) -> bytes:
        """Send and read until the peer closes or has nothing more to say."""
        answer = b""
        with suppress(OSError), self.connect() as peer:
            with suppress(OSError):
                peer.sendall(data)
            peer.settimeout(first_s)
            while piece := peer.recv(65536):
                answer += piece
                peer.settimeout(then_s)
        return answer

    def entries(self) -> list[tuple[str, str]]:
        """(path, id of the answer that went back, or nothing) of every request that it took for one."""
        assert self.log is not None
        lines = self.log.read_text(errors="replace").splitlines()
        if self.name == "caddy":
            # What names no host of the sample stands in Caddy's own log.
            lines += (self.log.parent / "stderr").read_text().splitlines()
            entries = [each for each in map(json.loads, lines) if each.get("logger", "").startswith("http.log.access")]
            return [(each["request"]["uri"], *each["resp_headers"].get("X-Request-Id", [""])) for each in entries]
        words = [line.split() for line in lines]
        if self.name == "haproxy":
            words = [each for each in words if len(each) == 7]
        return [(each[3], "" if each[-1] == "-" else each[-1]) for each in words]


def _replaced(name: str, *pairs: tuple[str, str]) -> str:
    """A sample with what a test must have otherwise; everything else is as it is shipped."""
    text = (PACKAGING / name).read_text()
    for old, new in pairs:
        assert text.count(old) == 1, (name, old)
        text = text.replace(old, new)
    return text


def _nginx(folder: Path, port: int, app: int) -> tuple[list[str], Path]:
    site = _replaced(
        "nginx.conf",
        ("listen 443", f"listen 127.0.0.1:{port}"),
        ("/etc/ssl/models.example.com.crt", f"{folder}/tls.crt"),
        ("/etc/ssl/models.example.com.key", f"{folder}/tls.key"),
        ("/var/log/nginx/ocserve.log", f"{folder}/log"),
        ("127.0.0.1:11711", f"127.0.0.1:{app}"),
    )
    (folder / "site.conf").write_text(site)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"{user} daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ {temporary} include {folder}/site.conf; }}"
    )
    return ["nginx", "-c", f"{folder}/nginx.conf", "-e", f"{folder}/error.log"], folder / "log"


def _caddy(folder: Path, port: int, app: int) -> tuple[list[str], Path]:
    site = _replaced(
        "Caddyfile",
        ("\nmodels.example.com {", f"\n{HOST} {{\n\ttls {folder}/tls.crt {folder}/tls.key"),
        ("/var/log/caddy/ocserve.log", f"{folder}/log"),
        ("127.0.0.1:11711", f"127.0.0.1:{app}"),
    )
    (folder / "Caddyfile").write_text(
        f"{{\n\tadmin off\n\tauto_https disable_redirects\n\thttps_port {port}\n}}\n{site}"
    )
    return ["caddy", "run", "--adapter", "caddyfile", "--config", f"{folder}/Caddyfile"], folder / "log"


def _haproxy(folder: Path, port: int, app: int) -> tuple[list[str], Path]:
    text = _replaced(
        "haproxy.cfg",
        ("bind :443", f"bind 127.0.0.1:{port}"),
        ("/etc/haproxy/certs/models.example.com.pem", f"{folder}/tls.pem"),
        ("127.0.0.1:11711", f"127.0.0.1:{app}"),
    )
    (folder / "haproxy.cfg").write_text(text)
    return ["haproxy", "-db", "-f", f"{folder}/haproxy.cfg"], folder / "stdout"


PROXIES: dict[str, Callable[[Path, int, int], tuple[list[str], Path]]] = {
    "nginx": _nginx,
    "caddy": _caddy,
    "haproxy": _haproxy,
}
INSTALLED = [
    pytest.param(name, marks=pytest.mark.skipif(not shutil.which(name), reason=f"{name} is not installed"))
    for name in PROXIES
]


@contextmanager
def proxy(name: str, folder: Path, app: int) -> Iterator[Proxy]:
    """The proxy in front of the server at port `app`."""
    certificate = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    names = ["-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}", "-days", "2"]
    files = ["-keyout", f"{folder}/tls.key", "-out", f"{folder}/tls.crt"]
    subprocess.run([*certificate, *names, *files], check=True, capture_output=True)
    (folder / "tls.pem").write_text((folder / "tls.crt").read_text() + (folder / "tls.key").read_text())
    port = free_port()
    argv, log = PROXIES[name](folder, port, app)
    environment = {**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(argv, stdout=stdout, stderr=stderr, env=environment)
    try:
        _wait_listening(port, process, folder)
        yield Proxy(name, port, log)
    finally:
        process.terminate()
        process.wait(20)


def _wait_listening(port: int, process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 20
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert process.poll() is None, (folder / "stderr").read_text()
        assert time.monotonic() < deadline, (folder / "stderr").read_text()
        time.sleep(0.05)


@contextmanager
def provider(make_engine: Callable[[], ScriptedEngine] = ScriptedEngine) -> Iterator[Served]:
    """The server as the samples say that it is configured."""
    limits = config.Limits(requests_per_minute=6_000_000, tokens_per_minute=6_000_000)
    with serving(
        make_engine, key=KEY, limits=limits, public_hosts=(HOST,), trusted_proxies=("127.0.0.1",), body_timeout_s=2
    ) as served:
        yield served


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What the server logs."""
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    stream = io.StringIO()
    logs.configure(config.Log(format="json"), stream)
    yield stream
    structlog.reset_defaults()
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    logging.captureWarnings(False)


def request(method: str, path: str, body: Any = None, **headers: str) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    fields = {"Host": HOST, "Authorization": f"Bearer {KEY}", **headers}
    if body is not None:
        fields |= {"Content-Type": "application/json", "Content-Length": str(len(data))}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


class Watched(ScriptedEngine):
    """Knows when each token was generated."""

    def __init__(self) -> None:
        self.times: list[float] = []
        super().__init__(Script(tokens=tuple(f"<{number}>" for number in range(5)), step_s=STEP_S))

    @property
    def steps(self) -> int:
        return len(self.times)

    @steps.setter
    def steps(self, steps: int) -> None:
        if steps:
            self.times.append(time.monotonic())


@pytest.mark.parametrize("name", INSTALLED)
def test_each_token_arrives_as_it_is_generated(name: str, tmp_path: Path) -> None:
    with provider(Watched) as served, proxy(name, tmp_path, served.port) as front:
        engine = served.engine
        assert isinstance(engine, Watched)
        lags: list[list[float]] = []
        while len(lags) < 3:  # the machine is shared: one good run is enough
            engine.times.clear()
            arrived = _arrivals(front)
            assert len(arrived) == len(engine.times) == 5
            lags.append([there - made for made, there in zip(engine.times, arrived, strict=True)])
            if max(lags[-1]) <= LAG_S:
                break
    print(f"{name}: chunks arrived {[round(lag * 1000, 1) for lag in lags[-1]]} ms after they were generated")
    assert max(lags[-1]) <= LAG_S, lags


def _arrivals(front: Proxy) -> list[float]:
    """When the text of each token was there."""
    arrived: list[float] = []
    seen = b""
    with front.connect() as peer:
        peer.sendall(request("POST", "/v1/chat/completions", {**CHAT, "stream": True}))
        while b"[DONE]" not in seen:
            piece = peer.recv(65536)
            assert piece, seen
            seen += piece
            arrived += [time.monotonic()] * (len(re.findall(rb"<\d>", seen)) - len(arrived))
    return arrived


@pytest.mark.parametrize("name", INSTALLED)
def test_client_addresses_come_from_the_configured_hop_only(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, list[str]]] = []

    def recording(*arguments: Any) -> Any:
        app = build(*arguments)

        async def record(scope: Any, receive: Any, send: Any) -> None:
            found: dict[str, list[str]] = {}
            for field, value in scope["headers"]:
                found.setdefault(field.decode(), []).append(value.decode())
            seen.append(found)
            await app(scope, receive, send)

        return record

    build = harness.build
    monkeypatch.setattr(harness, "build", recording)
    lies = {"X_Forwarded_For": "203.0.113.9", "X_Real_IP": "203.0.113.9", "Forwarded": "for=203.0.113.9"}
    with provider() as served, proxy(name, tmp_path, served.port) as front:
        told = parse(front.send(request("GET", "/v1/models?api-version=secret=1", **lies)))
        assert (told.status, "x-ratelimit-limit-requests" in told.headers) == (200, True)
        (headers,) = seen
        assert headers["x-forwarded-for"] == ["127.0.0.1"]
        assert headers["host"] == [HOST]
        assert "203.0.113.9" not in str(headers)
        assert parse(front.send(request("GET", "/v1/models", Authorization=""))).status == 401
        assert parse(front.send(request("GET", "/metrics"))).status == 404
        for path in ("/admin/state", "//admin/state", "/%61dmin/state", "//metrics", "/%6detrics"):
            assert parse(front.send(request("GET", path))).status == 404, path
        assert len(seen) == 2  # the proxy kept /metrics and /admin to itself
        with socket.create_connection(("127.0.0.1", served.port), 5, source_address=("127.0.0.5", 0)) as stranger:
            stranger.sendall(request("GET", "/v1/models", X_Forwarded_For="127.0.0.1"))
            assert harness.read_one(stranger).error["code"] == "untrusted_proxy"
    assert front.log is not None
    written = front.log.read_text()
    assert "/v1/models" in written
    assert KEY not in written
    assert "secret=" not in written
    assert "ratelimit" not in written.lower()


def chosen(full: bool) -> list[tuple[int, bytes]]:
    """Numbered cases: all, or one of six."""
    found = list(enumerate(desync.cases()))
    return found if full else found[::6]


def play(front: Proxy, cases: list[tuple[int, bytes]]) -> list[str]:
    """Send each case, and behind each a harmless request of its own, whose answer must be its own."""

    def one(case: tuple[int, bytes]) -> str | None:
        number, data = case
        front.send(data.replace(b"{id}", b"%d" % number).replace(b"{key}", f"Bearer {KEY}".encode()))
        name = f"p{number}"
        probe = request("GET", f"/v1/models/{name}", X_Request_Id=name, Connection="close")
        answer = front.send(probe, first_s=10)
        if not answer.startswith(b"HTTP/1.1 404") or f"x-request-id: {name}\r\n".encode() not in answer.lower():
            return f"{name}: {answer[:300]!r}"
        return None

    with ThreadPoolExecutor(8) as pool:
        return [wrong for wrong in pool.map(one, cases) if wrong]


def taken(log: io.StringIO) -> Counter[str]:
    """The ids of everything that the server took for a request, broken ones included."""
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    return Counter(line["request_id"] for line in lines if line["event"] in ("request", "malformed_request"))


@pytest.mark.parametrize("name", INSTALLED)
def test_no_request_is_cut_in_two_behind_a_proxy(name: str, tmp_path: Path, log: io.StringIO, full: bool) -> None:
    cases = chosen(full)
    begun = time.monotonic()
    with provider() as served, proxy(name, tmp_path, served.port) as front:
        assert play(front, cases) == []
        assert parse(front.send(request("GET", "/v1/models"))).status == 200
    entries, server = front.entries(), taken(log)
    assert disagreements(entries, server) == []
    answered = sum(1 for _, found in entries if found)
    print(
        f"{name}: {len(cases)} cases, {len(entries)} requests at the proxy, {answered} answered by the server and "
        f"{server.total() - answered} left by their clients, in {time.monotonic() - begun:.1f} s"
    )


def disagreements(entries: list[tuple[str, str]], server: Counter[str]) -> list[str]:
    """What the proxy (path, id of the answer) and the server (ids) tell differently.

    1. An answer that the server never gave. 2. A request that the proxy knows nothing of: one that its client left has
    no answer to name, but it is a case's own, or one without a name, and the proxy has a line for it. 3. An answer to
    another request.
    """
    forwarded = Counter(found for _, found in entries if found)
    unnamed = server - forwarded
    wrong = [f"invented {each}" for each in forwarded - server]
    wrong += [f"unknown to the proxy: {each}" for each in unnamed if not each.startswith(("c", "req_"))]
    if unnamed.total() > sum(not found for _, found in entries):
        wrong.append(f"more at the server than at the proxy: {unnamed}")
    for path, found in entries:
        match = _NUMBERED.fullmatch(path)
        if match and re.fullmatch(r"[csp]\d+", found) and match[1] != found:
            wrong.append(f"{path} got the answer of {found}")
    return wrong


def test_a_disagreement_would_be_seen() -> None:
    """The positive control."""
    entries = [("/v1/models/c1", "c1"), ("/tokenize", ""), ("/v1/models/p1", "p1")]
    assert disagreements(entries, Counter(("c1", "c2", "p1"))) == []
    assert disagreements(entries, Counter(("c1", "c2", "p1", "s1")))  # smuggled
    assert disagreements(entries, Counter(("c1", "c2", "c2", "p1")))  # one request made two
    assert disagreements(entries, Counter(("c1", "c2")))
    assert disagreements([("/v1/models/c1", "p1"), ("/v1/models/p1", "c1")], Counter(("c1", "p1")))  # answers swapped


def test_no_request_is_cut_in_two_without_a_proxy(log: io.StringIO, full: bool) -> None:
    cases = chosen(full)
    begun = time.monotonic()
    with provider() as served:
        assert play(Proxy("ocserve", served.port, None), cases) == []
    server = taken(log)
    two_lengths = set(desync.two_lengths())
    ambiguous = [number for number, data in cases if data in two_lengths]
    assert ambiguous
    assert [number for number in ambiguous if f"s{number}" in server] == []
    print(f"ocserve: {len(cases)} cases, {server.total()} requests, in {time.monotonic() - begun:.1f} s")
