"""Turns in the making, for the dialects whose turns are lists of parts and may follow one another on one side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec.structs import replace

from ocserve.generation import Image, Message, Role


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


def merged(turns: Iterable[Message]) -> tuple[Message, ...]:
    """`turns` with consecutive ones of the user, or of the assistant, as one: templates want the two to alternate."""
    found: list[Message] = []
    for turn in turns:
        if found and found[-1].role == turn.role and turn.role in ("user", "assistant"):
            found[-1] = _joined(found[-1], turn)
        else:
            found.append(turn)
    return tuple(found)


def _joined(one: Message, other: Message) -> Message:
    gap = "\n\n" if one.content and other.content else ""
    start = len(one.content) + len(gap)
    return replace(
        one,
        content=f"{one.content}{gap}{other.content}",
        reasoning=one.reasoning + other.reasoning,
        images=(*one.images, *(replace(image, at=image.at + start) for image in other.images)),
        tool_calls=(*one.tool_calls, *other.tool_calls),
    )
