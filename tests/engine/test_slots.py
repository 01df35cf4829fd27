"""Every (phase, move) pair: it leads where the table says, or it raises and changes nothing."""

from __future__ import annotations

import itertools

import pytest

from ocserve.engine.slots import TRANSITIONS, IllegalMove, Move, Phase
from tests.engine.test_scheduler import sequence


@pytest.mark.parametrize(("phase", "move"), list(itertools.product(Phase, Move)))
def test_every_pair(phase: Phase, move: Move) -> None:
    one = sequence("s", 5)
    one.phase, one.computed, one.slot = phase, 3, 1
    if (phase, move) in TRANSITIONS:
        one.move(move)
        assert one.phase is TRANSITIONS[phase, move]
        if one.phase in (Phase.WAITING, Phase.ENDED):
            assert (one.computed, one.slot, one.attached) == (0, None, False)
    else:
        with pytest.raises(IllegalMove):
            one.move(move)
        assert (one.phase, one.computed, one.slot) == (phase, 3, 1)


def test_tokens_are_the_prompt_then_what_was_generated() -> None:
    one = sequence("s", 3)
    one.generated = [7, 8]
    assert [one.token(position) for position in range(one.length)] == [0, 1, 2, 7, 8]
    assert one.remaining == 5
