"""What differs between operating systems: starting an engine process with one end of a socket pair, and confining it.

POSIX passes the descriptor; Windows duplicates the socket into the child through its standard input. Limits and the
parent-death signal exist where the system has them; everywhere an orphaned engine ends on end-of-file of its socket.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import TYPE_CHECKING

from ocserve.machine import usable_cores as usable_cores

if TYPE_CHECKING:
    from asyncio.subprocess import Process

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_MOST_DESCRIPTORS = 16_384
_OOM_SCORE = "500"  # under memory pressure the kernel ends the engine, not the front process

# libgomp's threads spin at barriers. When another process takes a core, unbounded spinning turned a step of 10 ms into
# seconds here; with a short spin and then sleep the same step took 30 ms. No debugger is started on an abort: the front
# is told by the exit status, and a backtrace would take longer than the restart.
# NumPy's library for linear algebra, of which nothing is used, would start threads that spin too.
# What one thread allocates another frees here, which leaves glibc's arenas, one for each thread, ever larger.
_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "1000",
    "GGML_NO_BACKTRACE": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}

FROM_STDIN = "stdin"
WORKER = (sys.executable, "-m", "ocserve.engine.worker")


async def spawn(argv: Sequence[str], environment: Mapping[str, str]) -> tuple[Process, socket.socket]:
    """Start `argv` plus two arguments, our process id and where `inherited_socket` finds its end; returns our end."""
    import asyncio  # the engine process, which this module is for too, starts sooner without

    environment = {**_ENVIRONMENT, **environment}
    ours, theirs = socket.socketpair()
    try:
        if sys.platform == "win32":
            process = await asyncio.create_subprocess_exec(
                *argv, str(os.getpid()), FROM_STDIN, stdin=PIPE, stdout=DEVNULL, stderr=PIPE, env=environment
            )
            assert process.stdin is not None
            process.stdin.write(theirs.share(process.pid))
            process.stdin.close()
        else:
            process = await asyncio.create_subprocess_exec(
                *argv,
                str(os.getpid()),
                str(theirs.fileno()),
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=PIPE,
                env=environment,
                pass_fds=(theirs.fileno(),),
            )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return process, ours


class Spare:
    """An engine process that nobody has told yet what to load: it reads its code meanwhile. It serves once."""

    def __init__(self, process: Process, connection: socket.socket) -> None:
        self._process = process
        self._connection = connection
        self._taken = False

    @classmethod
    async def start(cls, environment: Mapping[str, str], argv: Sequence[str] = WORKER) -> Spare:
        """Start one. Raises `OSError`."""
        return cls(*await spawn(argv, environment))

    def take(self) -> tuple[Process, socket.socket] | None:
        """What `spawn` returned, for whom it is from now on; None where it is somebody's already."""
        if self._taken:
            return None
        self._taken = True
        return self._process, self._connection

    async def close(self) -> None:
        """End the process if nobody took it."""
        if self.take() is not None:
            self._connection.close()
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


def inherited_socket(argument: str) -> socket.socket:
    """The child's end, from the argument that `spawn` added."""
    if argument == FROM_STDIN:
        if sys.platform != "win32":
            raise ValueError("a shared socket on standard input exists on Windows only")
        return socket.fromshare(sys.stdin.buffer.read())
    return socket.socket(fileno=int(argument))


def confine(parent: int) -> None:
    """Make this process a good engine: no core file, killed with its parent, first to go when memory runs out.

    Interrupt and termination are the front's to act on: a terminal sends them to the whole group, and the engine has to
    go on while accepted requests are drained. `parent` is the front's process id: had it died before the signal was
    asked for, nobody would send it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(0)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
        with contextlib.suppress(OSError):  # not allowed in some containers, and only advice to the kernel
            Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)


def raise_descriptor_limit() -> None:
    """Let this process hold as many connections as the system allows it; the usual soft limit is 1,024 files."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = min(hard, _MOST_DESCRIPTORS) if hard != resource.RLIM_INFINITY else _MOST_DESCRIPTORS
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with contextlib.suppress(ValueError, OSError):  # macOS refuses more than its own maximum
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def gpu_makers(root: Path = Path("/")) -> tuple[str, ...]:
    """Makers of the GPUs whose drivers are loaded, whether or not this build of llama.cpp can use them."""
    found = []
    if (root / "proc/driver/nvidia/version").exists() or (root / "dev/nvidia0").exists():
        found.append("NVIDIA")
    if (root / "dev/kfd").exists():
        found.append("AMD")
    if sys.platform == "darwin" and platform.machine() == "arm64":
        found.append("Apple")
    return tuple(found)
