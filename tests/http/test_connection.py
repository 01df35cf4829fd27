"""The connection's own rules: keep-alive, pipelining, trickles, refusals before HTTP, and answers that arrive."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from tests.http.harness import CHAT, Served, parse, read_all, read_one, serving, wait_for
from tests.scripted import Script, ScriptedEngine

pytestmark = pytest.mark.alone

GET = b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def hasty() -> Iterator[Served]:
    """A server with short deadlines."""
    with serving(header_timeout_s=0.5, keep_alive_s=0.5, body_timeout_s=0.5) as server:
        yield server


def closed_after(served: Served, first: bytes, drip: bytes = b"", every_s: float = 0.1) -> tuple[float, bytes]:
    """Send `first`, then a byte of `drip` now and then; how long until the server closed, and what it said."""
    with served.connect() as peer:
        begun = time.monotonic()
        peer.sendall(first)
        data = b""
        peer.settimeout(every_s)
        while time.monotonic() - begun < 5:
            try:
                piece = peer.recv(65536)
                if not piece:
                    return time.monotonic() - begun, data
                data += piece
            except TimeoutError:
                if drip:
                    try:
                        peer.sendall(drip[:1])
                    except OSError:
                        return time.monotonic() - begun, data
            except ConnectionResetError:
                return time.monotonic() - begun, data
    raise AssertionError("never closed")


def test_a_silent_connection_is_closed_without_an_answer(hasty: Served) -> None:
    seconds, data = closed_after(hasty, b"")
    assert 0.4 < seconds < 1.5
    assert data == b""


@pytest.mark.parametrize("drip", [b"a", b"\r", b"\n"])
def test_headers_that_trickle_get_408(hasty: Served, drip: bytes) -> None:
    seconds, data = closed_after(hasty, b"GET /ready HTTP/1.1\r\nX: ", drip if drip == b"a" else b"")
    assert 0.4 < seconds < 1.5
    assert parse(data).error["code"] == "request_timeout"


def test_empty_lines_do_not_keep_a_connection_alive(hasty: Served) -> None:
    seconds, _ = closed_after(hasty, b"", b"\n")
    assert seconds < 1.5
    seconds, data = closed_after(hasty, GET, b"\n")
    assert seconds < 2.5
    assert data.startswith(b"HTTP/1.1 200")


def test_a_kept_connection_is_closed_when_idle_and_headers_are_timed_on_it_too(hasty: Served) -> None:
    seconds, data = closed_after(hasty, GET)
    assert 0.4 < seconds < 1.5
    assert parse(data).status == 200
    seconds, data = closed_after(hasty, GET + b"GET /x", b"x")
    assert 0.4 < seconds < 1.5
    assert b"408" in data


def test_a_body_that_trickles_gets_408(hasty: Served) -> None:
    head = hasty.compose("POST", "/v1/chat/completions", b"{", {"Content-Length": "100"})
    seconds, data = closed_after(hasty, head, b" ")
    assert 0.4 < seconds < 1.5
    assert parse(data).error["code"] == "request_timeout"


def test_many_requests_on_one_connection(served: Served) -> None:
    body = json.dumps(CHAT).encode()
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        + str(len(body)).encode()
        + b"\r\n\r\n"
        + body
    )
    with served.connect() as peer:
        begun = time.monotonic()
        for _ in range(50):
            peer.sendall(request)
            assert read_one(peer).status == 200
        # 40 ms each would mean that small writes wait for a delayed acknowledgement.
        assert (time.monotonic() - begun) / 50 < 0.03


def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    with served.connect() as peer:
        peer.sendall(GET * 20 + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        data = read_all(peer)
    assert data.count(b"HTTP/1.1 200") == 21


def test_a_client_that_pipelined_and_left_is_noticed() -> None:
    with serving(lambda: ScriptedEngine(Script(prefill_s=5))) as served:
        with served.connect() as peer:
            peer.sendall(
                served.compose("POST", "/v1/chat/completions", CHAT).replace(b"Connection: close\r\n", b"") + GET
            )
            wait_for(lambda: any(run.phase == "prefill" for run in served.engine.runs.values()))
            (run,) = served.engine.runs.values()
        wait_for(lambda: run.cancelled, 1)


def test_a_flood_behind_a_request_is_bounded() -> None:
    with serving(lambda: ScriptedEngine(Script(prefill_s=5))) as served, served.connect() as peer:
        peer.sendall(served.compose("POST", "/v1/chat/completions", CHAT).replace(b"Connection: close\r\n", b""))
        wait_for(lambda: any(run.phase == "prefill" for run in served.engine.runs.values()))

        def flood() -> None:
            for _ in range(200):
                peer.sendall(b"x" * 65536)
                time.sleep(0.005)

        with pytest.raises(OSError):
            flood()


def test_a_refusal_arrives_although_the_body_was_not_read(served: Served) -> None:
    body = b"x" * (6 * 1024 * 1024)
    for _ in range(5):
        answer = served.request("POST", "/v1/chat/completions", body)
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")
        assert answer.headers["connection"] == "close"


def test_expect_100_continue_is_answered_only_if_the_body_is_wanted(served: Served) -> None:
    body = json.dumps(CHAT).encode()
    with served.connect() as peer:
        peer.sendall(
            served.compose(
                "POST", "/v1/chat/completions", b"", {"Content-Length": str(len(body)), "Expect": "100-continue"}
            )
        )
        assert peer.recv(100).startswith(b"HTTP/1.1 100")
        peer.sendall(body)
        assert b"HTTP/1.1 200" in read_all(peer)
    refused = served.request(
        "POST", "/v1/chat/completions", b"", {"Content-Length": "99999999", "Expect": "100-continue"}
    )
    assert refused.status == 413


def test_headers_beyond_the_limit_are_431(served: Served) -> None:
    for size in (33_000, 300_000):
        answer = served.request("GET", "/ready", None, {"X-Big": "a" * size})
        assert (answer.status, answer.error["code"]) == (431, "headers_too_large")
    assert served.request("GET", "/ready", None, {"X-Big": "a" * 30_000}).status == 200
