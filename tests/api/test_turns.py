"""Runs of turns become one in time that grows with their length, not with its square."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ocserve.api import openai_responses_items, turns
from ocserve.api.openai_responses_items import Item
from ocserve.chat.messages import Convention, template_messages
from ocserve.generation import Image, Message, Role, ToolCall, joined
from tests.cost import growth

FEW, FACTOR, TEXT = 512, 16, "x" * 440


def content_of_many_parts(count: int) -> Message:
    said = turns.Content()
    for _ in range(count):
        said.add_text(TEXT)
    return said.message("user")


def run(role: Role, count: int, **fields: Any) -> list[Message]:
    return [Message(role=role, **fields)] * count


def items(pieces: list[Message]) -> list[Item]:
    return [Item(id="i", wire=b"", piece=piece) for piece in pieces]


@pytest.mark.parametrize(
    "merge",
    [
        content_of_many_parts,
        lambda count: turns.merged(run("user", count, content=TEXT)),
        lambda count: openai_responses_items.turns(TEXT, items(run("developer", count, content=TEXT))),
        lambda count: openai_responses_items.turns(
            None, items([*run("assistant", count, reasoning=TEXT), Message(role="user")])
        ),
        lambda count: template_messages(
            (Message(role="user"), *run("system", count, content=TEXT)), (), Convention(knows_later_system=False), str
        ),
    ],
    ids=["parts", "turns", "instructions", "thoughts", "later system messages"],
)
def test_a_long_run_is_joined_at_once(merge: Callable[[int], object]) -> None:
    assert growth(merge, FEW, FACTOR) < FACTOR * 4


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
