"""Files and folders that settings name: opened only where that cannot wait for anybody, and tried without a trace."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

# A FIFO without a writer is opened at once and not when one comes; what is said to a terminal does not make it ours.
_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
_UNNAMED_UNKNOWN = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)  # what file systems without such files answer


def only_regular(path: str, flags: int) -> int:
    """An `opener` for `open`: raises `OSError` for whatever is no regular file after following links.

    From a FIFO, a socket or a device a read may never return, and what holds a thread for ever keeps the process from
    ending. It is judged once it is open, so that none takes the place of what was judged. What is made has mode 0600.
    """
    descriptor = os.open(path, flags | _AT_ONCE, 0o600)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is no regular file", path)


def obstacle_to(file: Path) -> str | None:
    """Why `file` can neither be written nor made, with the folders above it; None where it can."""
    if not os.path.exists(file):
        return obstacle_in(file.parent)
    try:
        os.close(os.open(file, os.O_WRONLY | os.O_APPEND | getattr(os, "O_NONBLOCK", 0)))
    except OSError as error:
        return f"{file} cannot be written: {error.strerror}"
    return None


def obstacle_in(folder: Path) -> str | None:
    """Why nothing can be made in `folder`, itself and those above it included; None where something can.

    It is tried, since rights are not all: a root may write, and there are disks and systems' folders that take nothing.
    """
    existing = next((each for each in (folder, *folder.parents) if os.path.exists(each)), Path(folder.anchor))
    if not os.path.isdir(existing):
        return f"{existing} is not a folder"
    try:
        _make_within(existing)
    except OSError as error:
        return f"{existing} cannot be written: {error.strerror}"
    return None


def _make_within(folder: Path) -> None:
    """Make something and have it gone: where there are files without a name, nobody ever sees it."""
    if unnamed := getattr(os, "O_TMPFILE", 0):
        try:
            os.close(os.open(folder, unnamed | os.O_WRONLY, 0o600))
        except OSError as error:
            if error.errno not in _UNNAMED_UNKNOWN:
                raise
        else:
            return
    os.rmdir(tempfile.mkdtemp(dir=folder))
