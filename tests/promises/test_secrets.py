"""P14: of what clients send and are told, and of their keys, nothing is left anywhere that lasts or that others see."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import psutil

from tests.accounts.books import rows
from tests.e2e.daemon import wait_until
from tests.promises.conftest import KEY, Provider

LEAST = 400
SCHEMA = Path(__file__).parents[2] / "packaging" / "log-schema.json"
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
GOOGLE = "/v1beta/models/default:generateContent"


class Canaries:
    """Strings that are nowhere else in the world."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.names: set[str] = set()  # of parameters that do not exist, which the answer to their sender names

    def __call__(self) -> str:
        self.made.append(f"kanari{len(self.made):04d}{os.urandom(5).hex()}")
        return self.made[-1]

    def name(self) -> str:
        self.names.add(found := self())
        return found


def texts(new: Canaries) -> Iterator[tuple[str, dict[str, Any]]]:
    """A request for each dialect, with canaries in every place that takes text."""
    schema = {"type": "object", "properties": {new(): {"type": "string", "description": new()}}}
    tool = {"name": "f" + new(), "description": new(), "parameters": schema}
    messages = [{"role": "system", "content": new()}, {"role": "user", "content": new()}]
    some: dict[str, Any] = {"model": "default", "max_tokens": 2}
    yield CHAT, {**some, "messages": messages, "user": new(), "metadata": {"a": new()}, "stop": [new()]}
    yield CHAT, {**some, "messages": messages, "stream": True}
    yield CHAT, {**some, "messages": messages, "tools": [{"type": "function", "function": tool}]}
    yield COMPLETIONS, {**some, "prompt": new(), "suffix": new()}
    yield COMPLETIONS, {**some, "prompt": [new(), new()], "echo": True, "stream": True}
    yield RESPONSES, {"model": "default", "input": new(), "instructions": new(), "metadata": {"b": new()}}
    yield (
        MESSAGES,
        {**some, "system": new(), "messages": [{"role": "user", "content": new()}], "stop_sequences": [new()]},
    )
    yield f"{MESSAGES}/count_tokens", {"model": "default", "messages": [{"role": "user", "content": new()}]}
    yield (
        GOOGLE,
        {"contents": [{"role": "user", "parts": [{"text": new()}]}], "systemInstruction": {"parts": [{"text": new()}]}},
    )
    yield (
        "/api/chat",
        {"model": "default", "messages": [{"role": "user", "content": new()}], "options": {"num_predict": 2}},
    )
    yield "/api/generate", {"model": "default", "prompt": new(), "system": new(), "options": {"num_predict": 2}}
    yield "/api/v0/chat/completions", {**some, "messages": messages}
    yield "/completion", {"prompt": new(), "n_predict": 2}
    yield "/infill", {"input_prefix": new(), "input_suffix": new(), "n_predict": 2}
    yield "/tokenize", {"content": new()}
    yield "/apply-template", {"messages": [{"role": "user", "content": new()}]}
    for path in ("/v1/embeddings", "/api/embed", "/api/v0/embeddings"):
        yield path, {"model": "default", "input": [new(), new()]}
    for path in ("/v1/rerank", "/v2/rerank"):
        yield path, {"model": "default", "query": new(), "documents": [new(), new()]}


def broken(path: str, body: dict[str, Any], new: Canaries) -> Iterator[bytes]:
    """The same request with each kind of mistake: in names, types, values, syntax, lengths."""
    yield json.dumps({**body, new.name(): new()}).encode()
    yield json.dumps({**body, "model": new()}).encode()
    yield json.dumps({**body, "temperature": new(), "max_tokens": new()}).encode()
    yield json.dumps(
        {key: new() if isinstance(value, list | dict) else [new()] for key, value in body.items()}
    ).encode()
    yield (json.dumps(body)[:-1] + f', "{new()}').encode()
    yield f'{{"messages": [{{"role": "{new()}", "content": [{{"type": "{new()}"}}]}}]}}'.encode()
    yield json.dumps({**body, "prompt": new() * 4000, "input": new() * 4000}).encode()


def send(port: int, method: str, path: str, body: bytes | None, key: str, **headers: str) -> tuple[int, str]:
    """The status, and the answer unless it is one that generated."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    named = {"Content-Type": "application/json", "Authorization": f"Bearer {key}", **headers}
    try:
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
        return answer.status, text if answer.status >= 400 or method == "GET" else ""
    finally:
        connection.close()


def sweep(port: int, new: Canaries) -> tuple[set[int], str, list[str]]:
    """Every dialect right and wrong, with right and wrong keys; the statuses, the errors, and the requests' ids."""
    numbers = itertools.count()
    statuses, errors, ids = set(), [], []

    def told(method: str, path: str, body: bytes | None = None, key: str = KEY, **headers: str) -> None:
        ids.append(f"secret-{next(numbers)}")
        status, error = send(port, method, path, body, key, **{"X-Request-Id": ids[-1], **headers})
        statuses.add(status)
        errors.append(error)

    for path, body in texts(new):
        told("POST", path, json.dumps(body).encode())
        told("POST", path, json.dumps(body).encode(), key=new())
        for mistake in broken(path, body, new):
            told("POST", path, mistake)
    for path in ("/v1/models/", "/v1/responses/", "/v1beta/models/", "/", "/v1/", "/api/"):
        told("GET", path + new())
        told("DELETE", path + new(), key=new())
    for path in ("/v1/models", "/props", "/api/tags", "/openrouter/models", "/health", "/ready", "/docs"):
        told("GET", f"{path}?{new.name()}={new()}")
        told("GET", path, **{"User-Agent": new(), "Cookie": new(), "Referer": f"http://{new()}/", "X-Api-Key": new()})
    told("DELETE", "/v1/models", b"{}")
    told("POST", CHAT, b"{}", **{"Content-Type": new()})
    told("POST", CHAT, b"{}", **{"Content-Encoding": new()})
    told("POST", CHAT, b"{}", **{"Idempotency-Key": new()})
    told("GET", "/v1/models", Host=new())
    told("GET", "/v1/models", Origin=f"https://{new()}")
    return statuses, "\n".join(errors), ids


def send_no_http(port: int, new: Canaries) -> None:
    """What is not quite a request."""
    for line in (f"GET /{new()} HTTP/1.1\r\nHost: {new()}\r\n\r\n", f"{new()}\r\n\r\n", f"GET / HTTP/1.1\r\n{new()}"):
        with socket.create_connection(("127.0.0.1", port), 5) as peer:
            peer.sendall(line.encode())
            peer.shutdown(socket.SHUT_WR)
            peer.recv(4096)


def written(folder: Path) -> dict[str, bytes]:
    """Every file that the server may have written: ledger, write-ahead log, log, whatever else lies there."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def seen_from_outside(process: psutil.Process) -> bytes:
    """Arguments and environment, of the engine too."""
    found = b""
    for each in (process, *process.children(recursive=True)):
        for name in ("cmdline", "environ"):
            found += Path(f"/proc/{each.pid}/{name}").read_bytes()
    return found


def test_p14_canaries_are_found_nowhere(provider: Provider) -> None:
    new = Canaries()
    process = psutil.Process(provider.server.process.pid)
    statuses, errors, ids = sweep(provider.port, new)
    send_no_http(provider.port, new)
    os.kill(provider.server.engine_pid(), signal.SIGSEGV)
    crashed = json.dumps({"model": "default", "prompt": new(), "max_tokens": 2}).encode()
    assert send(provider.port, "POST", COMPLETIONS, crashed, KEY)[0] in (200, 500)
    _, metrics = send(provider.port, "GET", "/metrics", None, KEY)
    wait_until(lambda: ids[-1] in provider.log.read_text())
    found = written(provider.folder)
    places = {**found, "metrics": metrics.encode(), "errors": errors.encode(), "processes": seen_from_outside(process)}
    places["stderr"] = provider.server.log.read_bytes()
    hits = [(place, canary) for place, data in places.items() for canary in (*new.made, KEY) if canary.encode() in data]
    hits = [(place, canary) for place, canary in hits if place != "errors" or canary not in new.names]
    sizes = {Path(place).name: len(data) for place, data in places.items()}
    print(
        f"P14: {len(new.made)} canaries in {len(ids)} requests (statuses {sorted(statuses)}), {len(hits)} hits; {sizes}"
    )
    assert not hits
    assert len(new.made) >= LEAST
    assert {200, 400, 401, 403, 404, 405, 415, 421} <= statuses
    # The positive controls: all of these are the places that are written to, and what may be in them is found.
    log = provider.log.read_text()
    assert all(each in log for each in ids)
    assert "engine_died" in log
    schema = jsonschema_rs.validator_for(json.loads(SCHEMA.read_text()))
    assert all(schema.is_valid(json.loads(line)) for line in log.splitlines())
    assert "ocserve_errors_total{" in metrics
    assert {"ledger.db", "ledger.db-wal", "server.log"} <= set(sizes)
    assert any(row.request_id.encode() in found[f"{provider.ledger}-wal"] for row in rows(provider.ledger))
    assert len(errors) > 10_000
