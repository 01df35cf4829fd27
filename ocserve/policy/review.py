"""Stands between what is generated and what is told: an answer's end, or all of it, waits for the verdict on it.

Each choice is judged by itself, all of them together once the last has ended. What is refused is dropped.
"""

from __future__ import annotations

import asyncio

from msgspec.structs import replace

from ocserve.errors import ApiError
from ocserve.generation import (
    Failed,
    Finished,
    GenerateEvent,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from ocserve.policy.judge import Judge
from ocserve.policy.protocol import Asker, Refusal, Said

Placed = tuple[int, GenerateEvent]  # an event, and which of the request's prompts it is about


class Review:
    """The review of one request's answers. `holds`: nothing is told of them before the verdict."""

    def __init__(self, judge: Judge, asker: Asker, choices: int, *, holds: bool) -> None:
        self._judge = judge
        self._asker = asker
        self._holds = holds
        self._said = [Said() for _ in range(choices)]
        self._waiting: list[tuple[int, TextDelta | ReasoningDelta | ToolCallDelta | Finished]] = []
        self.told_in_vain = False  # whether something has been told that was refused afterwards

    def take(self, prompt: int, event: GenerateEvent) -> list[Placed]:
        """What may be told now that `event` has happened."""
        match event:
            case TextDelta() | ReasoningDelta() | ToolCallDelta():
                self._said[event.index].add(event)
                if not self._holds:
                    return [(prompt, event)]
                self._waiting.append((prompt, event))
                return []
            case Finished():
                self._waiting.append((prompt, event))
                return []
            case Failed():  # nothing is judged any more
                self._waiting.clear()
        return [(prompt, event)]

    async def judged(self) -> list[Placed]:
        """The rest, once every choice has ended. A wait that is cancelled changes nothing."""
        ends = [event for _, event in self._waiting if isinstance(event, Finished)]
        asked = [event.index for event in ends if self._said[event.index]]
        questions = [self._asker.of_answer(self._said[index], index) for index in asked]
        found = await asyncio.gather(*map(self._judge.verdict, questions), return_exceptions=True)
        waiting, self._waiting = self._waiting, []
        for verdict in found:
            if isinstance(verdict, ApiError):
                return [(0, Failed(error=verdict.info, usage=_together(ends)))]
            if isinstance(verdict, BaseException):
                raise verdict
        refused = {index for index, verdict in zip(asked, found, strict=True) if isinstance(verdict, Refusal)}
        self.told_in_vain = bool(refused) and not self._holds
        rest: list[Placed] = []
        for prompt, event in waiting:
            if event.index not in refused:
                rest.append((prompt, event))
            elif isinstance(event, Finished):
                rest.append((prompt, replace(event, reason="content_filter", stop_sequence=None)))
        return rest

    def given_up(self) -> list[Placed]:
        """The rest for a client that has gone: what was used, and nothing that was said."""
        waiting, self._waiting = self._waiting, []
        return [
            (prompt, replace(event, reason="cancelled")) for prompt, event in waiting if isinstance(event, Finished)
        ]


def _together(ends: list[Finished]) -> Usage:
    """What all answers used, with the first prompt."""
    usages = [event.usage for event in ends]
    return replace(
        usages[0],
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
        accepted_draft_tokens=sum(usage.accepted_draft_tokens for usage in usages),
        rejected_draft_tokens=sum(usage.rejected_draft_tokens for usage in usages),
    )
