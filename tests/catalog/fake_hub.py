"""A model hub on loopback: what huggingface_hub and the downloader use of the hub, with faults on command.

Metadata and redirects come from one port, bytes from another (the "CDN"), so that what crosses hosts can be seen. Ports
make two origins here, as hosts do elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BLOCK = 64 * 1024


@dataclass
class Faults:
    """What goes wrong, and how often still. A count of -1 is always."""

    api_status: int = 0
    api_delay_s: float = 0.0
    api_garbage: bool = False
    status: int = 0
    statuses_left: int = 0
    good_answers_left: int = 0  # before `status` strikes
    cut_after: int = 0
    cuts_left: int = 0
    wrong_bytes_left: int = 0
    ignore_range: bool = False
    wrong_range: bool = False
    stall_s: float = 0.0
    stalls_left: int = 0
    etag: str | None = None
    redirect_to: str | None = None
    too_long: bool = False
    bytes_per_s: float = 0.0

    def take(self, counter: str) -> bool:
        """Whether a counted fault strikes now."""
        left = getattr(self, counter)
        if left > 0:
            setattr(self, counter, left - 1)
        return left != 0


@dataclass
class Sent:
    """One answer of the CDN: where it started and how many bytes went into the socket."""

    start: int
    count: int = 0


@dataclass
class FakeHub:
    """Repositories and what was asked for them. `host` and `cdn` are the two base addresses."""

    repos: dict[str, dict[str, bytes]]
    faults: Faults = field(default_factory=Faults)
    extra_names: tuple[str, ...] = ()
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)  # (port's role, path, headers)
    sent: list[Sent] = field(default_factory=list)
    host: str = ""
    cdn: str = ""

    def headers_seen(self, role: str) -> list[dict[str, str]]:
        return [headers for seen, _, headers in self.requests if seen == role]

    def info(self, repo: str) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = []
        for name, content in self.repos[repo].items():
            lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            siblings.append({"rfilename": name, "size": len(content), "blobId": "0" * 40, "lfs": lfs})
        fake_lfs = {"sha256": "0" * 64, "size": 1, "pointerSize": 134}
        siblings += [{"rfilename": name, "size": 1, "blobId": "0" * 40, "lfs": fake_lfs} for name in self.extra_names]
        return {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub
    role: str

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def _note(self) -> None:
        self.hub.requests.append((self.role, self.path, {key.lower(): value for key, value in self.headers.items()}))

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _HubHandler(_Handler):
    role = "hub"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self._note()
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"))
        else:
            self._resolve(path)

    def _api(self, rest: str) -> None:
        faults = self.hub.faults
        time.sleep(faults.api_delay_s)
        if faults.api_status:
            self._answer(faults.api_status, b"{}")
            return
        if faults.api_garbage:
            self._answer(200, b"<html>captive portal</html>")
            return
        repo, _, revision = rest.partition("/revision/")
        if repo not in self.hub.repos:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("", "main", COMMIT):
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            self._answer(200, json.dumps(self.hub.info(repo)).encode(), {"Content-Type": "application/json"})

    def _resolve(self, path: str) -> None:
        before, _, after = path.lstrip("/").partition("/resolve/")
        name = after.partition("/")[2]
        content = self.hub.repos[before][name]
        faults = self.hub.faults
        if faults.status and not faults.take("good_answers_left") and faults.take("statuses_left"):
            self._answer(faults.status)
            return
        headers = {
            "X-Linked-Etag": f'"{faults.etag or hashlib.sha256(content).hexdigest()}"',
            "X-Linked-Size": str(len(content)),
            "X-Repo-Commit": COMMIT,
            "Location": faults.redirect_to or f"{self.hub.cdn}/{before}/{name}",
        }
        self._answer(302, b"", headers)


class _CdnHandler(_Handler):
    role = "cdn"

    def do_GET(self) -> None:
        self._note()
        owner, repo, name = unquote(self.path).lstrip("/").split("/", 2)
        content = self.hub.repos[f"{owner}/{repo}"][name]
        faults = self.hub.faults
        start = 0
        wanted = self.headers.get("Range")
        if wanted and not faults.ignore_range:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        if faults.wrong_bytes_left and faults.take("wrong_bytes_left"):
            content = content[:-1] + bytes([content[-1] ^ 1])
        body = content[start:] + (b"x" * 10 if faults.too_long else b"")
        self.send_response(206 if wanted and not faults.ignore_range else 200)
        if wanted and not faults.ignore_range:
            claimed = start + 1 if faults.wrong_range else start
            self.send_header("Content-Range", f"bytes {claimed}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self._send(body, Sent(start))

    def _send(self, body: bytes, sent: Sent) -> None:
        self.hub.sent.append(sent)
        faults = self.hub.faults
        cut = faults.cut_after if faults.cut_after and faults.take("cuts_left") else len(body)
        stalls = faults.stall_s > 0 and faults.take("stalls_left")
        began = time.monotonic()
        for at in range(0, len(body), BLOCK):
            block = body[at : min(at + BLOCK, cut)]
            try:
                self.wfile.write(block)
            except OSError:  # the client was killed
                self.close_connection = True
                return
            sent.count += len(block)
            if stalls and at >= len(body) // 2:
                time.sleep(faults.stall_s)
                stalls = False
            if at + BLOCK >= cut < len(body):
                self.close_connection = True
                return
            if faults.bytes_per_s:
                time.sleep(max(0.0, sent.count / faults.bytes_per_s - (time.monotonic() - began)))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        # A modest buffer, so that what a killed client never read does not count as sent by much.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 256 * 1024)
        super().server_bind()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what these tests are about."""


@contextmanager
def serving(repos: dict[str, dict[str, bytes]]) -> Iterator[FakeHub]:
    """A hub with `repos` (repository -> file name -> content), until the block ends."""
    hub = FakeHub(repos)
    servers = []
    for handler in (_HubHandler, _CdnHandler):
        bound = type(handler.__name__, (handler,), {"hub": hub})
        server = _Server(("127.0.0.1", 0), bound)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        servers.append(server)
    hub.host, hub.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
