"""A stop that breaks nothing: accepted streams finish, new work is refused by a listener that still answers."""

from __future__ import annotations

import json
import signal
import socket
import time

import pytest

from tests.http.harness import CHAT, Served, parse, read_all, serving, wait_for
from tests.http.test_slow_clients import process
from tests.scripted import Script, ScriptedEngine


def open_stream(served: Served) -> socket.socket:
    peer = served.connect(20)
    peer.sendall(served.compose("POST", "/v1/chat/completions", {**CHAT, "stream": True}))
    return peer


def test_accepted_streams_finish_while_new_work_is_refused() -> None:
    with serving(lambda: ScriptedEngine(Script(tokens=("x",) * 50, step_s=0.02)), drain_s=10) as served:
        peers = [open_stream(served) for _ in range(8)]
        wait_for(lambda: served.engine.running == 8)
        served.stop()
        wait_for(lambda: not served.service.ready)
        refused = served.chat()
        assert (refused.status, refused.error["code"]) == (503, "shutting_down")
        assert refused.headers["retry-after"]
        assert served.request("GET", "/ready").status == 503
        assert served.request("GET", "/health").status == 200
        for peer in peers:
            with peer:
                answer = parse(read_all(peer))
            assert answer.events[-1] == "[DONE]"
            assert json.loads(answer.events[-2])["usage"]["completion_tokens"] == 50
        assert served.thread is not None
        served.thread.join(5)
        assert not served.thread.is_alive()


def test_at_the_deadline_streams_end_with_an_error_event() -> None:
    with serving(lambda: ScriptedEngine(Script(tokens=("x",) * 4000, step_s=0.02)), drain_s=0.3) as served:
        peers = [open_stream(served) for _ in range(4)]
        wait_for(lambda: served.engine.running == 4)
        begun = time.monotonic()
        served.stop()
        for peer in peers:
            with peer:
                answer = parse(read_all(peer))
            assert json.loads(answer.events[-1])["error"]["code"] == "shutting_down"
        assert served.thread is not None
        served.thread.join(5)
        assert not served.thread.is_alive()
        assert time.monotonic() - begun < 0.3 + 10


def test_idle_connections_do_not_hold_up_a_stop() -> None:
    with serving(header_timeout_s=30, keep_alive_s=30) as served:
        peers = [served.connect() for _ in range(20)]
        served.stop()
        assert served.thread is not None
        served.thread.join(3)
        assert not served.thread.is_alive()
        for peer in peers:
            peer.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_a_real_process_and_a_second_one_ends_it(number: signal.Signals) -> None:
    slow = {"tokens": ["x"] * 4000, "step_s": 0.02}
    for signals, most_s in ((1, 1.0 + 2.0), (2, 1.5)):
        with (
            process(script=slow, server={"drain_s": 1.0}) as (server, port),
            socket.create_connection(("127.0.0.1", port), 10) as peer,
        ):
            body = json.dumps({**CHAT, "stream": True}).encode()
            peer.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            assert peer.recv(1000)
            begun = time.monotonic()
            for _ in range(signals):
                server.send_signal(number)
                time.sleep(0.2)
            data = read_all(peer)
            assert server.wait(10) == 0
            print(f"{signals} x {number.name}: exit after {time.monotonic() - begun:.1f} s")
            assert time.monotonic() - begun < most_s
            assert b'"code":"shutting_down"' in data
