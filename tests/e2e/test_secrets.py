"""Must-show: a prompt and a key leave no trace in any log line at the lowest level, on any route or error path."""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path

import jsonschema
import pytest

from tests.e2e.daemon import RunningDaemon, daemon, wait_until

pytestmark = pytest.mark.beside

PROMPT, KEY, WRONG = "canary-prompt-7f3a9c", "canary-key-0b51d2e8f6a4", "canary-wrong-key-93c1"
PARAMETER = "canary_parameter_4d2e"  # an answer may name a parameter, the log may not


def send(server: RunningDaemon, path: str, body: object = None, *, key: str | None = KEY, method: str = "POST") -> int:
    data = None if method == "GET" else json.dumps(body).encode() if not isinstance(body, bytes) else body
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(server.root + path, data=data, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        assert PROMPT not in text
        assert KEY not in text
        assert WRONG not in text
        return error.code


def every_path(server: RunningDaemon) -> set[int]:
    """Canaries in prompts, names, values, paths, headers and broken bodies; the statuses that came back."""
    chat = {"model": "default", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 3}
    raw = {"model": "default", "prompt": PROMPT, "max_tokens": 3}
    statuses = {
        send(server, "/v1/chat/completions", chat),
        send(server, "/v1/chat/completions", {**chat, "stream": True}),
        send(server, "/v1/completions", raw),
        send(server, "/v1/completions", {**raw, "prompt": PROMPT * 5000}),
        send(server, "/v1/completions", {**raw, "stop": [PROMPT]}),
        send(server, "/v1/chat/completions", {**chat, "model": PROMPT}),
        send(server, "/v1/chat/completions", {**chat, PARAMETER: 1}),
        send(server, "/v1/chat/completions", {**chat, "temperature": PROMPT}),
        send(server, "/v1/chat/completions", {**chat, "tools": [{"type": PROMPT}]}),
        send(server, "/v1/chat/completions", {**chat, "user": PROMPT, "metadata": {"a": PROMPT}}),
        send(server, "/v1/chat/completions", {**chat, "messages": [{"role": PROMPT, "content": PROMPT}]}),
        send(server, "/v1/chat/completions", b'{"messages": "' + PROMPT.encode()),
        send(server, "/v1/chat/completions", chat, key=WRONG),
        send(server, f"/v1/{PROMPT}", chat),
        send(server, f"/v1/models/{PROMPT}", method="GET"),
        send(server, "/v1/models", method="GET"),
        send(server, "/v1/models", method="DELETE"),
        send(server, f"/health?{PROMPT}", method="GET"),
        send(server, "/ready", method="GET", key=WRONG),
    }
    for line in (
        f"GET /{PROMPT} HTTP/1.1\r\nHost: {PROMPT}\r\n\r\n",
        f"{PROMPT}\r\n\r\n",
        f"GET / HTTP/1.1\r\n{PROMPT}",
    ):
        with socket.create_connection(("127.0.0.1", int(server.root.rpartition(":")[2])), 5) as peer:
            peer.sendall(line.encode())
            peer.shutdown(socket.SHUT_WR)
            peer.recv(4096)
    return statuses


def test_canaries_reach_no_log_line(tiny_model: Path, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.touch(mode=0o600)
    key_file.write_text(KEY)
    environment = {"OCSERVE_AUTH_KEY_FILE": str(key_file), "OCSERVE_LOG_LEVEL": "debug", "PYTHONASYNCIODEBUG": "1"}
    with daemon(str(tiny_model), env=environment) as server:
        assert {200, 400, 401, 404, 405} <= every_path(server)
        arguments = Path(f"/proc/{server.engine_pid()}/cmdline").read_bytes()
        inherited = Path(f"/proc/{server.engine_pid()}/environ").read_bytes()
        os.kill(server.engine_pid(), signal.SIGSEGV)
        send(server, "/v1/completions", {"model": "default", "prompt": PROMPT, "max_tokens": 2})
        wait_until(lambda: server.log.read_text().count('"event":"request"') >= 20)
        log = server.log.read_text()
    schema = json.loads((Path(__file__).parents[2] / "packaging" / "log-schema.json").read_text())
    for line in log.splitlines():
        jsonschema.validate(json.loads(line), schema)
    assert "engine_died" in log  # the positive control: the log is the one that is written to
    for canary in (PROMPT, KEY, WRONG, PARAMETER):
        assert canary not in log
        assert canary.encode() not in arguments + inherited
