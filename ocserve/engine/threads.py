"""How many threads compute the next step, learnt from how long steps take.

One row is bound by memory bandwidth, which few threads use up; many rows are bound by arithmetic and want every core.
In between, and whenever another process wants a core, only measuring tells: threads wait for each other at
barriers, so one that is kept off its core holds up all of them, and a step can take tens of times as long.

For each kind of step there are two candidates. The cheaper one by moving average is used; the other is tried early
once and then every `PROBE_EVERY` steps, so that a change of the machine is noticed in both directions. A step that
takes much longer than usual counts for more, so that a collapse is left after a few steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Kind(Enum):
    """Steps that are alike: one decoding sequence, several, or some prompt among them."""

    SINGLE = "single"
    BATCH = "batch"
    PREFILL = "prefill"


FIRST_PROBE = 4
PROBE_EVERY = 128
_USUAL_WEIGHT, _PROBE_WEIGHT = 0.1, 0.5
_COLLAPSE = 3.0  # times the usual
_BETTER = 0.9  # the other candidate must be this much cheaper, so that noise does not flip the choice


@dataclass(slots=True)
class _Arm:
    """One candidate for one kind of step: seconds a row, moving average."""

    threads: int
    cost: float | None = None

    def learn(self, cost: float, weight: float) -> None:
        if self.cost is None:
            self.cost = cost
        else:
            self.cost += (_PROBE_WEIGHT if cost > _COLLAPSE * self.cost else weight) * (cost - self.cost)


@dataclass(slots=True)
class _Choice:
    current: _Arm
    other: _Arm
    steps: int = 0
    probing: bool = field(default=False)


class ThreadChooser:
    """`choose` before a step, `observe` after it."""

    def __init__(self, *, few: int, many: int, fixed: frozenset[Kind] = frozenset()) -> None:
        """A single row starts with `few` threads, the other kinds with `many`; `fixed` kinds stay at that."""
        self._choices = {}
        for kind in Kind:
            first, second = (few, many) if kind is Kind.SINGLE else (many, few)
            self._choices[kind] = _Choice(_Arm(first), _Arm(first if kind in fixed else second))

    def choose(self, kind: Kind) -> int:
        """Threads for the next step of this kind."""
        choice = self._choices[kind]
        choice.steps += 1
        choice.probing = choice.steps == FIRST_PROBE or choice.steps % PROBE_EVERY == 0
        return (choice.other if choice.probing else choice.current).threads

    def observe(self, kind: Kind, rows: int, seconds: float) -> None:
        """The step that was just chosen for took `seconds` for `rows`."""
        choice = self._choices[kind]
        arm, weight = (choice.other, _PROBE_WEIGHT) if choice.probing else (choice.current, _USUAL_WEIGHT)
        arm.learn(seconds / rows, weight)
        current, other = choice.current.cost, choice.other.cost
        if current is not None and other is not None and other < _BETTER * current:
            choice.current, choice.other = choice.other, choice.current
