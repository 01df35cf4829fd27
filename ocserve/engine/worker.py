"""The engine process: `python -m ocserve.engine.worker PARENT SOCKET`.

Loads the model that the first message names, then runs four threads beside those of the decode loop: two read and write
the socket, one prepares requests, one makes heartbeats. End-of-file on the socket ends the process after a moment for
storing kept prefixes, whatever it is computing; the death of the front ends it at once.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from queue import Queue
from typing import NoReturn

from ocserve.engine import wire
from ocserve.engine.assembly import STORING_S, assemble
from ocserve.engine.bindings import LlamaError
from ocserve.engine.duty import Duty, EngineBroken
from ocserve.engine.process import confine, inherited_socket
from ocserve.errors import EngineFailed

HEARTBEAT_S = 1.0
EXIT_BROKEN = 70
_MOST_UNSENT, _LARGE_BYTES, _FLUSH_S = 256, 1 << 16, 1.0  # frames; bytes of one; seconds
_AT_ONCE = getattr(socket, "MSG_DONTWAIT", 0)  # Windows has none
_STACK_MEGABYTES = (1536, 512, 128, 16)


class Wire:
    """The engine's end of the socket. `send` may be called from several threads.

    What the socket does not take at once a thread of its own writes, so that the next step is computed meanwhile. What
    that has not written when native code aborts is lost.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()
        self._unsent: Queue[bytes] = Queue(_MOST_UNSENT)
        threading.Thread(target=self._write, daemon=True, name="write").start()

    def send(self, message: wire.EngineMessage) -> None:
        """Send one frame; waits for a front that does not read for long, and until a large frame is written.

        Raises `FrameError` for a message that no frame holds.
        """
        frame = wire.encode(message)
        with self._sending:
            rest = frame if self._unsent.unfinished_tasks else frame[self._taken(frame) :]
            if rest:
                self._unsent.put(rest)
        if len(rest) > _LARGE_BYTES:
            self._unsent.join()

    def _taken(self, frame: bytes) -> int:
        """How many bytes the socket takes without waiting."""
        if not _AT_ONCE:
            return 0
        try:
            return self._socket.send(frame, _AT_ONCE)
        except OSError:  # it is full; or the front is gone, which is for the reading thread to find
            return 0

    def flush(self) -> None:
        """Wait until all is written, or for a moment if the front does not read."""
        with self._unsent.all_tasks_done:
            self._unsent.all_tasks_done.wait_for(lambda: not self._unsent.unfinished_tasks, _FLUSH_S)

    def _write(self) -> None:
        try:
            while True:
                frame = self._unsent.get()
                with contextlib.suppress(OSError):  # that the front is gone is for the reading thread to find
                    self._socket.sendall(frame)
                self._unsent.task_done()
        except Exception as error:  # noqa: BLE001  # without this thread the engine would only look alive
            _die(f"writing messages failed: {type(error).__name__}")

    def messages(self) -> Iterator[wire.FrontMessage]:
        """Messages from the front, until it is gone."""
        frames = wire.Frames()
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                return
            for body in frames.feed(data):
                yield wire.decode_front(body)


class Worker:
    """A loaded model and its threads."""

    def __init__(self, duty: Duty, connection: Wire) -> None:
        self._duty = duty
        self._connection = connection

    def run(self) -> NoReturn:
        """Start the threads and compute until the front is gone."""
        gc.collect()
        gc.freeze()  # the vocabulary and all else that stays: looking through it again would hold up a step
        for target in (self._read, self._beat):
            threading.Thread(target=target, daemon=True, name=target.__name__).start()
        _start_with_deep_stack(self._duty.prepare)
        try:
            self._duty.compute()
        except EngineBroken as error:
            self._connection.flush()
            _die(f"engine broken: {error}")
        os._exit(0)

    def _read(self) -> None:
        try:
            for message in self._connection.messages():
                self._duty.handle(message)
        except Exception as error:  # noqa: BLE001  # without this thread the engine would only look alive
            _die(f"reading messages failed: {type(error).__name__}")
        # The front is gone: kept prefixes are stored if that is quickly done.
        self._duty.stop()
        time.sleep(STORING_S)
        os._exit(0)

    def _beat(self) -> None:
        while True:
            self._connection.send(self._duty.heartbeat())
            time.sleep(HEARTBEAT_S)


def _start_with_deep_stack(target: Callable[[], None]) -> None:
    """Start a thread whose stack holds what llama.cpp's pre-tokenizers put on it.

    Some of them run through `std::regex`, which recurses for every character: about 340 bytes each were seen, so that
    30 kB of digits overflowed the usual 8 MiB. The address space is only reserved; memory is used as far as needed.
    """
    for megabytes in _STACK_MEGABYTES:
        try:
            threading.stack_size(megabytes * 1024 * 1024)
            threading.Thread(target=target, daemon=True, name="prepare").start()
            return
        except (ValueError, RuntimeError):  # more than this system or its limits allow
            continue
    _die("no stack for the preparing thread")


def _die(reason: str) -> NoReturn:
    """End with a line that the front logs; never with text from a request."""
    sys.stderr.write(f"ocserve-engine: {reason}\n")
    sys.stderr.flush()
    os._exit(EXIT_BROKEN)


def main(parent: str, argument: str) -> NoReturn:
    confine(int(parent))
    connection = Wire(inherited_socket(argument))
    first = next(connection.messages(), None)
    if not isinstance(first, wire.Load):
        _die("the first message was not a load")
    try:
        engine = assemble(first.spec, connection.send)
        if first.spec.require_gpu and engine.facts.gpu_layers == 0:
            raise LlamaError("no layer could be placed on a GPU, and engine.require_gpu is set")
    except LlamaError as error:
        connection.send(wire.LoadFailed(error=EngineFailed(str(error), code="model_load_failed").info))
        connection.flush()
        os._exit(EXIT_BROKEN)
    connection.send(wire.Ready(facts=engine.facts))
    Worker(engine, connection).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
