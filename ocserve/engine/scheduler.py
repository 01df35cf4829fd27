"""What the next step computes: pure decisions over the sequences' facts and a cost model; the loop carries them out.

A step is decided in this order:
 1. `preempt`: while the running sequences could outgrow memory in this step, the newest gives up its cells. The oldest
    always stays, and alone it always fits, so somebody always advances.
 2. `admit`: while a slot is free, take the next waiting sequence if its known tokens and some room to grow fit memory
    beside the others. Nobody is admitted in a step that preempts.
 3. `compose`: every sequence in its decode phase contributes its newest token (with forced or drafted ones beside it
    where that pays). Prompts fill what the step's time budget leaves, one after another, so that the first of several
    simultaneous prompts does not wait for the last.

The time budget of a step in which somebody decodes (`bound_s`) is a multiple of what decoding alone would take: that
bounds the inter-token latency of running streams while prompts are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from ocserve.engine.fastforward import worth_batching
from ocserve.engine.slots import Sequence
from ocserve.engine.speculation import MOST_DRAFTED

# Cells that an admitted sequence must find free beyond its known tokens: room for some decode steps, so that a full
# pool does not admit and preempt in turns.
GROWTH_TOKENS = 64
# A step with prompts in it may take this many times as long as without …
STRETCH = 7.0
# … or up to this many times, if it is then no longer than so many seconds: four words a second are read as fast as they
# come, and small chunks are dear.
MOST_STRETCH, SMOOTH_S = 10.0, 0.25
# Prompt tokens that a step computes at least, so that a slow machine's prompts advance too.
LEAST_CHUNK = 16
# A further prompt joins a batch if that takes at most this share of computing it afterwards.
JOINS_BELOW = 0.75


class Costs(Protocol):
    """Predicts how long a step takes."""

    def seconds(self, rows: int, cells: int = 0, *, prefill: bool = False) -> float:
        """A batch of `rows` that attend `cells` in sum over the rows; `prefill` if rows of prompts are among them."""

    def rows_within(self, seconds: float, *, rows: int, cells_per_row: int, most: int) -> int:
        """How many prompt rows, at most `most`, fit the time beside `rows` others."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` known tokens of a sequence to compute in this step, and `drafts` to verify behind them."""

    sequence: Sequence
    count: int
    drafts: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return self.count + len(self.drafts)

    @property
    def cells(self) -> int:
        """Cells that the rows attend, in sum: each row those of all positions up to its own."""
        return cells_attended(self.sequence.computed, self.rows)


def cells_attended(computed: int, rows: int) -> int:
    """Cells that `rows` rows attend in sum, behind `computed` tokens."""
    return rows * computed + rows * (rows + 1) // 2


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


def bound_s(decode_s: float) -> float:
    """How long a step with prompts may take where decoding alone takes `decode_s`."""
    return max(STRETCH * decode_s, min(MOST_STRETCH * decode_s, SMOOTH_S))


class Composer:
    """Puts batches together."""

    def __init__(
        self,
        costs: Costs,
        *,
        batch_tokens: int,
        outputs: int,
        slots: int,
        order: Literal["serial", "joint"] = "serial",
        fast_forward: bool = True,
    ) -> None:
        """A batch has at most `batch_tokens` rows, and `outputs` of them may ask for a distribution: one for each of
        `slots` sequences, the others for drafts."""
        self._costs = costs
        self._batch_tokens = batch_tokens
        self._outputs = outputs
        self._slots = slots
        self._order = order
        self._fast_forward = fast_forward

    @property
    def prefill_row_s(self) -> float:
        """Predicted seconds for one token of a long prompt."""
        return self._costs.seconds(self._batch_tokens, prefill=True) / self._batch_tokens

    def _budget(self, decode: Ordered[Chunk], position: int) -> int:
        """Rows of prompts, about `position` tokens long so far, that fit beside the decoding sequences."""
        rows = sum(chunk.rows for chunk in decode)
        most = self._batch_tokens - rows
        if not decode or most <= 0:
            return max(most, 0)
        # What decoding alone takes is one row for each sequence: forced and drafted ones must not stretch the bound.
        cells = sum(cells_attended(chunk.sequence.computed, 1) for chunk in decode)
        target_s = bound_s(self._costs.seconds(len(decode), cells))
        fitting = self._costs.rows_within(target_s, rows=rows, cells_per_row=position, most=most)
        return min(most, max(fitting, LEAST_CHUNK))

    @property
    def most_rows(self) -> int:
        """Rows of a batch."""
        return self._batch_tokens

    def decode(self, sequences: Ordered[Sequence], prompts: Ordered[Sequence], free: int) -> list[Chunk]:
        """One row for each of `sequences`, and forced or drafted tokens where that pays and there is room.

        `free` is how many drafted tokens find cells. None are drafted where `prompts` take all the time there is: a
        drafted row, which may be for nothing, would take the place of one of theirs.
        """
        spare = self._batch_tokens - len(sequences)
        rows, tokens = len(sequences), float(len(sequences))  # as planned so far, and what that is expected to yield
        free = free if self._leaves_time(sequences, prompts) else 0
        chunks = []
        for sequence in sequences:
            forced = self._forced(min(sequence.remaining - 1, spare), rows)
            most = min(sequence.room - 1, spare, free, self._drafts_each(len(sequences)))
            drafts, expected = self._drafts(sequence, most, rows, tokens)
            tokens += expected
            chunk = Chunk(sequence, 1 + forced, tuple(drafts))
            more = chunk.rows - 1
            spare, rows, free, tokens = spare - more, rows + more, free - len(drafts), tokens + forced
            chunks.append(chunk)
        return chunks

    def _drafts(self, sequence: Sequence, most: int, rows: int, tokens: float) -> tuple[Ordered[int], float]:
        """At most `most` tokens to verify, and how many of them are expected to be right.

        Where log-probabilities are wanted, the tokens that a constraint forces are among them, since each has to be
        drawn from a distribution.
        """
        if most <= 0 or sequence.remaining > 1:
            return (), 0.0
        if sequence.guide is not None and sequence.wants_logprobs:
            run = sequence.guide.forced()[:most]
            certain = run[: self._forced(len(run), rows)]
            return certain, float(len(certain))
        if sequence.speculator is None:
            return (), 0.0
        seconds = partial(self._decode_s, sequence.length)
        drafts = sequence.speculator.propose(seconds, rows_others=rows - 1, tokens_others=tokens - 1, most=most)
        return drafts, sequence.speculator.expected if drafts else 0.0

    def _decode_s(self, length: int, rows: int) -> float:
        """Predicted seconds of a step of `rows` rows that each attend `length` cells."""
        return self._costs.seconds(rows, rows * length)

    def _drafts_each(self, sequences: int) -> int:
        """How many drafted tokens each of so many decoding sequences may verify in one batch."""
        return min(MOST_DRAFTED, (self._outputs - self._slots) // sequences)

    def _forced(self, run: int, rows: int) -> int:
        """How many of a `run` of known tokens to compute in a step that has `rows` rows without them."""
        return worth_batching(run, self._costs.seconds, rows) if self._fast_forward and run > 0 else 0

    def _leaves_time(self, decode: Ordered[Sequence], prompts: Ordered[Sequence]) -> bool:
        """Whether a step with a row for each of `decode` has time left when `prompts` have got theirs."""
        if not decode or not prompts:
            return True
        budget = self._budget([Chunk(sequence, 1) for sequence in decode], prompts[0].computed)
        return budget >= min(self._batch_tokens - len(decode), sum(sequence.remaining for sequence in prompts))

    def prefill(self, decode: Ordered[Chunk], prompts: Ordered[Sequence]) -> tuple[Chunk, ...]:
        """Chunks of `prompts`, in the order in which they are to be served."""
        if not prompts:
            return ()
        budget = self._budget(decode, prompts[0].computed)
        if self._order == "joint":
            return _shared_out(prompts, budget)
        chunks: list[Chunk] = []
        rows = sum(chunk.rows for chunk in decode)
        for sequence in prompts:
            count = _chunk(sequence, budget)
            if count == 0 or (chunks and not self._joins(rows, count)):
                break
            chunks.append(Chunk(sequence, count))
            rows += count
            budget -= count
            if count < sequence.remaining:
                break  # it goes on in the next step; nobody passes it
        return tuple(chunks)

    def _joins(self, rows: int, more: int) -> bool:
        """Whether `more` rows are notably cheaper beside `rows` than in a step of their own."""
        first, second, both = (self._costs.seconds(count, prefill=True) for count in (rows, more, rows + more))
        return both <= JOINS_BELOW * (first + second)


def growth_margin(slots: int) -> int:
    """Cells that must be free beyond all known tokens for `slots` sequences to be admitted."""
    return GROWTH_TOKENS * slots * (slots + 1) // 2


def _chunk(sequence: Sequence, budget: int) -> int:
    """How much of a prompt's rest to compute: in equal parts, up to where its state is to be kept if it is."""
    rest = sequence.remaining
    for stop in sequence.stops:
        if sequence.computed < stop:
            rest = stop - sequence.computed
            break
    if budget <= 0:
        return 0
    parts = -(-rest // budget)
    return -(-rest // parts)


def _shared_out(prompts: Ordered[Sequence], budget: int) -> tuple[Chunk, ...]:
    """Equal shares for all prompts; what a short one leaves goes to the others."""
    chunks = []
    left = sorted(prompts, key=lambda sequence: sequence.remaining)
    while left and budget > 0:
        share = max(1, budget // len(left))
        sequence = left.pop(0)
        count = _chunk(sequence, min(share, budget))
        chunks.append(Chunk(sequence, count))
        budget -= count
    return tuple(chunks)
