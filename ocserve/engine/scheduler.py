"""What the next step computes: a pure decision over the sequences' facts; the loop carries it out.

A plan is made in this order:
 1. Preempt: while the running sequences could outgrow the pool in this step, the newest gives up its cells. The oldest
    always stays, and alone it always fits, so somebody always advances.
 2. Admit: while a slot is free, take the waiting sequence of the tenant with the fewest running ones, the earliest
    first, if its known tokens and some room to grow fit the pool beside the others. Nobody is admitted in a step that
    preempts.
 3. Decode: every sequence in its decode phase contributes its newest token.
 4. Prefill: one prompt after another, earliest admitted first, within the prefill budget, so that the first of
    several simultaneous prompts does not wait for the last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field

from ocserve.engine.slots import Phase, Sequence

# Cells that an admitted sequence must find free beyond its known tokens: room for some decode steps, so that a full
# pool does not admit and preempt in turns.
GROWTH_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` tokens of a prompt to compute in this step."""

    sequence: Sequence
    count: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The step to take; `preempt` and `admit` come before the batch, `decode` rows before `prefill` rows."""

    preempt: tuple[Sequence, ...] = ()
    admit: tuple[Sequence, ...] = ()
    decode: tuple[Sequence, ...] = ()
    prefill: tuple[Chunk, ...] = field(default=())


def plan(
    running: Ordered[Sequence], waiting: Ordered[Sequence], *, slots: int, pool_tokens: int, prefill_budget: int
) -> Plan:
    """Decide one step. `running` is in order of admission, `waiting` in order of arrival."""
    staying, preempted = _preempt(running, pool_tokens)
    admitted = () if preempted else _admit(staying, waiting, slots, pool_tokens)
    decode = tuple(sequence for sequence in staying if sequence.phase is Phase.DECODE)
    prefilling = [sequence for sequence in staying if sequence.phase is Phase.PREFILL]
    return Plan(
        preempt=preempted,
        admit=admitted,
        decode=decode,
        prefill=_prefill([*prefilling, *admitted], prefill_budget),
    )


def _cells_after_step(sequences: Ordered[Sequence]) -> int:
    """Cells that the sequences will have claimed when all their known tokens are computed."""
    return sum(sequence.length for sequence in sequences)


def _preempt(running: Ordered[Sequence], pool_tokens: int) -> tuple[list[Sequence], tuple[Sequence, ...]]:
    staying = list(running)
    preempted = []
    while len(staying) > 1 and _cells_after_step(staying) > pool_tokens:
        preempted.append(staying.pop())
    return staying, tuple(preempted)


def _admit(
    running: Ordered[Sequence], waiting: Ordered[Sequence], slots: int, pool_tokens: int
) -> tuple[Sequence, ...]:
    admitted: list[Sequence] = []
    held = Counter(sequence.tenant for sequence in running)
    cells = _cells_after_step(running)
    queue = list(waiting)
    while queue and len(running) + len(admitted) < slots:
        candidate = min(queue, key=lambda sequence: held[sequence.tenant])  # min keeps the earliest of equals
        growth = min(GROWTH_TOKENS, candidate.max_tokens - len(candidate.generated))
        growth *= 1 + len(running) + len(admitted)
        alone = not running and not admitted
        if not alone and cells + candidate.length + growth > pool_tokens:
            break
        queue.remove(candidate)
        admitted.append(candidate)
        held[candidate.tenant] += 1
        cells += candidate.length
    return tuple(admitted)


def _prefill(prefilling: Ordered[Sequence], budget: int) -> tuple[Chunk, ...]:
    chunks = []
    for sequence in prefilling:
        if budget <= 0:
            break
        count = min(budget, sequence.remaining)
        chunks.append(Chunk(sequence, count))
        budget -= count
    return tuple(chunks)


class PrefillPace:
    """How many prompt tokens one step may compute so that running streams stay smooth.

    Measures prefill speed (tokens per second, moving average over steps that were mostly prefill) and allows as many
    tokens as fit `target_s`; with nobody decoding the whole batch is allowed.
    """

    MINIMUM = 16

    def __init__(self, batch_tokens: int, target_s: float = 0.1) -> None:
        self._batch_tokens = batch_tokens
        self._target_s = target_s
        self._tokens_per_s = batch_tokens / target_s / 4

    def budget(self, decoding: int) -> int:
        """Prompt tokens for a step in which `decoding` sequences decode."""
        room = self._batch_tokens - decoding
        if not decoding:
            return room
        return min(room, max(self.MINIMUM, int(self._tokens_per_s * self._target_s)))

    def observe(self, prefill_tokens: int, seconds: float) -> None:
        """Learn from a step that computed `prefill_tokens` prompt tokens among others."""
        if prefill_tokens >= self.MINIMUM and seconds > 0:
            self._tokens_per_s += 0.2 * (prefill_tokens / seconds - self._tokens_per_s)
