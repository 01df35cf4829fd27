"""Probes under load, and the measurements that the drafts quote. Times are seconds in figures, ms in texts."""

from __future__ import annotations

import asyncio
import re
import time
from statistics import fmean, median, quantiles

from ocserve.audit.server import Reply, Stream
from ocserve.audit.subject import SHORT, STORY, Subject, counting, named
from ocserve.audit.verdict import Fault, Refused, Unproven, clean, expect

_SAMPLES = 12
_AT_ONCE = 16
_ROUNDS = 3
_TOKENS = 32
_FLOOD = 128
_MOST_SPENT = 600  # requests that the audit is willing to send to reach a limit
_ENOUGH = 20  # requests that tell how fast they are answered
_LONGEST_WAIT_S = 60.0
_LIMITS = ("limit", "remaining", "reset")


def _p95(values: list[float]) -> float:
    return quantiles(values, n=20, method="inclusive")[-1]


async def latency(subject: Subject) -> str:
    """Latency, time to first token and speed of single requests, one after another."""
    streams = [await subject.chat_stream(f"{STORY} Part {i}.", max_tokens=_TOKENS) for i in range(_SAMPLES)]
    firsts = [first for stream in streams if (first := stream.first_text_s) is not None]
    if len(firsts) < _SAMPLES:
        raise Fault("a stream has no text")
    times = [stream.took_s for stream in streams]
    rates = [
        (stream.used("completion_tokens") - 1) / max(stream.took_s - first, 1e-6)
        for stream, first in zip(streams, firsts, strict=True)
    ]
    subject.figures.update(
        {
            "latency_mean_s": fmean(times),
            "latency_p50_s": median(times),
            "latency_p95_s": _p95(times),
            "ttft_p50_s": median(firsts),
            "ttft_p95_s": _p95(firsts),
            "tok_per_s": median(rates),
            "tok_per_s_with_prompt": sum(stream.used("completion_tokens") for stream in streams) / sum(times),
        }
    )
    return (
        f"{_SAMPLES} streams of {_TOKENS} tokens: latency mean {fmean(times) * 1000:.0f} ms, P50 "
        f"{median(times) * 1000:.0f} ms, P95 {_p95(times) * 1000:.0f} ms; first token P50 {median(firsts) * 1000:.0f} "
        f"ms, P95 {_p95(firsts) * 1000:.0f} ms; {median(rates):.1f} tok/s"
    )


async def concurrent(subject: Subject) -> str:
    """Many requests at once are all answered, each with its own answer."""
    ids = [1000 + 17 * i for i in range(_AT_ONCE)]

    async def ask(token: int) -> Stream:
        return await subject.chat_stream(temperature=0, max_tokens=8, logit_bias={str(token): 100})

    try:
        alone = [(await ask(token)).text for token in ids]
    except Refused:
        alone = []
    if alone:
        texts = [stream.text for stream in await asyncio.gather(*map(ask, ids))]
        mixed = sum(one != other for one, other in zip(texts, alone, strict=True))
        expect(not mixed, f"{mixed} of {_AT_ONCE} answers differ from those of the same requests alone")
        return f"{_AT_ONCE} at once, each the answer that it gets alone"
    streams = await asyncio.gather(*(subject.chat_stream(max_tokens=8) for _ in ids))
    expect(all(stream.done for stream in streams), "a stream has no [DONE]")
    return f"{_AT_ONCE} at once, all answered"


async def sustained(subject: Subject) -> str:
    """Sustained load is served without a failure, and at no less than the speed of single requests."""

    async def alone(number: int) -> float:
        stream = await subject.chat_stream(f"{STORY} Part {number} alone.", max_tokens=_TOKENS)
        return stream.used("completion_tokens") / stream.took_s

    async def worker(number: int) -> list[Stream]:
        return [
            await subject.chat_stream(f"{STORY} Part {number}, {turn}.", max_tokens=_TOKENS) for turn in range(_ROUNDS)
        ]

    before = await alone(1)
    began = time.perf_counter()
    streams = [stream for some in await asyncio.gather(*map(worker, range(_AT_ONCE // 2))) for stream in some]
    took = time.perf_counter() - began
    solo = min(before, await alone(2))
    expect(all(stream.done and stream.usage for stream in streams), "a stream broke off")
    total = sum(stream.used("completion_tokens") for stream in streams) / took
    times = [stream.took_s for stream in streams]
    subject.figures.update(
        {"load_tok_per_s": total, "load_latency_p50_s": median(times), "load_latency_p95_s": _p95(times)}
    )
    # Half of it, since other work on a shared machine comes and goes meanwhile.
    expect(total > 0.5 * solo, f"{_AT_ONCE // 2} at once make {total:.0f} tok/s together, one alone {solo:.0f}")
    return (
        f"{len(streams)} streams, {_AT_ONCE // 2} at once: {total:.0f} tok/s together, latency P50 "
        f"{median(times) * 1000:.0f} ms, P95 {_p95(times) * 1000:.0f} ms"
    )


async def same_under_load(subject: Subject) -> str:
    """Answers are as good under load as without: a greedy answer stays what it was."""
    starts = range(11, 11 + _AT_ONCE)

    async def ask(start: int) -> str:
        return (await subject.chat(counting(start), temperature=0, max_tokens=12)).text

    alone = [await ask(start) for start in starts]
    same = sum(one == other for one, other in zip(alone, await asyncio.gather(*map(ask, starts)), strict=True))
    # Batches change the order of sums, which may tip a close call of a quantised model, but not most answers.
    expect(2 * same >= _AT_ONCE, f"{same} of {_AT_ONCE} greedy answers under load are those given alone")
    return f"{same} of {_AT_ONCE} greedy answers under load are those given alone"


async def overload(subject: Subject) -> str:
    """More work than the server takes is refused with 429, Retry-After is true, and what was taken is answered."""

    moments: dict[int, float] = {}

    async def one(number: int) -> Reply:
        fields = subject.fields(f"{SHORT} {number}", {"max_tokens": 16})
        reply = await subject.server.send("POST", "/chat/completions", fields, patient=False)
        moments[id(reply)] = time.perf_counter()
        return reply

    replies = await asyncio.gather(*(one(number) for number in range(_FLOOD)))
    refused = [reply for reply in replies if reply.status == 429]
    others = {reply.status for reply in replies} - {200, 429}
    expect(not others, f"under overload the server answers with status {', '.join(map(str, sorted(others)))}")
    if not refused:
        raise Unproven(f"{_FLOOD} requests at once were all answered: no limit was met")
    for reply in refused:
        expect(reply.headers.get("retry-after"), "a 429 has no Retry-After")
        expect(isinstance(reply.error.get("message"), str), "a 429 has no error object")
    codes = sorted({clean(reply.error.get("code"), 40) for reply in refused})
    soonest = min(refused, key=lambda reply: (_told_s(reply), moments[id(reply)]))
    back = await _come_back(subject, soonest, moments[id(soonest)])
    return f"of {_FLOOD} requests at once {len(refused)} were refused with 429 ({', '.join(codes)}); {back}"


def _told_s(refused: Reply) -> float:
    """When a refusal says to come back, in seconds; raises `Fault` where that is no number."""
    told = refused.headers.get("retry-after", "")
    if not re.fullmatch(r"\d+(\.\d+)?", told):
        raise Fault("the Retry-After of a 429 is no number of seconds")
    return float(told)


async def _come_back(subject: Subject, refused: Reply, moment: float) -> str:
    """After the time that a refusal at `moment` named, a request is served; what was found of that."""
    told = _told_s(refused)
    if told > _LONGEST_WAIT_S:
        return f"its Retry-After of {told:g} s was not waited for"
    await asyncio.sleep(max(0.0, moment + told - time.perf_counter()))
    fields = subject.fields(SHORT, {"max_tokens": 1})
    again = await subject.server.send("POST", "/chat/completions", fields, patient=False)
    expect(again.status != 429, f"after a Retry-After of {told:g} s the request is refused again")
    again.ok()
    return f"after the {told:g} s of Retry-After the request is served"


async def limit_headers(subject: Subject) -> str:
    """Limits are announced in x-ratelimit headers."""
    reply = await subject.chat(SHORT, max_tokens=1)
    found = {name: reply.headers.get(f"x-ratelimit-{name}-requests") for name in _LIMITS}
    if not any(found.values()):
        refused = {each.code for each in subject.server.exchanges if each.status == 429}
        if any("overload" not in code for code in refused):  # being full is not a limit that could be announced
            raise Fault("the server refuses with 429 but announces no x-ratelimit headers")
        raise Unproven("no limit is announced and none was met")
    missing = [name for name, value in found.items() if not value]
    expect(not missing, f"x-ratelimit-{'/'.join(missing)}-requests is missing")
    expect(all(str(found[name]).isdigit() for name in ("limit", "remaining")), "a limit is no number")
    other = await subject.chat(SHORT, max_tokens=1)
    return (
        f"limit {clean(found['limit'], 20)}, remaining {clean(found['remaining'], 20)} and then "
        f"{clean(other.headers.get('x-ratelimit-remaining-requests'), 20)}, reset {clean(found['reset'], 20)}"
    )


async def token_limit_headers(subject: Subject) -> str:
    """A limit on tokens per minute is announced."""
    reply = await subject.chat(SHORT, max_tokens=1)
    limit = reply.headers.get("x-ratelimit-limit-tokens")
    if not limit:
        raise Unproven("no limit on tokens is announced")
    expect(limit.isdigit() and reply.headers.get("x-ratelimit-remaining-tokens", "").isdigit(), "it is no number")
    return f"{clean(limit, 20)} tokens per minute"


async def limit_enforced(subject: Subject) -> str:
    """The announced limit on requests holds: so many pass, the next is a 429, and Retry-After is true."""
    first = await subject.chat(SHORT, max_tokens=1)
    announced = first.headers.get("x-ratelimit-remaining-requests", "")
    if not announced.isdigit():
        raise Unproven("no limit on requests is announced")
    if int(announced) > _MOST_SPENT:
        raise Unproven(f"{announced} requests remain: too many to spend on finding out")
    fields = subject.fields(SHORT, {"max_tokens": 1})
    per_minute = first.headers.get("x-ratelimit-limit-requests", "")
    passed, began = 0, time.perf_counter()
    while True:
        reply = await subject.server.send("POST", "/chat/completions", fields, patient=False)
        if reply.status == 429:
            break
        reply.ok()
        passed += 1
        refilled = (time.perf_counter() - began) * (int(per_minute) if per_minute.isdigit() else 0) / 60
        if passed >= _ENOUGH and refilled > passed:
            raise Unproven(f"the limit, {per_minute} a minute, refills faster than requests are answered in turn")
        if passed > int(announced) + refilled + 10:
            raise Fault(f"{announced} requests were announced as remaining, and {passed} passed")
    expect(passed >= int(announced) - 1, f"{announced} requests were announced as remaining, and {passed} passed")
    back = await _come_back(subject, reply, time.perf_counter())
    return f"{announced} announced, {passed} passed, then 429; {back}"


PROBES = named(latency, concurrent, sustained, same_under_load)
LIMITS = named(overload, limit_headers, token_limit_headers, limit_enforced)
