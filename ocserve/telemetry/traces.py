"""OpenTelemetry traces over OTLP, off unless an endpoint is named: one server span for each request, and below it where
its time went.

Spans are made from the record of a request that has ended, so they cost it nothing, and hold names, counts and times,
never content and no key. Sending them is a thread's of the library, from a bounded queue: what does not fit is dropped.
The library is an extra (`ocserve[otel]`) and is loaded only when traces are on.
"""

from __future__ import annotations

import re
import threading
import time
from typing import TYPE_CHECKING, Any

from ocserve import __version__, config
from ocserve.config import ConfigError
from ocserve.generation import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

_QUEUE = 2048  # spans that wait to be sent
_BATCH = 512
_EVERY_MS = 2000
_PATIENCE_S = 3.0  # for one answer of the collector, and for all of what waits when the server stops
_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_MS = 1_000_000
# What a route does, in the words of the semantic conventions for generative AI; the first that is in its path counts.
_OPERATIONS = (
    ("embed", "embeddings"),
    ("chat", "chat"),
    ("messages", "chat"),
    ("responses", "chat"),
    ("generateContent", "generate_content"),
    ("GenerateContent", "generate_content"),
    ("completion", "text_completion"),
    ("infill", "text_completion"),
    ("generate", "text_completion"),
)


class Traces:
    """Makes spans of records and has them sent to the settings' endpoint. Raises `ConfigError` without the extra."""

    def __init__(self, settings: config.Otel) -> None:
        assert settings.endpoint is not None
        self._provider, self._exporter = _made(settings, settings.endpoint)
        self._tracer: Tracer = self._provider.get_tracer("ocserve", __version__)

    def observe(self, record: RequestRecord) -> None:
        """Trace a request that has ended just now."""
        from opentelemetry import trace

        end = time.time_ns()
        begin = end - int(record.total_ms * _MS)
        span = self._tracer.start_span(
            _name(record), _parent(record.traceparent), trace.SpanKind.SERVER, _attributes(record), start_time=begin
        )
        if record.error_code is not None and (record.status >= 500 or record.status < 400):
            span.set_status(trace.StatusCode.ERROR)
        if span.is_recording():
            self._parts(span, record, begin, end)
        span.end(end)

    def _parts(self, whole: Span, record: RequestRecord, begin: int, end: int) -> None:
        """Where the time went: until the slot, until the first piece, until the end; as far as it got."""
        from opentelemetry import trace

        within = trace.set_span_in_context(whole)
        reached = begin
        for name, until_ms in (("queue", record.queue_ms), ("prefill", record.ttft_ms), ("decode", record.total_ms)):
            if until_ms is None:
                return
            until = min(end, max(reached, begin + int(until_ms * _MS)))
            self._tracer.start_span(name, within, start_time=reached).end(until)
            reached = until

    def close(self) -> None:
        """Send what waits, and end. Takes a few seconds where nobody answers."""
        # The library would try for half a minute.
        end = threading.Timer(_PATIENCE_S, self._exporter.shutdown)
        end.start()
        self._provider.shutdown()
        end.cancel()


def open_traces(settings: config.Otel) -> Traces | None:
    """Traces as the settings want them, None being none. Raises `ConfigError`."""
    return None if settings.endpoint is None else Traces(settings)


def _made(settings: config.Otel, endpoint: str) -> tuple[TracerProvider, SpanExporter]:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError:
        raise ConfigError(
            "otel.endpoint is set, but OpenTelemetry is not installed.", "pip install 'ocserve[otel]'"
        ) from None
    if not re.fullmatch(r"https?://[^\s/]+\S*", endpoint):
        raise ConfigError("otel.endpoint is not an http or https address.", "for example http://127.0.0.1:4318")
    address = endpoint if endpoint.rstrip("/").endswith("/v1/traces") else endpoint.rstrip("/") + "/v1/traces"
    ratio = TraceIdRatioBased(settings.sample_ratio)  # whatever a stranger's header says of sampling
    provider = TracerProvider(
        sampler=ParentBased(ratio, remote_parent_sampled=ratio, remote_parent_not_sampled=ratio),
        resource=Resource.create({"service.name": settings.service_name, "service.version": __version__}),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(endpoint=address, timeout=_PATIENCE_S)
    provider.add_span_processor(
        BatchSpanProcessor(
            exporter, max_queue_size=_QUEUE, schedule_delay_millis=_EVERY_MS, max_export_batch_size=_BATCH
        )
    )
    return provider, exporter


def _parent(header: str | None) -> Context:
    """The context that a W3C `traceparent` names; an empty one, and so a new trace, where it is none."""
    from opentelemetry import trace
    from opentelemetry.context import Context

    found = _PARENT.fullmatch(header or "")
    # Version 255 is forbidden, and of version 0 nothing follows the flags.
    if not found or found[1] == "ff" or (found[1] == "00" and header != found[0][:55]):
        return Context()
    parent = trace.SpanContext(
        trace_id=int(found[2], 16),
        span_id=int(found[3], 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(int(found[4], 16) & trace.TraceFlags.SAMPLED),
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(parent), Context()) if parent.is_valid else Context()


def _name(record: RequestRecord) -> str:
    operation = _operation(record)
    return f"{operation} {record.model}" if operation and record.model else record.route


def _operation(record: RequestRecord) -> str | None:
    if record.model is None:
        return None
    return next((operation for part, operation in _OPERATIONS if part in record.route), None)


def _attributes(record: RequestRecord) -> dict[str, Any]:
    """What is known of a request, by the names of the semantic conventions; what is not known is left out."""
    used = record.usage if record.usage.prompt_tokens else None
    found: dict[str, Any] = {
        "http.route": record.route,
        "http.response.status_code": record.status,
        "error.type": record.error_code,
        "gen_ai.operation.name": _operation(record),
        "gen_ai.provider.name": "ocserve" if record.model else None,
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model if used else None,
        "gen_ai.response.finish_reasons": [record.finish_reason] if record.finish_reason else None,
        "gen_ai.usage.input_tokens": used and used.prompt_tokens,
        "gen_ai.usage.output_tokens": used and used.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": used and used.cached_tokens,
        "ocserve.request_id": record.request_id,
        "ocserve.stream": record.stream if record.model else None,
    }
    return {name: value for name, value in found.items() if value is not None}
