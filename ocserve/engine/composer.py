"""What the next step computes: pure decisions over the sequences' facts and a cost model; the loop carries them out.

Every sequence in its decode phase contributes its newest token, with forced or drafted ones beside it where that pays.
Prompts fill what the step's time budget leaves, one after another, so that the first of several simultaneous prompts
does not wait for the last.

The budget (`bound_s`) is a multiple of what decoding alone would take: that bounds the inter-token latency of running
streams while prompts are computed. Where a batch of both kinds of rows saves next to nothing, as on most CPUs, they
take turns instead: llama.cpp computes the attention of a prompt's rows in tiles, and rows of other sequences among them
make each tile cover their cells too.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from ocserve.engine.attention import Attention, Span
from ocserve.engine.costs import TILE_ROWS
from ocserve.engine.fastforward import worth_batching
from ocserve.engine.slots import Sequence
from ocserve.engine.speculation import MOST_DRAFTED

# A step with prompts in it may take this many times as long as without …
STRETCH = 6.25
# … or up to this many times, if it is then no longer than so many seconds: five tokens a second are read as fast as
# they come, and small chunks are dear.
MOST_STRETCH, SMOOTH_S = 7.25, 0.2
# Beside running streams a prompt should take at most this many times what it takes in the largest chunks. Where both
# aims cannot be had (attention far into a long prompt is dear in small chunks), the larger miss is kept small.
SLOWDOWN = 1.3
# Prompt tokens that a step computes at least, so that a slow machine's prompts advance too.
LEAST_CHUNK = 8
_SIZES = (32, TILE_ROWS, 96, 128, 192, 256, 384, 512, 1024, 2048)  # chunks that are weighed
# A further prompt joins a batch if that takes at most this share of computing it afterwards, …
JOINS_BELOW = 0.75
# … and prompts join decoding sequences below this one. Without tiles, where rows do not make others dearer, they join
# if that saves anything.
MIXES_BELOW = 0.9
_FEW_PARTS = 3


class Costs(Protocol):
    """Predicts how long a step takes."""

    def seconds(self, rows: int, cells: int = 0, *, prefill: bool = False) -> float:
        """A batch of `rows` that attend `cells` in sum over the rows; `prefill` if rows of prompts are among them."""

    def rows_within(self, seconds: float, *, rows: int, cells_per_row: int, most: int) -> int:
        """How many prompt rows, at most `most`, fit the time beside `rows` others."""


class StepCosts(Costs, Protocol):
    """Chooses thread counts too, and learns from what steps took."""

    def threads(self, rows: int, *, prefill: bool = False) -> int: ...
    def teaches(self, rows: int, threads: int, seconds: float) -> bool: ...
    def observe(self, rows: int, cells: int, threads: int, seconds: float) -> None: ...


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
    def span(self) -> Span:
        return Span(self.sequence.computed, self.rows)


def bound_s(decode_s: float) -> float:
    """How long a step with prompts may take where decoding alone takes `decode_s`."""
    return max(STRETCH * decode_s, min(MOST_STRETCH * decode_s, SMOOTH_S))


@dataclass(frozen=True, slots=True)
class _Share:
    """Prompt rows of a step beside decoding sequences, in a batch of their own or not, and the time of both."""

    rows: int
    apart: bool
    seconds: float


class Composer:
    """Puts batches together."""

    def __init__(
        self,
        costs: Costs,
        *,
        batch_tokens: int,
        outputs: int,
        slots: int,
        attention: Attention | None = None,
        order: Literal["serial", "joint"] = "serial",
        fast_forward: bool = True,
    ) -> None:
        """A batch has at most `batch_tokens` rows, and `outputs` of them may ask for a distribution: one for each of
        `slots` sequences, the others for drafts and for prompts of which each token is to be scored."""
        self._costs = costs
        self._batch_tokens = batch_tokens
        self._outputs = outputs
        self._slots = slots
        self._attention = attention or Attention()
        self._order = order
        self._fast_forward = fast_forward
        self._prompts_turn = False  # whether the last step was one of prompts alone, beside decoding sequences

    @property
    def prefill_row_s(self) -> float:
        """Predicted seconds for one token of a long prompt."""
        return self._costs.seconds(self._batch_tokens, prefill=True) / self._batch_tokens

    @property
    def most_rows(self) -> int:
        """Rows of a batch."""
        return self._batch_tokens

    def cells(self, chunks: Iterable[Chunk]) -> int:
        """Cells that the rows of a batch attend in sum."""
        return self._attention.cells([chunk.span for chunk in chunks])

    def compose(
        self, sequences: Ordered[Sequence], prompts: Ordered[Sequence], free: int
    ) -> tuple[list[Chunk], tuple[Chunk, ...]]:
        """The chunks of decoding `sequences`, and those of `prompts`, which are in the order of service.

        `free` is how many drafted tokens find cells. None are drafted where prompts take all the time there is: a
        drafted row, which may be for nothing, would take the place of one of theirs.
        """
        had_turn, self._prompts_turn = self._prompts_turn, False
        if not sequences or not prompts:
            return self._decode(sequences, free), self._prefill(prompts, self._batch_tokens, 0)
        share = self._share(sequences, prompts)
        if share.apart and not had_turn:
            self._prompts_turn = True
            return [], self._prefill(prompts, share.rows, 0)
        wanted = min(self._batch_tokens - len(sequences), sum(sequence.remaining for sequence in prompts))
        decode = self._decode(sequences, free if share.rows >= wanted else 0)
        if share.apart or had_turn:  # after a turn of theirs, prompts in this step too would be two waits in one
            return decode, ()
        rows = sum(chunk.rows for chunk in decode)
        drafted = sum(len(chunk.drafts) for chunk in decode)
        left = share.rows - (rows - len(sequences))
        return decode, self._prefill(prompts, min(max(left, LEAST_CHUNK), self._batch_tokens - rows), rows, drafted)

    def _share(self, sequences: Ordered[Sequence], prompts: Ordered[Sequence]) -> _Share:
        """How many rows of the first of `prompts` go beside a row for each of `sequences`.

        The bound is a multiple of what these would take if no prompt had come.
        """
        rows, position = len(sequences), prompts[0].computed
        most = self._batch_tokens - rows
        if most <= 0:
            return _Share(0, False, 0.0)
        # One row for each is what decoding alone takes: forced and drafted ones must not stretch the bound.
        others = [Span(sequence.computed, 1) for sequence in sequences]
        decode_s = self._costs.seconds(rows, self._attention.cells(others))
        prompt_cells = sum(prompt.computed for prompt in prompts)
        target_s = bound_s(self._costs.seconds(rows, self._attention.cells(others, absent=prompt_cells)))
        each = self._attention.cells_per_row(position)
        fitting = (
            self._costs.rows_within(target_s, rows=rows, cells_per_row=each, most=most),
            self._costs.rows_within(target_s - decode_s, rows=0, cells_per_row=each, most=most),
        )
        sizes = {min(size, most) for size in (*fitting, *_SIZES, LEAST_CHUNK) if size >= LEAST_CHUNK or size == most}
        return _least_miss([self._priced(Span(position, size), others, decode_s) for size in sorted(sizes)], target_s)

    def _priced(self, prompt: Span, others: list[Span], decode_s: float) -> _Share:
        rows, cells = len(others) + prompt.rows, self._attention.cells([*others, prompt])
        mixed_s = self._costs.seconds(rows, cells, prefill=True)
        apart_s = decode_s + self._costs.seconds(prompt.rows, self._attention.cells([prompt]), prefill=True)
        mixes = mixed_s <= (1.0 if self._attention.dense else MIXES_BELOW) * apart_s
        return _Share(prompt.rows, not mixes, mixed_s if mixes else apart_s)

    def _decode(self, sequences: Ordered[Sequence], free: int) -> list[Chunk]:
        """One row for each of `sequences`, and forced or drafted tokens where that pays and there is room."""
        spare = self._batch_tokens - len(sequences)
        rows, tokens = len(sequences), float(len(sequences))  # as planned so far, and what that is expected to yield
        chunks = []
        for sequence in sequences:
            forced = self._forced(sequence, min(sequence.remaining - 1, spare), rows)
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
            certain = run[: self._forced(sequence, len(run), rows)]
            return certain, float(len(certain))
        if sequence.speculator is None:
            return (), 0.0
        seconds = partial(self._decode_s, sequence.length)
        drafts = sequence.speculator.propose(seconds, rows_others=rows - 1, tokens_others=tokens - 1, most=most)
        return drafts, sequence.speculator.expected if drafts else 0.0

    def would_draft(self, sequence: Sequence, sequences: int) -> bool:
        """Whether a draft is wanted behind the next token of one of so many decoding sequences. It is not kept."""
        most = min(sequence.room - 1, self._batch_tokens - sequences, self._drafts_each(sequences))
        if most <= 0 or sequence.speculator is None:
            return False
        others, seconds = sequences - 1, partial(self._decode_s, sequence.length)
        drafts = sequence.speculator.propose(seconds, rows_others=others, tokens_others=others, most=most)
        sequence.speculator.withdraw()
        return bool(drafts)

    def _decode_s(self, length: int, rows: int) -> float:
        """Predicted seconds of a step of `rows` rows, each behind `length` tokens of its sequence."""
        return self._costs.seconds(rows, rows * self._attention.cells_per_row(length))

    def _drafts_each(self, sequences: int) -> int:
        """How many drafted tokens each of so many decoding sequences may verify in one batch."""
        return min(MOST_DRAFTED, (self._outputs - self._slots) // sequences)

    def _forced(self, sequence: Sequence, run: int, rows: int) -> int:
        """How many of a `run` of its known tokens to compute in a step that has `rows` rows without them."""
        if not self._fast_forward or run <= 0:
            return 0
        return worth_batching(run, partial(self._decode_s, sequence.length), rows)

    def _prefill(self, prompts: Ordered[Sequence], budget: int, beside: int, drafted: int = 0) -> tuple[Chunk, ...]:
        """Chunks of `prompts` with at most `budget` rows, in a batch that has `beside` others, `drafted` among them."""
        spare = self._outputs - self._slots - drafted  # distributions beyond that of each sequence's newest token
        if self._order == "joint":
            return _shared_out(prompts, budget, spare)
        chunks: list[Chunk] = []
        for sequence in prompts:
            count = _chunk(sequence, budget, spare, beside=None if self._attention.dense else beside)
            if count == 0 or (chunks and not self._joins(beside, count)):
                break
            chunks.append(Chunk(sequence, count))
            beside += count
            budget -= count
            if sequence.unscored:
                spare -= count - 1
            elif count < sequence.remaining:
                break  # it goes on in the next step; nobody passes it
        return tuple(chunks)

    def _joins(self, rows: int, more: int) -> bool:
        """Whether `more` rows are notably cheaper beside `rows` than in a step of their own."""
        first, second, both = (self._costs.seconds(count, prefill=True) for count in (rows, more, rows + more))
        return both <= JOINS_BELOW * (first + second)


def _least_miss(shares: Iterable[_Share], target_s: float) -> _Share:
    """The largest that meets both aims, the step's time and the prompt's pace, or the one that misses them least."""
    shares = list(shares)
    pace = max(share.rows / share.seconds for share in shares)

    def miss(share: _Share) -> float:
        return max(share.seconds / target_s, pace * share.seconds / share.rows / SLOWDOWN)

    return max(
        (share for share in shares if miss(share) <= 1), key=lambda share: share.rows, default=min(shares, key=miss)
    )


def _chunk(sequence: Sequence, budget: int, spare: int, *, beside: int | None = None) -> int:
    """How much of a prompt's rest to compute, up to where its state is to be kept if it is.

    What takes a few steps is divided equally, unless that would divide a tile in a batch with `beside` other
    rows. Where each of its tokens asks for a distribution, `spare` are to be had beside that of its newest token.
    """
    rest = sequence.words_ahead
    for stop in sequence.stops:
        if sequence.computed < stop:
            rest = min(rest, stop - sequence.computed)
            break
    most = min(budget, 1 + spare) if sequence.unscored else budget
    if most <= 0:
        return 0
    parts = -(-rest // most)
    equal, full = -(-rest // parts), min(rest, most)
    divides_tile = beside is not None and beside + equal < TILE_ROWS <= beside + full
    return full if parts > _FEW_PARTS or divides_tile else equal


def _shared_out(prompts: Ordered[Sequence], budget: int, spare: int) -> tuple[Chunk, ...]:
    """Equal shares for all prompts; what a short one leaves goes to the others."""
    chunks = []
    left = sorted(prompts, key=lambda sequence: sequence.remaining)
    while left and budget > 0:
        share = max(1, budget // len(left))
        sequence = left.pop(0)
        count = _chunk(sequence, min(share, budget), spare)
        chunks.append(Chunk(sequence, count))
        budget -= count
        spare -= count - 1 if sequence.unscored else 0
    return tuple(chunks)
