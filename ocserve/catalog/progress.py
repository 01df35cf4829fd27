"""What a pull tells its caller while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

Phase = Literal["waiting", "note", "checking", "downloading", "unpacking"]


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """One step. `note` is a sentence for the user (phases `waiting` and `note`); the numbers belong to `file`.

    `checking` is the re-hash of what an earlier pull left, `unpacking` the way out of a wheel that has come.
    `bytes_per_s` counts only what this process received. `total_bytes` is 0 where nobody has said it.
    """

    phase: Phase
    file: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    bytes_per_s: float = 0.0
    note: str = ""


OnProgress = Callable[[Progress], None]


def notice(text: str) -> Progress:
    """A sentence for the user."""
    return Progress(phase="note", note=text)
