"""An answer as blocks: consecutive text, thought and tool calls, for the dialects whose answers are made of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from ocserve.generation import GenerateEvent, ReasoningDelta, TextDelta, ToolCallDelta

Kind = Literal["text", "reasoning", "call"]


@dataclass(slots=True)
class Block:
    """One block. Of a call, `name` is the function's and `text` its arguments as JSON text."""

    kind: Kind
    name: str = ""
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def arguments(self) -> msgspec.Raw | None:
        """A call's arguments, on one line, with its numbers as they were written; None if they are no whole object."""
        text = self.text or "{}"
        try:
            msgspec.json.decode(text, type=dict[str, msgspec.Raw])
            return msgspec.Raw(msgspec.json.format(text.encode(), indent=-1))
        except (ValueError, RecursionError):
            return None


def blocks(events: Iterable[GenerateEvent]) -> list[Block]:
    """The blocks that one choice's events make up."""
    found: list[Block] = []
    calls: dict[int, Block] = {}
    for event in events:
        match event:
            case ToolCallDelta(call=call, name=name, arguments=piece):
                if name is not None:
                    found.append(calls.setdefault(call, Block("call", name)))
                calls[call].pieces.append(piece)
            case TextDelta(text=piece) | ReasoningDelta(text=piece) if piece:
                kind: Kind = "text" if isinstance(event, TextDelta) else "reasoning"
                if not found or found[-1].kind != kind:
                    found.append(Block(kind))
                found[-1].pieces.append(piece)
            case _:
                pass
    return found
