"""Traces as a collector gets them: over real HTTP, in OpenTelemetry's own encoding."""

from __future__ import annotations

import gzip
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ocserve import config
from ocserve.config import ConfigError
from ocserve.generation import RequestRecord, Usage
from ocserve.telemetry import traces
from tests.http.harness import CHAT, serving
from tests.scripted import Script, ScriptedEngine

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `otel` is not installed")

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """Takes traces; `spans` are all so far, `resources` what they are of."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.data = b""
        self.url = ""


@contextmanager
def collecting() -> Iterator[Collector]:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["content-length"]))
            data = gzip.decompress(data) if self.headers.get("content-encoding") == "gzip" else data
            collector.paths.append(self.path)
            collector.data += data
            request = ExportTraceServiceRequest.FromString(data)
            for each in request.resource_spans:
                collector.resources.append(plain(each.resource.attributes))
                collector.spans += [span for scope in each.scope_spans for span in scope.spans]
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def plain(attributes: Any) -> dict[str, Any]:
    """Attributes as Python values."""

    def value(of: Any) -> Any:
        kind = of.WhichOneof("value")
        return [value(each) for each in of.array_value.values] if kind == "array_value" else getattr(of, kind)

    return {each.key: value(each.value) for each in attributes}


def record(**fields: Any) -> RequestRecord:
    given: dict[str, Any] = {
        "request_id": "req-1",
        "route": "/v1/chat/completions",
        "key_id": "key-canary",
        "model": "tiny",
        "status": 200,
        "stream": True,
        "usage": Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=3),
        "finish_reason": "stop",
        "error_code": None,
        "queue_ms": 100.0,
        "ttft_ms": 250.0,
        "total_ms": 1000.0,
    }
    return RequestRecord(**given | fields)


def sent(*records: RequestRecord, **settings: Any) -> Collector:
    """What a collector has once the server that had these requests has stopped."""
    with collecting() as collector:
        made = traces.Traces(config.Otel(endpoint=collector.url, **settings))
        for each in records:
            made.observe(each)
        made.close()
    return collector


def test_a_request_is_a_server_span_with_the_parts_of_its_time() -> None:
    collector = sent(record(), service_name="acme")
    assert set(collector.paths) == {"/v1/traces"}
    assert collector.resources[0]["service.name"] == "acme"
    spans = {span.name: span for span in collector.spans}
    whole = spans["chat tiny"]
    assert whole.kind == 2
    assert not whole.parent_span_id
    assert plain(whole.attributes) == {
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "ocserve",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "ocserve.request_id": "req-1",
        "ocserve.stream": True,
    }
    begin = whole.start_time_unix_nano
    parts = [spans[name] for name in ("queue", "prefill", "decode")]
    assert all(part.parent_span_id == whole.span_id and part.trace_id == whole.trace_id for part in parts)
    bounds = [(part.start_time_unix_nano - begin, part.end_time_unix_nano - begin) for part in parts]
    assert bounds == [(0, 100_000_000), (100_000_000, 250_000_000), (250_000_000, 1_000_000_000)]
    assert whole.end_time_unix_nano - begin == 1_000_000_000
    assert b"key-canary" not in collector.data


def test_a_request_that_was_refused_has_no_parts_and_its_error() -> None:
    nothing: dict[str, Any] = dict.fromkeys(("model", "queue_ms", "ttft_ms", "finish_reason"))
    refused = record(**nothing, status=503, usage=Usage(), error_code="not_ready")
    collector = sent(refused)
    (span,) = collector.spans
    assert span.name == "/v1/chat/completions"
    assert span.status.code == 2
    found = plain(span.attributes)
    assert found["error.type"] == "not_ready"
    assert not any(name.startswith("gen_ai.") for name in found)


@pytest.mark.parametrize(
    ("header", "continued"),
    [
        (PARENT, True),
        ("01" + PARENT[2:] + "-more", True),
        (PARENT + "-more", False),
        ("ff" + PARENT[2:], False),
        (PARENT.upper(), False),
        (PARENT[:-1], False),
        ("00-" + "0" * 32 + PARENT[35:], False),
        (PARENT[:36] + "0" * 16 + "-01", False),
        ("nonsense", False),
        (None, False),
    ],
)
def test_a_trace_is_continued_where_the_header_is_one(header: str | None, continued: bool) -> None:
    collector = sent(record(traceparent=header))
    whole = next(span for span in collector.spans if span.name == "chat tiny")
    assert (whole.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c") == continued
    assert (whole.parent_span_id.hex() == "b7ad6b7169203331") == continued


def test_the_settings_and_no_stranger_decide_what_is_sent() -> None:
    for header in (None, PARENT, PARENT[:-1] + "0"):
        assert sent(record(traceparent=header), sample_ratio=0.0).spans == []
        assert len(sent(record(traceparent=header)).spans) == 4


def test_a_collector_that_is_not_there_costs_requests_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "_PATIENCE_S", 0.2)
    begun = time.monotonic()
    made = traces.Traces(config.Otel(endpoint="http://127.0.0.1:1"))
    for _ in range(1000):  # more spans than wait to be sent
        made.observe(record())
    made.close()
    assert time.monotonic() - begun < 10, "a stop waits for a collector that is not there"


def test_a_server_traces_its_requests_and_never_what_they_say() -> None:
    with collecting() as collector:
        made = traces.Traces(config.Otel(endpoint=collector.url))
        with serving(lambda: ScriptedEngine(Script(tokens=("canary",))), trace=made.observe) as served:
            served.chat(headers={"traceparent": PARENT}, messages=[{"role": "user", "content": "canary"}])
            served.request("POST", "/v1/chat/completions", CHAT, [("traceparent", PARENT), ("traceparent", PARENT)])
            served.request("GET", "/health")
        made.close()
    wholes = [span for span in collector.spans if span.kind == 2]
    assert [span.name for span in wholes] == ["chat tiny", "chat tiny", "/health"]
    assert [span.trace_id.hex() == PARENT[3:35] for span in wholes] == [True, False, False]
    assert {span.name for span in collector.spans} == {"chat tiny", "queue", "prefill", "decode", "/health"}
    assert b"canary" not in collector.data


def test_addresses_that_are_none_are_refused() -> None:
    for endpoint in ("collector:4318", "grpc://collector", "http://"):
        with pytest.raises(ConfigError, match="not an http or https address"):
            traces.open_traces(config.Otel(endpoint=endpoint))
    assert traces.open_traces(config.Otel()) is None


def test_without_the_extra_the_start_ends_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError) as refused:
        traces.open_traces(config.Otel(endpoint="http://127.0.0.1:4318"))
    assert refused.value.hint == "pip install 'ocserve[otel]'"


def test_nothing_of_it_is_loaded_unless_it_is_on() -> None:
    code = "import sys, ocserve.app; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
