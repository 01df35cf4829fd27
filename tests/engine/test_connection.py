"""The engine's end of the socket: what is sent leaves in order, soon, and not without bounds."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from ocserve.engine import wire
from ocserve.engine.worker import Wire


@pytest.fixture
def ends() -> Iterator[tuple[Wire, socket.socket]]:
    """The engine's end, and the front's as a plain socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Wire(ours), theirs


def numbered(number: int) -> wire.Heartbeat:
    return wire.Heartbeat(stats=wire.EngineStats(steps=number, steps_by_sequences=(0,) * 2000), step_age_s=0.0)


def received(theirs: socket.socket, count: int) -> list[int]:
    """The numbers of the next messages."""
    frames, numbers = wire.Frames(), list[int]()
    while len(numbers) < count:
        for body in frames.feed(theirs.recv(1 << 16)):
            message = wire.decode_engine(body)
            assert isinstance(message, wire.Heartbeat)
            numbers.append(message.stats.steps)
    return numbers


def test_what_is_sent_arrives_in_order_and_is_gone_after_a_flush(ends: tuple[Wire, socket.socket]) -> None:
    connection, theirs = ends
    for number in range(20):
        connection.send(numbered(number))
    connection.flush()
    assert not connection._unsent.unfinished_tasks
    assert received(theirs, 20) == list(range(20))


def test_a_front_that_does_not_read_holds_up_who_sends(ends: tuple[Wire, socket.socket]) -> None:
    """Else what it does not read would pile up in memory."""
    connection, theirs = ends
    count = 2000  # of 2 kB each: more than the socket and the queue take
    sending = threading.Thread(target=lambda: [connection.send(numbered(number)) for number in range(count)])
    sending.start()
    while not connection._unsent.full():
        time.sleep(0.01)
    begun = time.monotonic()
    connection.flush()
    assert 0.9 < time.monotonic() - begun < 10  # it gives up after a second
    assert sending.is_alive()
    assert received(theirs, count) == list(range(count))
    sending.join(10)
    assert not sending.is_alive()


def test_a_front_that_is_gone_holds_up_nobody(ends: tuple[Wire, socket.socket]) -> None:
    connection, theirs = ends
    theirs.close()
    for number in range(1000):
        connection.send(numbered(number))
    connection.flush()
    assert not connection._unsent.unfinished_tasks


def test_what_no_frame_holds_is_refused_to_who_sends_it(
    ends: tuple[Wire, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends one request, not the engine."""
    connection, theirs = ends
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 100)
    with pytest.raises(wire.FrameError):
        connection.send(numbered(1))
    monkeypatch.undo()
    connection.send(numbered(2))
    assert received(theirs, 1) == [2]


def test_a_large_frame_is_written_before_the_next_is_made(ends: tuple[Wire, socket.socket]) -> None:
    connection, theirs = ends
    large = wire.Heartbeat(stats=wire.EngineStats(steps_by_sequences=(0,) * 1_000_000), step_age_s=0.0)
    sending = threading.Thread(target=connection.send, args=(large,))
    sending.start()
    sending.join(0.5)
    assert sending.is_alive()
    assert received(theirs, 1) == [0]
    sending.join(10)
    assert not sending.is_alive()
