"""P8: a stop at any moment ends every accepted stream properly and the process on time, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.accounts.books import rows
from tests.catalog.fake_hub import serving as serving_hub
from tests.catalog.test_pull_from_hub import model_file
from tests.http.harness import wait_for
from tests.promises.servers import ended, server
from tests.promises.streams import Ending, ask

STREAMS = 50
# How long the drain may take, and whether a second signal ends it early. Streams last about 0.5 s.
WAYS = {"patient": (10.0, False), "deadline": (0.1, False), "twice": (10.0, True)}


async def streams_stopped(
    port: int, pid: int, run: int, second: bool, chance: random.Random
) -> tuple[list[Ending], float]:
    """The endings of all streams, and the moment of the signal that counts."""
    asked = [
        asyncio.create_task(ask(port, f"emit {chance.randint(1, 25)} every 0.02", f"run{run}-{index}"))
        for index in range(STREAMS)
    ]
    await asyncio.sleep(chance.uniform(0.0, 0.4))
    os.kill(pid, signal.SIGTERM)
    told = time.monotonic()
    if second:
        await asyncio.sleep(chance.uniform(0.0, 0.2))
        os.kill(pid, signal.SIGTERM)
        told = time.monotonic()
    return list(await asyncio.gather(*asked)), told


def stop_one(file: Path, run: int, way: str, chance: random.Random) -> tuple[list[Ending], float]:
    """The endings, and how long the process took to end after the last of them or after its deadline."""
    drain_s, second = WAYS[way]
    with server(worker=2.0, ledger=str(file), server={"drain_s": drain_s}) as served:
        engine = served.engine()
        endings, told = asyncio.run(streams_stopped(served.port, served.pid, run, second, chance))
        served.process.join(15)
        due = max(ending.ended for ending in endings) if way == "patient" else told + drain_s * (not second)
        late = time.monotonic() - due
        assert served.process.exitcode == 0
        wait_for(lambda: ended(engine), 1)
    return endings, late


@pytest.mark.parametrize("way", WAYS)
def test_p8_every_accepted_stream_ends_as_it_should(tmp_path: Path, full: bool, way: str) -> None:
    """60 SIGTERMs each way under 50 streams, half of them before all had arrived."""
    chance = random.Random(8)
    if not full and way != "deadline":
        pytest.skip("seconds; with --full")
    stops = 60 if full else 1
    file = tmp_path / "ledger.db"
    stopped = [stop_one(file, run, way, chance) for run in range(stops)]
    endings = [ending for found, _ in stopped for ending in found]
    slowest = max(late for _, late in stopped)
    # At its deadline a server gives streams 1 s for their last words, and then its engine 2 s to end by itself.
    assert slowest < (3.5 if way == "deadline" else 1.0)
    accepted = [ending for ending in endings if ending.status == 200]
    assert all(ending.structured for ending in accepted)
    assert {ending.error for ending in accepted} <= {None, "shutting_down"}
    if way == "patient":
        assert {ending.error for ending in accepted} == {None}
    refused = [ending for ending in endings if ending.status not in (0, 200)]  # 0: it came when nobody listened
    assert {(ending.status, ending.error) for ending in refused} <= {(503, "shutting_down")}
    by_id = {row.request_id: row for row in rows(file)}
    for ending in accepted:
        row = by_id[ending.request_id]
        assert row.outcome == ("completed" if ending.error is None else "failed")
        assert row.completion_tokens == ending.deltas
    assert len(accepted) > len(endings) / 4
    cut = sum(ending.error is not None for ending in accepted)
    print(
        f"P8 {way}: {stops} SIGTERMs, {len(accepted)} streams accepted, {cut} cut with an error event, 0 broken; "
        f"ended at most {slowest:.2f} s late"
    )


COMMAND = [sys.executable, "-m", "ocserve", "run"]


def end_at(command: list[str], environment: dict[str, str], after_s: float) -> tuple[float, bytes, int | None]:
    """Start a command, send SIGTERM and return how long it then took, what it had said and its status."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    time.sleep(after_s)
    before = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    _, said = process.communicate(timeout=20)
    took = time.monotonic() - told
    wait_for(lambda: all(ended(child) for child in before), 15)  # one that still reads its code finds nobody there
    return took, said, process.returncode


def test_p8_a_stop_during_a_load_leaves_nothing(tiny_model: Path, tmp_path: Path, full: bool) -> None:
    """20 SIGTERMs at any time from the start of the process."""
    if not full:
        pytest.skip("seconds; with --full")
    chance = random.Random(88)
    environment = {**os.environ, "OCSERVE_CACHE_DIRECTORY": str(tmp_path)}
    slowest = 0.0
    for _ in range(20):
        command = [*COMMAND, str(tiny_model), "--port", "0"]
        took, said, status = end_at(command, environment, chance.uniform(0.2, 2.5))
        assert b"Traceback" not in said, said.decode()
        assert status in (0, -signal.SIGTERM, 128 + signal.SIGTERM), status
        slowest = max(slowest, took)
    print(f"P8 load: ended {slowest:.2f} s after the signal at most")
    assert slowest < 1.0


def test_p8_a_stop_during_a_download_leaves_what_goes_on(tmp_path: Path, full: bool) -> None:
    """10 SIGTERMs under `ocserve run` of a model that is being fetched."""
    if not full:
        pytest.skip("seconds; with --full")
    content = model_file(tmp_path, 16)
    with serving_hub({"acme/bulk-GGUF": {"bulk-F32.gguf": content}}) as hub:
        environment = {
            **os.environ,
            "OCSERVE_STORE_DIRECTORY": str(tmp_path / "models"),
            "OCSERVE_STORE_HUB_ENDPOINT": hub.host,
            "OCSERVE_STORE_RESERVE_BYTES": "1024",
        }
        slowest = 0.0
        for _ in range(10):
            hub.faults.bytes_per_s = 0.5e6
            before = len(hub.sent)
            process = subprocess.Popen(
                [*COMMAND, "hf:acme/bulk-GGUF:F32", "--port", "0"],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            wait_for(lambda before=before: len(hub.sent) > before, 20)  # type: ignore[misc]
            process.send_signal(signal.SIGTERM)
            told = time.monotonic()
            _, said = process.communicate(timeout=20)
            slowest = max(slowest, time.monotonic() - told)
            assert b"Traceback" not in said, said.decode()
        hub.faults.bytes_per_s = 0
        already = sum(sent.count for sent in hub.sent)
        pull = [sys.executable, "-m", "ocserve", "pull", "hf:acme/bulk-GGUF:F32"]
        assert subprocess.run(pull, env=environment, capture_output=True, timeout=60).returncode == 0
        assert sum(sent.count for sent in hub.sent) <= len(content) + already
    (file,) = (tmp_path / "models").rglob("bulk-F32.gguf")
    assert file.read_bytes() == content
    print(f"P8 download: ended {slowest:.2f} s after the signal at most")
    assert slowest < 1.0
