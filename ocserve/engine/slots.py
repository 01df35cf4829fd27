"""Sequences and their states: what one generation holds while it lives in the engine.

    WAITING ──admit──▶ PREFILL ──computed──▶ DECODE ──end──▶ ENDED
       ▲                  │                    │
       └────preempt───────┴────────────────────┘           (end is allowed from every state)

A preempted sequence gives back its slot and KV cells and keeps its tokens, sampler and text stream, so that it later
goes on where it was after computing its tokens again. A sequence stores facts; everything else is a property.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from ocserve.engine.text import TextStream
from ocserve.generation import GenerateRequest, Usage


class Phase(Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    ENDED = "ended"


class Move(Enum):
    ADMIT = "admit"
    COMPUTED = "computed"
    PREEMPT = "preempt"
    END = "end"


TRANSITIONS: dict[tuple[Phase, Move], Phase] = {
    (Phase.WAITING, Move.ADMIT): Phase.PREFILL,
    (Phase.PREFILL, Move.COMPUTED): Phase.DECODE,
    (Phase.PREFILL, Move.PREEMPT): Phase.WAITING,
    (Phase.DECODE, Move.PREEMPT): Phase.WAITING,
    (Phase.WAITING, Move.END): Phase.ENDED,
    (Phase.PREFILL, Move.END): Phase.ENDED,
    (Phase.DECODE, Move.END): Phase.ENDED,
}


class Sampler(Protocol):
    """Draws tokens for one sequence; owned by it and closed when it ends."""

    def close(self) -> None: ...


class IllegalMove(Exception):
    """A transition that the table does not have; the sequence is unchanged."""


class Sequence:
    """One generation: its tokens, how many of them are in KV memory, and what it samples and emits with."""

    def __init__(
        self,
        request: GenerateRequest,
        prompt: tuple[int, ...],
        *,
        max_tokens: int,
        sampler: Sampler,
        deadline: float,
    ) -> None:
        self.request = request
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.sampler = sampler
        self.deadline = deadline
        self.text = TextStream(request.stop)
        self.generated: list[int] = []
        self.computed = 0  # tokens, from the start, whose KV cells exist
        self.slot: int | None = None
        self.phase = Phase.WAITING
        self.started = False  # whether the client has been told that it holds a slot
        self.unseen = 0  # sampled tokens whose text is still held back

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def tenant(self) -> bytes:
        return self.request.salt

    @property
    def length(self) -> int:
        """Tokens known so far: prompt and generated."""
        return len(self.prompt) + len(self.generated)

    @property
    def remaining(self) -> int:
        """Known tokens that still have to be computed."""
        return self.length - self.computed

    @property
    def usage(self) -> Usage:
        return Usage(prompt_tokens=len(self.prompt), completion_tokens=len(self.generated))

    def token(self, position: int) -> int:
        """The known token at `position`."""
        prompt = len(self.prompt)
        return self.prompt[position] if position < prompt else self.generated[position - prompt]

    def move(self, move: Move) -> None:
        """Take a transition; raises `IllegalMove` and changes nothing if there is none."""
        target = TRANSITIONS.get((self.phase, move))
        if target is None:
            raise IllegalMove(f"{move.value} from {self.phase.value}")
        self.phase = target
        if target in (Phase.WAITING, Phase.ENDED):
            self.computed = 0
            self.slot = None
