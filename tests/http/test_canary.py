"""P14 at the edge: what a client sends as prompt, parameter, header or key reaches no log line and no error text."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
import structlog

from ocserve import config
from ocserve.telemetry import logs
from tests.http.harness import CHAT, COMPLETION, KEY, Served, serving
from tests.scripted import Script, ScriptedEngine

CANARY = "kanarienvogel-7f3a"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Everything that is logged, at DEBUG, libraries included."""
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    stream = io.StringIO()
    logs.configure(config.Log(level="debug", format="json"), stream)
    yield stream
    structlog.reset_defaults()
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    logging.captureWarnings(False)


def sweep(served: Served) -> list[bytes]:
    """Requests with canaries everywhere, on every route and into every kind of error; all raw answers."""
    message = {"role": "user", "content": CANARY}
    chat = {"model": "tiny", "messages": [message]}
    key = {"Authorization": f"Bearer {CANARY}"}
    right = {"Authorization": f"Bearer {KEY}"}
    post = "/v1/chat/completions"
    bodies = [
        chat,
        {**chat, "stream": True},
        {**chat, "stop": [CANARY], "user": CANARY, "metadata": {CANARY: CANARY}},
        {**chat, "stop": [CANARY * 40]},
        {**chat, "temperature": CANARY},
        {**chat, "model": CANARY},
        {**chat, CANARY + " ": 1},
        {**chat, "tools": [{"type": "function", "function": {"name": CANARY}}]},
        {**chat, "logit_bias": {CANARY: 1}},
        {**chat, "service_tier": CANARY},
        {**chat, "response_format": {"type": CANARY}},
        {**chat, "messages": [{"role": CANARY, "content": CANARY}]},
        {**chat, "messages": [{"role": "user", "content": [{"type": CANARY}]}]},
        f'{{"messages": "{CANARY}'.encode(),
        f'{{"messages": "{CANARY}", "messages": "{CANARY}"}}'.encode(),
        f'{{"messages": "{CANARY}\\ud800"}}'.encode(),
        f'"{CANARY}"'.encode(),
        CANARY.encode(),
        b"[" * 100 + CANARY.encode(),
        CANARY.encode() * 300_000,
    ]
    requests = [served.compose("POST", path, body, right) for body in bodies for path in (post, "/v1/completions")]
    requests += [
        served.compose("POST", "/v1/completions", {**COMPLETION, "prompt": CANARY}, right),
        served.compose("POST", "/v1/completions", {**COMPLETION, "prompt": [CANARY, CANARY]}, right),
        *(
            served.compose("GET", f"{path}?q={CANARY}", None, headers)
            for path in ("/v1/models", "/v1/models/tiny", f"/v1/models/{CANARY}", "/health", "/ready", f"/{CANARY}")
            for headers in (key, right, {"x-api-key": CANARY}, {"Origin": f"https://{CANARY}"}, {"Host": CANARY})
        ),
        served.compose("POST", post, chat, key),
        served.compose("POST", post, chat, {**right, "Content-Type": CANARY}),
        served.compose("POST", post, chat, {**right, "Content-Encoding": CANARY}),
        served.compose("POST", post, chat, {**right, "X-Request-Id": CANARY + "/x"}),
        served.compose("POST", post, chat, {**right, "X-Request-Id": KEY}),
        served.compose("POST", post, chat, {**right, "Content-Length": CANARY}),
        served.compose("POST", post, chat, {**right, "X-Forwarded-For": CANARY}),
        served.compose(CANARY.upper(), post, chat, right),
        f"{CANARY}\r\n\r\n".encode(),
        f"GET /{CANARY} HTTP/1.1\r\n{CANARY} \r\n\r\n".encode(),
        f"GET /{'a' * 40_000} HTTP/1.1\r\nHost: localhost\r\nX: {CANARY}\r\n\r\n".encode(),
    ]
    return [served.raw(request, 2) for request in requests]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_no_canary_in_any_log_line_or_error(log: io.StringIO) -> None:
    def script(request: object) -> Script:
        next(crashes)
        return Script(crash_at=1 if len(runs) % 3 == 0 else None, tokens=(CANARY, CANARY))

    runs: list[int] = []
    crashes = iter(lambda: runs.append(1), 0)
    with serving(lambda: ScriptedEngine(script), key=KEY, header_timeout_s=0.5, keep_alive_s=0.5) as served:
        answers = sweep(served)
        metrics = served.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"}).body.decode()
    assert "ocserve_errors_total{" in metrics
    assert CANARY not in metrics.lower()
    assert KEY not in metrics
    written = log.getvalue()
    lines = written.splitlines()
    assert len(lines) >= len(answers)
    assert CANARY not in written.lower()
    assert KEY not in written
    assert '"route":"/v1/chat/completions"' in written
    errors = [answer for answer in answers if b" 200 " not in answer[:20]]
    assert len(errors) > 50
    assert not [answer for answer in errors if CANARY.encode() in answer.lower()]


def test_a_mistake_of_ours_is_logged_without_what_the_client_sent(log: io.StringIO) -> None:
    def script(request: object) -> Script:
        raise RuntimeError(CANARY)

    with serving(lambda: ScriptedEngine(script)) as served:
        answer = served.chat(messages=[{"role": "user", "content": CANARY}])
    assert (answer.status, answer.error["code"]) == (500, "internal_error")
    assert CANARY not in answer.raw.decode()
    assert CANARY not in log.getvalue()
    assert '"exception":"RuntimeError"' in log.getvalue()


def test_what_is_stored_is_in_no_log_line(log: io.StringIO) -> None:
    with serving(lambda: ScriptedEngine(Script(tokens=(CANARY,)))) as served:
        asked = {"model": "tiny", "input": CANARY, "instructions": CANARY, "metadata": {CANARY: CANARY}}
        held = served.request("POST", "/v1/responses", asked).json
        path = f"/v1/responses/{held['id']}"
        more = {"model": "tiny", "input": CANARY, "previous_response_id": held["id"]}
        answers = [
            served.request("POST", "/v1/responses", more),
            served.request("GET", path),
            served.request("GET", f"{path}/input_items"),
            served.request("DELETE", path),
        ]
        never = served.request("GET", f"/v1/responses/{CANARY}?after={CANARY}")
        wrong = served.request("GET", f"/v1/responses/{CANARY}/input_items?limit={CANARY}")
    assert [answer.status for answer in answers] == [200] * 4
    assert [answer.status for answer in (never, wrong)] == [400, 400]
    assert CANARY not in (never.raw + wrong.raw).decode()
    assert CANARY not in log.getvalue()
    assert held["id"] not in log.getvalue()
    assert '"route":"/v1/responses/{id}"' in log.getvalue()


def test_the_canary_would_be_found(log: io.StringIO) -> None:
    """The positive control."""
    logs.event("x", detail=CANARY)
    assert CANARY in log.getvalue()


def test_one_request_is_one_line_whatever_it_contains(log: io.StringIO) -> None:
    with serving() as served:
        before = log.getvalue().count('"event":"request"')
        for model in ("a\nb", "a\r\nb", "\x1b[31m", "\u2028", "\x85"):
            served.chat(model=model)
        served.request("GET", "/v1/models/%0d%0a%1b%5b31m")
        served.chat(**CHAT)
    lines = [line for line in log.getvalue().splitlines() if '"event":"request"' in line]
    assert len(lines) - before == 7
    assert log.getvalue().isprintable() or log.getvalue().replace("\n", "").isprintable()
