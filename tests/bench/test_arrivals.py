"""Arrivals are Poisson where they say so, and a trace is read whole or refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from ocserve.bench import arrivals


def test_poisson_gaps_are_exponential() -> None:
    offsets = arrivals.poisson(5.0, 4000, "seed")
    gaps = np.array([later - earlier for earlier, later in pairwise([0.0, *offsets])])
    assert gaps.mean() == pytest.approx(0.2, rel=0.06)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.08)  # the mark of the exponential distribution
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.05
    # Kolmogorov-Smirnov against the exponential distribution: 1.63 / sqrt(n) is the 1 % level.
    shares = np.arange(1, len(gaps) + 1) / len(gaps)
    assert np.abs(shares - (1 - np.exp(-5.0 * np.sort(gaps)))).max() < 1.63 / np.sqrt(len(gaps))


def test_a_seed_gives_the_same_arrivals_again() -> None:
    assert arrivals.poisson(1.0, 9, "a") == arrivals.poisson(1.0, 9, "a") != arrivals.poisson(1.0, 9, "b")


def test_a_trace_is_sorted_by_its_offsets() -> None:
    text = (
        '{"offset_s":2,"prompt_tokens":5,"output_tokens":6}\n\n{"offset_s":0.5,"prompt_tokens":7,"output_tokens":8}\n'
    )
    first, second = arrivals.read_trace(text)
    assert (first.offset_s, first.prompt_tokens, first.output_tokens, second.offset_s) == (0.5, 7, 8, 2)


@pytest.mark.parametrize(
    "line", ["{", '{"offset_s":-1,"prompt_tokens":1,"output_tokens":1}', '{"offset_s":1,"prompt_tokens":1}', ""]
)
def test_a_trace_that_is_wrong_is_refused(line: str) -> None:
    with pytest.raises(arrivals.TraceError):
        arrivals.read_trace(line)
