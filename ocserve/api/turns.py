"""Turns in the making, for the dialects whose turns are lists of parts and may follow one another on one side."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from msgspec.structs import replace

from ocserve.generation import Image, Message, Role, joined


class Content:
    """The text and images of a turn while its parts are read."""

    def __init__(self, text: str = "") -> None:
        self._pieces = [text]
        self._length = len(text)
        self._images: list[Image] = []

    def __bool__(self) -> bool:
        return bool(self._length or self._images)

    def add_text(self, text: str) -> None:
        """Put text behind what has been said."""
        self._pieces.append(text)
        self._length += len(text)

    def add_image(self, image: Image) -> None:
        """Put an image behind what has been said."""
        self._images.append(replace(image, at=self._length))

    def message(self, role: Role, *, tool_call_id: str | None = None, name: str | None = None) -> Message:
        """The turn that it makes."""
        content, images = "".join(self._pieces), tuple(self._images)
        return Message(role=role, content=content, images=images, tool_call_id=tool_call_id, name=name)


_SIDES = ("user", "assistant")


def merged(turns: Iterable[Message]) -> tuple[Message, ...]:
    """`turns` with consecutive ones of the user, or of the assistant, as one: templates want the two to alternate."""
    sides = groupby(enumerate(turns), key=lambda entry: entry[1].role if entry[1].role in _SIDES else entry[0])
    return tuple(joined([turn for _, turn in run]) for _, run in sides)
