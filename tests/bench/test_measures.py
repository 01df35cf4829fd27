"""Figures are what textbooks say they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ocserve.bench import measures
from ocserve.bench.client import Sample
from ocserve.bench.measures import Objective
from ocserve.bench.scenario import parse


def sample(
    began: float = 0.0,
    visible: tuple[float, ...] = (0.1, 0.2),
    *,
    ended: float | None = None,
    phase: str = "p",
    group: str = "g",
    tokens: int | None = None,
    prompt: int = 10,
    cached: int = 0,
    error: str | None = None,
    digest: str = "",
) -> Sample:
    return Sample(
        phase=phase,
        group=group,
        began_s=began,
        visible_s=visible,
        ended_s=ended if ended is not None else (visible or (0.0,))[-1],
        prompt_tokens=prompt,
        cached_tokens=cached,
        completion_tokens=len(visible) if tokens is None else tokens,
        error=error,
        digest=digest,
    )


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert measures.percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_the_median_of_eight_is_the_mean_of_the_fourth_and_the_fifth() -> None:
    assert measures.percentile([8, 1, 7, 2, 6, 3, 5, 4], 50) == 4.5


def test_a_summary_adds_rounds_and_counts_every_error_by_kind() -> None:
    first = [sample(0.0, (1.0, 2.0, 4.0), prompt=100, cached=40), sample(1.0, (), ended=0.5, error="timeout")]
    second = [sample(50.0, (2.0, 3.0), ended=5.0, prompt=100, cached=10), sample(51.0, (), error="timeout")]
    found = measures.summary([first, second], "p", "g", objective=Objective(ttft_s=1.5))
    assert found.errors == {"timeout": 2}
    assert found.requests == 4
    assert found.span_s == 4.0 + 5.0
    assert found.ttft_p50 == 1.5
    assert found.itl_p50 == 1.0
    assert found.output_tokens == 5
    assert found.output_per_s == pytest.approx(5 / 9)
    assert (found.prompt_tokens, found.cached_tokens, found.prefill_tokens) == (200, 50, 150)
    assert found.cached_share == 0.25
    assert found.good_share == 0.25
    assert found.goodput_per_s == pytest.approx(1 / 9)


def test_a_broken_request_is_not_in_the_latencies() -> None:
    found = measures.summary([[sample(0, (1.0, 99.0), error="cut off")]], "p", "g", objective=Objective())
    assert (found.ttft_p50, found.itl_p50, found.output_tokens, found.good_share) == (None, None, 0, None)


def test_gaps_count_only_while_another_group_waits() -> None:
    streams = sample(0.0, (1.0, 2.0, 5.0, 6.0), group="streams")
    document = sample(2.5, (2.0, 3.0), group="document")  # waits from 2.5 to 4.5
    assert measures.inter_token([[streams, document]], "p", "streams", "document") == [3.0]
    assert measures.inter_token([[streams, document]], "p", "streams", None) == [1.0, 3.0, 1.0]


def test_an_objective_needs_both_latencies() -> None:
    both = Objective(ttft_s=0.5, itl_s=0.2)
    assert both.met(sample(0, (0.5, 0.6, 0.7)))
    assert not both.met(sample(0, (0.6, 0.7)))
    assert not both.met(sample(0, (0.1, 0.5)))
    assert not both.met(sample(0, (0.1, 0.2), error="timeout"))
    assert not Objective()


def test_the_decode_rate_is_over_the_time_when_all_stream() -> None:
    slow = sample(0.0, tuple(0.1 * at for at in range(1, 41)))  # 0.1 … 4.0
    late = sample(1.0, tuple(0.1 * at for at in range(1, 21)))  # 1.1 … 3.0
    assert measures.decode_rate([slow, late]) == pytest.approx(20, rel=0.03)
    assert measures.decode_rate([sample(0.0), sample(9.0)]) is None
    assert measures.decode_rate([sample(error="timeout")]) is None


def test_deltas_of_two_tokens_count_twice() -> None:
    assert measures.decode_rate([sample(0.0, (1.0, 2.0, 3.0), tokens=6)]) == pytest.approx(2.0)


def test_a_ratio_is_the_median_of_paired_rounds() -> None:
    found = measures.ratio("x", "ttft_p50", [(1, 2), (3, 4), (9, 3), (None, 1), (1, 0)])
    assert found is not None
    assert found.rounds == (0.5, 0.75, 3.0)
    assert found.median == 0.75
    assert found.low == 0.5
    assert found.high == 3.0
    assert measures.ratio("x", "ttft_p50", [(None, 1)]) is None


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    """Nominally 95 %; the percentile bootstrap of a median of 15 covers somewhat less or more."""
    draw = np.random.default_rng(7)
    covered = 0
    for _ in range(60):
        low, high = measures.bootstrap(tuple(float(value) for value in draw.normal(1.0, 0.1, 15)))
        covered += low <= 1.0 <= high
    assert covered >= 51


def test_relations_compare_cells_of_one_target() -> None:
    scenario = parse(
        "x",
        'about=""\nphases=[{name="a",groups=[{name="g"}]},{name="b",groups=[{name="g"}]}]\n'
        'relations=[{name="r",of="b/g",over="a/g",measure="ttft_p50"}]',
    )
    rounds = [[sample(0, (1.0,), phase="a"), sample(0, (0.25,), phase="b")]]
    (found,) = measures.relations(scenario, rounds, "")
    assert (found.name, found.median, found.low) == ("r", 0.25, None)


def test_answers_are_matched_by_cell_and_text() -> None:
    one = [sample(digest="a"), sample(digest="b"), sample(digest="b")]
    other = [sample(digest="b"), sample(digest="a"), sample(digest="c")]
    assert measures.same_answers(one, other, lambda each: each.digest) == (2, 3)
