"""The engine's one loop: take messages, plan, compute a batch, sample, emit one frame for the whole step.

Runs on one thread that owns the context and all sequences; nothing here is locked. While no sequence lives it blocks on
its inbox and costs no CPU, apart from storing kept prefixes once after a while.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from queue import Empty, SimpleQueue

from ocserve.engine.ahead import Ahead
from ocserve.engine.composer import Chunk, Composer, StepCosts
from ocserve.engine.constraint import GuideError
from ocserve.engine.context import Context, DecodeStatus
from ocserve.engine.counts import Counts
from ocserve.engine.drawing import Drawing, UnusableDistribution
from ocserve.engine.duty import EngineBroken
from ocserve.engine.emission import Emitter
from ocserve.engine.fairness import FairOrder
from ocserve.engine.inbox import CancelRequest, ImageSeen, Message, Stop
from ocserve.engine.judging import Judge, Verdict
from ocserve.engine.kv import KvMemory
from ocserve.engine.rows import rows_of
from ocserve.engine.scheduler import admit, growth_margin, preempt
from ocserve.engine.seeing import Encodes, Sight, computations
from ocserve.engine.slots import Group, Move, Phase, Sequence
from ocserve.engine.wire import EngineStats
from ocserve.errors import ApiError, EngineFailed, Overloaded
from ocserve.generation import FinishReason

# After this many steps in a row without one usable distribution the process is of no use; the front replaces it.
_BROKEN_STEPS = 3
_STATS_EVERY_S = 0.5
# Kept prefixes are stored when nothing was to compute for this long.
_STORE_AFTER_S = 0.5
_LOOK_AGAIN_S = 0.2  # deadlines are looked at that often while all wait for an image to be encoded


class EngineLoop:
    """Runs sequences to their end. `submit`, `cancel` and `stop` may be called from any thread."""

    def __init__(
        self,
        context: Context,
        kv: KvMemory,
        *,
        costs: StepCosts,
        composer: Composer,
        emitter: Emitter,
        parallel: int,
        park_bytes: int = 0,
        projector: Encodes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`park_bytes` of main memory may hold the states of preempted sequences; `projector` encodes images."""
        self._clock = clock
        self._context = context
        self._kv = kv
        self._costs = costs
        self._composer = composer
        self._emitter = emitter
        self._parallel = parallel
        self._park_bytes = park_bytes
        self._most_running = parallel
        self._order = FairOrder(lambda: composer.prefill_row_s)
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self.sight = Sight(projector, lambda: self._inbox.put(ImageSeen())) if projector is not None else None
        self._blind = False  # whether every prompt waits for an image and nothing else is to be computed
        self._began = False  # whether anything waited or prefilled in the last step
        self._image_turn = False  # whether the last step was an image's
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._stopping = False
        self._counts = Counts(steps_by_sequences=[0] * (parallel + 1))
        self._judge = Judge(self._inbox.put)
        self._drawing = Drawing(context, kv, emitter, self._counts)
        self._ahead = Ahead(context, kv, costs, composer, emitter, self._counts)
        self._sheds = False  # whether kept prefixes are on their way out of memory
        self._stats_due = 0.0
        self._update_stats(0.0)
        self._broken_steps = 0
        self.step_started: float | None = None  # monotonic time, read by the heartbeat thread

    def submit(self, group: Group) -> None:
        """Queue a request's choices for slots."""
        self._inbox.put(group)

    def cancel(self, request_id: str) -> None:
        """End a request within one step, in whatever phase."""
        self._inbox.put(CancelRequest(request_id))

    def stop(self) -> None:
        """Have `run` return, soon if nothing is being computed."""
        self._inbox.put(Stop())

    def stats(self) -> EngineStats:
        """The counters as they were after a recent step, or now while idle; for any thread."""
        return self._stats

    def _update_stats(self, now: float) -> None:
        self._stats = self._counts.snapshot(self._kv, running=len(self._running), waiting=len(self._waiting))
        self._stats_due = now + _STATS_EVERY_S

    def run(self) -> None:
        """Turn until stopped; raises `EngineBroken` when the process should end."""
        while not self._stopping:
            self.turn(wait=True)
            self.decode_on()
        while self._kv.save_some():
            pass

    def turn(self, *, wait: bool) -> bool:
        """Take messages, compute one step, send what it made visible; False if there was nothing to compute.

        Raises `EngineBroken`.
        """
        self._receive(wait=wait)
        now = self.step_started = self._clock()
        self._expire(now)
        busy, self._blind = bool(self._running or self._waiting), False
        if busy:
            self._step()
        elif self.sight is not None:
            self.sight.ready(())
        self._show_all(now)
        return busy

    def _show_all(self, now: float) -> None:
        """A step is done: let everybody see it."""
        if not self._running or now >= self._stats_due:
            self._update_stats(now)
        self.step_started = None
        self._emitter.flush()

    # --- messages ---------------------------------------------------------------------------------------------------

    def _receive(self, *, wait: bool) -> None:
        """Take every message that is there; wait for one only if there is nothing to compute."""
        if wait and self._blind:
            with suppress(Empty):
                self._handle(self._inbox.get(timeout=_LOOK_AGAIN_S))
        elif wait and not self._running and not self._waiting:
            self._handle(self._next_when_idle())
        while not self._inbox.empty():  # nobody else takes from it
            self._handle(self._inbox.get())

    def _next_when_idle(self) -> Message:
        while self._kv.unsaved:
            try:
                return self._inbox.get(timeout=_STORE_AFTER_S)
            except Empty:
                while self._inbox.empty() and self._kv.save_some():
                    pass
        return self._inbox.get()

    def _handle(self, message: Message) -> None:
        match message:
            case Group(members=members):
                self._waiting += members
            case CancelRequest(request_id=request_id):
                for sequence in [each for each in (*self._running, *self._waiting) if each.id == request_id]:
                    self._finish(sequence, "cancelled")
                for sequence in self._judge.dismiss(request_id):
                    self._emitter.finished(sequence, "cancelled")
            case Verdict() if self._judge.settles(message):
                self._judged(message)
            case Stop():
                self._stopping = True
            case ImageSeen() | Verdict():
                pass  # the next step looks; its request is over

    def _expire(self, now: float) -> None:
        """End what has reached its wall-clock cap; the cap is a length limit like any other."""
        for sequence in [each for each in (*self._running, *self._waiting) if now >= each.deadline]:
            if sequence.group.started:
                self._emitter.cut(sequence)
                self._finish(sequence, "length")
            elif sequence.phase is not Phase.ENDED:
                self._fail(sequence, Overloaded("The request waited for a slot as long as it was allowed to run."))

    # --- one step ---------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        beginning = bool(self._waiting) or any(each.phase is Phase.PREFILL for each in self._running)
        prompts = self._begin() if beginning or self._began else []
        self._began = beginning
        free = self._relieve()
        self._sheds = self._kv.shed()
        if beginning:
            prompts = [sequence for sequence in prompts if sequence.phase is Phase.PREFILL]
            for sequence in self._running:
                self._emitter.started(sequence)  # clients learn that their prompts are being computed
        self._emitter.flush()  # and those whose answers have ended
        decoding = [each for each in self._running if each.phase is Phase.DECODE]
        if self.sight is not None:
            prompts = self._seen(self.sight, prompts, busy=bool(decoding))
            if prompts and not prompts[0].words_ahead and not (decoding and self._image_turn):
                self._show(self.sight, prompts[0])
                return
            prompts = [sequence for sequence in prompts if sequence.words_ahead]
        self._image_turn = False
        decode, prefill = self._composer.compose(decoding, prompts, free)
        if decode or prefill:
            self._compute(decode, prefill)

    def _begin(self) -> list[Sequence]:
        """Admit whom there is room for; returns the prompts that can be computed now."""
        self._order.activate(
            {each.tenant for each in (*self._waiting, *self._running) if each.phase is not Phase.DECODE}
        )
        if self._waiting and len(self._running) < self._most_running:
            self._admit()
        return self._prompts()

    def _seen(self, sight: Sight, prompts: list[Sequence], *, busy: bool) -> list[Sequence]:
        """Those of `prompts` that do not wait for an image to be encoded."""
        ready, failed = sight.ready(prompts)
        for sequence in failed:
            self._fail(sequence, EngineFailed("An image could not be encoded."))
        restoring = any(each.restoring is not None for each in self._running)
        self._blind = len(prompts) > len(ready) + len(failed) and not (ready or busy or restoring)
        return ready

    def _relieve(self) -> int:
        """Preempt while the running sequences could outgrow memory in this step; the cells that they leave over."""
        claims = sum(sequence.claim for sequence in self._running)
        room = self._kv.room(claims + self._composer.most_rows)
        if claims <= room:
            return room - claims
        for sequence in preempt(self._running, room, self._kv.freed_without):
            self._preempt(sequence)
        return 0

    def _preempt(self, sequence: Sequence) -> None:
        """Move its cells to main memory and let it wait again, before those that never ran."""
        if sequence.attached:
            parked_bytes = sum(each.parked.state.nbytes for each in self._waiting if each.parked)
            sequence.parked = self._kv.park(sequence, self._park_bytes - parked_bytes)
            self._counts.parked += sequence.parked is not None
        else:
            self._kv.leave(sequence)
        others_begun = any(other.has_begun for other in sequence.group.members if other is not sequence)
        if sequence.parked is None and not sequence.generated and not others_begun:
            sequence.group.cached_tokens = None  # the prompt begins anew
        self._running.remove(sequence)
        sequence.move(Move.PREEMPT)
        self._waiting.insert(0, sequence)
        self._counts.preemptions += 1

    def _admit(self) -> None:
        begun = [sequence for sequence in self._waiting if sequence.generated or sequence.parked]
        new = self._order.sort(sequence for sequence in self._waiting if sequence not in begun)
        candidates = [*begun, *new][: self._most_running - len(self._running)]
        for position, sequence in enumerate(candidates):
            self._kv.expect(sequence, [*self._running, *candidates[:position]])
        wanted = sum(each.claim for each in (*self._running, *candidates)) + growth_margin(self._parallel)
        room = self._kv.room(wanted)
        for sequence in admit(self._running, candidates, slots=self._most_running, room=room):
            self._waiting.remove(sequence)
            sequence.move(Move.ADMIT)
            self._kv.enter(sequence)
            self._running.append(sequence)

    def _prompts(self) -> list[Sequence]:
        """Prompts that can be computed now, in the order in which they are served."""
        ordered = self._order.sort(each for each in self._running if each.phase is Phase.PREFILL)
        ready: list[Sequence] = []
        begun = restored = False
        for index, sequence in enumerate(ordered):
            if not sequence.attached:
                ahead = [*ordered[:index], *(later for later in ordered[index + 1 :] if later.attached)]
                if self._kv.awaits(sequence, ahead):
                    continue
                self._counts.resumed += sequence.parked is not None
                self._kv.attach(sequence)
                begun = True
        decoding = any(each.phase is Phase.DECODE for each in self._running)
        if begun:  # and has taken what it shares of what goes
            self._kv.shed(at_once=not decoding)
        for sequence in ordered:
            if not sequence.attached:
                continue
            if sequence.restoring is not None and not restored:
                self._kv.restore_some(sequence, wait=not decoding)
                restored = True
            if sequence.restoring is None:
                sequence.note_cached()
                ready.append(sequence)
        return ready

    # --- computing --------------------------------------------------------------------------------------------------

    def _compute(self, decode: list[Chunk], prefill: tuple[Chunk, ...]) -> None:
        chunks = [*decode, *prefill]
        rows, starts, newest = rows_of(chunks)
        if not self._kv.make_room(len(rows)):
            raise EngineBroken("the plan exceeds the pool")
        for chunk in chunks:
            if chunk.sequence.guide is not None and chunk.count == chunk.sequence.remaining:
                chunk.sequence.guide.begin_mask()
        threads = self._costs.threads(len(rows), prefill=bool(prefill))
        self._context.use_threads(threads)
        begun = time.perf_counter()
        status = self._decode(lambda: self._context.decode(rows))
        if status is not DecodeStatus.OK:
            self._recover(status, chunks)
            return
        seconds = max(time.perf_counter() - begun, 1e-6)
        if self._costs.teaches(len(rows), threads, seconds):
            self._costs.observe(len(rows), self._composer.cells(chunks), threads, seconds)
        self._computed(decode, prefill, starts, newest)

    def _computed(
        self, decode: list[Chunk], prefill: tuple[Chunk, ...], starts: list[int], newest: list[int | None]
    ) -> None:
        """Go on behind a batch; `starts` and `newest` are as `rows_of` has them."""
        chunks = [*decode, *prefill]
        self._counts.step(len(decode), sum(chunk.count for chunk in decode), sum(chunk.count for chunk in prefill))
        for chunk in prefill:
            self._order.charge(chunk.sequence.tenant, chunk.count)
        for chunk in chunks:
            sequence = chunk.sequence
            self._kv.append(sequence, sequence.tokens(sequence.computed, sequence.computed + chunk.count))
        self._score(zip(chunks, starts, strict=True))
        self._sample([(chunk, row) for chunk, row in zip(chunks, newest, strict=True) if row is not None])

    def decode_on(self) -> None:
        """Compute further steps while nothing is to be done but to decode. Raises `EngineBroken`."""
        running = list(self._running)
        most = 0 if self._began or self._waiting or self._sheds else self._ahead.most(running)
        if most < 2 or not self._goes_on():
            return
        ended, undrawn = self._ahead.decode(running, most, self._goes_on)
        for sequence, reason in ended:
            self._finish(sequence, reason)
        if undrawn:
            rows = range(len(running))
            self._computed([Chunk(sequence, 1) for sequence in running], (), list(rows), list(rows))
        self._show_all(self._clock())

    def _goes_on(self) -> bool:
        """Whether another step may be computed without a look at anything else."""
        self.step_started = now = self._clock()
        return self._inbox.empty() and now < self._stats_due and all(now < each.deadline for each in self._running)

    def _show(self, sight: Sight, sequence: Sequence) -> None:
        """Compute the image that comes next in a prompt, all of it in a step of its own.

        Nothing is learnt of costs from it: rows that are no tokens are not looked up.
        """
        self._image_turn = True
        image, rows = sequence.next_image, sight.look(sequence)
        assert image is not None
        assert rows is not None
        assert sequence.slot is not None
        count = len(rows)
        if not self._kv.make_room(count):
            raise EngineBroken("the plan exceeds the pool")
        self._context.use_threads(self._costs.threads(min(count, self._context.batch_tokens), prefill=True))
        chunk, newest = Chunk(sequence, count), None
        for decode, batch_rows in computations(self._context, sequence, image, rows):
            status, newest = self._decode(decode), batch_rows - 1
            if status is not DecodeStatus.OK:
                self._recover(status, [chunk], undone=self._kv.cut(sequence))  # what of the image was computed
                return
        self._computed([], (chunk,), [0], [newest if image.end == sequence.length else None])

    def _decode(self, decode: Callable[[], DecodeStatus]) -> DecodeStatus:
        status = decode()
        while status is DecodeStatus.NO_SLOT and self._kv.evict():
            status = decode()  # windows have cells of their own, which no plan knows
        return status

    def _score(self, chunks: Iterable[tuple[Chunk, int]]) -> None:
        """Read what is wanted of prompts from the rows of their chunks, which begin at the given ones."""
        for chunk, start in chunks:
            if chunk.sequence.unscored:
                try:
                    self._drawing.score(chunk, start)
                except UnusableDistribution as error:
                    self._fail(chunk.sequence, EngineFailed(str(error)))

    def _sample(self, sampled: list[tuple[Chunk, int]]) -> None:
        usable = not sampled
        for chunk, row in sampled:
            sequence = chunk.sequence
            if sequence.phase is Phase.ENDED:
                continue  # another choice of its request failed in this very step
            if sequence.phase is Phase.PREFILL:
                sequence.move(Move.COMPUTED)
            try:
                reason = self._drawing.take(chunk, row)
            except (UnusableDistribution, GuideError) as error:
                self._fail(sequence, EngineFailed(str(error)))
                continue
            usable = True
            if reason is not None:
                self._finish(sequence, reason)
        self._broken_steps = 0 if usable else self._broken_steps + 1
        if self._broken_steps >= _BROKEN_STEPS:
            raise EngineBroken("no usable distribution in several steps")

    # --- ends -------------------------------------------------------------------------------------------------------

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._release(sequence)
        if reason != "stop" or not sequence.answer.is_held:
            self._emitter.finished(sequence, reason)
            return
        self._emitter.rest(sequence)
        if (verdict := self._judge.ask(sequence)) is not None:
            self._judged(verdict)

    def _judged(self, verdict: Verdict) -> None:
        if verdict.fault is None:
            self._emitter.finished(verdict.sequence, "stop")
            return
        self._counts.invalid += 1
        self._fail(verdict.sequence, EngineFailed(verdict.fault))

    def _fail(self, sequence: Sequence, error: ApiError) -> None:
        """One choice cannot go on: the request ends for all of them."""
        for member in sequence.group.members:
            if member.phase is not Phase.ENDED:
                self._release(member)
        self._judge.dismiss(sequence.id)
        self._emitter.failed(sequence.group, error)

    def _release(self, sequence: Sequence) -> None:
        self._kv.leave(sequence)
        for queue in (self._running, self._waiting):
            if sequence in queue:
                queue.remove(sequence)
        sequence.move(Move.END)
        sequence.parked = None
        sequence.close()
        self._most_running = self._parallel

    def _recover(self, status: DecodeStatus, chunks: list[Chunk], *, undone: bool = True) -> None:
        """A batch that could not be computed; llama.cpp restored its state, unless it is not `undone`."""
        if status in (DecodeStatus.ABORTED, DecodeStatus.FATAL):
            raise EngineBroken(f"llama_decode failed: {status.name}")
        if undone and status is DecodeStatus.NO_SLOT and len(self._running) > 1:
            self._most_running = len(self._running) - 1  # until one of them ends
            self._preempt(self._running[-1])
        else:
            self._fail(chunks[-1].sequence, EngineFailed("The engine could not compute this sequence."))
