"""What clients read of their limits: the names, units and moments of the usual APIs."""

from __future__ import annotations

import pytest

from ocserve import config
from ocserve.accounts.buckets import LimitState
from ocserve.accounts.limits import Limiter
from ocserve.http.limit_headers import anthropic, duration, openai


def state() -> LimitState:
    """A quarter of a second after a request of 150 tokens."""
    now = [1000.0]
    limits = Limiter(config.Limits(requests_per_minute=60, tokens_per_minute=6000), lambda: now[0])
    limits.admit("key", retry=0).reserve(150)
    now[0] += 0.25
    return limits.snapshot("key")


def test_headers_are_those_of_the_usual_apis() -> None:
    assert openai(state()) == {
        b"x-ratelimit-limit-requests": b"60",
        b"x-ratelimit-remaining-requests": b"59",
        b"x-ratelimit-reset-requests": b"750ms",
        b"x-ratelimit-limit-tokens": b"6000",
        b"x-ratelimit-remaining-tokens": b"5875",
        b"x-ratelimit-reset-tokens": b"1.25s",
    }
    assert anthropic(state(), 1_790_000_000.5) == {
        b"anthropic-ratelimit-requests-limit": b"60",
        b"anthropic-ratelimit-requests-remaining": b"59",
        b"anthropic-ratelimit-requests-reset": b"2026-09-21T14:13:22Z",
        b"anthropic-ratelimit-tokens-limit": b"6000",
        b"anthropic-ratelimit-tokens-remaining": b"5875",
        b"anthropic-ratelimit-tokens-reset": b"2026-09-21T14:13:22Z",
    }
    assert openai(LimitState(None, None)) == anthropic(LimitState(None, None), 0.0) == {}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0001, "1ms"),
        (0.012, "12ms"),
        (1, "1s"),
        (59.9996, "1m0s"),
        (90.951, "1m30.951s"),
        (360, "6m0s"),
        (3723, "1h2m3s"),
    ],
)
def test_durations_are_written_as_go_writes_them(seconds: float, text: str) -> None:
    assert duration(round(seconds * 1e9)) == text
