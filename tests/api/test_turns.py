"""Runs of turns become one in time that grows with their length, not with its square."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from ocserve.api import openai_responses_items, turns
from ocserve.api.openai_responses_items import Item
from ocserve.chat.messages import Convention, template_messages
from ocserve.generation import Image, Message, Role, ToolCall, joined

COUNT, TEXT = 8190, "x" * 440


def content_of_many_parts() -> Message:
    said = turns.Content()
    for _ in range(1024):
        said.add_text("x" * 4096)
    return said.message("user")


def run(role: Role, **fields: Any) -> list[Message]:
    return [Message(role=role, **fields)] * COUNT


def items(pieces: list[Message]) -> list[Item]:
    return [Item(id="i", wire=b"", piece=piece) for piece in pieces]


@pytest.mark.parametrize(
    "merge",
    [
        content_of_many_parts,
        lambda: turns.merged(run("user", content=TEXT)),
        lambda: openai_responses_items.turns(TEXT, items(run("developer", content=TEXT))),
        lambda: openai_responses_items.turns(None, items([*run("assistant", reasoning=TEXT), Message(role="user")])),
        lambda: template_messages(
            (Message(role="user"), *run("system", content=TEXT)), (), Convention(knows_later_system=False), str
        ),
    ],
    ids=["parts", "turns", "instructions", "thoughts", "later system messages"],
)
def test_a_long_run_is_joined_at_once(merge: Callable[[], object]) -> None:
    started = time.process_time()
    merge()
    assert time.process_time() - started < 0.4


def test_images_stay_where_they_stood() -> None:
    image = Image(data=b"", at=1)
    calls = (ToolCall(id="a", name="f", arguments="{}"),)
    one = joined(
        [
            Message(role="user", images=(image,), name="n"),
            Message(role="user", content="ab", images=(image,), tool_calls=calls),
            Message(role="user", content="cd", images=(image,), reasoning="r"),
        ]
    )
    assert (one.content, [each.at for each in one.images], one.name) == ("ab\n\ncd", [1, 1, 5], "n")
    assert (one.reasoning, one.tool_calls) == ("r", calls)
