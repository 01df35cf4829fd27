"""Starts the real `ocserve run` in a process of its own, as a user would, and waits for its ready line."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

_READY = re.compile(r"ready: (http://\S+)")
_START_TIMEOUT_S = 120.0


@dataclass
class RunningDaemon:
    """A server process that answers requests; `base_url` ends in /v1."""

    process: subprocess.Popen[bytes]
    base_url: str
    log: Path

    @property
    def root(self) -> str:
        return self.base_url.removesuffix("/v1")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.root + path, timeout=30) as answer:
            return json.load(answer)

    def health(self) -> Any:
        return self.get("/health")

    def engine_pid(self) -> int:
        """The engine process: the daemon's only child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1, children
        return int(children[0])


def wait_until(holds: Callable[[], object], seconds: float = 30.0) -> None:
    """Ask again and again until it holds: counters travel with heartbeats, and a busy machine takes its time."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.05)


@contextmanager
def daemon(
    *arguments: str, env: dict[str, str] | None = None, store: Path | None = None, stop_timeout_s: float = 40.0
) -> Iterator[RunningDaemon]:
    """Run `ocserve run … --port 0`, with the models of `store`; standard error goes to a file, as a service's would."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "stderr.log"
        # Profiles stay, so that not every start measures; prefixes do not, so that runs do not help each other.
        cache = {"OCSERVE_CACHE_DIRECTORY": str(user_cache_path("ocserve-tests")), "OCSERVE_CACHE_DISK_BYTES": "0"}
        keys = {"OCSERVE_AUTH_KEYS_FILE": str(Path(folder) / "keys.json")}  # whoever runs the tests may have some
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **cache, **keys, **(env or {})}
        if store is not None:
            environment["OCSERVE_STORE_DIRECTORY"] = str(store)
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "ocserve", "run", *arguments, "--port", "0"],
                stdout=subprocess.PIPE,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                env=environment,
            )
            try:
                yield RunningDaemon(process, _wait_ready(process, log) + "/v1", log)
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    try:
                        process.wait(stop_timeout_s)
                    finally:
                        process.kill()
                        process.wait()
                assert process.stdout is not None
                process.stdout.close()


def _wait_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    assert process.stdout is not None
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        readable, _, _ = select.select([process.stdout], [], [], 0.5)
        if readable:
            line = process.stdout.readline().decode()
            if match := _READY.search(line):
                return match.group(1).removesuffix("/v1")
            if not line:
                break
    raise AssertionError(f"the daemon did not become ready:\n{log.read_text()[-4000:]}")
