"""P11: slow and idle connections are cut on time, and nobody else notices them."""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.http.harness import CHAT, read_all, serving, wait_for
from tests.scripted import Script, ScriptedEngine

ROOT = Path(__file__).parents[2]
REQUEST = json.dumps(CHAT).encode()


@contextmanager
def process(**options: Any) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A server process and its port."""
    command = [sys.executable, "-m", "tests.http.serve_scripted", json.dumps(options)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        try:
            assert server.stdout is not None
            yield server, int(server.stdout.readline())
        finally:
            server.kill()


def latencies(port: int, count: int) -> list[float]:
    """Seconds per honest request, each on its own connection."""
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(REQUEST)}\r\nConnection: close\r\n\r\n"
    )
    found = []
    for _ in range(count):
        begun = time.monotonic()
        with socket.create_connection(("127.0.0.1", port), 10) as peer:
            peer.sendall(head.encode() + REQUEST)
            assert read_all(peer).startswith(b"HTTP/1.1 200")
        found.append(time.monotonic() - begun)
        time.sleep(0.01)
    return found


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def shown(values: list[float]) -> str:
    return f"{statistics.median(values) * 1000:.1f}/{p99(values) * 1000:.1f}"


@contextmanager
def attackers(port: int, counts: dict[str, int]) -> Iterator[subprocess.Popen[bytes]]:
    """The slow clients, all connected."""
    command = [sys.executable, "-m", "tests.http.slow_clients", str(port), *map(str, counts.values())]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as clients:
        time.sleep(3.5)
        try:
            yield clients
        finally:
            clients.kill()


def test_slow_and_idle_connections_are_cut_on_time_and_hurt_nobody(full: bool) -> None:
    counts = {"idle": 2000, "headers": 1000, "bodies": 500} if full else {"idle": 200, "headers": 100, "bodies": 50}
    header_s, body_s = (10.0, 30.0) if full else (2.0, 3.0)
    settings = {"header_timeout_s": header_s, "body_timeout_s": body_s}
    with process(server=settings) as (_, port):
        latencies(port, 50)
        quiet = latencies(port, 200)
        # The control: the same clients at work on the same machine, against another server. What is left is our doing.
        with process(server=settings) as (_, decoy), attackers(decoy, counts):
            elsewhere = latencies(port, 400 if full else 150)
        with attackers(port, counts) as clients:
            attacked = latencies(port, 400 if full else 150)
            output, _ = clients.communicate(timeout=120)
    held: dict[str, list[tuple[float, int]]] = {kind: [] for kind in counts}
    for kind, seconds, status in json.loads(output):
        held[kind].append((seconds, status))
    longest = {kind: max(seconds for seconds, _ in entries) for kind, entries in held.items()}
    print(
        f"{counts}: honest p50/p99 {shown(quiet)} ms on a quiet machine, "
        f"{shown(elsewhere)} ms while another server is attacked, {shown(attacked)} ms under attack; "
        f"held at most {', '.join(f'{kind} {seconds:.1f} s' for kind, seconds in longest.items())}"
    )
    assert {kind: len(entries) for kind, entries in held.items()} == counts
    assert {status for _, status in held["idle"]} == {0}
    assert {status for _, status in held["headers"]} == {408}
    assert {status for _, status in held["bodies"]} == {408}
    late_s = 1.0 if full else 3.0  # other work on the machine
    assert longest["idle"] < header_s + late_s
    assert longest["headers"] < header_s + late_s
    assert longest["bodies"] < body_s + late_s
    # Below 50 ms it is the machine's scheduling that is measured; its neighbours' work decides the short form's p99.
    usual = p99 if full else statistics.median
    assert usual(attacked) < max(2 * usual(elsewhere), 0.050)


@pytest.mark.parametrize(("step_s", "cancelled"), [(0.005, True), (0.0, False)], ids=["decoding", "decoded"])
def test_a_client_that_reads_nothing_is_cut_and_its_work_ends(step_s: float, cancelled: bool) -> None:
    def make() -> ScriptedEngine:
        return ScriptedEngine(Script(tokens=("x" * 50_000,) * 4000, step_s=step_s))

    with serving(make, write_timeout_s=1.0) as served, socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.connect(("127.0.0.1", served.port))
        most = 4000 if cancelled else 200
        peer.sendall(served.compose("POST", "/v1/chat/completions", {**CHAT, "stream": True, "max_tokens": most}))
        begun = time.monotonic()
        wait_for(lambda: served.service.active == 1)
        wait_for(lambda: served.service.active == 0, 8)
        print(f"cut {time.monotonic() - begun:.1f} s after the request")
        (run,) = served.engine.runs.values()
        assert run.cancelled is cancelled
        with pytest.raises(ConnectionResetError):  # else the system keeps for minutes what nobody will read
            list(iter(lambda: peer.recv(1 << 16), b""))
        assert served.chat(max_tokens=1).status == 200


def test_a_client_that_reads_slowly_but_steadily_is_served() -> None:
    def make() -> ScriptedEngine:
        return ScriptedEngine(Script(tokens=("x" * 10_000,) * 15))

    with serving(make, write_timeout_s=0.4) as served, served.connect(20) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.sendall(served.compose("POST", "/v1/chat/completions", {**CHAT, "stream": True}))
        data = b""
        while piece := peer.recv(4096):
            data += piece
            time.sleep(0.005)
        assert data.count(b"data: [DONE]") == 1
