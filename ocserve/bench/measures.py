"""Figures from samples. Pure; times are seconds, percentiles interpolate linearly between order statistics."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import median
from types import MappingProxyType

import msgspec

from ocserve.bench.client import Sample
from ocserve.bench.scenario import Scenario

_RESAMPLES = 2000


class Objective(msgspec.Struct, frozen=True, kw_only=True):
    """A service level: a request is good if its TTFT and its p95 inter-token latency stay within (None: any)."""

    ttft_s: float | None = None
    itl_s: float | None = None

    def __bool__(self) -> bool:
        return self.ttft_s is not None or self.itl_s is not None

    def met(self, sample: Sample) -> bool:
        """Whether the request ended well and in time."""
        if sample.error is not None or sample.ttft_s is None:
            return False
        if self.ttft_s is not None and sample.ttft_s > self.ttft_s:
            return False
        gaps = [later - earlier for earlier, later in pairwise(sample.visible_s)]
        return self.itl_s is None or not gaps or percentile(gaps, 95) <= self.itl_s


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one cell (target, phase, group) over all rounds; None where there is nothing to say.

    `span_s` sums, over the rounds, the time from the first request's beginning to the last one's end: rates' divisor.
    `uncounted` answers reported no usage. `prefill_tokens` were computed, by the server's word; `new_tokens` are the
    least that had to be if it kept each conversation (and shares nothing between them). `good_share` and
    `goodput_per_s` count requests that met the objective.
    """

    requests: int
    errors: dict[str, int]
    uncounted: int
    span_s: float
    ttft_p50: float | None
    ttft_p95: float | None
    ttft_p99: float | None
    itl_p50: float | None
    itl_p95: float | None
    itl_p99: float | None
    e2e_p50: float | None
    e2e_p95: float | None
    e2e_p99: float | None
    output_tokens: int
    output_per_s: float
    prompt_tokens: int
    cached_tokens: int | None
    prefill_tokens: int | None
    new_tokens: int
    cached_share: float | None
    good_share: float | None
    goodput_per_s: float | None


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """Per-round ratios of a measure, their median, and its 95 % bootstrap interval (None for a single round)."""

    name: str
    measure: str
    rounds: tuple[float, ...]
    median: float
    low: float | None
    high: float | None


# What is compared between targets: the field of `Summary` and its name on paper.
COMPARED: Mapping[str, str] = MappingProxyType(
    {
        "ttft_p50": "TTFT p50",
        "itl_p50": "ITL p50",
        "itl_p99": "ITL p99",
        "e2e_p50": "end to end p50",
        "output_per_s": "output tokens/s",
        "prefill_tokens": "prefill tokens",
    }
)


def percentile(values: Sequence[float], percent: float) -> float:
    """The `percent`-th percentile; of eight values the 50th is the mean of the fourth and the fifth."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def gaps(samples: Iterable[Sample], windows: Sequence[tuple[float, float]] | None = None) -> list[float]:
    """Times between visible deltas; with `windows` (on the session's clock) only those that touch one."""
    found = []
    for sample in samples:
        for earlier, later in pairwise(sample.visible_s):
            begin, end = sample.began_s + earlier, sample.began_s + later
            if windows is None or any(begin < closes and end > opens for opens, closes in windows):
                found.append(later - earlier)
    return found


def cell(samples: Sequence[Sample], phase: str, group: str) -> list[Sample]:
    """The samples of one group in one phase."""
    return [sample for sample in samples if sample.phase == phase and sample.group == group]


def waiting(samples: Sequence[Sample], phase: str, group: str) -> list[tuple[float, float]]:
    """When requests of a group waited for their first token, on the session's clock."""
    return [
        (each.began_s, each.began_s + (each.ended_s if each.ttft_s is None else each.ttft_s))
        for each in cell(samples, phase, group)
    ]


def inter_token(rounds: Sequence[Sequence[Sample]], phase: str, group: str, during: str | None) -> list[float]:
    """The inter-token latencies of a cell over all rounds, as its `during` says."""
    return [
        gap
        for samples in rounds
        for gap in gaps(cell(samples, phase, group), waiting(samples, phase, during) if during else None)
    ]


def summary(
    rounds: Sequence[Sequence[Sample]], phase: str, group: str, *, during: str | None = None, objective: Objective
) -> Summary:
    """The figures of a cell from the samples of each round."""
    cells = [found for samples in rounds if (found := cell(samples, phase, group))]
    everyone = [sample for samples in cells for sample in samples]
    good = [sample for sample in everyone if sample.error is None]
    span_s = sum(max(s.began_s + s.ended_s for s in each) - min(s.began_s for s in each) for each in cells)
    ttft = [sample.ttft_s for sample in good if sample.ttft_s is not None]
    itl = inter_token([[s for s in each if s.error is None or s.phase != phase or s.group != group] for each in rounds],
                      phase, group, during)  # fmt: skip
    e2e = [sample.ended_s for sample in good]
    output = sum(sample.completion_tokens for sample in good)
    prompt, cached = sum(s.prompt_tokens for s in good), _all_or_none(s.cached_tokens for s in good)
    met = sum(objective.met(sample) for sample in everyone)

    def at(values: Sequence[float], percent: float) -> float | None:
        return percentile(values, percent) if values else None

    return Summary(
        requests=len(everyone),
        errors=dict(Counter(sample.error for sample in everyone if sample.error is not None)),
        uncounted=sum(not sample.counted for sample in good),
        span_s=span_s,
        ttft_p50=at(ttft, 50),
        ttft_p95=at(ttft, 95),
        ttft_p99=at(ttft, 99),
        itl_p50=at(itl, 50),
        itl_p95=at(itl, 95),
        itl_p99=at(itl, 99),
        e2e_p50=at(e2e, 50),
        e2e_p95=at(e2e, 95),
        e2e_p99=at(e2e, 99),
        output_tokens=output,
        output_per_s=output / span_s if span_s else 0.0,
        prompt_tokens=prompt,
        cached_tokens=cached,
        prefill_tokens=None if cached is None else prompt - cached,
        new_tokens=prompt - sum(s.known_tokens for s in good),
        cached_share=cached / prompt if prompt and cached is not None else None,
        good_share=met / len(everyone) if objective and everyone else None,
        goodput_per_s=met / span_s if objective and span_s else None,
    )


def _all_or_none(values: Iterable[int | None]) -> int | None:
    """Their sum, unless one is missing."""
    found = list(values)
    known = [value for value in found if value is not None]
    return sum(known) if len(known) == len(found) else None


def ratio(name: str, measure: str, pairs: Iterable[tuple[float | None, float | None]]) -> Ratio | None:
    """The paired ratio over rounds; None if no round has both values."""
    found = tuple(one / other for one, other in pairs if one is not None and other)
    if not found:
        return None
    low, high = bootstrap(found) if len(found) > 1 else (None, None)
    return Ratio(name=name, measure=measure, rounds=found, median=median(found), low=low, high=high)


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % percentile interval of the median (Efron 1979), reproducibly resampled."""
    draw = random.Random(0)  # noqa: S311 -- reproducible, not secret
    medians = [median(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES)]
    return percentile(medians, 2.5), percentile(medians, 97.5)


def decode_rate(samples: Sequence[Sample]) -> float | None:
    """Tokens per second of simultaneous streams while all of them stream; None if they never do.

    The window opens when the last stream shows its first delta and closes when the first stream shows its last one: a
    delta's tokens are the answer's tokens over its deltas.
    """
    if any(sample.error is not None or len(sample.visible_s) < 2 for sample in samples):
        return None
    opens = max(sample.began_s + sample.visible_s[0] for sample in samples)
    closes = min(sample.began_s + sample.visible_s[-1] for sample in samples)
    if closes <= opens:
        return None
    tokens = 0.0
    for sample in samples:
        inside = sum(opens < sample.began_s + at <= closes for at in sample.visible_s)
        tokens += inside * sample.completion_tokens / len(sample.visible_s)
    return tokens / (closes - opens)


def relations(scenario: Scenario, rounds: Sequence[Sequence[Sample]], label: str) -> list[Ratio]:
    """The scenario's ratios within one target, per round."""
    during = {f"{phase.name}/{group.name}": group.during for phase in scenario.phases for group in phase.groups}

    def value(samples: Sequence[Sample], name: str, measure: str) -> float | None:
        phase, _, group = name.partition("/")
        found = summary([samples], phase, group, during=during[name], objective=Objective())
        number: float | None = getattr(found, measure)
        return number

    found = []
    for each in scenario.relations:
        pairs = [
            (value(samples, each.of, each.measure), value(samples, each.over, each.over_measure or each.measure))
            for samples in rounds
        ]
        found.append(ratio(f"{label}: {each.name}" if label else each.name, each.measure, pairs))
    return [each for each in found if each is not None]


def same_answers(one: Sequence[Sample], other: Sequence[Sample], key: Callable[[Sample], str]) -> tuple[int, int]:
    """(equal, compared): answers of two targets in one round, matched by cell and by the order of their texts."""
    ours, theirs = (Counter(key(sample) for sample in samples if sample.error is None) for samples in (one, other))
    return (ours & theirs).total(), max(ours.total(), theirs.total())
