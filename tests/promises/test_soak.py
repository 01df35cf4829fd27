"""P24: a server that has worked for long is as it was: memory, descriptors, tasks, threads, KV cells, latency."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.daemon import daemon, wait_until
from tests.promises.servers import server
from tests.promises.streams import Ending, ask, head
from tests.promises.test_aborts import samples

CLIENTS = 12
SOAK_S = 1800.0
MOST_SLOPE = 5 * 2**20  # bytes for each 100,000 requests
_WARM = 0.1  # of the requests, before anything is compared
_MISTAKES: dict[str, dict[str, Any]] = {
    "decimal_above_max_value": {"temperature": 9},
    "model_not_found": {"model": "nobody"},
    "invalid_type": {"max_tokens": "x"},
    "unknown_parameter": {"nonsense": 1},
}


@dataclass
class Soak:
    """Clients that ask for whatever clients ask for, and what the front process was like meanwhile."""

    port: int
    front: psutil.Process
    chance: random.Random
    asked: int = 0
    seconds: list[float] = field(default_factory=list)  # of whole answers, in order
    memory: list[tuple[int, int]] = field(default_factory=list)  # requests so far, resident bytes
    ends: Counter[str] = field(default_factory=Counter)

    async def run(self, requests: int, most_s: float = math.inf) -> None:
        begun = time.monotonic()

        async def client() -> None:
            while self.asked < requests and time.monotonic() - begun < most_s:
                self.asked += 1
                if self.asked % 10 == 0:
                    self.memory.append((self.asked, self.front.memory_info().rss))
                await self.one(self.asked)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))

    async def one(self, number: int) -> None:
        """Of ten: five streams, three whole answers, an abort and a mistake."""
        kind = self.chance.randrange(10)
        prompt = f"emit {self.chance.randint(1, 8)} {number % 977}"
        if kind == 9:
            self.count(await ask(self.port, prompt, f"r{number}", **self.chance.choice([*_MISTAKES.values()])))
        elif kind == 8:
            await self.abort(f"emit 400 {number % 977}", number)
        else:
            begun = time.monotonic()
            self.count(await ask(self.port, prompt, f"r{number}", stream=kind < 5, max_tokens=8))
            self.seconds.append(time.monotonic() - begun)

    def count(self, ending: Ending) -> None:
        self.ends["broken" if not ending.structured else ending.error or "done"] += 1

    async def abort(self, prompt: str, number: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        body = {"model": "tiny", "prompt": prompt, "stream": True, "max_tokens": 200}
        writer.write(head(body, f"r{number}"))
        await asyncio.sleep(self.chance.uniform(0, 0.05))
        writer.transport.abort()
        self.ends["aborted"] += 1

    def slope(self) -> tuple[float, float]:
        """Bytes of resident memory for each 100,000 requests after the first of them, and half the 95 % interval."""
        points = [point for point in self.memory if point[0] > self.asked * _WARM]
        xs, ys = [x / 100_000 for x, _ in points], [float(y) for _, y in points]
        found = statistics.linear_regression(xs, ys)
        rest = [y - found.slope * x - found.intercept for x, y in zip(xs, ys, strict=True)]
        spread = sum((x - statistics.fmean(xs)) ** 2 for x in xs)
        error = math.sqrt(sum(each**2 for each in rest) / (len(xs) - 2) / spread)
        return found.slope, 1.96 * error

    def drift(self) -> float:
        """The p99 of the last third of the answers over that of the second tenth to the first third."""
        count = len(self.seconds)
        early, late = self.seconds[int(count * _WARM) : count // 3], self.seconds[-count // 3 :]
        return p99(late) / p99(early)


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def standing(process: psutil.Process) -> dict[str, int]:
    """What a leak would add to."""
    children = len(process.children(recursive=True))
    return {"descriptors": process.num_fds(), "threads": process.num_threads(), "children": children}


def told(soak: Soak, took_s: float) -> str:
    slope, error = soak.slope()
    return (
        f"P24: {soak.asked} requests in {took_s:.0f} s ({dict(soak.ends)}): resident memory {slope / 2**20:+.2f} ± "
        f"{error / 2**20:.2f} MiB for each 100,000 requests (from {soak.memory[0][1] / 2**20:.1f} to "
        f"{soak.memory[-1][1] / 2**20:.1f} MiB), p99 of whole answers x{soak.drift():.2f} from early to late"
    )


@pytest.mark.timeout(3600)
def test_p24_a_front_process_is_after_100_000_requests_what_it_was(tmp_path: Path, full: bool) -> None:
    """In short 150 requests; memory is not held against them."""
    requests = 100_000 if full else 150
    file = tmp_path / "ledger.db"
    with server(worker=10.0, ledger=str(file)) as served:
        front = psutil.Process(served.pid)
        asyncio.run(Soak(served.port, front, random.Random(1)).run(40))
        wait_until(lambda: served.report()["tasks"] <= 9)
        before, tasks = standing(front), served.report()["tasks"]
        soak = Soak(served.port, front, random.Random(24))
        begun = time.monotonic()
        asyncio.run(soak.run(requests))
        print(told(soak, time.monotonic() - begun))
        wait_until(lambda: standing(front) == before and served.report()["tasks"] == tasks, 20)
        log = file.with_name("ledger.db-wal").stat().st_size
    print(f"{before}, {tasks} tasks before and after; write-ahead log {log / 2**20:.1f} MiB")
    assert {"done", "aborted"} <= set(soak.ends) <= {"done", "aborted", *_MISTAKES}, soak.ends
    assert not full or len(soak.ends) == 2 + len(_MISTAKES), soak.ends
    assert log <= 8 * 2**20
    if full:
        slope, error = soak.slope()
        assert slope - error <= MOST_SLOPE
        assert soak.drift() < 1.5


@pytest.mark.timeout(3600)
def test_p24_a_real_engine_is_after_30_minutes_what_it_was(tiny_model: Path, tmp_path: Path, full: bool) -> None:
    if not full:
        pytest.skip("half an hour; with --full")
    # The cache in main memory may grow to its bound: here so small that it is full before anything is compared.
    env = {"OCSERVE_LEDGER_DIRECTORY": str(tmp_path), "OCSERVE_CACHE_HOST_BYTES": str(2 * 2**20)}
    with daemon(str(tiny_model), env=env) as running:
        port, front, engine = (
            int(running.root.rpartition(":")[2]),
            psutil.Process(running.process.pid),
            psutil.Process(running.engine_pid()),
        )
        asyncio.run(Soak(port, front, random.Random(1)).run(300))
        before = standing(front), standing(engine)
        soak, native = (Soak(port, each, random.Random(24)) for each in (front, engine))
        begun = time.monotonic()

        async def both() -> None:
            async def look() -> None:
                while True:
                    await asyncio.sleep(1)
                    native.asked = soak.asked
                    native.memory.append((soak.asked, engine.memory_info().rss))

            looking = asyncio.create_task(look())
            await soak.run(10**9, SOAK_S)
            looking.cancel()

        asyncio.run(both())
        print(told(soak, time.monotonic() - begun))
        slope, error = native.slope()
        print("its engine by requests:", *(f"{count}: {size / 2**20:.2f} MiB" for count, size in native.memory[::120]))
        print(f"its engine {slope / 2**20:+.2f} ± {error / 2**20:.2f} MiB for each 100,000 requests")
        wait_until(lambda: (standing(front), standing(engine)) == before, 20)
        wait_until(lambda: (now := samples(running))["ocserve_kv_cells_used"] == now["ocserve_kv_cells_kept"])
    assert "broken" not in soak.ends
    assert soak.slope()[0] - soak.slope()[1] <= MOST_SLOPE
    assert slope - error <= MOST_SLOPE
