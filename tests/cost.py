"""What work costs, said so that a test need not know how fast or how busy the machine is."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

ROUNDS = 5


def growth(work: Callable[[int], object], size: int, factor: int) -> float:
    """How many times as much processor time `work` takes at `factor * size` as at `size`: `factor` if it is linear,
    its square if it is quadratic. The least of a few rounds counts, without the collector, which looks at everything
    that the tests before left behind."""
    gc.collect()
    gc.disable()
    try:
        return min(_cost(work, size * factor) for _ in range(ROUNDS)) / min(_cost(work, size) for _ in range(ROUNDS))
    finally:
        gc.enable()


def _cost(work: Callable[[int], object], size: int) -> float:
    begun = time.process_time()
    work(size)
    return time.process_time() - begun


def idle_share() -> float:
    """The share of one processor that this process uses while the test waits: the least of three seconds, for
    something may stir that has nothing to do with it."""
    return min(_cost(time.sleep, 1) for _ in range(3))


def peak_bytes(work: Callable[[], object]) -> int:
    """How much memory this process has at most, while it does some work, beyond what it had before (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest so far: proc(5)
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
