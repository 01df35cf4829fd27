"""Server processes for the proofs, forked from one that has read the code, so that a start costs little."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.http.serve_scripted"])


def _serve(options: dict[str, Any], told: Connection, log: str | None) -> None:
    from tests.http.serve_scripted import run

    def end_with_the_test() -> None:
        with suppress(EOFError, OSError):
            told.recv()  # nothing is ever sent: this ends when the test's process does, however it was ended
        os._exit(1)

    threading.Thread(target=end_with_the_test, daemon=True).start()
    descriptor = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, sys.stderr.fileno())
    run(options, told.send)


@dataclass(frozen=True)
class Server:
    """A server process of `tests.http.serve_scripted`."""

    process: Any
    port: int
    told: Connection

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def report(self) -> dict[str, int]:
        """What its event loop says of itself."""
        self.signal(signal.SIGUSR1)
        assert self.told.poll(30)
        found: dict[str, int] = json.loads(self.told.recv())
        return found

    def engine(self) -> psutil.Process:
        """Its engine process; `IndexError` while there is none."""
        return psutil.Process(self.pid).children()[0]


def ended(process: psutil.Process) -> bool:
    """Whether a process has ended, even if nobody has asked for its status."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@contextmanager
def server(log: Path | None = None, **options: Any) -> Iterator[Server]:
    """A process that serves, and its port; `options` are those of `tests.http.serve_scripted`."""
    ours, theirs = _FORKS.Pipe()
    process = _FORKS.Process(target=_serve, args=(options, theirs, str(log) if log else None))
    process.start()
    theirs.close()
    try:
        assert ours.poll(60)
        yield Server(process, int(ours.recv()), ours)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.join(10)
        ours.close()
