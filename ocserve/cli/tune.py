"""`ocserve tune [MODEL]`: measure this machine thoroughly, and keep what was found for later runs.

Threads × batch sizes are timed by a child process for each waiting policy (how long OpenMP's threads spin at a barrier
before they sleep), in turns, so that a change of the machine's load meets all policies alike. Nothing is kept if the
machine was busy.
"""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import click
import msgspec

if TYPE_CHECKING:
    from ocserve.config import Config

MOST_SPREAD, MOST_OTHERS = 0.15, 0.2  # beyond, the machine was busy and its timings are not kept
DEFAULT_SPINS = 1000  # what an engine has without a tuned policy
# Without end is not among them: a thread that is kept off its core would hold up the others for whole time slices.
_SPIN_COUNTS = (DEFAULT_SPINS, 0, 30_000, 300_000)
_WORTH_A_CHANGE = 0.97  # another policy must take less than this share of the default's time
_ROUNDS = 2
_QUICK_S, _THOROUGH_S = 3.0, 6.0  # for each round of each policy
_STORE_TIMEOUT_S = 60.0
ARGV = (sys.executable, "-m", "ocserve.engine.tuning")


class Timing(msgspec.Struct, frozen=True):
    """A measured step, as the child prints it."""

    threads: int
    rows: int
    cells: int
    seconds: float


class Line(msgspec.Struct, frozen=True):
    """A line of the child: progress, or timings with their spread and others' share of the cores, or an error."""

    share: float | None = None
    timings: tuple[Timing, ...] = ()
    spread: float = 0.0
    others: float = 0.0
    error: str | None = None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What was found. `relative` is each waiting policy's time as a share of the default's, by spin count.

    `spread` is how far timings of a step lie apart, `others` the share of the cores' time that other processes had.
    """

    model: str
    spin_count: int | None
    relative: dict[int, float]
    spread: float
    others: float
    kept: bool
    timings: tuple[Timing, ...]


class TuningFailed(Exception):
    """The child process could not measure or store; the text says why."""


@dataclass(frozen=True, slots=True)
class _Round:
    """What one child measured."""

    spin_count: int | None
    timings: dict[tuple[int, int, int], float]  # (threads, rows, cells) → seconds
    spread: float
    others: float


@click.command("tune")
@click.argument("model", required=False)
@click.option("--quick", is_flag=True, help="Measure threads and batch sizes only, in some seconds.")
@click.option("--force", is_flag=True, help="Keep the result even if the machine was busy.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: str | None, quick: bool, force: bool, as_json: bool) -> None:
    """Measure which threads, batch sizes and waiting policy suit MODEL here, and keep that for `ocserve run`.

    MODEL is named as for `ocserve run`. Close other programs first.
    """
    from ocserve import app, config
    from ocserve.catalog.pull import pull
    from ocserve.catalog.sizing import choose_default
    from ocserve.cli import Failure
    from ocserve.cli.model_output import print_json
    from ocserve.cli.pull import progress

    tree = config.load().config
    reference = model or tree.model.default or choose_default(tree.store, say=lambda line: click.echo(line, err=True))
    with progress() as on_progress:
        installed = pull(reference, tree.store, on_progress)
    spec = msgspec.to_builtins(app.engine_spec(tree.engine, tree.cache, installed, app.plan_here(tree, installed)))
    try:
        with click.progressbar(length=1000, label=f"Measuring {installed.name}", file=sys.stderr) as bar:
            rounds = measure(
                spec, tree, quick=quick, on_progress=lambda share: bar.update(round(1000 * share) - bar.pos)
            )
        result = judge(installed.name, rounds, force=force)
        if result.kept:
            _keep(spec, tree, result)
    except TuningFailed as error:
        raise Failure(f"{installed.name} could not be tuned: {error}") from None
    print_json(result) if as_json else show(result)
    if not result.kept:
        raise Failure(
            f"this machine was busy, so nothing was kept: the same step took times that lie {result.spread:.0%} apart, "
            f"and other processes had {result.others:.0%} of the cores' time",
            "close other programs and try again, or use --force",
        )


def measure(
    spec: Mapping[str, object], tree: Config, *, quick: bool, on_progress: Callable[[float], None]
) -> list[_Round]:
    """Time the model under each waiting policy in turns. Raises `TuningFailed`."""
    # Elsewhere the bindings are not built with the OpenMP library that knows this setting.
    spin_counts: tuple[int | None, ...] = _SPIN_COUNTS if sys.platform == "linux" else (None,)
    turns = [spin_count for _ in range(_ROUNDS) for spin_count in (spin_counts[:1] if quick else spin_counts)]
    budget_s = _QUICK_S if quick else _THOROUGH_S
    task = {"type": "measure", "spec": spec, "budget_s": budget_s}
    timeout_s = tree.engine.load_timeout_s + 10 * budget_s
    rounds = []
    for number, spin_count in enumerate(turns):

        def shown(share: float, number: int = number) -> None:
            on_progress((number + share) / len(turns))

        line = _ask(task, spin_count, timeout_s, shown)
        timings = {(each.threads, each.rows, each.cells): each.seconds for each in line.timings}
        rounds.append(_Round(spin_count, timings, line.spread, line.others))
        shown(1.0)
    return rounds


def judge(model: str, rounds: Sequence[_Round], *, force: bool) -> Result:
    """Compare the policies and merge the rounds of the best; `kept` says whether the result is worth keeping."""
    default = rounds[0].spin_count
    merged = {each.spin_count: _merged(rounds, each.spin_count) for each in rounds}
    relative = {spins: _relative(timings, merged[default]) for spins, timings in merged.items()}
    best = min(relative, key=lambda spins: relative[spins])
    if relative[best] > _WORTH_A_CHANGE:
        best = default
    chosen = [each for each in rounds if each.spin_count == best]
    between = [
        max(same) / min(same) - 1
        for step in merged[best]
        if len(same := [each.timings[step] for each in chosen if step in each.timings]) > 1
    ]
    spread = max(median(between or [0.0]), *(each.spread for each in chosen))
    others = max(each.others for each in rounds)
    timings = (Timing(*step, seconds) for step, seconds in sorted(merged[best].items()))
    return Result(
        model=model,
        spin_count=best,
        relative={spins: share for spins, share in relative.items() if spins is not None},
        spread=spread,
        others=others,
        kept=force or (spread <= MOST_SPREAD and others <= MOST_OTHERS),
        timings=tuple(timings),
    )


def _merged(rounds: Sequence[_Round], spin_count: int | None) -> dict[tuple[int, int, int], float]:
    """Each step's fastest round: whatever else ran here can only have made a step slower."""
    merged: dict[tuple[int, int, int], float] = {}
    for each in rounds:
        if each.spin_count == spin_count:
            for step, seconds in each.timings.items():
                merged[step] = min(seconds, merged.get(step, math.inf))
    return merged


def _relative(timings: Mapping[tuple[int, int, int], float], default: Mapping[tuple[int, int, int], float]) -> float:
    """The geometric mean over batch sizes of how much longer the best thread count takes than the default's best."""
    mine, others = _best(timings), _best(default)
    shares = [math.log(mine[rows] / others[rows]) for rows in mine.keys() & others.keys()]
    return math.exp(sum(shares) / len(shares))


def _best(timings: Mapping[tuple[int, int, int], float]) -> dict[int, float]:
    """Seconds of the best thread count for each batch size, with an empty memory."""
    empty = _fewest_cells((rows, cells) for _, rows, cells in timings)
    best: dict[int, float] = {}
    for (_, rows, cells), seconds in timings.items():
        if cells == empty[rows]:
            best[rows] = min(seconds, best.get(rows, math.inf))
    return best


def _fewest_cells(timed: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Of (rows, cells): the fewest cells for each number of rows, which are what an empty memory gives them."""
    fewest: dict[int, int] = {}
    for rows, cells in timed:
        fewest[rows] = min(cells, fewest.get(rows, cells))
    return fewest


def _keep(spec: Mapping[str, object], tree: Config, result: Result) -> None:
    # After a quick measurement nothing is known of other policies: what an earlier one stored stays.
    spin_count = result.spin_count if len(result.relative) > 1 else None
    task = {
        "type": "keep",
        "spec": spec,
        "timings": result.timings,
        "spread": result.spread,
        "spin_count": spin_count,
    }
    _ask(task, None, _STORE_TIMEOUT_S, lambda share: None)


def _ask(
    task: Mapping[str, object], spin_count: int | None, timeout_s: float, on_progress: Callable[[float], None]
) -> Line:
    """Give the child a task under a waiting policy; its last line. Raises `TuningFailed`."""
    from ocserve import config

    environment = config.engine_environment() | {"GGML_NO_BACKTRACE": "1"}
    if spin_count is not None:
        environment["GOMP_SPINCOUNT"] = str(spin_count)
    line = Line()
    with subprocess.Popen(
        ARGV, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        limit = threading.Timer(timeout_s, child.kill)
        limit.start()
        try:
            child.stdin.write(msgspec.json.encode(task))
            child.stdin.close()
            for text in child.stdout:
                line = msgspec.json.decode(text, type=Line)
                if line.share is not None:
                    on_progress(line.share)
        except BrokenPipeError:
            child.kill()
        except msgspec.MsgspecError:
            child.kill()
            raise TuningFailed("the measuring process said something that is not a measurement") from None
        finally:
            limit.cancel()
    if line.error is not None:
        raise TuningFailed(line.error)
    if child.returncode != 0:
        raise TuningFailed(f"the measuring process ended with status {child.returncode}")
    return line


def show(result: Result) -> None:
    """A table of rows × threads, the best of each size marked, and what follows from it."""
    from ocserve.cli.model_output import print_table

    empty = _fewest_cells((timing.rows, timing.cells) for timing in result.timings)
    shallow = [timing for timing in result.timings if timing.cells == empty[timing.rows]]
    seconds = {(timing.rows, timing.threads): timing.seconds for timing in shallow}
    counts = sorted({timing.threads for timing in shallow})
    table = []
    for rows in sorted({timing.rows for timing in shallow}):
        best = min(seconds[rows, threads] for threads in counts if (rows, threads) in seconds)
        cells = []
        for threads in counts:
            took = seconds.get((rows, threads))
            mark = "*" if took == best else ""
            cells.append("" if took is None else f"{1000 * took:.1f} ms  {rows / took:.0f}/s{mark}")
        table.append((str(rows), *cells))
    print_table(("rows", *(f"{threads} {'thread' if threads == 1 else 'threads'}" for threads in counts)), table)
    for spins, share in sorted(result.relative.items()):
        mark = "*" if spins == result.spin_count else " "
        click.echo(f"waiting policy {spins:>7} spins{mark} {share:.2f} of the default's time")
    click.echo(f"timings lie {result.spread:.0%} apart; other processes had {result.others:.0%} of the cores' time")
    click.echo("kept for `ocserve run`" if result.kept else "not kept")
