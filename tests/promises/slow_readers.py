"""Clients that hardly read what they asked for: `python -m tests.promises.slow_readers <port> <count> <seconds>`.

Every other one takes a byte a second, the rest nothing. Prints a line when all have asked, and then how many seconds
each was served until the server cut it, or null for those that it never cut.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from contextlib import suppress

from tests.promises.streams import head

SLOW_TOKENS = 60


def begin(port: int, number: int) -> socket.socket:
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    peer.connect(("127.0.0.1", port))
    body = {"model": "tiny", "prompt": f"{number}", "stream": True, "max_tokens": SLOW_TOKENS}
    peer.sendall(head(body, f"slow-{number}"))
    return peer


def main(port: int, count: int, seconds: float) -> None:
    begun = time.monotonic()
    peers = {}
    for number in range(count):
        peers[number] = begin(port, number)
        time.sleep(max(0.0, begun + number * 3.0 / count - time.monotonic()))
    print("asked", flush=True)
    held: dict[int, float | None] = dict.fromkeys(peers)
    while time.monotonic() - begun < seconds and None in held.values():
        time.sleep(1)
        for number, peer in peers.items():
            if held[number] is None and cut(peer, reads=number % 2 == 0):
                held[number] = round(time.monotonic() - begun, 1)
    print(json.dumps(list(held.values())), flush=True)


def cut(peer: socket.socket, *, reads: bool) -> bool:
    """Whether the server has ended the connection; takes a byte from one that reads."""
    poll = select.poll()
    poll.register(peer, 0)  # errors and hang-ups only: a client that reads nothing sees no end that is behind data
    if poll.poll(0):
        return True
    with suppress(BlockingIOError):
        return reads and not peer.recv(1, socket.MSG_DONTWAIT)
    return False


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
