"""Turns in the making, for the dialects whose turns are lists of parts and may follow one another on one side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby

from ocserve.generation import Image, Message, Role, joined


@dataclass(slots=True)
class Content:
    """The text and images of a turn while its parts are read."""

    text: str = ""
    images: list[Image] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.images)

    def add_image(self, data: bytes) -> None:
        """Put an image behind what has been said."""
        self.images.append(Image(data=data, at=len(self.text)))

    def message(self, role: Role, **fields: str | None) -> Message:
        """The turn that it makes."""
        return Message(role=role, content=self.text, images=tuple(self.images), **fields)  # type: ignore[arg-type]


_SIDES = ("user", "assistant")


def merged(turns: Iterable[Message]) -> tuple[Message, ...]:
    """`turns` with consecutive ones of the user, or of the assistant, as one: templates want the two to alternate."""
    sides = groupby(enumerate(turns), key=lambda entry: entry[1].role if entry[1].role in _SIDES else entry[0])
    return tuple(joined([turn for _, turn in run]) for _, run in sides)
