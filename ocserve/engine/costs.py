"""What the next step will cost, and how many threads should compute it: a model of this machine, refined by every step.

Pure: no clock and no llama.cpp. It starts from timings (measured at load or stored) and is told what steps took. Two
things are learnt at two speeds:

* A curve for each thread count: seconds by row count, a table over powers of two joined by straight lines that never
  falls, plus seconds for each attended cell, which may differ between few rows (bound by bandwidth) and many (bound by
  arithmetic). Every step moves it a little, by a normalised least mean squares rule on logarithms with the error
  clipped, so that one stall moves it by 5 % at most.
* A load factor for each thread count and band of row counts: how much slower than its curve it runs just now. It
  follows a change of the machine after one or two steps.

Threads wait for each other at barriers, so one that is kept off its core holds up all of them, and a step can take
hundreds of times as long. That shows as a load, and another thread count is the cheaper one from the next step on. The
counts that are not used are tried now and then, within a budget of time: what the last trial lost decides when the next
one comes. The engine sees only its own steps; that the front process wants a core shows in their times.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from ocserve.engine.attention import CELL_STEP

SURPRISE = 1.5  # a step that takes this many times what is expected, twice in a row, is a change and not noise
COLLAPSE = 10.0  # once is enough: waiting for a second such step would cost more than a mistake
TRIAL_STEPS = 128  # steps of a band between two trials of a thread count
TRIAL_SHARE = 32  # a trial may cost one part in so many of the time since the last one …
LONGEST_WAIT_S = 30.0  # … but comes after this at the latest, twice that if it did not help, up to
_MOST_DOUBLINGS = 4
_BETTER = 0.9  # another count must be this much cheaper to be preferred, so that noise does not flip the choice
# Noise makes steps slow, hardly ever fast: only slow steps are distrusted, and only the first few in a row.
_CURVE_RATE, _ERROR_CLIP, _STALL_CLIP, _MOST_STALLS = 0.2, 2.0, 0.25, 2
_LOAD_RATE = 0.1
_BANDS = (1, 16)  # one row, up to 16, more: decoding alone, decoding together, prompts
# Where nothing else was measured: a further row costs this share of a step with one (135M model on a CPU: 8 ms and
# 2.4), and attending this many cells as much as that step (same model: 23 kB a cell against 90 MB of weights).
_ROW_SHARE, _CELLS_OF_STEP = 0.3, 4000
_FEWEST_CELL_SHARE = 1e-6
_MOST_SPREAD = 8  # between models in how many cells are worth a step
# On a CPU, llama.cpp computes attention in tiles from so many rows on (GGML_FA_TILE_Q) and row by row below. In tiles a
# cell costs about this share (135M model: 2 to 3 µs against 6 to 13).
TILE_ROWS = 64
_NO_TILES = 1 << 30
_ROW_IN_CELLS = (
    4000.0  # without flash attention, in batches of many rows (135M model: 5,100 by time, 3,100 by arithmetic)
)
_SHARED_SPREAD, _SINGLE_SPREAD = 3.0, 3.0  # how far measured costs of cells may lie from the usual there
_ALIKE_ROWS = 16  # a cell costs the same there in batches of so many rows or more
_REPEATS, _REPEAT_SPREAD = 15, 0.25  # so many steps teach nothing if they are as the one before them, within a quarter
_SHORT_S = 0.05  # and are so short that learning, 0.1 ms in cold caches, is felt
_PASSED_SHARE = 0.05  # and this much a cell that is not the row's own (same model: 0.6 µs against 12)
_TILED_SHARE = 0.35


class Timing(msgspec.Struct, frozen=True):
    """A measured step: `rows` computed by `threads` attended `cells` (the sum of their context lengths)."""

    threads: int
    rows: int
    cells: int
    seconds: float


def thread_candidates(cores: int) -> tuple[int, ...]:
    """Thread counts worth measuring on `cores` cores, ascending.

    One leaves the most to others; one fewer than all leaves the front process a core; decoding rarely gains beyond
    eight or half of the cores, because few threads use up the memory's bandwidth.
    """
    return tuple(sorted({1, min(8, cores), max(1, cores // 2), max(1, cores - 1), cores}))


@dataclass(slots=True)
class _Curve:
    """Seconds of an undisturbed step under one thread count, by rows and attended cells.

    From the knot number `alike` on, a cell costs the same at all sizes, so that one step teaches all of them.
    """

    knots: Sequence[int]
    steps: list[float]
    cells: list[float]
    alike: int
    slow_steps: int = 0

    def seconds(self, rows: int, cells: int) -> float:
        left, share = self._place(rows)
        step = self.steps[left] + share * (self.steps[left + 1] - self.steps[left])
        cell = self.cells[left] + share * (self.cells[left + 1] - self.cells[left])
        return step + cell * cells

    def nudge(self, rows: int, cells: int, ratio: float) -> None:
        """Move towards a step that took `ratio` times what the curve says, each part by its share in that."""
        left, share = self._place(rows)
        share = min(share, 1.0)
        weights = ((left, 1 - share), (left + 1, share))
        parts: list[tuple[list[float], Iterable[int], float]]
        parts = [(self.steps, [index], weight * self.steps[index]) for index, weight in weights]
        if left >= self.alike:
            parts.append((self.cells, range(self.alike, len(self.cells)), self.cells[left] * cells))
        else:
            parts += [(self.cells, [index], weight * self.cells[index] * cells) for index, weight in weights]
        total = sum(part for _, _, part in parts)
        error = math.log(ratio)
        self.slow_steps = self.slow_steps + 1 if error > _STALL_CLIP else 0
        most = _STALL_CLIP if self.slow_steps <= _MOST_STALLS else _ERROR_CLIP
        error = max(-_ERROR_CLIP, min(most, error))
        gain = _CURVE_RATE * error * total / sum(part * part for _, _, part in parts)
        for table, indices, part in parts:
            for index in indices:
                table[index] *= math.exp(gain * part)
        for index in range(left, 0, -1):
            self.steps[index - 1] = min(self.steps[index - 1], self.steps[index])
        for index in range(left + 1, len(self.steps)):
            self.steps[index] = max(self.steps[index], self.steps[index - 1])

    def _place(self, rows: int) -> tuple[int, float]:
        """The knot at or below `rows`, and how far towards the next one; beyond the last the line goes on."""
        left = min(bisect_right(self.knots, rows), len(self.knots) - 1) - 1
        return left, (rows - self.knots[left]) / (self.knots[left + 1] - self.knots[left])


def _knots(most_rows: int, tiles: int) -> tuple[int, ...]:
    """Powers of two, the last size before `tiles`, and `most_rows`; two at least."""
    powers = {1 << exponent for exponent in range(max(1, most_rows - 1).bit_length())}
    return tuple(sorted({*powers, max(2, most_rows), *({tiles - 1} if most_rows > tiles else ())}))


def _fit(timings: Sequence[Timing], knots: Sequence[int], tiles: int, row_in_cells: float) -> _Curve:
    """The curve through timings of one thread count; what was not measured is extended from what was.

    From so many rows on, attention is computed in `tiles`; `row_in_cells` as in `CostModel`.
    """
    by_rows: dict[int, list[Timing]] = {}
    for timing in sorted(timings, key=lambda timing: (timing.rows, timing.cells)):
        by_rows.setdefault(timing.rows, []).append(timing)
    per_step = min(by_rows[min(by_rows)], key=lambda timing: timing.cells).seconds
    floor = _FEWEST_CELL_SHARE * per_step
    cell_costs = {
        rows: max(floor, (same[-1].seconds - same[0].seconds) / (same[-1].cells - same[0].cells))
        for rows, same in by_rows.items()
        if same[-1].cells > same[0].cells
    } or {1: per_step / _CELLS_OF_STEP}

    def cell_cost(rows: int) -> float:
        tiled = rows >= tiles
        near = min(cell_costs, key=lambda known: ((known >= tiles) != tiled, abs(math.log(known / rows))))
        if (near >= tiles) == tiled:
            return cell_costs[near]
        return max(floor, cell_costs[near] * (_TILED_SHARE if tiled else 1 / _TILED_SHARE))

    measured, highest = [], 0.0
    for rows, same in by_rows.items():
        # A tenth at least is the step itself: the shallow timing must not vanish behind a cell cost that noise raised.
        highest = max(highest, same[0].seconds - cell_cost(rows) * same[0].cells, same[0].seconds / 10)
        measured.append((rows, highest))
    steps = [_extended(measured, rows) for rows in knots]
    alike = bisect_left(knots, _ALIKE_ROWS) if tiles == _NO_TILES else len(knots)
    costs = [cell_cost(rows) for rows in knots]
    if tiles == _NO_TILES:
        usual = steps[-1] / knots[-1] / row_in_cells
        shared = next((cost for rows, cost in cell_costs.items() if rows >= _ALIKE_ROWS), usual)
        costs = _dense_costs(knots, costs[0], per_step / _CELLS_OF_STEP, shared, usual)
    return _Curve(knots, steps, costs, alike)


def _dense_costs(
    knots: Sequence[int], single: float, usual_single: float, shared: float, usual_shared: float
) -> list[float]:
    """What a cell costs each row without flash attention, from what it was seen to cost one row and each of many.

    A cell is read once for all rows, so that between the two the cost falls with each doubling. Either is a difference
    of two timings, which may have been disturbed: it is trusted within limits of the usual only.
    """
    shared = max(usual_shared / _SHARED_SPREAD, min(usual_shared * _SHARED_SPREAD, shared))
    single = max(shared, min(usual_single * _SINGLE_SPREAD, single))
    many = math.log(_ALIKE_ROWS)
    return [single * (shared / single) ** min(1.0, math.log(rows) / many) for rows in knots]


def _extended(measured: Sequence[tuple[int, float]], rows: int) -> float:
    """Seconds at `rows` on the lines through ascending (rows, seconds)."""
    if len(measured) == 1:
        known, seconds = measured[0]
        return seconds * (1 + _ROW_SHARE * (rows - 1)) / (1 + _ROW_SHARE * (known - 1))
    right = min(max(1, bisect_right([known for known, _ in measured], rows)), len(measured) - 1)
    (low, start), (high, end) = measured[right - 1], measured[right]
    return max(start + (rows - low) * (end - start) / (high - low), measured[0][1] / 10)


@dataclass(slots=True)
class _Arm:
    """One thread count in one band: how loaded it is, and when it was last looked at."""

    load: float = 1.0
    suspect: float | None = None
    tried_s: float = 0.0
    tried_step: int = 0
    failures: int = 0

    def learn(self, ratio: float) -> None:
        """A step took `ratio` times what the curve says.

        1. Much faster than the load says: at once. Noise makes steps slow, hardly ever fast.
        2. Collapsed: at once.
        3. Much slower, for the second time in a row: the smaller of the two. For the first time: remembered.
        4. As expected: a moving average.
        """
        surprise = ratio / self.load
        suspect, self.suspect = self.suspect, None
        if surprise < 1 / SURPRISE or surprise > COLLAPSE:
            self.load = ratio
        elif surprise > SURPRISE and suspect is not None:
            self.load = min(suspect, ratio)
        elif surprise > SURPRISE:
            self.suspect = ratio
        else:
            self.load += _LOAD_RATE * (ratio - self.load)


@dataclass(slots=True)
class _Band:
    """Row counts that are alike, and the thread count that is used for them."""

    current: int
    arms: dict[int, _Arm]
    steps: int = field(default=0)


class CostModel:
    """Predicts what steps cost and chooses their threads. `threads` before each step, `observe` after it.

    `most_rows` is the largest batch. A count that the operator fixed is kept for its kind of step: `decode_threads` for
    steps without prompt rows, `prefill_threads` for those with some; it must be among the timings' thread counts, or
    `ValueError`.
    """

    def __init__(
        self,
        timings: Iterable[Timing],
        *,
        most_rows: int,
        decode_threads: int | None = None,
        prefill_threads: int | None = None,
        dense: bool = False,
        row_in_cells: float = _ROW_IN_CELLS,
    ) -> None:
        """`dense`: attention is computed without flash attention, so that there are no tiles; attending about
        `row_in_cells` cells is then as much arithmetic as the rest of a row, in batches of many rows."""
        by_threads: dict[int, list[Timing]] = {}
        for timing in timings:
            by_threads.setdefault(timing.threads, []).append(timing)
        if not by_threads or {decode_threads, prefill_threads} - {None, *by_threads}:
            raise ValueError("no timings of a thread count that is to be used")
        self._most_rows = most_rows
        self._fixed = {False: decode_threads, True: prefill_threads}
        self._dense = dense
        tiles = _NO_TILES if dense else TILE_ROWS
        knots = _knots(most_rows, tiles)
        self._curves = {
            threads: _fit(by_threads[threads], knots, tiles, row_in_cells) for threads in sorted(by_threads)
        }
        self._bands = [_Band(0, {threads: _Arm() for threads in self._curves}) for _ in range(len(_BANDS) + 1)]
        for band, rows in zip(self._bands, (1, 8, most_rows), strict=True):
            costs = self._costs(band, min(rows, most_rows), 0)
            # The fewest threads that are about as good as the best leave the other cores to other processes.
            band.current = next(threads for threads, cost in costs.items() if _BETTER * cost <= min(costs.values()))
        self._busy_s = 0.0
        self._heard, self._repeats = (0, 0, 0.0), 0  # rows, threads and seconds of the last step, if it was foreseen

    def seconds(self, rows: int, cells: int = 0, *, prefill: bool = False) -> float:
        """Predicted seconds of a step with `rows` rows that attend `cells` in all, under its usual thread count.

        `cells` is the sum over rows of their context lengths; `prefill` says whether prompt rows are among them, which
        matters only where the operator fixed thread counts.
        """
        threads = self.usual_threads(rows, prefill=prefill)
        return self._curves[threads].seconds(rows, cells) * self._band(rows).arms[threads].load

    def passed_over(self, share: float) -> int:
        """How many cells of others add so much (0.1: a tenth) to a step of one row, which does not need them.

        Only where llama.cpp computes on a CPU: there a row looks at the mask of every cell in use or, without flash
        attention, computes with it.
        """
        step_s = self.seconds(1)
        attended_s = (self.seconds(1, _CELLS_OF_STEP) - step_s) / _CELLS_OF_STEP
        if self._dense:
            least_s = step_s / (_MOST_SPREAD * _CELLS_OF_STEP)  # what was measured with noise may be next to nothing
            return max(CELL_STEP, round(share * step_s / max(attended_s, least_s)))
        return round(share * step_s / (_PASSED_SHARE * attended_s))

    def rows_within(self, seconds: float, *, rows: int, cells_per_row: int, most: int) -> int:
        """How many prompt rows, `most` at most, a step of `rows` other rows can take on within `seconds`; 0 if none.

        Every row, old or new, is taken to attend `cells_per_row`.
        """

        def fits(more: int) -> bool:
            return self.seconds(rows + more, (rows + more) * cells_per_row, prefill=True) <= seconds

        most = min(most, self._most_rows - rows)
        if most <= 0 or not fits(1):
            return 0
        if fits(most):
            return most
        fitting, excessive = 1, most
        while excessive - fitting > 1:
            middle = (fitting + excessive) // 2
            fitting, excessive = (middle, excessive) if fits(middle) else (fitting, middle)
        return fitting

    def usual_threads(self, rows: int, *, prefill: bool = False) -> int:
        """The thread count that steps of this kind have at present, trials apart."""
        return self._fixed[prefill] or self._band(rows).current

    def threads(self, rows: int, *, prefill: bool = False) -> int:
        """The thread count for the next step: the usual one, or one that is due for a trial."""
        usual = self.usual_threads(rows, prefill=prefill)
        if self._fixed[prefill]:
            return usual
        band = self._band(rows)
        band.steps += 1
        due = (threads for threads in band.arms if threads != usual and self._trial_is_due(band, threads, rows))
        return next(due, usual)

    def teaches(self, rows: int, threads: int, seconds: float) -> bool:
        """Whether to `observe` a step: learning holds up the next one, and most repetitions of what was foreseen say
        nothing."""
        rows_before, threads_before, seconds_before = self._heard
        alike = abs(seconds - seconds_before) <= _REPEAT_SPREAD * seconds_before and seconds < _SHORT_S
        if alike and (rows, threads) == (rows_before, threads_before) and self._repeats < _REPEATS:
            self._repeats += 1
            self._busy_s += seconds
            return False
        self._repeats = 0
        return True

    def observe(self, rows: int, cells: int, threads: int, seconds: float) -> None:
        """A step of `rows` rows that attended `cells` took `seconds` with `threads`, which must be a known count."""
        assert seconds > 0
        self._busy_s += seconds
        band, curve = self._band(rows), self._curves[threads]
        expected = curve.seconds(rows, cells)
        arm, usual = band.arms[threads], band.current
        arm.learn(seconds / expected)
        curve.nudge(rows, cells, seconds / expected)
        arm.load *= expected / curve.seconds(rows, cells)  # what the curve has taken over is no longer load
        predicted = curve.seconds(rows, cells) * arm.load
        settled = abs(seconds - predicted) <= _REPEAT_SPREAD * predicted
        self._heard = (rows, threads, seconds) if settled else (0, 0, 0.0)
        costs = self._costs(band, rows, cells)
        best = min(costs, key=costs.__getitem__)
        if costs[best] < _BETTER * costs[usual]:
            band.current = best
            band.arms[best].failures = 0
        if threads != band.current:
            arm.failures = arm.failures + 1 if threads != usual else 0
            arm.tried_s, arm.tried_step = self._busy_s, band.steps

    def _band(self, rows: int) -> _Band:
        return self._bands[sum(rows > limit for limit in _BANDS)]

    def _costs(self, band: _Band, rows: int, cells: int) -> dict[int, float]:
        """Seconds expected of each thread count, ascending in threads."""
        return {
            threads: curve.seconds(rows, cells) * band.arms[threads].load for threads, curve in self._curves.items()
        }

    def _trial_is_due(self, band: _Band, threads: int, rows: int) -> bool:
        """Whether what a trial would lose is small against the time since the last one."""
        arm = band.arms[threads]
        if band.steps - arm.tried_step < TRIAL_STEPS:
            return False
        costs = self._costs(band, rows, 0)
        wait = min(LONGEST_WAIT_S, TRIAL_SHARE * (costs[threads] - costs[band.current]))
        return bool(self._busy_s - arm.tried_s >= wait * 2 ** min(arm.failures, _MOST_DOUBLINGS))
