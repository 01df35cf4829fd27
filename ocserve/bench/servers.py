"""Own servers for a measurement: `ocserve run` as a child process on a free port, with a cache of its own."""

from __future__ import annotations

import json
import re
import select
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from ocserve import config

_READY = re.compile(r"ready: (http://\S+)")
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*=")
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0


class ServerFailed(Exception):
    """A server did not become ready; the text ends with the last line of its log."""


class OwnServer:
    """One `ocserve run`. `words` are its arguments, with NAME=VALUE settings before them: `OCSERVE_… smollm2:135m`.

    `folder` keeps its log and, across restarts, its cache: another server's prefixes must not help it.
    """

    def __init__(self, words: str, folder: Path, variables: Mapping[str, str] | None = None) -> None:
        arguments = shlex.split(words)
        count = next((i for i, word in enumerate(arguments) if not _VARIABLE.match(word)), len(arguments))
        settings = dict(word.split("=", 1) for word in arguments[:count])
        folder.mkdir(parents=True, exist_ok=True)
        alone = {"OCSERVE_MODEL_SERVE_INSTALLED": "false"}  # it serves what is named, whatever the store has
        self._variables = {"OCSERVE_CACHE_DIRECTORY": str(folder / "cache"), **alone, **(variables or {}), **settings}
        self._arguments = arguments[count:]
        self._log = folder / "server.log"
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self) -> None:
        """Start it and wait until it is ready. Raises `ServerFailed`."""
        assert self._process is None
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ocserve", "run", *self._arguments, "--port", str(self._port)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=config.child_environment(self._variables),
            )
        self.url = self._ready_line(self._process)
        self._port = int(self.url.removesuffix("/v1").rpartition(":")[2])

    def _ready_line(self, process: subprocess.Popen[bytes]) -> str:
        assert process.stdout is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            readable, _, _ = select.select([process.stdout], [], [], 0.5)
            if readable:
                line = process.stdout.readline().decode()
                if match := _READY.search(line):
                    return match.group(1)
                if not line:
                    break
        self.stop()
        *_, last = self._log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise ServerFailed(f"`ocserve run {shlex.join(self._arguments)}` did not become ready: {last}")

    def cells(self, key: str | None) -> int:
        """How many cells its KV cache has; strangers are not told. Raises `ServerFailed`."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        request = urllib.request.Request(self.url.removesuffix("/v1") + "/health", headers=headers)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
                return int(json.load(answer)["stats"]["cells_total"])
        except (OSError, ValueError, KeyError) as error:
            raise ServerFailed(f"{self.url} does not say how large its KV cache is ({type(error).__name__})") from None

    def stop(self) -> None:
        """End it; twice is harmless."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()

    def restart(self) -> None:
        """End it and start it again at the same address. Raises `ServerFailed`."""
        self.stop()
        self.start()


def restart_by_command(command: str, url: str) -> None:
    """Run the operator's command in a shell and wait until `url` answers. Raises `ServerFailed`."""
    finished = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, capture_output=True, check=False)  # noqa: S602 -- the operator's own words
    if finished.returncode != 0:
        raise ServerFailed(f"the restart command ended with status {finished.returncode}")
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/models", timeout=5):  # noqa: S310 -- the operator's own address
                return
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):  # it is there, and wants a key
                return
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise ServerFailed(f"{url} did not come back after the restart command")
        time.sleep(0.1)
