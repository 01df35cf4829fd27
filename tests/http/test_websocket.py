"""OpenAI's Responses over a WebSocket: the real SDK, and every guard and bound that holds over HTTP."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from msgspec.structs import replace
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from ocserve import config
from ocserve.http.websocket import WebSocket
from tests.http.harness import KEY, MODEL, Answer, Served, parse, read_all, serving, wait_for
from tests.http.test_responses import WEATHER, client, post, weather
from tests.scripted import Script, ScriptedEngine

HANDSHAKE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


@contextmanager
def opened(served: Served, **headers: str) -> Iterator[ClientConnection]:
    with connect(f"ws://127.0.0.1:{served.port}/v1/responses", additional_headers=headers, proxy=None) as peer:
        yield peer


def create(peer: ClientConnection, **fields: Any) -> None:
    given = {"type": "response.create", "model": "tiny", "input": "Hi", **fields}
    peer.send(json.dumps({name: value for name, value in given.items() if value is not None}))


def events(peer: ClientConnection) -> list[dict[str, Any]]:
    """The events of one response, or the one that refuses it."""
    found: list[dict[str, Any]] = []
    while not found or found[-1]["type"] not in (
        "response.completed",
        "response.incomplete",
        "response.failed",
        "error",
    ):
        found.append(json.loads(peer.recv(timeout=10)))
    return found


def said(peer: ClientConnection, **fields: Any) -> dict[str, Any]:
    """The last event of a response."""
    create(peer, **fields)
    return events(peer)[-1]


def refusal(peer: ClientConnection, **fields: Any) -> dict[str, Any]:
    last = said(peer, **fields)
    assert last["type"] == "error", last
    assert last["status"] >= 400
    assert last["error"]["headers"] == last["headers"]
    return dict(last["error"])


def upgrade(served: Served, path: str = "/v1/responses", **headers: str) -> Answer:
    """A handshake as bytes; the answer is whatever comes over HTTP."""
    given = {"Host": f"127.0.0.1:{served.port}", **HANDSHAKE, **{k.replace("_", "-"): v for k, v in headers.items()}}
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items() if value != "(none)")
    with served.connect(0.5) as peer:
        peer.sendall(f"GET {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1"))
        return parse(read_all(peer))


@pytest.mark.filterwarnings("ignore:connect:DeprecationWarning")  # how the SDK uses its WebSocket library
def test_the_sdk_holds_a_conversation_with_tools() -> None:
    model = replace(MODEL, capabilities=("chat", "tools", "reasoning"))
    with (
        serving(lambda: ScriptedEngine(weather), model=model) as served,
        client(served) as sdk,
        sdk.responses.connect() as peer,
    ):
        peer.response.create(model="tiny", input="How is Oslo?", tools=[WEATHER], store=False)  # type: ignore[list-item]
        for event in peer:
            if event.type == "response.completed":
                break
        [call] = [item for item in event.response.output if item.type == "function_call"]
        assert json.loads(call.arguments) == {"at": "Oslo"}
        assert event.response.store is False
        peer.response.create(
            model="tiny",
            previous_response_id=event.response.id,
            input=[{"type": "function_call_output", "call_id": call.call_id, "output": "rain"}],
            store=False,
        )
        text = ""
        for event in peer:
            if event.type == "response.output_text.delta":
                text += event.delta
            if event.type == "response.completed":
                break
        assert text == event.response.output_text == "It is rain."


def test_the_events_are_those_of_a_stream_over_http(served: Served) -> None:
    over_http = [json.loads(event.partition("\ndata: ")[2]) for event in post(served, stream=True).body.decode().split("\n\n")[:-1]]  # noqa: E501  # fmt: skip
    with opened(served) as peer:
        create(peer, stream=True)
        found = events(peer)
    headers = found[0].pop("headers")
    assert {"x-request-id"} <= set(headers)

    def shape(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: shape(each) for name, each in value.items() if "id" not in name and not name.endswith("_at")}
        return [shape(each) for each in value] if isinstance(value, list) else value

    assert shape(found) == shape(over_http)


def test_what_has_no_effect_and_what_is_left_of_a_limit_are_said_with_the_first_event() -> None:
    with (
        serving(limits=config.Limits(requests_per_minute=2)) as served,
        opened(served, **{"x-request-id": "mine"}) as peer,
    ):
        create(peer, prompt_cache_key="x")
        first = events(peer)[0]
        assert first["type"] == "response.created"
        assert first["headers"]["x-ocserve-ignored"] == "prompt_cache_key"
        assert first["headers"]["x-ratelimit-remaining-requests"] == "1"
        assert first["headers"]["x-request-id"] == "mine-1"
        said(peer)
        refused = refusal(peer)
        assert (refused["code"], refused["headers"]["x-request-id"]) == ("rate_limit_exceeded", "mine-3")
        assert int(refused["headers"]["retry-after"]) > 0


def test_what_is_not_stored_is_recalled_on_its_connection_only(served: Served) -> None:
    with opened(served) as peer, opened(served) as other:
        first = said(peer, store=False)["response"]["id"]
        assert refusal(other, previous_response_id=first)["code"] == "previous_response_not_found"
        assert served.request("GET", f"/v1/responses/{first}").status == 404
        second = said(peer, store=False, previous_response_id=first, input="And?")["response"]
        asked = list(served.engine.runs.values())[-1].request.prompt
        assert [turn.content for turn in asked.messages] == ["Hi", "Hello, world!", "And?"]  # type: ignore[union-attr]
        refusal(peer, previous_response_id=first)
        stored = said(peer, previous_response_id=second["id"])["response"]
        assert stored["store"] is True
        assert served.request("GET", f"/v1/responses/{stored['id']}").status == 200
        assert said(other, previous_response_id=stored["id"])["type"] == "response.completed"
    with opened(served) as peer:
        assert refusal(peer, previous_response_id=second["id"])["param"] == "previous_response_id"


def test_a_prompt_can_be_made_ready_without_an_answer(served: Served) -> None:
    with opened(served) as peer:
        ready = said(peer, generate=False, store=False, instructions="Be brief.", max_output_tokens=5)
        assert ready["type"] == "response.completed"
        assert ready["response"]["output"] == []
        run = list(served.engine.runs.values())[-1]
        assert run.request.max_tokens == 0
        said(peer, previous_response_id=ready["response"]["id"], input="And?")
        asked = list(served.engine.runs.values())[-1].request
        assert [turn.content for turn in asked.prompt.messages] == ["Hi", "And?"]  # type: ignore[union-attr]
        assert asked.max_tokens > 0
        said(peer, generate=False, store=False, input=[], instructions="Be brief.")
        ready = said(peer, generate=False, store=False)["response"]
        answer = said(peer, previous_response_id=ready["id"], input=[])["response"]
        asked = list(served.engine.runs.values())[-1].request
        assert [turn.content for turn in asked.prompt.messages] == ["Hi"]  # type: ignore[union-attr]
        for fields in ({}, {"generate": False}, {"previous_response_id": answer["id"]}):
            assert refusal(peer, input=[], **fields)["param"] == "input"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"type": None}, "type", "missing_required_parameter"),
        ({"type": "response.steer"}, "type", "invalid_value"),
        ({"type": 5}, "type", "invalid_type"),
        ({"generate": "no"}, "generate", "invalid_type"),
        ({"stream": False}, "stream", "unsupported_parameter"),
        ({"stream_id": "a"}, "stream_id", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"frobnicate": 1}, "frobnicate", "unknown_parameter"),
        ({"temperature": 9}, "temperature", "decimal_above_max_value"),
        ({"model": "gpt-5"}, "model", "model_not_found"),
        ({"input": None}, "input", "missing_required_parameter"),
    ],
    ids=str,
)
def test_a_wrong_message_is_refused_by_name_and_the_connection_goes_on(
    served: Served, fields: dict[str, Any], param: str, code: str
) -> None:
    with opened(served) as peer:
        refused = refusal(peer, **fields)
        assert (refused["param"], refused["code"]) == (param, code)
        assert said(peer)["type"] == "response.completed"


@pytest.mark.parametrize("message", ["", "{", "[]", "null", '{"a":1,"a":2}', "[" * 65 + "]" * 65, b"{}", "\x00"])
def test_what_is_no_object_is_refused_and_the_connection_goes_on(served: Served, message: str | bytes) -> None:
    with opened(served) as peer:
        peer.send(message)
        [refused] = events(peer)
        assert refused["status"] == 400
        assert said(peer)["type"] == "response.completed"


def test_early_messages_wait_their_turn_and_too_many_are_refused() -> None:
    with serving(lambda: ScriptedEngine(Script(step_s=0.02))) as served, opened(served) as peer:
        for number in range(20):
            create(peer, metadata={"n": str(number)})
        last = [events(peer)[-1] for _ in range(20)]
        refused = [each for each in last if each["type"] == "error"]
        made = [each["response"]["metadata"]["n"] for each in last if each["type"] == "response.completed"]
        assert made == [str(number) for number in range(len(made))]
        assert len(made) in (16, 17)
        assert {each["error"]["code"] for each in refused} == {"server_is_overloaded"}


def test_only_one_response_is_made_at_a_time() -> None:
    with serving(lambda: ScriptedEngine(Script(step_s=0.02))) as served, opened(served) as peer:
        for _ in range(4):
            create(peer)
        most = 0
        for _ in range(4):
            while json.loads(peer.recv(timeout=5))["type"] != "response.completed":
                most = max(most, served.service.active)
        assert most == 1


def test_a_client_that_leaves_ends_its_work_and_what_waits() -> None:
    with serving(lambda: ScriptedEngine(Script(tokens=("a",) * 1000, step_s=0.01))) as served:
        with opened(served) as peer:
            create(peer)
            create(peer)
            while json.loads(peer.recv(timeout=5))["type"] != "response.output_text.delta":
                pass
        wait_for(lambda: served.service.active == 0, 2)
        assert [run.cancelled for run in served.engine.runs.values()] == [True]


def test_a_client_that_vanishes_ends_its_work() -> None:
    with serving(lambda: ScriptedEngine(Script(tokens=("a",) * 1000, step_s=0.01))) as served:
        with opened(served) as peer:
            create(peer)
            peer.recv(timeout=5)
            peer.socket.shutdown(socket.SHUT_RDWR)
            wait_for(lambda: served.service.active == 0, 2)
        assert served.chat(max_tokens=1).status == 200


def test_an_engine_that_dies_fails_the_response_and_not_the_connection() -> None:
    scripts = iter([Script(crash_at=2), Script(), Script()])
    with serving(lambda: ScriptedEngine(lambda request: next(scripts))) as served, opened(served) as peer:
        failed = said(peer)
        assert failed["type"] == "response.failed"
        assert failed["response"]["error"]["code"] == "server_error"
        assert said(peer)["type"] == "response.completed"


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Host": "evil.example"}, 421, "misdirected_request"),
        ({"Host": "localhost.evil.example:80"}, 421, "misdirected_request"),
        ({"Host": "(none)"}, 400, None),
        ({"Origin": "https://evil.example"}, 403, "origin_not_allowed"),
        ({"Origin": "null"}, 403, "origin_not_allowed"),
        ({"Sec_Fetch_Site": "cross-site"}, 403, "origin_not_allowed"),
        ({"Authorization": "Bearer wrong"}, 401, "invalid_api_key"),
        ({"Authorization": "(none)"}, 401, "invalid_api_key"),
        ({"X_Forwarded_For": "1.2.3.4", "Authorization": "(none)"}, 401, "invalid_api_key"),
    ],
    ids=str,
)
def test_a_handshake_passes_every_guard(headers: dict[str, str], status: int, code: str | None) -> None:
    with serving(key=KEY, auth=config.Auth(anonymous=False)) as served:
        given = {"Authorization": f"Bearer {KEY}", **headers}
        for path in ("/v1/responses", "/responses", "//v1/responses/"):
            answer = upgrade(served, path, **given)
            assert answer.status == status, path
            assert code is None or answer.error["code"] == code
        assert not served.engine.runs


def test_a_key_opens_a_connection() -> None:
    with serving(key=KEY, auth=config.Auth(anonymous=False)) as served:
        for header in ({"Authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}):
            with opened(served, **header) as peer:
                assert said(peer)["type"] == "response.completed"
        with pytest.raises(InvalidStatus) as refused, opened(served):
            pass
        assert refused.value.response.status_code == 401
        assert refused.value.response.headers["x-request-id"]


def test_listed_origins_and_the_servers_own_pages_may_connect() -> None:
    with serving(cors_origins=("https://app.example",)) as served:
        for origin in ("https://app.example", f"http://127.0.0.1:{served.port}"):
            with opened(served, Origin=origin) as peer:
                assert said(peer)["type"] == "response.completed"


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec_WebSocket_Version": "12"},
        {"Sec_WebSocket_Key": "short"},
        {"Sec_WebSocket_Key": "(none)"},
        {"Upgrade": "h2c"},
        {"Upgrade": "websocket, websocket"},
        {"Connection": "close"},
        {"Sec_WebSocket_Protocol": "a b/;"},
        {"Content_Length": "0"},
        {"X_Long": "x" * 9000},
    ],
    ids=lambda each: str(each)[:40],
)
def test_what_is_no_proper_handshake_is_a_request_for_what_is_not_there(
    served: Served, headers: dict[str, str]
) -> None:
    answer = upgrade(served, **{"Connection": "Upgrade, close", **headers})
    assert (answer.status, answer.headers["allow"]) == (405, "POST, OPTIONS")


def test_an_upgrade_that_is_not_offered_is_a_plain_request(served: Served) -> None:
    assert upgrade(served, "/v1/models").json["data"][0]["id"] == "tiny"
    assert upgrade(served, "/nope").error["code"] == "not_found"
    assert upgrade(served, "/v1/chat/completions").status == 405
    assert upgrade(served, "/v1/responses?frobnicate=1").error["param"] == "frobnicate"
    assert served.request("GET", "/v1/responses").status == 405


def test_a_message_beyond_the_limit_ends_the_connection() -> None:
    with serving(max_body_bytes=10_000) as served, opened(served) as peer:
        create(peer, input="x" * 20_000)
        with pytest.raises(ConnectionClosedError) as closed:
            peer.recv(timeout=5)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009
        assert not served.engine.runs


def test_a_message_that_trickles_ends_the_connection() -> None:
    with serving(body_timeout_s=0.3) as served, opened(served) as peer:
        assert said(peer)["type"] == "response.completed"
        time.sleep(0.4)  # an idle connection is another matter
        assert said(peer)["type"] == "response.completed"
        begun = time.monotonic()
        peer.socket.sendall(b"\x81\xfe\x10\x00\x00\x00\x00\x00{")
        with pytest.raises(ConnectionClosed):
            peer.recv(timeout=5)
        assert 0.2 < time.monotonic() - begun < 2


def test_an_idle_connection_is_closed_and_a_busy_one_is_not() -> None:
    slow = Script(tokens=("a",) * 10, step_s=0.05)
    with serving(lambda: ScriptedEngine(slow), socket_idle_s=0.4) as served, opened(served) as peer:
        assert said(peer)["type"] == "response.completed"
        with pytest.raises(ConnectionClosed) as closed:
            peer.recv(timeout=5)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1001, "idle")


def test_a_client_that_reads_nothing_is_cut_and_its_work_ends() -> None:
    def make() -> ScriptedEngine:
        return ScriptedEngine(Script(tokens=("x" * 50_000,) * 4000, step_s=0.005))

    with serving(make, write_timeout_s=1.0) as served:
        with served.connect() as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lines = "".join(f"{name}: {value}\r\n" for name, value in {"Host": "localhost", **HANDSHAKE}.items())
            peer.sendall(f"GET /v1/responses HTTP/1.1\r\n{lines}\r\n".encode())
            assert peer.recv(12) == b"HTTP/1.1 101"
            message = json.dumps({"type": "response.create", "model": "tiny", "input": "Hi"}).encode()
            peer.sendall(bytes([0x81, 0x80 | len(message), 0, 0, 0, 0]) + message)
            wait_for(lambda: served.service.active == 1)
            wait_for(lambda: served.service.active == 0, 8)
        assert served.chat(max_tokens=1).status == 200


def test_answers_to_pings_are_not_kept_for_a_client_that_reads_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were, as many as could be sent before the write deadline: nothing counts them."""
    kept: list[int] = []
    closing: list[bool] = []
    receive = WebSocket.data_received

    def watched(self: WebSocket, data: bytes) -> None:
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        receive(self, data)
        kept.append(self.transport.get_write_buffer_size())
        closing.append(self.transport.is_closing())

    monkeypatch.setattr(WebSocket, "data_received", watched)
    ping = bytes([0x89, 0xFD, 0, 0, 0, 0]) + bytes(125)
    with served.connect() as peer:
        lines = "".join(f"{name}: {value}\r\n" for name, value in {"Host": "localhost", **HANDSHAKE}.items())
        peer.sendall(f"GET /v1/responses HTTP/1.1\r\n{lines}\r\n".encode())
        assert peer.recv(12) == b"HTTP/1.1 101"
        peer.settimeout(5)
        with suppress(OSError):  # it is cut, or no longer read
            for _ in range(1000):
                if not any(closing):
                    peer.sendall(ping * 100)
        wait_for(lambda: any(closing))
    assert max(kept) < 1_000_000


def test_a_message_of_very_many_frames_ends_the_connection(served: Served) -> None:
    """Empty ones count nothing against the limit of its bytes."""
    with opened(served) as peer:
        peer.socket.sendall(b"\x01\x81\x00\x00\x00\x00{" + b"\x00\x80\x00\x00\x00\x00" * 20_000)
        with pytest.raises(ConnectionClosedError) as closed:
            peer.recv(timeout=10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009


def test_a_caller_has_so_many_connections_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ocserve.http.response_socket._MOST_CONNECTIONS", 2)
    with serving() as served:
        with opened(served), opened(served):
            answer = upgrade(served)
            assert (answer.status, answer.error["code"]) == (429, "too_many_connections")
            assert answer.headers["retry-after"]
        wait_for(lambda: upgrade(served).status == 101)


def test_a_stop_lets_the_response_finish_refuses_the_next_and_closes() -> None:
    with serving(lambda: ScriptedEngine(Script(tokens=("x",) * 40, step_s=0.02)), drain_s=10) as served:
        with opened(served) as idle, opened(served) as peer:
            create(peer)
            wait_for(lambda: served.engine.running == 1)
            served.stop()
            wait_for(lambda: not served.service.ready)
            assert refusal(idle)["code"] == "shutting_down"
            assert events(peer)[-1]["response"]["usage"]["output_tokens"] == 40
            for each in (idle, peer):
                with pytest.raises(ConnectionClosed) as closed:
                    each.recv(timeout=5)
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == 1012
        assert served.thread is not None
        served.thread.join(5)
        assert not served.thread.is_alive()


def test_at_the_deadline_of_a_stop_the_response_fails() -> None:
    with serving(lambda: ScriptedEngine(Script(tokens=("x",) * 4000, step_s=0.02)), drain_s=0.3) as served:
        with opened(served) as peer:
            create(peer)
            wait_for(lambda: served.engine.running == 1)
            served.stop()
            assert events(peer)[-1]["type"] == "response.failed"
        assert served.thread is not None
        served.thread.join(5)
        assert not served.thread.is_alive()


def test_nothing_of_a_conversation_is_logged(capfd: pytest.CaptureFixture[str]) -> None:
    from ocserve.telemetry import logs

    logs.configure(config.Log(level="debug", format="json"))
    with serving() as served:
        with opened(served, **{"x-request-id": "call"}) as peer:
            said(peer, input="canary", instructions="canary")
            refusal(peer, frobnicate="canary")
            peer.send("canary")
            events(peer)
            peer.send(b"canary")
            events(peer)
        with connect(f"ws://127.0.0.1:{served.port}/v1/responses", proxy=None) as peer:
            peer.socket.sendall(b"\x81\x86\x00\x00\x00\x00canary")
            peer.recv(timeout=5)
            peer.socket.sendall(b"\xff\xff")
        wait_for(lambda: not served.service.active)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    assert "canary" not in json.dumps(lines)
    turns = {line["request_id"]: line["status"] for line in lines if line["event"] == "request"}
    assert {"call": 101, "call-1": 200, "call-2": 400, "call-3": 400, "call-4": 400}.items() <= turns.items()
