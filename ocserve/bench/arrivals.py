"""When requests are due: Poisson arrivals by seed, and traces of offsets and sizes. Pure; times are seconds."""

from __future__ import annotations

import random
from itertools import accumulate
from typing import Annotated

import msgspec
from msgspec import Meta


class TraceError(Exception):
    """A trace cannot be used; the text names the line."""


class Arrival(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of a trace: a request of `prompt_tokens`, answered with at most `output_tokens`, at `offset_s`."""

    offset_s: Annotated[float, Meta(ge=0)]
    prompt_tokens: Annotated[int, Meta(ge=1)]
    output_tokens: Annotated[int, Meta(ge=1)]


def poisson(rate: float, count: int, seed: str) -> list[float]:
    """`count` offsets whose gaps are exponential with mean 1 / `rate`."""
    draw = random.Random(f"{seed}/arrivals")  # noqa: S311 -- reproducible, not secret
    return list(accumulate(draw.expovariate(rate) for _ in range(count)))


def read_trace(text: str) -> tuple[Arrival, ...]:
    """A trace as JSON lines, in the order of its offsets. Raises `TraceError`."""
    arrivals = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                arrivals.append(msgspec.json.decode(line, type=Arrival))
            except msgspec.MsgspecError as error:
                raise TraceError(f"line {number}: {error}") from None
    if not arrivals:
        raise TraceError("the trace has no lines")
    return tuple(sorted(arrivals, key=lambda arrival: arrival.offset_s))
