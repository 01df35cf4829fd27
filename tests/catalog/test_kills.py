"""`ocserve pull` survives being killed at any time: the file ends up right, and little of it is fetched twice."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.catalog.fake_hub import FakeHub, serving
from tests.catalog.test_pull_from_hub import model_file

REPO = "acme/bulk-GGUF"
REFERENCE = f"hf:{REPO}:F32"
MOST_REFETCHED = 16 * 1024 * 1024
COMMAND = [sys.executable, "-c", "from ocserve.cli import main; main()", "pull", REFERENCE, "--json"]


def environment(hub: FakeHub, home: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "OCSERVE_STORE_DIRECTORY": str(home / "models"),
        "OCSERVE_STORE_HUB_ENDPOINT": hub.host,
        "OCSERVE_STORE_RESERVE_BYTES": "1024",
    }


def start(hub: FakeHub, home: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        COMMAND, env=environment(hub, home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def kill_somewhere(process: subprocess.Popen[bytes], hub: FakeHub, chance: random.Random) -> bool:
    """Kill -9 at a random time: in one of four anywhere in the process's life, else while bytes flow."""
    before = len(hub.sent)
    if chance.random() < 0.25:
        time.sleep(chance.uniform(0.0, 1.0))
    else:
        deadline = time.monotonic() + 30
        while len(hub.sent) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.3))
    alive = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL) if alive else None
    process.communicate()
    return alive


def refetched(hub: FakeHub) -> list[int]:
    """Per new answer, how many bytes it repeated of what had been put into a socket before."""
    high, repeated = 0, []
    for sent in hub.sent:
        repeated.append(max(0, high - sent.start))
        high = max(high, sent.start + sent.count)
    return repeated


def test_random_kills_and_wrong_bytes_cost_at_most_16_mib_each(tmp_path: Path, full: bool) -> None:
    """100 kills (12 in the short form) of the real command, then one run with wrong bytes, then the finish."""
    kills = 100 if full else 12
    content = model_file(tmp_path, 64)
    chance = random.Random(25)
    began = time.monotonic()
    with serving({REPO: {"bulk-F32.gguf": content}}) as hub:
        # A killed pull had bytes flowing for 0.16 s on average; the kills are to span most of the file and not end it.
        hub.faults.bytes_per_s = len(content) * 0.6 / (kills * 0.16)
        killed = sum(kill_somewhere(start(hub, tmp_path), hub, chance) for _ in range(kills))
        hub.faults.bytes_per_s = 0
        starts_before_wrong_bytes = len(hub.sent)
        repeated = refetched(hub)
        hub.faults.wrong_bytes_left = 1
        process = start(hub, tmp_path)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err.decode()
        repeated += refetched(hub)[starts_before_wrong_bytes : starts_before_wrong_bytes + 1]
    result = json.loads(out.splitlines()[-1])
    path = Path(result["model"]["path"])
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    print(
        f"{killed} of {kills} kills hit, most fetched again after one {max(repeated) / 2**20:.2f} MiB, "
        f"in all {sum(repeated) / 2**20:.1f} MiB of {len(content) / 2**20:.0f}, {time.monotonic() - began:.0f} s"
    )
    assert sha256 == hashlib.sha256(content).hexdigest() == result["model"]["sha256"]
    assert killed >= kills * 0.9
    assert max(repeated) <= MOST_REFETCHED
    assert [each.name for each in path.parent.iterdir() if each.name != path.name] == ["manifest.json"]


def test_two_processes_pull_one_model_once(tmp_path: Path) -> None:
    content = model_file(tmp_path, 16)
    with serving({REPO: {"bulk-F32.gguf": content}}) as hub:
        hub.faults.bytes_per_s = 8e6
        processes = [start(hub, tmp_path) for _ in range(2)]
        outputs = [process.communicate(timeout=120) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        assert sum(sent.count for sent in hub.sent) == len(content)
    assert sum(b'"waiting"' in out for out, _ in outputs) == 1


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    content = model_file(tmp_path, 8)
    with serving({REPO: {"bulk-F32.gguf": content}}) as hub:
        hub.faults.bytes_per_s = 2e6
        first = start(hub, tmp_path)
        while not hub.sent:
            time.sleep(0.01)
        second = start(hub, tmp_path)
        time.sleep(1.0)
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
        hub.faults.bytes_per_s = 0
        out, err = second.communicate(timeout=60)
    assert second.returncode == 0, err.decode()
    assert b'"waiting"' in out
