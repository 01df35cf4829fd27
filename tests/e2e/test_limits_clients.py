"""Must-show: limits over HTTP, with the real client's own retries."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import openai
import pytest

from tests.e2e.daemon import RunningDaemon, daemon, wait_until

pytestmark = pytest.mark.beside


async def ask(client: openai.AsyncOpenAI) -> str:
    try:
        await client.completions.create(model="default", prompt=[40, 41], max_tokens=1)
    except openai.RateLimitError:
        return "refused"
    return "done"


def test_a_hundred_clients_with_two_retries_each_all_finish(tiny_model: Path, full: bool) -> None:
    """100 requests of one key at once; 60 a minute in the full form, 96 in the short one."""
    per_minute = burst = 60 if full else 96
    clients = 100

    async def all_at_once(url: str) -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="x") as client:  # max_retries: the default, two
            return list(await asyncio.gather(*(ask(client) for _ in range(clients))))

    with daemon(str(tiny_model), env={"OCSERVE_LIMITS_REQUESTS_PER_MINUTE": str(per_minute)}) as server:
        begun = time.monotonic()
        assert asyncio.run(all_at_once(server.base_url)) == ["done"] * clients
        elapsed = time.monotonic() - begun
    # Never more than burst + rate × elapsed.
    assert clients <= burst + per_minute / 60 * elapsed + 1


def test_refusals_are_immediate_carry_the_headers_and_never_exceed_the_rate(tiny_model: Path) -> None:
    async def hammer(url: str) -> tuple[int, float, list[float], openai.RateLimitError]:
        passed, waits, last = 0, [], None
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
            begun = time.monotonic()
            while time.monotonic() - begun < 2:
                asked = time.monotonic()
                try:
                    await client.completions.create(model="default", prompt=[40], max_tokens=1)
                    passed += 1
                except openai.RateLimitError as refusal:
                    waits.append(time.monotonic() - asked)
                    last = refusal
        assert last is not None
        return passed, time.monotonic() - begun, waits, last

    with daemon(str(tiny_model), env={"OCSERVE_LIMITS_REQUESTS_PER_MINUTE": "30"}) as server:
        passed, elapsed, waits, last = asyncio.run(hammer(server.base_url))
    assert passed <= 30 + 0.5 * elapsed + 1
    assert sorted(waits)[len(waits) // 2] < 0.1
    assert last.response.headers["x-ratelimit-limit-requests"] == "30"
    assert float(last.response.headers["retry-after-ms"]) > 0
    assert int(last.response.headers["retry-after"]) >= 1
    assert last.code == "rate_limit_exceeded"


def test_tokens_are_reserved_at_admission_and_settled_at_the_end(tiny_model: Path) -> None:
    bias = {"0": -100, "2": -100}
    with (
        daemon(str(tiny_model), env={"OCSERVE_LIMITS_TOKENS_PER_MINUTE": "1000"}) as server,
        openai.OpenAI(base_url=server.base_url, api_key="x", max_retries=0) as client,
    ):
        raw = client.completions.with_raw_response.create(
            model="default", prompt=[40] * 100, max_tokens=300, logit_bias=bias
        )
        # 400 of 1,000 were reserved while it ran; nothing was left over to give back.
        assert 600 <= int(raw.headers["x-ratelimit-remaining-tokens"]) <= 620
        client.completions.create(model="default", prompt=[40] * 10, max_tokens=400, stop=["\n", "a", "e", "t"])
        after = client.completions.with_raw_response.create(model="default", prompt=[40] * 10, max_tokens=10)
        usage = after.parse().usage
        assert usage is not None
        assert int(after.headers["x-ratelimit-remaining-tokens"]) > 200  # the stopped one gave its reservation back


def test_streams_that_are_left_are_charged_for_what_they_delivered(tiny_model: Path) -> None:
    """A client that always leaves early must not have its tokens for nothing."""

    def ended(server: RunningDaemon) -> int:
        return server.log.read_text().count('"finish_reason"')

    async def leave(server: RunningDaemon) -> tuple[int, int]:
        delivered = 0
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="x", max_retries=0) as client:
            for _ in range(5):
                stream = await client.completions.create(
                    model="default",
                    prompt=[40] * 10,
                    max_tokens=450,
                    stream=True,
                    extra_body={"logit_bias": {"0": -100, "2": -100}},
                )
                async for _ in stream:
                    delivered += 1
                    if delivered % 20 == 0:
                        break
                await stream.close()
            await asyncio.to_thread(wait_until, lambda: ended(server) >= 5)
            raw = await client.completions.with_raw_response.create(model="default", prompt=[40], max_tokens=1)
            return delivered, int(raw.headers["x-ratelimit-remaining-tokens"])

    with daemon(str(tiny_model), env={"OCSERVE_LIMITS_TOKENS_PER_MINUTE": "3000"}) as server:
        begun = time.monotonic()
        delivered, remaining = asyncio.run(leave(server))
        refilled = 50 * (time.monotonic() - begun)
        left = [line for line in server.log.read_text().splitlines() if '"finish_reason":"cancelled"' in line]
    assert delivered >= 100
    assert remaining <= 3000 - delivered - 5 * 10 + refilled
    assert len(left) >= 4  # a tiny model may finish before its client has gone
