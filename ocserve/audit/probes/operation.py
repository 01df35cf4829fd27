"""Probes of operation: figures for monitoring, repeats that are not run twice, limits published as they are held."""

from __future__ import annotations

import asyncio
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ocserve.audit.published import PATHS
from ocserve.audit.server import Reply, dig
from ocserve.audit.subject import SHORT, Subject, named
from ocserve.audit.verdict import Fault, Unproven, Unsaid, clean, expect

_SAMPLE = re.compile(
    r"(?P<name>[a-zA-Z_:][\w:]*)"
    r"(?:\{(?P<labels>(?:[a-zA-Z_]\w*=\"(?:[^\"\\]|\\[\\\"n])*\",?)*)\})? (?P<value>\S+)(?: -?\d+)?"
)
# What has to be among the figures, by kind of metric.
_FIGURES = (
    ("the time to the first token", "histogram", r"time_to_first_token|ttft"),
    ("the time between tokens", "histogram", r"inter_token|time_per_output_token|between_tokens"),
    ("the wait in the queue", "histogram", r"queue"),
    ("errors", "counter", r"error|fail"),
    ("tokens", "counter", r"token"),
)
_LIMITS = {
    "requests_per_minute": r"requests? (per|a) minute|\brpm\b",
    "requests_per_day": r"requests? (per|a) day|\brpd\b",
    "tokens_per_minute": r"tokens? (per|a) minute|\btpm\b",
    "concurrent_requests": r"concurren|at the same time|at once|parallel",
}
_MOST_AT_ONCE = 64
_FEW = 8  # tokens, fewer than any answer with its prompt has


async def metrics(subject: Subject) -> str:
    """The server's figures can be scraped by Prometheus: latencies, queue, errors and tokens."""
    reply = await subject.server.send("GET", "/metrics", at_root=True)
    if reply.status != 200:
        raise Unproven(f"/metrics is not open to this key: status {reply.status}")
    kinds, samples = _parsed(reply.body.decode(errors="replace"))
    found = []
    for what, kind, pattern in _FIGURES:
        name = next((name for name, its in kinds.items() if its == kind and re.search(pattern, name)), None)
        if name is None:
            raise Fault(f"/metrics has no {kind} of {what}")
        found.append(name)
    for name in (name for name, kind in kinds.items() if kind == "histogram"):
        _whole(name, samples)
    return f"{len(kinds)} metrics, among them {', '.join(clean(name, 60) for name in found)}"


_Samples = Mapping[str, list[tuple[dict[str, str], float]]]


def _parsed(text: str) -> tuple[dict[str, str], _Samples]:
    """The kind of each metric, and its samples with their labels. Raises `Fault` for a line that is none."""
    kinds: dict[str, str] = {}
    samples: defaultdict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ", 3)
            kinds[name] = kind.strip()
        elif line.strip() and not line.startswith("#"):
            match = _SAMPLE.fullmatch(line.strip())
            if match is None:
                raise Fault("a line of /metrics is not in Prometheus' text format")
            labels = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match["labels"] or ""))
            samples[match["name"]].append((labels, float(match["value"])))
    return kinds, samples


def _whole(name: str, samples: _Samples) -> None:
    """A histogram's buckets grow with their bounds, and the last has everything."""
    series: defaultdict[tuple[tuple[str, str], ...], list[tuple[float, float]]] = defaultdict(list)
    for labels, value in samples.get(f"{name}_bucket", ()):
        bound = float(labels.pop("le", "nan"))
        series[tuple(sorted(labels.items()))].append((bound, value))
    counts = {tuple(sorted(labels.items())): value for labels, value in samples.get(f"{name}_count", ())}
    for its, buckets in series.items():
        values = [value for _, value in sorted(buckets)]
        expect(values == sorted(values), f"the buckets of {clean(name, 60)} do not grow")
        expect(values[-1] == counts.get(its), f"the buckets of {clean(name, 60)} do not hold what was counted")


async def idempotency(subject: Subject) -> str:
    """A request that is repeated with its Idempotency-Key is answered equally, where such keys are known at all."""
    fields = subject.fields(SHORT, {"max_tokens": 8, "temperature": 1})
    stamp = time.time_ns()
    names = [f"audit-{stamp}-{number}" for number in (1, 1, 2)]
    first, again, other = [
        (await subject.server.send("POST", "/chat/completions", fields, headers={"idempotency-key": name})).ok()
        for name in names
    ]
    told = any("idempoten" in name for name in again.headers)
    if not told and dig(again.json, "id") != dig(first.json, "id"):
        return "Idempotency-Key is not known here: a repeat is a request of its own"
    expect(again.body == first.body, "a repeat with its Idempotency-Key was answered differently")
    expect(dig(other.json, "id") != dig(first.json, "id"), "another Idempotency-Key got the first one's answer")
    return f"{len(first.body)} bytes, the same twice; another key, another answer"


async def _limits(subject: Subject) -> tuple[str, dict[str, Any]]:
    """Where the limits are published, and what they are where that can be read. Raises `Unsaid`."""
    for page in await subject.published("limits"):
        found = dig(page.json, "limits")
        if isinstance(found, dict):
            return page.address, found
    raise Unsaid(
        f"{clean(subject.pages.get('limits', PATHS['limits'][0]), 120)} has no limits that can be read as JSON"
    )


async def limits_published(subject: Subject) -> str:
    """Limits are published: requests a minute and a day, tokens a minute, requests at once; headers say the same."""
    try:
        address, found = await _limits(subject)
    except Unsaid:
        for page in await subject.published("limits"):
            if (quote := page.quote(*_LIMITS.values())) is not None:
                return f"{page.address}: {clean(quote, 200)}"
        raise
    missing = [name for name in _LIMITS if name not in found]
    expect(not missing, f"{address} does not say {', '.join(missing)}")
    reply = await subject.chat(SHORT, max_tokens=1)
    for unit in ("requests", "tokens"):
        own = [dig(each, "limits") or {} for each in await _of_models(subject)]
        known = {str(limits.get(f"{unit}_per_{period}")) for limits in (found, *own) for period in ("minute", "day")}
        told = reply.headers.get(f"x-ratelimit-limit-{unit}")
        expect(told is None or told in known, f"a limit of {clean(told, 20)} {unit} is announced and not published")
    shown = (f"{name} {'unlimited' if found[name] is None else clean(found[name], 20)}" for name in _LIMITS)
    return f"{address}: {', '.join(shown)}"


async def _of_models(subject: Subject) -> list[Any]:
    """What is published of each model's limits."""
    pages = await subject.published("limits")
    models = dig(pages[0].json, "models") if pages else None
    return models if isinstance(models, list) else []


async def limits_raised(subject: Subject) -> str:
    """It is published how limits are raised."""
    for kind in ("limits", "support"):
        for page in await subject.published(kind):
            if (quote := page.quote(r"\braise|increas|higher")) is not None:
                return f"{page.address}: {clean(quote, 200)}"
    raise Unsaid("how limits are raised is not said at /limits or /support")


async def concurrent_limit(subject: Subject) -> str:
    """The published limit on requests at the same time is the one that holds."""
    address, found = await _limits(subject)
    most = found.get("concurrent_requests")
    if most is None:
        return f"{address}: unlimited"
    if not isinstance(most, int) or most > _MOST_AT_ONCE:
        raise Unproven(f"{clean(most, 20)} at once are more than this audit sends")
    fields = subject.fields(SHORT, {"max_tokens": 64})

    async def one() -> Reply:
        return await subject.server.send("POST", "/chat/completions", fields, patient=False)

    replies = await asyncio.gather(*(one() for _ in range(2 * most + 4)))
    served = sum(reply.status == 200 for reply in replies)
    others = {reply.status for reply in replies} - {200, 429}
    expect(not others, f"beyond the limit the server answers with status {', '.join(map(str, sorted(others)))}")
    expect(served < len(replies), f"{most} at once are published, and {served} were served")
    expect(served >= most, f"{most} at once are published, and {served} were served")
    return f"{address}: {most}; of {len(replies)} at once {served} were served, the others refused with 429"


async def token_limit_enforced(subject: Subject) -> str:
    """The limit on tokens counts what answers use, and a request that exceeds it is refused."""
    reply = await subject.chat(SHORT, max_tokens=8)
    most, announced = subject.max_output_tokens or 64, reply.headers.get("x-ratelimit-limit-tokens", "")
    # A stream that may use many tokens and uses few.
    room = min(most, int(announced) // 2 + 1) if announced.isdigit() else 8
    stream = await subject.chat_stream(SHORT, max_tokens=room, leave_after=2)
    limit, remaining = (stream.headers.get(f"x-ratelimit-{name}-tokens", "") for name in ("limit", "remaining"))
    if not (limit.isdigit() and remaining.isdigit()):
        try:
            address, found = await _limits(subject)
        except Unsaid:
            raise Unproven("no limit on tokens is announced or published") from None
        expect(found.get("tokens_per_minute") is None, f"{address} has a limit on tokens, and no header announces it")
        return f"{address}: unlimited"
    counted = f"{remaining} of {limit} remain while an answer is generated"
    if int(remaining) >= int(limit):
        if int(limit) / 60 * stream.took_s > _FEW:
            raise Unproven(f"{limit} tokens a minute refill faster than an answer uses them")
        raise Fault(f"{counted}: it is not counted")
    if int(limit) > most:
        return f"{counted}; no single request can exceed them"
    over = await subject.server.send(
        "POST", "/chat/completions", subject.fields(SHORT, {"max_tokens": int(limit)}), patient=False
    )
    expect(over.status in (400, 429), f"a request for more than {limit} tokens is answered with status {over.status}")
    return f"{counted}; a request for more is refused with status {over.status}"


PROBES = named(metrics, idempotency, limits_published, limits_raised)
LIMITS = named(concurrent_limit, token_limit_enforced)
