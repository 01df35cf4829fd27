"""The engine's one loop: take messages, plan, compute a batch, sample, emit one frame for the whole step.

Runs on one thread that owns the context and all sequences; nothing here is locked. While no sequence lives it blocks on
its inbox and costs no CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import numpy as np

from ocserve.engine.context import Context, DecodeStatus, Row
from ocserve.engine.llama import Vocab
from ocserve.engine.sampler import SamplerChain
from ocserve.engine.scheduler import Plan, PrefillPace, plan
from ocserve.engine.slots import Move, Phase, Sequence
from ocserve.engine.threads import Kind, ThreadChooser
from ocserve.engine.wire import EngineStats, Step
from ocserve.errors import EngineFailed, Overloaded
from ocserve.generation import (
    Failed,
    Finished,
    FinishReason,
    GenerateEvent,
    Started,
    TextDelta,
)

# After this many steps in a row without one usable distribution the process is of no use; the front replaces it.
_BROKEN_STEPS = 3


@dataclass(frozen=True, slots=True)
class CancelSequence:
    """Inbox message: end this request with what it has."""

    request_id: str


class EngineBroken(Exception):
    """The context can no longer compute; the process must end."""


class EngineLoop:
    """Runs sequences to their end. `submit` and `cancel` may be called from any thread."""

    def __init__(
        self,
        context: Context,
        vocab: Vocab,
        *,
        parallel: int,
        batch_tokens: int,
        threads: ThreadChooser,
        emit: Callable[[Step], None],
    ) -> None:
        self._context = context
        self._vocab = vocab
        self._threads = threads
        self._emit = emit
        self._parallel = parallel
        self._pace = PrefillPace(batch_tokens)
        self._inbox: SimpleQueue[Sequence | CancelSequence] = SimpleQueue()
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._free_slots = list(range(parallel - 1, -1, -1))
        self._events: list[tuple[str, GenerateEvent]] = []
        self._steps = self._prefill_tokens = self._decode_tokens = self._preemptions = 0
        self._steps_by_sequences = [0] * (parallel + 1)
        self._broken_steps = 0
        self.step_started: float | None = None  # monotonic time, read by the heartbeat thread

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence for a slot."""
        self._inbox.put(sequence)

    def cancel(self, request_id: str) -> None:
        """End a sequence within one step, in whatever phase."""
        self._inbox.put(CancelSequence(request_id))

    def stats(self) -> EngineStats:
        """The counters; a consistent enough view from another thread."""
        return EngineStats(
            steps=self._steps,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            steps_by_sequences=tuple(self._steps_by_sequences),
            running=len(self._running),
            waiting=len(self._waiting),
            cells_used=sum(sequence.computed for sequence in list(self._running)),
            cells_total=self._context.pool_tokens,
            preemptions=self._preemptions,
        )

    def run(self) -> None:
        """Loop until the process ends; raises `EngineBroken` when it should."""
        while True:
            self._receive()
            self.step_started = time.monotonic()
            self._expire(self.step_started)
            self._step()
            self.step_started = None
            self._flush()

    def _flush(self) -> None:
        """Send what became visible, as one frame."""
        if self._events:
            events, self._events = self._events, []
            self._emit(Step(events=tuple(events)))

    def _receive(self) -> None:
        """Take every message that is there; wait for one only if there is nothing to compute."""
        idle = not self._running and not self._waiting and not self._events
        try:
            while True:
                message = self._inbox.get(block=idle)
                idle = False
                if isinstance(message, Sequence):
                    self._waiting.append(message)
                else:
                    self._cancel(message.request_id)
        except Empty:
            return

    def _cancel(self, request_id: str) -> None:
        for sequence in (*self._running, *self._waiting):
            if sequence.id == request_id:
                self._finish(sequence, "cancelled")
                return

    def _expire(self, now: float) -> None:
        """End what has reached its wall-clock cap; the cap is a length limit like any other."""
        for sequence in (*self._running, *self._waiting):
            if now < sequence.deadline:
                continue
            if sequence.started:
                self._emit_text(sequence, sequence.text.finish())
                self._finish(sequence, "length")
            else:
                error = Overloaded("The request waited for a slot as long as it was allowed to run.")
                self._end(sequence, Failed(error=error.info))

    def _step(self) -> None:
        decoding = sum(sequence.phase is Phase.DECODE for sequence in self._running)
        step = plan(
            self._running,
            self._waiting,
            slots=self._parallel,
            pool_tokens=self._context.pool_tokens,
            prefill_budget=self._pace.budget(decoding),
        )
        for sequence in step.preempt:
            self._preempt(sequence)
        for sequence in step.admit:
            self._admit(sequence)
        if step.admit:
            self._flush()  # a client learns that its prompt is being computed, not that it has been
        if not step.decode and not step.prefill:
            return
        rows, sampled_from = self._rows(step)
        prefill_tokens = sum(chunk.count for chunk in step.prefill)
        kind = Kind.PREFILL if prefill_tokens else Kind.SINGLE if len(rows) == 1 else Kind.BATCH
        self._context.use_threads(self._threads.choose(kind))
        begun = time.monotonic()
        status = self._context.decode(rows)
        if status is not DecodeStatus.OK:
            self._recover(status, step)
            return
        seconds = time.monotonic() - begun
        self._threads.observe(kind, len(rows), seconds)
        self._pace.observe(prefill_tokens, seconds)
        self._count(step, prefill_tokens)
        self._sample(sampled_from)

    def _admit(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        sequence.move(Move.ADMIT)
        sequence.slot = self._free_slots.pop()
        self._running.append(sequence)
        if not sequence.started:
            sequence.started = True
            self._events.append((sequence.id, Started(prompt_tokens=len(sequence.prompt))))

    def _preempt(self, sequence: Sequence) -> None:
        """Give the cells back and wait again, before those that never ran."""
        self._release(sequence)
        sequence.move(Move.PREEMPT)
        self._waiting.insert(0, sequence)
        self._preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
        if sequence.slot is not None:
            self._context.forget(sequence.slot)
            self._free_slots.append(sequence.slot)

    def _rows(self, step: Plan) -> tuple[list[Row], list[tuple[int, Sequence]]]:
        """The batch, and for each sequence that samples after it the row to sample from. Marks rows as computed."""
        rows: list[Row] = []
        sampled_from: list[tuple[int, Sequence]] = []
        chunks = [(sequence, 1) for sequence in step.decode]
        chunks += [(chunk.sequence, chunk.count) for chunk in step.prefill]
        for sequence, count in chunks:
            assert sequence.slot is not None
            end = sequence.computed + count
            for position in range(sequence.computed, end):
                last = position + 1 == sequence.length
                rows.append(Row(sequence.token(position), position, sequence.slot, last))
            sequence.computed = end
            if sequence.remaining == 0:
                sampled_from.append((len(rows) - 1, sequence))
        return rows, sampled_from

    def _count(self, step: Plan, prefill_tokens: int) -> None:
        self._steps += 1
        self._prefill_tokens += prefill_tokens
        self._decode_tokens += len(step.decode)
        self._steps_by_sequences[len(step.decode)] += 1

    def _sample(self, sampled_from: list[tuple[int, Sequence]]) -> None:
        usable = not sampled_from
        for row, sequence in sampled_from:
            if sequence.phase is Phase.PREFILL:
                sequence.move(Move.COMPUTED)
            # NaN or all -inf would abort the process inside the sampler; it ends this sequence only.
            if not np.isfinite(self._context.logits(row).max()):
                self._fail(sequence, "The model produced no usable distribution for this sequence.")
                continue
            usable = True
            assert isinstance(sequence.sampler, SamplerChain)
            self._take(sequence, sequence.sampler.sample(self._context, row))
        self._broken_steps = 0 if usable else self._broken_steps + 1
        if self._broken_steps >= _BROKEN_STEPS:
            raise EngineBroken("no usable distribution in several steps")

    def _take(self, sequence: Sequence, token: int) -> None:
        """Add a sampled token to its sequence and emit what became visible."""
        sequence.generated.append(token)
        sequence.unseen += 1
        if self._vocab.is_end(token):
            self._emit_text(sequence, sequence.text.finish())
            self._finish(sequence, "stop")
            return
        text = sequence.text.feed(self._vocab.piece(token))
        if sequence.text.matched is not None:
            self._emit_text(sequence, text)
            self._finish(sequence, "stop")
        elif len(sequence.generated) >= sequence.max_tokens:
            text += sequence.text.finish()
            self._emit_text(sequence, text)
            self._finish(sequence, "length")
        else:
            self._emit_text(sequence, text)

    def _emit_text(self, sequence: Sequence, text: str) -> None:
        if text:
            self._events.append((sequence.id, TextDelta(text=text, tokens=sequence.unseen)))
            sequence.unseen = 0

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        stop = sequence.text.matched if reason == "stop" else None
        self._end(sequence, Finished(reason=reason, usage=sequence.usage, stop_sequence=stop))

    def _fail(self, sequence: Sequence, message: str) -> None:
        self._end(sequence, Failed(error=EngineFailed(message).info, usage=sequence.usage))

    def _end(self, sequence: Sequence, event: Finished | Failed) -> None:
        self._release(sequence)
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        sequence.move(Move.END)
        sequence.sampler.close()
        self._events.append((sequence.id, event))

    def _recover(self, status: DecodeStatus, step: Plan) -> None:
        """A batch that could not be computed. The plan rules out a full pool, so NO_SLOT means fragmentation."""
        if status in (DecodeStatus.ABORTED, DecodeStatus.FATAL):
            raise EngineBroken(f"llama_decode failed: {status.name}")
        # llama.cpp restored its state, but these rows count as computed here: the newest sequence ends, the others
        # compute theirs again.
        *others, newest = (*step.decode, *(chunk.sequence for chunk in step.prefill))
        self._fail(newest, "The engine could not compute this sequence.")
        for sequence in reversed(others):
            self._preempt(sequence)
