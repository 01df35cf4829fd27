"""What the loop's inbox takes."""

from __future__ import annotations

from dataclasses import dataclass

from ocserve.engine.slots import Group


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """Inbox message: end this request's choices with what they have."""

    request_id: str


@dataclass(frozen=True, slots=True)
class ImageSeen:
    """Inbox message: an image that a prompt waits for has been encoded."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Inbox message: store what is worth storing and return."""


Message = Group | CancelRequest | Stop | ImageSeen
