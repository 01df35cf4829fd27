"""Framing: any split of the bytes gives the same messages; a broken frame is an error, not a crash."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ocserve.engine import wire
from ocserve.generation import ChatPrompt, Finished, GenerateRequest, Message, Sampling, TextDelta, Usage

MESSAGES: tuple[wire.FrontMessage, ...] = (
    wire.Prepare(
        request=GenerateRequest(
            request_id="r",
            model="m",
            prompt=ChatPrompt(messages=(Message(role="user", content="grüße 🎈"),)),
            sampling=Sampling(temperature=0.5, logit_bias={3: -100.0}, seed=-(2**63)),
            max_tokens=5,
            stop=("a", "b"),
            salt=b"\x00\xff",
        )
    ),
    wire.Start(request_id="r"),
    wire.Cancel(request_id="r"),
)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_any_split_gives_the_same_messages(cuts: list[int]) -> None:
    data = b"".join(wire.encode(message) for message in MESSAGES)
    frames = wire.Frames()
    seen = []
    position = 0
    for cut in [*cuts, len(data)]:
        seen += [wire.decode_front(body) for body in frames.feed(data[position : position + cut])]
        position += cut
    assert tuple(seen) == MESSAGES


def test_a_step_survives_the_wire() -> None:
    step = wire.Step(
        events=(
            ("r", TextDelta(text="hi", tokens=1)),
            ("r", Finished(reason="stop", usage=Usage(prompt_tokens=3, completion_tokens=2), stop_sequence="x")),
        )
    )
    (body,) = wire.Frames().feed(wire.encode(step))
    assert wire.decode_engine(body) == step


def test_an_oversized_length_is_refused_before_it_is_buffered() -> None:
    with pytest.raises(wire.FrameError):
        list(wire.Frames().feed(struct.pack(">I", wire.MAX_FRAME_BYTES + 1)))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_raise_anything_else(body: bytes) -> None:
    for decode in (wire.decode_front, wire.decode_engine):
        with contextlib.suppress(wire.FrameError):
            decode(body)
