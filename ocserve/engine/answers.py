"""From sampled tokens to what a client gets to see of them: bytes, text, channels, and stop strings in words only.

An `AnswerPlan` says how the answers to one prompt are held and read, an `Answer` is one of them under way.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ocserve.chat.arguments import bare_texts
from ocserve.chat.channels import Channels, Part
from ocserve.chat.grammar import AnswerGrammar, answer_grammar, offered
from ocserve.chat.speech import Speech
from ocserve.engine.text import TextStream
from ocserve.generation import ChatPrompt, Constraint, GenerateRequest


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """`speech` None: all is words. `thinking`: the prompt ends within a thought, which may take `budget` tokens.

    `closing` are the tokens that end a thought. `grammar` is what the answer is held to.
    """

    speech: Speech | None = None
    tools: Mapping[str, frozenset[str]] = field(default_factory=dict)
    thinking: bool = False
    budget: int | None = None
    closing: tuple[int, ...] = ()
    grammar: AnswerGrammar | Constraint | None = None

    @classmethod
    def of(
        cls, request: GenerateRequest, speech: Speech | None, *, thinking: bool, closing: Sequence[int]
    ) -> AnswerPlan:
        """Raises InvalidRequest where calls are demanded and there is nothing to call."""
        prompt = request.prompt
        if speech is None or not isinstance(prompt, ChatPrompt):
            return cls(grammar=request.constraint)
        tools = {tool.name: bare_texts(tool) for _, tool in offered(prompt.tools, request.tool_choice)}
        if not tools and speech.reasoning is None and not any(speech.tools.say):
            return cls(grammar=request.constraint)
        return cls(
            speech=speech,
            tools=tools,
            thinking=thinking,
            budget=prompt.reasoning.max_tokens if speech.reasoning is not None else None,
            closing=tuple(closing),
            grammar=answer_grammar(speech, prompt.tools, request.tool_choice, request.constraint, thinking=thinking),
        )

    def open(self, stop: tuple[str, ...]) -> Answer:
        """A new answer, which ends at the first of the stop strings."""
        return Answer(self, stop)


class Answer:
    """One answer under way."""

    def __init__(self, plan: AnswerPlan, stop: tuple[str, ...]) -> None:
        self._words = TextStream(stop)
        self._plan = plan
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._channels: Channels | None = None
        self._marks: Mapping[int, str] = {}
        if plan.speech is not None:
            self._channels = Channels(plan.speech, tools=plan.tools, thinking=plan.thinking)
            self._marks = plan.speech.marks.by_id
        self.only_words = True  # so far

    @property
    def matched(self) -> str | None:
        """The stop string that ended the answer."""
        return self._words.matched

    @property
    def calls(self) -> int:
        """How many calls have begun."""
        return 0 if self._channels is None else self._channels.calls

    @property
    def withheld_bytes(self) -> int:
        """How many of the last bytes that were fed are in no part yet."""
        if self._channels is None:
            return self._words.withheld_bytes
        undecoded = len(self._decoder.getstate()[0])
        return undecoded + self._channels.withheld_bytes + self._words.withheld_bytes

    def feed(self, token: int, piece: bytes) -> list[Part]:
        """What is certain now, with the bytes of one more token."""
        if self._channels is None:
            return _words(self._words.feed(piece))
        mark = self._marks.get(token)
        text = self._decoder.decode(piece) if mark is None else self._decoder.decode(b"", final=True) + mark
        return self._stopped(self._channels.feed(text))

    def finish(self) -> list[Part]:
        """The rest: whatever was held back."""
        if self._channels is None:
            return _words(self._words.finish())
        parts = self._stopped(self._channels.feed(self._decoder.decode(b"", final=True)))
        return [*parts, *self._stopped(self._channels.finish()), *_words(self._words.finish())]

    def overdue(self, reasoning_tokens: int) -> tuple[int, ...]:
        """The tokens that must follow now because the thought has had its time, tokens held back included."""
        if self._channels is None or not self._channels.thinking or self._plan.budget is None:
            return ()
        complete = not self._decoder.getstate()[0]
        return self._plan.closing if complete and reasoning_tokens >= self._plan.budget else ()

    def _stopped(self, parts: list[Part]) -> list[Part]:
        """The parts up to a stop string in the words."""
        shown: list[Part] = []
        for part in parts:
            if self.matched is not None:
                break
            if part.channel == "content":
                shown.append(Part("content", self._words.advance(part.text)))
            else:
                self.only_words = False
                shown.append(part)
        return shown


def _words(text: str) -> list[Part]:
    return [Part("content", text)] if text else []
