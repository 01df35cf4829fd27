"""What a monitoring system reads of the server, in Prometheus' words.

Two sources. Of a request's end the `Meter` takes its record, once. What is so at the moment of a scrape it pulls from
its owners' frozen states, as a `Reading`; nothing below pushes. Labels are bounded: routes come from the route list,
models from what is served, limits and finish reasons from lists, and whatever else there is counts as `other`. Keys,
clients and content are no labels.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from ocserve.generation import GAP_BOUNDS_S, RequestRecord
from ocserve.telemetry.readings import CheckCounts, EngineReading, Reading

OTHER = "other"
_MOST_CODES = 128  # of errors; they are ours and about fifty, an engine's included
_LATENCY_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
_FINISH_REASONS = frozenset({"stop", "length", "tool_calls", "content_filter", "cancelled", "error"})
_LIMITS = frozenset(
    {
        *("requests_per_minute", "tokens_per_minute", "requests_per_day", "tokens_per_day"),
        *("concurrent_requests", "capacity", "balance", "spend_cap"),
    }
)

Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Definition:
    """A metric as it is exported. `name` is a counter's without `_total`, which the format adds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: Labels
    help: str

    @property
    def exported(self) -> str:
        """The name in a scrape."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def _counter(name: str, labels: str, text: str) -> Definition:
    return Definition(name, "counter", tuple(labels.split()), text)


def _gauge(name: str, labels: str, text: str) -> Definition:
    return Definition(name, "gauge", tuple(labels.split()), text)


def _seconds(name: str, text: str) -> Definition:
    return Definition(name, "histogram", ("model",), text)


_REQUESTS = _counter(
    "ocserve_requests",
    "route status finish_reason",
    "Requests that ended, by route, class of HTTP status (499: the client left) and why the answer ended.",
)
_ERRORS = _counter("ocserve_errors", "code", "Requests that ended in an error, in a stream that had begun as well.")
_REFUSALS = _counter("ocserve_limit_refusals", "limit", "Requests that a limit refused, by its name.")
_TOKENS = _counter(
    "ocserve_tokens", "model kind", "Tokens of requests that ended; cached ones are part of the prompt's."
)
_HITS = _counter("ocserve_cache_hits", "model", "Requests a part of whose prompt was not computed.")
_QUEUE = _seconds("ocserve_queue_seconds", "From a request's arrival to its slot, the load of its model included.")
_PREFILL = _seconds("ocserve_prefill_seconds", "From the slot to the first piece of the answer.")
_TTFT = _seconds("ocserve_time_to_first_token_seconds", "From a request's arrival to the first piece of its answer.")
_DECODE = _seconds("ocserve_decode_seconds", "From the first piece of an answer to its end.")
_DURATION = _seconds("ocserve_request_duration_seconds", "From arrival to end, of requests that used a model.")
_GAPS = _seconds(
    "ocserve_inter_token_latency_seconds", "From one token of an answer to its next, as they are handed to the client."
)
_CHECKS = _counter(
    "ocserve_policy_checks", "stage verdict", "Prompts and answers that were judged; `failed` is where no verdict came."
)
_CHECK_SECONDS = Definition(
    "ocserve_policy_check_seconds", "histogram", ("stage",), "How long a verdict took, the wait for its turn included."
)

# How each pulled value is read: of the server, and of each model (with the value of a further label, if any).
_OF_SERVER: tuple[tuple[Definition, Callable[[Reading], float | None]], ...] = (
    (_gauge("ocserve_ready", "", "1 when a request for the default model would be taken."), lambda now: now.ready),
    (_gauge("ocserve_start_time_seconds", "", "When the server started, since the epoch."), lambda now: now.started),
    (_gauge("ocserve_requests_active", "", "Requests admitted and not settled."), lambda now: now.active),
    (
        _gauge("ocserve_ledger_healthy", "", "0 while there is a ledger that cannot be written."),
        lambda now: now.ledger_healthy,
    ),
    (
        _gauge("ocserve_ledger_rows_unwritten", "", "Rows of the ledger that wait for a disk that takes them."),
        lambda now: now.ledger_unwritten,
    ),
    (
        _gauge("ocserve_front_resident_memory_bytes", "", "Main memory of the front process."),
        lambda now: now.resident_bytes,
    ),
)
_INFO = _gauge("ocserve_build_info", "version", "Always 1; the version is the label.")
_ENGINE_TOKENS = _counter("ocserve_engine_tokens", "model kind", "Tokens that the engine computed, or was spared.")
_CACHED = _counter("ocserve_engine_cached_tokens", "model tier", "Prompt tokens taken from a tier of the KV cache.")
_OF_ENGINE: tuple[tuple[Definition, Labels, Callable[[EngineReading], float | None]], ...] = (
    (_gauge("ocserve_model_loaded", "model", "1 while the model is in memory."), (), lambda it: it.loaded),
    (
        _gauge("ocserve_answers_owed", "model", "Answers being generated or waited for."),
        (),
        lambda it: it.owed,
    ),
    (
        _gauge("ocserve_sequences_running", "model", "Sequences that hold a slot."),
        (),
        lambda it: it.stats.running,
    ),
    (
        _gauge("ocserve_sequences_waiting", "model", "Sequences that wait for a slot in the engine."),
        (),
        lambda it: it.stats.waiting,
    ),
    (
        _gauge("ocserve_kv_cells_used", "model", "KV cells of running sequences and kept prefixes."),
        (),
        lambda it: it.stats.cells_used,
    ),
    (
        _gauge("ocserve_kv_cells_kept", "model", "KV cells that only kept prefixes hold; they are given up on demand."),
        (),
        lambda it: it.stats.cells_kept,
    ),
    (_gauge("ocserve_kv_cells", "model", "KV cells that there are."), (), lambda it: it.stats.cells_total),
    (
        _gauge("ocserve_engine_resident_memory_bytes", "model", "Main memory of the engine process."),
        (),
        lambda it: it.resident_bytes,
    ),
    (
        _counter("ocserve_engine_restarts", "model", "Engine processes that died and were replaced."),
        (),
        lambda it: it.restarts,
    ),
    (_counter("ocserve_engine_steps", "model", "Batches that the engine decoded."), (), lambda it: it.stats.steps),
    (_ENGINE_TOKENS, ("prefill",), lambda it: it.stats.prefill_tokens),
    (_ENGINE_TOKENS, ("decode",), lambda it: it.stats.decode_tokens),
    (_ENGINE_TOKENS, ("forced",), lambda it: it.stats.forced_tokens),
    (_CACHED, ("device",), lambda it: it.stats.resident_tokens),
    (_CACHED, ("host",), lambda it: it.stats.host_tokens),
    (_CACHED, ("disk",), lambda it: it.stats.disk_tokens),
    (
        _counter(
            "ocserve_invalid_objects",
            "model",
            "Finished objects that did not satisfy their schema; their requests ended in an error.",
        ),
        (),
        lambda it: it.stats.invalid_objects,
    ),
    (
        _counter("ocserve_engine_preemptions", "model", "Sequences moved aside because the KV pool was full."),
        (),
        lambda it: it.stats.preemptions,
    ),
    (
        _counter("ocserve_engine_evictions", "model", "Kept prefixes given up for room."),
        (),
        lambda it: it.stats.evictions,
    ),
)
_OF_REQUESTS = (
    *(_REQUESTS, _ERRORS, _REFUSALS, _TOKENS, _HITS),
    *(_QUEUE, _PREFILL, _TTFT, _GAPS, _DECODE, _DURATION),
)
DEFINITIONS: tuple[Definition, ...] = (
    *_OF_REQUESTS,
    *(definition for definition, _ in _OF_SERVER),
    _INFO,
    *(_CHECKS, _CHECK_SECONDS),
    *dict.fromkeys(definition for definition, _, _ in _OF_ENGINE),
)


@dataclass(frozen=True, slots=True)
class Buckets:
    """A histogram's values for one set of labels: how many do not exceed each bound, the last being all; their sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


@dataclass(frozen=True, slots=True)
class Family:
    """A metric with what it is now, by the values of its labels."""

    definition: Definition
    samples: tuple[tuple[Labels, float | Buckets], ...]


class _Count:
    """A counter's values."""

    def __init__(self, definition: Definition) -> None:
        self._definition = definition
        self._values: defaultdict[Labels, float] = defaultdict(float)

    def add(self, *labels: str, amount: float = 1) -> None:
        self._values[labels] += amount

    def forget(self, models: Container[str]) -> None:
        """Drop what is of none of these models."""
        if self._definition.labels[:1] == ("model",):
            gone = [labels for labels in self._values if labels[0] not in models and labels[0] != OTHER]
            for labels in gone:
                del self._values[labels]

    def family(self) -> Family:
        return Family(self._definition, tuple(self._values.items()))


class _Histogram:
    """A histogram's values, by the first bound that each does not exceed."""

    def __init__(self, definition: Definition, bounds: Sequence[float]) -> None:
        self._definition = definition
        self._bounds = tuple(bounds)
        self._counts: dict[str, list[int]] = {}
        self._sums: defaultdict[str, float] = defaultdict(float)

    def observe(self, model: str, seconds: float) -> None:
        self._of(model)[bisect_left(self._bounds, seconds)] += 1
        self._sums[model] += seconds

    def add(self, model: str, counts: Sequence[int], seconds: float) -> None:
        """Values that were counted elsewhere by the same bounds, and their sum."""
        mine = self._of(model)
        for bound, count in enumerate(counts):
            mine[bound] += count
        self._sums[model] += seconds

    def forget(self, models: Container[str]) -> None:
        """Drop what is of none of these models."""
        for model in [each for each in self._counts if each not in models and each != OTHER]:
            del self._counts[model], self._sums[model]

    def family(self) -> Family:
        return Family(
            self._definition,
            tuple(
                ((model,), Buckets(self._bounds, tuple(accumulate(counts)), self._sums[model]))
                for model, counts in self._counts.items()
            ),
        )

    def _of(self, model: str) -> list[int]:
        return self._counts.setdefault(model, [0] * (len(self._bounds) + 1))


class Meter:
    """Every metric of one server."""

    def __init__(self, read: Callable[[], Reading], routes: Container[str], models: Container[str]) -> None:
        """`read` is asked at every scrape; `routes` and `models` are what these labels may be."""
        self._read = read
        self._routes = routes
        self._models = models
        self._codes: set[str] = set()
        self._served = self._failed = 0  # requests that used a model
        self._counts = {each: _Count(each) for each in _OF_REQUESTS if each.kind == "counter"}
        self._histograms = {
            each: _Histogram(each, GAP_BOUNDS_S if each is _GAPS else _LATENCY_BOUNDS_S)
            for each in _OF_REQUESTS
            if each.kind == "histogram"
        }

    def observe(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        self._judge(record)
        count, model = self._counts, _known(record.model, self._models)
        reason = "none" if record.finish_reason is None else _known(record.finish_reason, _FINISH_REASONS)
        count[_REQUESTS].add(_known(record.route, self._routes), f"{record.status // 100}xx", reason)
        if record.error_code is not None:
            count[_ERRORS].add(self._code(record.error_code))
        if record.limit is not None:
            count[_REFUSALS].add(_known(record.limit, _LIMITS))
        usage = record.usage
        if not usage.prompt_tokens:
            return
        for kind, tokens in (
            ("prompt", usage.prompt_tokens),
            ("cached", usage.cached_tokens),
            ("completion", usage.completion_tokens),
            ("reasoning", usage.reasoning_tokens),
            ("image", usage.image_tokens),
            ("draft_accepted", usage.accepted_draft_tokens),
            ("draft_rejected", usage.rejected_draft_tokens),
        ):
            count[_TOKENS].add(model, kind, amount=tokens)
        count[_HITS].add(model, amount=usage.cached_tokens > 0)
        self._time(model, record)

    def _time(self, model: str, record: RequestRecord) -> None:
        """The times of a request that used a model."""
        queue, first, total = record.queue_ms, record.ttft_ms, record.total_ms
        for definition, milliseconds in (
            (_QUEUE, queue),
            (_PREFILL, None if first is None or queue is None else first - queue),
            (_TTFT, first),
            (_DECODE, None if first is None else total - first),
            (_DURATION, total),
        ):
            if milliseconds is not None:
                self._histograms[definition].observe(model, max(0.0, milliseconds / 1000))
        self._histograms[_GAPS].add(model, record.token_gaps, record.token_gaps_s)

    def _judge(self, record: RequestRecord) -> None:
        """Count a request for or against the server; what its client did wrong, or left, is neither."""
        if record.model is None or record.error_code == "maintenance":
            return
        if record.status >= 500 or record.finish_reason == "error":
            self._failed += 1
        elif record.status < 300:
            self._served += 1

    def availability(self) -> float | None:
        """Which share of the requests to models the server did not fail, since its start; None before the first."""
        judged = self._served + self._failed
        return self._served / judged if judged else None

    def _code(self, code: str) -> str:
        if code not in self._codes and len(self._codes) >= _MOST_CODES:
            return OTHER
        self._codes.add(code)
        return code

    def families(self) -> Iterator[Family]:
        """Everything, now. What was counted of models that have gone is forgotten."""
        for count in self._counts.values():
            count.forget(self._models)
        for histogram in self._histograms.values():
            histogram.forget(self._models)
        yield from (count.family() for count in self._counts.values())
        yield from (histogram.family() for histogram in self._histograms.values())
        now = self._read()
        pulled: dict[Definition, list[tuple[Labels, float]]] = {}
        samples: list[tuple[Definition, Labels, float | None]] = [
            *((definition, (), value(now)) for definition, value in _OF_SERVER),
            (_INFO, (now.version,), 1),
            *(
                (definition, (engine.model, *further), value(engine))
                for engine in now.engines
                for definition, further, value in _OF_ENGINE
            ),
        ]
        for definition, labels, found in samples:
            if found is not None:
                pulled.setdefault(definition, []).append((labels, found))
        yield from (Family(definition, tuple(found)) for definition, found in pulled.items())
        yield from _checks(now.checks)


def _checks(stages: Sequence[CheckCounts]) -> Iterator[Family]:
    """What a content policy has judged."""
    counted = [((of.stage, verdict), float(count)) for of in stages for verdict, count in of.outcomes]
    yield Family(_CHECKS, tuple(counted))
    took = [((of.stage,), Buckets(of.bounds_s, tuple(accumulate(of.took)), of.took_s)) for of in stages]
    yield Family(_CHECK_SECONDS, tuple(took))


def _known(word: str | None, known: Container[str]) -> str:
    return word if word is not None and word in known else OTHER
