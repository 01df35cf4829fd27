"""Steps without a plan: plain sequences decode on, and what a step drew is told while the next one is computed.

A batch takes all of the model's weights through the caches, so that every line of Python behind it starts cold and
takes several times as long as it would in a loop of its own. Where nothing is to be computed but the next token of each
sequence, the loop's thread therefore only draws and computes; a second thread does the rest, one step behind.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from ocserve.engine import slots
from ocserve.engine.composer import Chunk, Composer, StepCosts
from ocserve.engine.context import Context, DecodeStatus, Row
from ocserve.engine.counts import Counts
from ocserve.engine.duty import EngineBroken
from ocserve.engine.emission import Emitter
from ocserve.engine.kv import KvMemory
from ocserve.engine.sampler import BestToken, SamplerChain
from ocserve.generation import FinishReason

_MOST_BEHIND = 4  # steps: so late may be told of a token

Running = Sequence[slots.Sequence]
Ended = list[tuple[slots.Sequence, FinishReason]]


@dataclass(frozen=True, slots=True)
class _Step:
    """A token for each of the sequences."""

    sequences: Running
    tokens: list[int]


@dataclass(slots=True)
class Told:
    """What came of telling: the choices that have ended, and why."""

    ended: Ended
    error: Exception | None = None


class Teller:
    """Tells of drawn tokens on a thread of its own, which starts with the first of them.

    From a `tell` to the next `settle` the emitter and the sequences' texts and drafters are that thread's.
    """

    def __init__(self, emitter: Emitter, composer: Composer) -> None:
        self._emitter = emitter
        self._composer = composer
        self._steps: SimpleQueue[_Step | None] = SimpleQueue()
        self._settled: SimpleQueue[Told] = SimpleQueue()
        self._told = Told([])
        self._thread: threading.Thread | None = None
        self.drafts_wait = False  # whether a sequence would rather have drafts verified

    @property
    def behind(self) -> bool:
        """Whether telling takes longer than computing."""
        return self._steps.qsize() > _MOST_BEHIND

    def tell(self, sequences: Running, tokens: list[int]) -> None:
        """Add a token to each sequence, soon."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name="tell")
            self._thread.start()
        self._steps.put(_Step(sequences, tokens))

    def settle(self) -> Ended:
        """Wait until all is told; the choices that have ended by it. What the thread raised is raised here."""
        self._steps.put(None)
        told = self._settled.get()
        if told.error is not None:
            raise told.error
        return told.ended

    def _work(self) -> None:
        while True:
            step = self._steps.get()
            if step is None:
                self._settled.put(self._settle())
                continue
            try:
                self._tell(step)
            except Exception as error:  # noqa: BLE001  # raised by `settle`, on the loop's thread
                self._told.error = error

    def _settle(self) -> Told:
        told, self._told, self.drafts_wait = self._told, Told([]), False
        return told

    def _tell(self, step: _Step) -> None:
        for sequence, token in zip(step.sequences, step.tokens, strict=True):
            reason = self._emitter.take(sequence, token)
            if reason is not None:
                self._told.ended.append((sequence, reason))
        if not self._told.ended:  # else the loop has more to tell
            self._emitter.flush()
        for sequence, token in zip(step.sequences, step.tokens, strict=True):
            if sequence.speculator is not None:
                sequence.speculator.accept([token])
                self.drafts_wait |= self._composer.would_draft(sequence, len(step.sequences))


class Ahead:
    """Decodes on. Belongs to the loop's thread."""

    def __init__(
        self,
        context: Context,
        kv: KvMemory,
        costs: StepCosts,
        composer: Composer,
        emitter: Emitter,
        counts: Counts,
    ) -> None:
        self._context = context
        self._kv = kv
        self._costs = costs
        self._composer = composer
        self._counts = counts
        self._ends = emitter.ends
        self._teller = Teller(emitter, composer)

    def most(self, sequences: Running) -> int:
        """How many steps there is room for, 0 if one of the sequences is not `plain`."""
        if not sequences or not all(sequence.plain for sequence in sequences):
            return 0
        free = (self._kv.capacity - self._kv.cells) // len(sequences)
        return min(free, *(sequence.room for sequence in sequences))

    def decode(self, sequences: Running, most: int, go_on: Callable[[], bool]) -> tuple[Ended, bool]:
        """Compute up to `most` steps of one token for each sequence while `go_on` says so.

        Ends with the step in which a sequence ends, in which drafts would pay, or that telling is too far behind.
        Returns the choices that have ended, and whether one more batch was computed, behind which no token could be
        drawn for some sequence and none was for the others. Raises `EngineBroken`.
        """
        count, undrawn = 0, False
        cells = self._composer.cells([Chunk(sequence, 1) for sequence in sequences])
        tokens = [sequence.token(sequence.length - 1) for sequence in sequences]
        while True:
            threads = self._costs.threads(len(sequences))
            self._context.use_threads(threads)
            rows = [_row(sequence, token, count) for sequence, token in zip(sequences, tokens, strict=True)]
            if count:
                self._teller.tell(sequences, tokens)  # now: it gets to work where this thread waits for llama.cpp
            begun = time.perf_counter()
            status = self._context.decode(rows)
            seconds = max(time.perf_counter() - begun, 1e-6)
            if status in (DecodeStatus.ABORTED, DecodeStatus.FATAL):
                raise EngineBroken(f"llama_decode failed: {status.name}")
            if status is not DecodeStatus.OK:
                break  # the next step is planned
            undrawn = not all(map(self._context.usable, range(len(rows))))
            if undrawn:
                break
            tokens = [_draw(sequence, self._context, row) for row, sequence in enumerate(sequences)]
            count += 1
            if self._costs.teaches(len(rows), threads, seconds):
                self._costs.observe(len(rows), cells + count * len(rows), threads, seconds)
            at_end = count == most or any(map(self._ends, tokens))
            if at_end or self._teller.drafts_wait or self._teller.behind or not go_on():
                self._teller.tell(sequences, tokens)
                break
        ended = self._teller.settle() if count else []
        self._account(sequences, count)
        return ended, undrawn

    def _account(self, sequences: Running, steps: int) -> None:
        for sequence in sequences:
            self._kv.append(sequence, sequence.tokens(sequence.computed, sequence.computed + steps))
        self._counts.step(len(sequences), len(sequences) * steps, 0, steps=steps)


def _row(sequence: slots.Sequence, token: int, step: int) -> Row:
    """The row of a sequence's newest token, so many steps after those that it knows of."""
    assert sequence.slot is not None
    return Row(token, sequence.computed + step, sequence.slot, True)


def _draw(sequence: slots.Sequence, context: Context, row: int) -> int:
    assert isinstance(sequence.sampler, SamplerChain | BestToken)
    return sequence.sampler.sample(context, row)
