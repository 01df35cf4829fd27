"""What the loop is told by other threads: one message each, taken between two steps."""

from __future__ import annotations

from dataclasses import dataclass

from ocserve.engine.judging import Verdict
from ocserve.engine.slots import Group


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """End this request's choices with what they have."""

    request_id: str


@dataclass(frozen=True, slots=True)
class ImageSeen:
    """An image that a prompt waits for has been encoded."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Store what is worth storing and return."""


Message = Group | CancelRequest | Stop | ImageSeen | Verdict
