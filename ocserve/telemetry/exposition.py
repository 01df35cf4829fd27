"""Metrics in Prometheus' text format, written by its own library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ocserve.telemetry.metrics import Buckets, Family

MEDIA_TYPE = CONTENT_TYPE_PLAIN_0_0_4


def write(families: Iterable[Family]) -> bytes:
    """A scrape's answer, of `MEDIA_TYPE`."""
    registry = CollectorRegistry()
    registry.register(_Once(families))
    return generate_latest(registry)


class _Once(Collector):
    """What a registry collects from."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._metrics = [_metric(family) for family in families]

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics


def _metric(family: Family) -> Metric:
    definition = family.definition
    name, text, labels = definition.name, definition.help, definition.labels
    if definition.kind == "histogram":
        histogram = HistogramMetricFamily(name, text, labels=labels)
        for values, sample in family.samples:
            assert isinstance(sample, Buckets)
            bounds = (*map(str, sample.bounds), "+Inf")
            counted = [(bound, float(count)) for bound, count in zip(bounds, sample.counts, strict=True)]
            histogram.add_metric(values, counted, sample.total)
        return histogram
    single = (CounterMetricFamily if definition.kind == "counter" else GaugeMetricFamily)(name, text, labels=labels)
    for values, sample in family.samples:
        assert not isinstance(sample, Buckets)
        single.add_metric(values, float(sample))
    return single
