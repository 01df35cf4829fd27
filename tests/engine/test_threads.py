"""Thread counts follow what steps cost, in both directions, on synthetic machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from ocserve.engine.threads import PROBE_EVERY, Kind, ThreadChooser


def play(chooser: ThreadChooser, kind: Kind, cost: Callable[[int], float], steps: int, rows: int = 8) -> Counter[int]:
    """Run `steps` steps whose seconds are `cost(threads)`; how often each count was used."""
    used: Counter[int] = Counter()
    for _ in range(steps):
        threads = chooser.choose(kind)
        used[threads] += 1
        chooser.observe(kind, rows, cost(threads))
    return used


def quiet(threads: int) -> float:
    return 0.08 / threads


def crowded(threads: int) -> float:
    return 0.08 if threads == 1 else 0.5


def test_on_a_quiet_machine_batches_use_every_core_and_probes_are_rare() -> None:
    used = play(ThreadChooser(few=1, many=2), Kind.BATCH, quiet, 1000)
    assert used[1] <= 1 + 1000 // PROBE_EVERY


def test_a_collapse_is_left_within_a_few_steps() -> None:
    chooser = ThreadChooser(few=1, many=2)
    play(chooser, Kind.BATCH, quiet, 200)
    used = play(chooser, Kind.BATCH, crowded, 60)
    assert used[2] <= 4


def test_when_the_neighbour_has_gone_every_core_is_used_again() -> None:
    chooser = ThreadChooser(few=1, many=2)
    play(chooser, Kind.BATCH, quiet, 50)
    play(chooser, Kind.BATCH, crowded, 300)
    play(chooser, Kind.BATCH, quiet, 4 * PROBE_EVERY)
    assert play(chooser, Kind.BATCH, quiet, 100)[2] >= 98


def test_kinds_are_judged_apart() -> None:
    chooser = ThreadChooser(few=1, many=2)
    play(chooser, Kind.PREFILL, quiet, 50)
    assert play(chooser, Kind.SINGLE, lambda threads: 0.010 if threads == 1 else 0.0095, 300, rows=1)[1] >= 295
    assert play(chooser, Kind.BATCH, crowded, 50)[2] <= 6


def test_a_count_that_was_set_is_kept() -> None:
    chooser = ThreadChooser(few=1, many=2, fixed=frozenset({Kind.SINGLE}))
    assert set(play(chooser, Kind.SINGLE, quiet, 300, rows=1)) == {1}
    assert play(chooser, Kind.BATCH, crowded, 50)[2] <= 6


@pytest.mark.parametrize("kind", list(Kind))
def test_one_core_leaves_no_choice(kind: Kind) -> None:
    assert set(play(ThreadChooser(few=1, many=1), kind, quiet, 300)) == {1}
