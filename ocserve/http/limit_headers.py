"""What is left of a caller's limits, in the headers that clients read; an unlimited dimension has none."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator

from ocserve.accounts.buckets import Dimension, LimitState
from ocserve.accounts.pricing import dollars


def openai(state: LimitState) -> dict[bytes, bytes]:
    """`x-ratelimit-*`: when the bucket will be full again is a duration."""
    fields: dict[bytes, bytes] = {}
    for unit, dimension in _limited(state):
        fields[f"x-ratelimit-limit-{unit}".encode()] = b"%d" % dimension.limit
        fields[f"x-ratelimit-remaining-{unit}".encode()] = b"%d" % dimension.remaining
        fields[f"x-ratelimit-reset-{unit}".encode()] = duration(dimension.full_in_ns).encode()
    return fields


def anthropic(state: LimitState, now_s: float) -> dict[bytes, bytes]:
    """`anthropic-ratelimit-*`: when the bucket will be full again is a moment."""
    fields: dict[bytes, bytes] = {}
    for unit, dimension in _limited(state):
        full_at = datetime.datetime.fromtimestamp(math.ceil(now_s + dimension.full_in_ns / 1e9), datetime.UTC)
        fields[f"anthropic-ratelimit-{unit}-limit".encode()] = b"%d" % dimension.limit
        fields[f"anthropic-ratelimit-{unit}-remaining".encode()] = b"%d" % dimension.remaining
        fields[f"anthropic-ratelimit-{unit}-reset".encode()] = full_at.strftime("%Y-%m-%dT%H:%M:%SZ").encode()
    return fields


def balance(picodollars: int) -> dict[bytes, bytes]:
    """What a prepaid key may still spend beside what running requests hold, in US dollars."""
    return {b"x-balance-remaining": dollars(picodollars).encode()}


def _limited(state: LimitState) -> Iterator[tuple[str, Dimension]]:
    for unit, dimension in (("requests", state.requests), ("tokens", state.tokens)):
        if dimension is not None:
            yield unit, dimension


def duration(nanoseconds: int) -> str:
    """A duration as Go writes it, in whole milliseconds, rounded up: `12ms`, `1.5s`, `6m0s`, `1h2m3s`."""
    milliseconds = -(-nanoseconds // 1_000_000)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    seconds = f"{rest // 1000}.{rest % 1000:03}".rstrip("0").rstrip(".") + "s"
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + seconds
