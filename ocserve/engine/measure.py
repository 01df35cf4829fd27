"""Times batches of a loaded model, unless it was done before: what `CostModel` starts from.

Made to fit into a start: the most telling sizes come first, each only if it is expected to fit into what is left of the
time budget, so that a small model is measured finely and a slow one coarsely. What is left out the cost model extends
from what is there. A step cannot be interrupted, so the budget may be passed by one step of one row for each thread
count that must be measured.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from statistics import median

import msgspec

from ocserve.engine import llama, profile
from ocserve.engine.attention import Attention, Span
from ocserve.engine.bindings import LlamaError
from ocserve.engine.context import Context, DecodeStatus, Row
from ocserve.engine.costs import Timing, thread_candidates
from ocserve.engine.llama import Vocab
from ocserve.engine.wire import EngineSpec
from ocserve.machine import usable_cores

BUDGET_S = 3.0
_DEEP_SHARE = 0.4  # of the budget is kept for steps behind many cells where every row computes with all of them
MOST_SPREAD, MOST_OTHERS = 0.15, 0.2  # beyond, the machine was busy and its timings are not worth keeping
_SIZES = (1, 8, 64, 2, 4, 16, 32, 128, 256, 512, 1024, 2048)  # most telling first: one stream, several, a prompt
_FEW_ROWS = 8
_HOPELESS = 1.3  # a count that takes this many times the best at `_FEW_ROWS` is not timed with more rows
_DEPTHS = (1024, 512, 256)  # cells in memory at which a single row is timed again: the deepest that the budget allows
_COPIES = 8  # where rows attend all cells, so many copies of a short prompt make them
_CHUNK = 32  # rows that are timed there too
_MOST_REPEATS, _WORTH_REPEATING_S = 3, 0.15


class Measurement(msgspec.Struct, frozen=True):
    """Timings of one machine and model, and whether to trust them.

    `spread` is how far repeats of a step typically lie apart (0.1 is 10 %), `others` the share of the usable cores'
    time that other processes had meanwhile: a steady neighbour makes steps slow without making them differ.
    """

    timings: tuple[Timing, ...]
    spread: float
    others: float

    @property
    def is_quiet(self) -> bool:
        return self.spread <= MOST_SPREAD and self.others <= MOST_OTHERS


def profile_key(spec: EngineSpec) -> profile.ProfileKey:
    """What a profile of this engine on this machine is filed under."""
    return profile.ProfileKey(
        model_digest=spec.model_digest,
        llama_cpp=llama.version(),
        processor=profile.processor(),
        cores=usable_cores(),
        gpu_layers=spec.gpu_layers,
        kv_type=spec.kv_type,
        flash_attention=spec.flash_attention,
        batch_tokens=spec.batch_tokens,
        parallel=spec.parallel,
    )


def stored_or_measured(context: Context, vocab: Vocab, spec: EngineSpec) -> tuple[Timing, ...]:
    """The timings of a loaded model: the stored ones, or measured now, and stored if the machine was quiet.

    Every thread count that the operator set is among them. Raises `LlamaError` if the model cannot compute.
    """
    directory = Path(spec.cache_directory) if spec.cache_directory and spec.model_digest else None
    fixed = {spec.threads_decode, spec.threads_prefill} - {None}
    if directory is not None:
        stored = profile.load(directory, profile_key(spec))
        if stored is not None and stored.covers(fixed):
            return stored.timings
    found = measure_spec(context, vocab, spec, thread_candidates(usable_cores()))
    if directory is not None and found.is_quiet:
        kept = profile.Profile(key=profile_key(spec), timings=found.timings, spread=found.spread)
        with contextlib.suppress(OSError):  # a cache that cannot be written costs the next start some seconds
            profile.save(directory, kept)
    return found.timings


def measure_spec(
    context: Context,
    vocab: Vocab,
    spec: EngineSpec,
    threads: Sequence[int],
    *,
    budget_s: float = BUDGET_S,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Measurement:
    """`measure` with the sizes of an engine that was told `spec`."""
    return measure(
        context,
        vocab,
        threads=threads,
        needed=[count for count in (spec.threads_decode, spec.threads_prefill) if count is not None],
        most_rows=max(spec.batch_tokens, spec.parallel),
        outputs=spec.parallel,
        dense=not spec.flash_attention,
        budget_s=budget_s,
        on_progress=on_progress,
    )


def measure(
    context: Context,
    vocab: Vocab,
    *,
    threads: Sequence[int],
    needed: Collection[int] = (),
    most_rows: int,
    outputs: int,
    dense: bool = False,
    budget_s: float = BUDGET_S,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Measurement:
    """Time steps of 1 … `most_rows` rows under each of `threads`, and under the `needed` ones at least once.

    As in a step that decodes, up to `outputs` rows ask for a distribution: with a large vocabulary that is a good part
    of the work. `dense` contexts attend without flash attention. The context's cells are used and freed. `on_progress`
    gets the share of the budget that is spent.
    Raises `LlamaError` if a step fails.
    """
    begun, busy_s = time.monotonic(), _busy_with_others_s()
    stopwatch = _Stopwatch(context, vocab.size, outputs, dense, budget_s, on_progress)
    descending = sorted({*threads, *needed}, reverse=True)
    most_rows = min(most_rows, context.batch_tokens)
    for rows in dict.fromkeys(min(size, most_rows) for size in (*_SIZES, most_rows)):
        for count in descending:
            first = not stopwatch.timings  # something has to be known
            must = rows == 1 and (first or count in needed)
            if must or not stopwatch.is_hopeless(count, rows):
                stopwatch.time(rows, count, must=must)
    stopwatch.time_deep(most_rows)
    stopwatch.forget()
    available_s = (time.monotonic() - begun) * len(_cores())
    others = max(0.0, _busy_with_others_s() - busy_s) / available_s
    return Measurement(timings=tuple(stopwatch.timings), spread=stopwatch.spread, others=others)


def _cores() -> set[int]:
    """The numbers of the cores that this process may run on."""
    return os.sched_getaffinity(0) if sys.platform == "linux" else set(range(os.cpu_count() or 1))


def _busy_with_others_s() -> float:
    """Seconds that these cores have computed for anybody but this process, or were taken from a virtual machine."""
    import psutil

    cores = _cores()
    busy_s = -time.process_time()
    for core, times in enumerate(psutil.cpu_times(percpu=True)):
        if core in cores:
            # A guest's time is part of a user's.
            busy_s += sum(times) - sum(getattr(times, name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))
    return busy_s


class _Stopwatch:
    """Times steps within a budget of seconds."""

    def __init__(
        self,
        context: Context,
        vocabulary: int,
        outputs: int,
        dense: bool,
        budget_s: float,
        on_progress: Callable[[float], None],
    ) -> None:
        self.timings: list[Timing] = []
        self._context = context
        self._vocabulary = vocabulary
        self._outputs = min(outputs, context.outputs)
        self._budget_s = budget_s
        self._on_progress = on_progress
        self._spent_s = 0.0
        self._depth = 0  # cells that sequence 0 has
        self._in_use, self._holders = 0, 1  # cells of all sequences, and how many sequences those are
        self._attention = Attention(lambda: self._in_use) if dense else Attention()
        self._spreads: list[float] = []

    @property
    def spread(self) -> float:
        """The typical distance of the slower half of repeats from the fastest, as a share of that."""
        return median(self._spreads) if self._spreads else 0.0

    def is_hopeless(self, threads: int, rows: int) -> bool:
        """Whether this count was so slow with a few rows that more rows need not be timed."""
        at_few = {timing.threads: timing.seconds for timing in self.timings if timing.rows == _FEW_ROWS}
        return rows > _FEW_ROWS and at_few.get(threads, 0.0) > _HOPELESS * min(at_few.values(), default=0.0)

    def time(self, rows: int, threads: int, *, must: bool = False) -> None:
        """Time a step of `rows`, several times if it is short, each time with nothing before it."""
        expected = self._expected(rows, threads)
        kept_s = _DEEP_SHARE * self._budget_s if self._attention.dense else 0.0
        if not must and self._spent_s + expected > self._budget_s - kept_s:
            return
        self._context.use_threads(threads)
        repeats: list[float] = []
        while not repeats or (len(repeats) < _MOST_REPEATS and self._is_worth(repeats[0])):
            self.forget()
            repeats.append(self._step(rows))
        self._note(threads, Span(0, rows), repeats)

    def time_deep(self, chunk: int) -> None:
        """Time single rows after a long prompt: what attended cells cost."""
        known = [timing for timing in self.timings if timing.rows == 1]
        best = min(self.timings, key=lambda timing: timing.seconds / timing.rows)
        room = self._context.pool_tokens - _MOST_REPEATS * (len(known) + _CHUNK)
        per_row, repeats_s = best.seconds / best.rows, _MOST_REPEATS * sum(timing.seconds for timing in known)
        left_s = self._budget_s - self._spent_s - repeats_s
        copies = min(_COPIES, self._context.sequences) if self._attention.dense else 1
        computed = {depth: depth // copies for depth in _DEPTHS if depth <= room}
        depth = next((depth for depth, tokens in computed.items() if tokens * per_row <= left_s), None)
        if depth is None:
            return
        self.forget()
        self._context.use_threads(best.threads)
        while self._depth < computed[depth]:
            self._step(min(chunk, computed[depth] - self._depth))
        self._copy(copies)
        for timing in known:
            self._context.use_threads(timing.threads)
            self._note(timing.threads, Span(self._depth, 1), [self._step(1) for _ in range(_MOST_REPEATS)])
        chunks = [timing for timing in self.timings if timing.rows == _CHUNK]
        if self._attention.dense and chunks and _CHUNK * per_row <= self._budget_s - self._spent_s:
            fastest = min(chunks, key=lambda timing: timing.seconds)
            self._context.use_threads(fastest.threads)
            repeats = [self._step(_CHUNK)]
            while len(repeats) < _MOST_REPEATS and self._spent_s + repeats[0] <= self._budget_s:
                repeats.append(self._step(_CHUNK))
            self._note(fastest.threads, Span(self._depth, _CHUNK), repeats)

    def _copy(self, copies: int) -> None:
        """Let so many sequences in all have the cells that sequence 0 has."""
        if copies > 1:
            state, self._holders = self._context.save(0), copies
            self._in_use += sum(self._depth for other in range(1, copies) if self._context.restore(other, state))

    def _note(self, threads: int, span: Span, repeats: Sequence[float]) -> None:
        """Timings of steps as they are computed now, of which `span` is the last.

        The fastest counts: noise makes steps slow, and what cells cost is a small difference between two timings.
        """
        fastest = min(repeats)
        self._in_use -= span.rows
        cells = self._attention.cells([span])
        self._in_use += span.rows
        self.timings.append(Timing(threads=threads, rows=span.rows, cells=cells, seconds=fastest))
        if len(repeats) == _MOST_REPEATS:
            self._spreads.append(median(repeats) / fastest - 1)

    def forget(self) -> None:
        """Free all cells."""
        for sequence in range(self._holders):
            self._context.forget(sequence)
        self._depth, self._in_use, self._holders = 0, 0, 1

    def _is_worth(self, seconds: float) -> bool:
        return seconds <= _WORTH_REPEATING_S and self._spent_s + seconds <= self._budget_s

    def _expected(self, rows: int, threads: int) -> float:
        """Seconds at the most: as many rows cost at most that much more, as few threads that much more."""
        return min(
            (
                timing.seconds * max(1.0, rows / timing.rows) * max(1.0, timing.threads / threads)
                for timing in self.timings
            ),
            default=0.0,
        )

    def _step(self, rows: int) -> float:
        """Compute `rows` further tokens of sequence 0; seconds."""
        last = rows - self._outputs
        batch = [Row(index % self._vocabulary, self._depth + index, 0, index >= last) for index in range(rows)]
        begun = time.perf_counter()
        status = self._context.decode(batch)
        self._context.logits(rows - 1)  # waits for a GPU
        seconds = time.perf_counter() - begun
        if status is not DecodeStatus.OK:
            raise LlamaError(f"a step of {rows} rows could not be timed: {status.name}")
        self._depth += rows
        self._in_use += rows
        self._spent_s += seconds
        self._on_progress(min(1.0, self._spent_s / self._budget_s))
        return seconds
