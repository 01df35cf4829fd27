"""From sampled tokens to what a client gets to see of them: bytes, text, channels, and stop strings in words only.

An `AnswerPlan` says how the answers to one prompt are held and read, an `Answer` is one of them under way.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ocserve.chat.arguments import arguments_schema, bare_texts
from ocserve.chat.channels import Channels, Part
from ocserve.chat.grammar import AnswerGrammar, answer_grammar, offered
from ocserve.chat.speech import Speech
from ocserve.engine.text import StopStrings
from ocserve.engine.validation import Validator, validator
from ocserve.generation import ChatPrompt, Constraint, GenerateRequest, JsonConstraint


@dataclass(frozen=True, slots=True)
class Promises:
    """What the objects of an answer have to satisfy: a value in words, the arguments of calls by the tool's name."""

    value: Validator | None
    calls: Mapping[str, Validator]

    @classmethod
    def of(cls, request: GenerateRequest) -> Promises | None:
        """Of a request whose schemas were compiled; None where there is nothing to check."""
        constraint, prompt = request.constraint, request.prompt
        value = validator(constraint.schema) if isinstance(constraint, JsonConstraint) else None
        tools = offered(prompt.tools, request.tool_choice) if isinstance(prompt, ChatPrompt) else ()
        calls = {tool.name: validator(arguments_schema(tool)) for _, tool in tools}
        return cls(value, calls) if value is not None or calls else None


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """`speech` None: all is words. `thinking`: the prompt ends within a thought, which may take `budget` tokens.

    `closing` are the tokens that end a thought. `grammar` is what the answer is held to,
    `promises` what is checked of it at its end.
    """

    speech: Speech | None = None
    tools: Mapping[str, frozenset[str]] = field(default_factory=dict)
    thinking: bool = False
    budget: int | None = None
    closing: tuple[int, ...] = ()
    grammar: AnswerGrammar | Constraint | None = None
    promises: Promises | None = None

    @classmethod
    def of(
        cls, request: GenerateRequest, speech: Speech | None, *, thinking: bool, closing: Sequence[int]
    ) -> AnswerPlan:
        """Raises InvalidRequest where calls are demanded and there is nothing to call."""
        prompt = request.prompt
        if speech is None or not isinstance(prompt, ChatPrompt):
            return cls(grammar=request.constraint)
        if prompt.messages and prompt.messages[-1].role == "assistant":
            speech = speech.continuing()
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
        return Answer(self, stop) if self.promises is None else HeldAnswer(self, stop, self.promises)


class Answer:
    """One answer under way: bytes of tokens in, parts out, whatever the borders between the tokens are.

    Bytes that are not UTF-8 become U+FFFD as Unicode recommends it (one for each maximal part of a character), an
    incomplete character waits.
    """

    is_held = False  # whether there is anything to check at its end

    def __init__(self, plan: AnswerPlan, stop: tuple[str, ...]) -> None:
        self._words = StopStrings(stop)
        self._words_end = 0  # of the words, and marks among them, that were read
        self._plan = plan
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.decoded = 0  # characters so far; a mark is one, an incomplete one is none
        self._channels: Channels | None = None
        self._marks: Mapping[int, str] = {}
        if plan.speech is not None:
            self._channels = Channels(plan.speech, tools=plan.tools, thinking=plan.thinking)
            self._marks = plan.speech.marks.by_id
        self.only_words = True  # so far
        self.calls = 0  # that have begun

    @property
    def matched(self) -> str | None:
        """The stop string that ended the answer."""
        return self._words.matched

    @property
    def limited(self) -> bool:
        """Whether its thoughts have a budget."""
        return self._plan.budget is not None

    def feed(self, token: int, piece: bytes) -> list[Part]:
        """What is certain now, with the bytes of one more token."""
        mark = self._marks.get(token)
        return self._read(self._decoder.decode(piece) if mark is None else self._decoder.decode(b"", final=True) + mark)

    def finish(self) -> list[Part]:
        """The rest: whatever was held back."""
        parts = self._read(self._decoder.decode(b"", final=True))
        if self._channels is not None:
            parts += self._stopped(self._channels.finish())
        return [*parts, *self._released()]

    def objects(self) -> list[tuple[Validator, str]]:
        """The JSON texts of an answer that has ended by itself, each with what it has to satisfy."""
        return []

    def overdue(self, reasoning_tokens: int) -> tuple[int, ...]:
        """The tokens that must follow now because the thought has had its time, tokens held back included."""
        if self._channels is None or not self._channels.thinking or self._plan.budget is None:
            return ()
        complete = not self._decoder.getstate()[0]
        return self._plan.closing if complete and reasoning_tokens >= self._plan.budget else ()

    def _read(self, text: str) -> list[Part]:
        self.decoded += len(text)
        if self._channels is not None:
            return self._stopped(self._channels.feed(text))
        return self._stopped([Part("content", text, self.decoded)] if text else [])

    def _stopped(self, parts: list[Part]) -> list[Part]:
        """The parts up to a stop string in the words, which nothing but marks may interrupt."""
        shown: list[Part] = []
        for part in parts:
            if self.matched is not None:
                break
            if part.channel == "content":
                self._words_end = part.end
                words = self._words.advance(part.text)
                end = part.end - self._words.withheld
                if words or end == part.end:
                    shown.append(Part("content", words, end))
            else:
                self.only_words = False
                self.calls += part.name is not None
                shown += [*self._released(), part]
        return shown

    def _released(self) -> list[Part]:
        """The words that were held back: no stop string begins with them."""
        words = self._words.release()
        return [Part("content", words, self._words_end)] if words else []


class HeldAnswer(Answer):
    """An answer that keeps what it has told, so that it can be checked."""

    is_held = True

    def __init__(self, plan: AnswerPlan, stop: tuple[str, ...], promises: Promises) -> None:
        super().__init__(plan, stop)
        self._promises = promises
        self._told: list[Part] = []

    def feed(self, token: int, piece: bytes) -> list[Part]:
        parts = super().feed(token, piece)
        self._told += parts
        return parts

    def finish(self) -> list[Part]:
        parts = super().finish()
        self._told += parts
        return parts

    def objects(self) -> list[tuple[Validator, str]]:
        """Those of calls, or the value, unless a stop string has cut it."""
        words = "".join(part.text for part in self._told if part.channel == "content")
        calls: list[tuple[Validator, list[str]]] = []
        for part in self._told:
            if part.channel == "call":
                if part.name is not None:
                    calls.append((self._promises.calls[part.name], []))
                calls[-1][1].append(part.text)
        if calls:
            return [(promised, "".join(texts)) for promised, texts in calls]
        value = self._promises.value if self.matched is None else None
        return [] if value is None else [(value, words)]
