"""Files that settings name, opened only where that cannot wait for anybody."""

from __future__ import annotations

import errno
import os
import stat

# A FIFO without a writer is opened at once and not when one comes; what is said to a terminal does not make it ours.
_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)


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
