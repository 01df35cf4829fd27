"""Whether forced tokens are worth a larger batch. Pure; costs come from the engine's measurements."""

from __future__ import annotations

from collections.abc import Callable

_MARGIN = 0.03  # predictions are about this good: a smaller gain may be a loss


def worth_batching(run_length: int, seconds: Callable[[int], float], rows_already: int) -> int:
    """How many of `run_length` forced tokens to compute with the coming step instead of one per step; often all or 0.

    `seconds(rows)` predicts a step, `rows_already` are the coming step's rows, the sequence's own current one included.
    A forced token left out costs its sequence a step of that size later. Chosen is the number with the least
    predicted time until the run is computed, and 0 where that saves less than 3 % against no batching.
    """
    assert rows_already > 0
    step = seconds(rows_already)
    best, least = 0, (1 + run_length) * step
    enough = least * (1 - _MARGIN)
    for count in range(1, run_length + 1):
        total = seconds(rows_already + count) + (run_length - count) * step
        if total < least:
            best, least = count, total
    return best if least <= enough else 0
