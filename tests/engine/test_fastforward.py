"""The decision to batch forced tokens, on costs like those of a CPU and of a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ocserve.engine.fastforward import worth_batching


def cpu(rows: int) -> float:
    """A second row costs as much as a step of its own, eight cost half as much per row (2 cores, 135M model)."""
    return 0.007 if rows == 1 else 0.012 + 0.0027 * (rows - 1)


def gpu(rows: int) -> float:
    """Batches are nearly free until the arithmetic units are full."""
    return 0.010 + 0.00002 * rows + 0.0002 * max(0, rows - 128)


def linear(rows: int) -> float:
    return 0.007 * rows


@pytest.mark.parametrize("run", [1, 2])
def test_on_a_cpu_a_short_run_of_a_single_stream_goes_step_by_step(run: int) -> None:
    assert worth_batching(1, cpu, 1) == 0
    assert worth_batching(run, linear, 1) == 0


def test_on_a_cpu_long_runs_are_batched() -> None:
    assert worth_batching(7, cpu, 1) == 7
    assert worth_batching(40, cpu, 1) == 40


def test_on_a_gpu_every_run_is_batched() -> None:
    for run in (1, 2, 7, 40):
        assert worth_batching(run, gpu, 1) == run
        assert worth_batching(run, gpu, 8) == run


def test_a_run_is_batched_only_as_far_as_it_pays() -> None:
    def cliff(rows: int) -> float:
        return 0.01 if rows <= 8 else 1.0

    assert worth_batching(20, cliff, 1) == 7
    assert worth_batching(20, cliff, 8) == 0


def test_a_gain_within_the_predictions_error_is_not_taken() -> None:
    assert worth_batching(1, lambda rows: 1.0 if rows == 1 else 1.96, 1) == 0
    assert worth_batching(1, lambda rows: 1.0 if rows == 1 else 1.90, 1) == 1


def test_no_run_no_batch() -> None:
    assert worth_batching(0, gpu, 1) == 0


@given(
    run=st.integers(0, 30),
    rows=st.integers(1, 8),
    increments=st.lists(st.floats(0, 0.01), min_size=40, max_size=40),
    first=st.floats(1e-4, 0.05),
)
def test_the_choice_is_never_slower_than_any_other_by_more_than_the_margin(
    run: int, rows: int, increments: list[float], first: float
) -> None:
    def seconds(count: int) -> float:
        return first + sum(increments[:count])

    def total(batched: int, cost: Callable[[int], float]) -> float:
        return cost(rows + batched) + (run - batched) * cost(rows)

    chosen = worth_batching(run, seconds, rows)
    assert 0 <= chosen <= run
    least = min(total(count, seconds) for count in range(run + 1))
    assert total(chosen, seconds) <= total(0, seconds) * (1 + 1e-9)
    assert total(chosen, seconds) * 0.97 <= least * (1 + 1e-9)
