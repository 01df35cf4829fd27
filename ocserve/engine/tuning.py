"""Measures a model on this machine for `ocserve tune`: `python -m ocserve.engine.tuning`.

One task as JSON on standard input, JSON lines on standard output. `Measure` loads the model and times it under the
OpenMP settings that this process was started with: `{"share": 0.3}` while it runs, then a `Measurement`. `Keep` stores
what was found best. A child process per measurement, because OpenMP reads its settings once, and because a model that
crashes must not take the command with it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from ocserve.engine import llama, profile
from ocserve.engine.bindings import LlamaError
from ocserve.engine.context import Context
from ocserve.engine.costs import Timing, thread_candidates
from ocserve.engine.measure import measure_spec, profile_key
from ocserve.engine.wire import EngineSpec
from ocserve.machine import usable_cores

_POOL_TOKENS = 2048  # the deepest prompt that is timed, with room to grow
_EVERY_COUNT = 8  # up to so many cores every thread count is timed
_PROGRESS_STEP = 0.02


class Measure(msgspec.Struct, frozen=True, tag="measure"):
    """Load the model of `spec` and time it for about `budget_s`."""

    spec: EngineSpec
    budget_s: float


class Keep(msgspec.Struct, frozen=True, tag="keep"):
    """Store `timings` as the profile of `spec`, and the waiting policy under which they were measured, if any."""

    spec: EngineSpec
    timings: tuple[Timing, ...]
    spread: float
    spin_count: int | None


class Failed(msgspec.Struct, frozen=True):
    """The task could not be done."""

    error: str


def measure(task: Measure) -> None:
    """Print progress and the measurement. Raises `LlamaError`."""
    spec, cores = task.spec, usable_cores()
    log = llama.LoadLog()
    model = llama.Model(spec.path, gpu_layers=spec.gpu_layers, log=log)
    context = Context(
        model,
        pool_tokens=max(_POOL_TOKENS, spec.batch_tokens),
        sequences=spec.parallel,
        batch_tokens=max(spec.batch_tokens, spec.parallel),
        threads=cores,
        kv_type=spec.kv_type,
        flash_attention=spec.flash_attention,
    )
    log.close()
    told = 0.0

    def progress(share: float) -> None:
        nonlocal told
        if share >= told + _PROGRESS_STEP:
            told = share
            _print({"share": share})

    threads = {*thread_candidates(cores), *(range(1, cores + 1) if cores <= _EVERY_COUNT else ())}
    _print(measure_spec(context, model.vocab, spec, sorted(threads), budget_s=task.budget_s, on_progress=progress))


def keep(task: Keep) -> None:
    """Store the profile and the waiting policy. Raises `OSError`."""
    assert task.spec.cache_directory is not None
    directory = Path(task.spec.cache_directory)
    profile.save(directory, profile.Profile(key=profile_key(task.spec), timings=task.timings, spread=task.spread))
    if task.spin_count is not None:
        waiting = profile.Waiting(processor=profile.processor(), cores=usable_cores(), spin_count=task.spin_count)
        profile.save_waiting(directory, waiting)


def _print(value: object) -> None:
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()


def main() -> None:
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Measure | Keep)
    try:
        measure(task) if isinstance(task, Measure) else keep(task)
    except (LlamaError, OSError) as error:
        _print(Failed(error=str(error)))


if __name__ == "__main__":
    main()
