"""What the front process costs beside the model: memory, idle CPU, time to start. Ceilings of times are tenfold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import openai
import psutil

from ocserve import app, config
from ocserve.catalog.store import Store
from tests.e2e.daemon import RunningDaemon, daemon

RESIDENT_BYTES = 120_000_000
OVERHEAD_BYTES = 100_000_000
IDLE_SHARE = 0.005  # of one core
START_CPU_S = 0.6

# What downloads, renders templates or computes has no business in a front process whose model is installed.
FOREIGN = {
    "prometheus_client",
    "huggingface_hub",
    "httpx",
    "httpx2",
    "httpcore",
    "requests",
    "jinja2",
    "numpy",
    "llama_cpp",
    "tqdm",
    "yaml",
}

LIST_MODULES = """
import json, sys
from ocserve import app, cli
async def serve(settings, models, on_ready, spare, reread):
    async with app.running(settings, models, spare):
        print(json.dumps(sorted(sys.modules)))
app.serve = serve
cli.main()
"""

# The engine process reads its own code for as long as the front reads these.
LATER = {"starlette", "uvicorn", "structlog", "ocserve.app", "ocserve.service", "ocserve.catalog.store"}
LIST_AT_SPAWN = """
import json, sys
from ocserve import cli
from ocserve.engine import process
spawn, loaded = process.spawn, []
async def listing(argv, environment):
    loaded.append(sorted(sys.modules))
    return await spawn(argv, environment)
process.spawn = listing
from ocserve.cli import run
run._announce = lambda daemon, url: (print(json.dumps(loaded)), signal.raise_signal(signal.SIGTERM))
import signal
cli.main()
"""


def cpu_s(*processes: psutil.Process) -> float:
    return sum(process.cpu_times().user + process.cpu_times().system for process in processes)


def ask(running: RunningDaemon, text: str) -> None:
    with openai.OpenAI(base_url=running.base_url, api_key="anything") as client:
        client.chat.completions.create(model="default", messages=[{"role": "user", "content": text}], max_tokens=8)


def test_the_front_process_is_small(server: RunningDaemon) -> None:
    resident = psutil.Process(server.process.pid).memory_info().rss
    print(f"front process: {resident / 1e6:.0f} MB resident")
    assert resident < RESIDENT_BYTES


def test_the_engine_process_takes_little_beside_what_llama_takes(smollm2: Path, model_cache: Path) -> None:
    """Model, KV cells and llama.cpp's buffers are what a process that has nothing else needs for the same context."""
    tree = config.load(flags={"store.directory": model_cache}).config
    installed = Store(tree.store).find("smollm2:135m")
    assert installed is not None
    spec = app.engine_spec(tree.engine, config.Cache(disk_bytes=0), installed, app.plan_here(tree, installed))
    command = [sys.executable, "-m", "tests.e2e.bare_memory", msgspec.json.encode(spec).decode()]
    bare = int(subprocess.run(command, capture_output=True, check=True, timeout=120).stdout)
    with daemon("smollm2:135m", store=model_cache) as running:
        ask(running, "word " * 600)
        engine = psutil.Process(running.engine_pid()).memory_info().rss
    print(f"engine process: {engine / 1e6:.0f} MB resident, llama.cpp alone {bare / 1e6:.0f} MB")
    assert bare > 100_000_000
    assert engine - bare < OVERHEAD_BYTES


def test_idle_costs_no_cpu(server: RunningDaemon, full: bool) -> None:
    processes = [psutil.Process(server.process.pid), psutil.Process(server.engine_pid())]
    time.sleep(0.5)
    seconds = 30.0 if full else 3.0
    before = cpu_s(*processes)
    time.sleep(seconds)
    share = (cpu_s(*processes) - before) / seconds
    print(f"idle: {share:.2%} of a core")
    assert share < IDLE_SHARE * (2 if full else 10)


def test_the_front_process_starts_quickly(tiny_model: Path, full: bool) -> None:
    used = []
    for _ in range(3 if full else 1):
        with daemon(str(tiny_model)) as small:
            used.append(cpu_s(psutil.Process(small.process.pid)))
    print(f"front process: {min(used):.2f} s of CPU time up to the ready line")
    assert min(used) < START_CPU_S * (1 if full else 10)


def test_the_serving_front_process_has_loaded_nothing_that_it_does_not_need(smollm2: Path, model_cache: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIST_MODULES, "run", "smollm2:135m", "--port", "0"],
        env={**os.environ, "OCSERVE_STORE_DIRECTORY": str(model_cache)},
        capture_output=True,
        check=True,
        timeout=120,
    )
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert {"starlette", "uvicorn", "msgspec"} <= loaded  # the list is the right one
    assert not loaded & FOREIGN


def test_the_engine_process_is_started_before_the_front_has_loaded_what_it_serves_with(tiny_model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIST_AT_SPAWN, "run", str(tiny_model), "--port", "0"],
        capture_output=True,
        check=True,
        timeout=120,
    )
    (at_spawn,) = json.loads(done.stdout)  # the one process is the one that serves
    assert "ocserve.engine.process" in at_spawn
    assert not LATER & {*at_spawn}
