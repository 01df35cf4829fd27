"""Who computes: pure decisions over the sequences' facts; the loop carries them out, then `composer` fills the batch.

1. `preempt`: while the running sequences could outgrow memory in this step, the newest gives up its cells. The oldest
   always stays, and alone it always fits, so somebody always advances.
2. `admit`: while a slot is free, take the next waiting sequence if its known tokens and some room to grow fit memory
   beside the others. Nobody is admitted in a step that preempts.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered

from ocserve.engine.slots import Sequence

# Cells that an admitted sequence must find free beyond its known tokens: room for some decode steps, so that a full
# pool does not admit and preempt in turns.
GROWTH_TOKENS = 64


def preempt(running: Ordered[Sequence], room: int, freed: Callable[[Sequence], int]) -> tuple[Sequence, ...]:
    """Those to preempt so that the known tokens of the others fit.

    `running` is in order of admission, `room` the cells that no running sequence holds, `freed` how many more there are
    without this one.
    """
    staying = list(running)
    preempted = []
    while len(staying) > 1 and sum(sequence.claim for sequence in staying) > room:
        newest = staying.pop()
        preempted.append(newest)
        room += freed(newest)
    return tuple(preempted)


def admit(running: Ordered[Sequence], waiting: Ordered[Sequence], *, slots: int, room: int) -> tuple[Sequence, ...]:
    """Those to admit, of `waiting` in the order in which they are to be served."""
    admitted: list[Sequence] = []
    free = room - sum(sequence.claim for sequence in running)
    for candidate in waiting:
        beside = len(running) + len(admitted)
        growth = min(GROWTH_TOKENS, candidate.room) * (1 + beside)
        if beside >= slots or (beside and candidate.claim + growth > free):
            break
        admitted.append(candidate)
        free -= candidate.claim
    return tuple(admitted)


def growth_margin(slots: int) -> int:
    """Cells that must be free beyond all known tokens for `slots` sequences to be admitted."""
    return GROWTH_TOKENS * slots * (slots + 1) // 2
