"""Locks between processes, one file each. The operating system drops a lock when its holder dies, however it dies."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

POLL_S = 0.1

if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _try_share(descriptor: int) -> bool:
        """Windows has no shared lock, and needs none here: a file that a process has open cannot be deleted."""
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _try_share(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks: using a model must not fail for it
            return True
        return True


@contextmanager
def exclusive(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock at `path`, calling `on_wait` once if another process has it.

    The lock file stays: removing it would let two processes hold locks on two files of one name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if not _try_lock(descriptor):
            on_wait()
            while not _try_lock(descriptor):
                time.sleep(POLL_S)
        yield
    finally:
        os.close(descriptor)


def shared(path: Path) -> AbstractContextManager[bool]:
    """Hold the lock at `path` beside others that share it; False where another holds it alone."""
    return _held(path, _try_share)


def alone(path: Path) -> AbstractContextManager[bool]:
    """Hold the lock at `path` alone, without waiting; False where another holds or shares it."""
    return _held(path, _try_lock)


@contextmanager
def _held(path: Path, try_lock: Callable[[int], bool]) -> Iterator[bool]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:  # a store that this process may only read is served all the same
        yield True
        return
    try:
        yield try_lock(descriptor)
    finally:
        os.close(descriptor)
