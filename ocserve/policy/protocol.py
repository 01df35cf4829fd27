"""What is asked of whoever judges content, and what counts as a verdict: one JSON document each way.

A question has the conversation as `messages`, or everything else as `text`. Images are counted, not shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec

from ocserve.decoding import resolved
from ocserve.generation import (
    ChatPrompt,
    EmbedRequest,
    FillPrompt,
    GenerateEvent,
    Message,
    Prompt,
    ReasoningDelta,
    ScoreRequest,
    TextDelta,
    TextPrompt,
    TokenPrompt,
    Tool,
    ToolCall,
    ToolCallDelta,
)

Stage = Literal["prompt", "answer"]

_Category = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_./-]{0,63}\Z")]
_Told = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
_GAP = "\n\n"


class NoVerdict(Exception):
    """What was answered is no verdict. The text says why in our words, nothing of what was answered."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Content that is not allowed: of what kind, and what its sender is told."""

    category: str
    message: str


@resolved
class _Verdict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    allow: bool
    category: _Category | None = None
    message: _Told | None = None


class _Call(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str
    arguments: str
    id: str | None = None


class _Tool(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str
    description: str = ""
    parameters: str | None = None


class _Turn(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    role: str
    content: str
    reasoning: str = ""
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: tuple[_Call, ...] = ()
    images: int = 0


class Question(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One question. `key` is the id of the key, never the key. `choice` numbers the answers of a request from 0."""

    version: Literal[1]
    stage: Stage
    request_id: str
    key: str
    model: str
    messages: tuple[_Turn, ...] | None = None
    tools: tuple[_Tool, ...] = ()
    text: str | None = None
    reasoning: str = ""
    tool_calls: tuple[_Call, ...] = ()
    choice: int | None = None

    def encoded(self) -> bytes:
        """As it is sent."""
        return msgspec.json.encode(self)


@dataclass(frozen=True, slots=True)
class Asker:
    """Whose request it is that questions are about."""

    request_id: str
    key: str
    model: str

    def of_prompt(self, prompt: Prompt, spelt: str = "") -> Question:
        """A prompt. `spelt` is what the tokens of one that has no text spell."""
        match prompt:
            case ChatPrompt(messages=messages, tools=tools):
                return self._ask("prompt", messages=tuple(map(_turn, messages)), tools=tuple(map(_tool, tools)))
            case TextPrompt(text=text):
                return self._ask("prompt", text=text)
            case FillPrompt(prefix=prefix, suffix=suffix, files=files):
                others = [part for file in files for part in file]
                return self._ask("prompt", text=_GAP.join((*others, prefix, suffix)))
            case TokenPrompt():
                return self._ask("prompt", text=spelt)

    def of_inputs(self, question: EmbedRequest | ScoreRequest, spelt: Sequence[str] = ()) -> Question:
        """The texts that something is computed of. `spelt` are those of inputs that came as token ids, in order."""
        if isinstance(question, ScoreRequest):
            return self._ask("prompt", text=_GAP.join((question.query, *question.documents)))
        left = iter(spelt)
        texts = [each.text if isinstance(each, TextPrompt) else next(left) for each in question.inputs]
        return self._ask("prompt", text=_GAP.join(texts))

    def of_answer(self, said: Said, choice: int) -> Question:
        """The answer that is this choice of the request."""
        calls = tuple(_Call(name=name, arguments="".join(pieces)) for name, pieces in said.calls)
        return self._ask(
            "answer",
            text="".join(said.content),
            reasoning="".join(said.reasoning),
            tool_calls=calls,
            choice=choice,
        )

    def _ask(
        self,
        stage: Stage,
        *,
        messages: tuple[_Turn, ...] | None = None,
        tools: tuple[_Tool, ...] = (),
        text: str | None = None,
        reasoning: str = "",
        tool_calls: tuple[_Call, ...] = (),
        choice: int | None = None,
    ) -> Question:
        return Question(
            version=1,
            stage=stage,
            request_id=self.request_id,
            key=self.key,
            model=self.model,
            messages=messages,
            tools=tools,
            text=text,
            reasoning=reasoning,
            tool_calls=tool_calls,
            choice=choice,
        )


@dataclass(slots=True)
class Said:
    """What one choice has said, gathered from its events."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[tuple[str, list[str]]] = field(default_factory=list)

    def add(self, event: GenerateEvent) -> None:
        """Take what an event says."""
        match event:
            case TextDelta(text=text) if text:
                self.content.append(text)
            case ReasoningDelta(text=text) if text:
                self.reasoning.append(text)
            case ToolCallDelta(name=name, arguments=arguments, call=call):
                if name is not None:
                    self.calls.append((name, []))
                self.calls[call][1].append(arguments)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)


def verdict(answer: bytes) -> Refusal | None:
    """What was answered, None being that the content is allowed; raises `NoVerdict`."""
    try:
        found = msgspec.json.decode(answer, type=_Verdict)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise NoVerdict("the answer is no verdict") from None
    if found.allow:
        if found.category is not None or found.message is not None:
            raise NoVerdict("the verdict both allows and gives a reason against it")
        return None
    if found.category is None or found.message is None:
        raise NoVerdict("the verdict refuses without a category or a message")
    return Refusal(found.category, found.message)


def _turn(message: Message) -> _Turn:
    return _Turn(
        role=message.role,
        content=message.content,
        reasoning=message.reasoning,
        name=message.name,
        tool_call_id=message.tool_call_id,
        tool_calls=tuple(map(_call, message.tool_calls)),
        images=len(message.images),
    )


def _call(call: ToolCall) -> _Call:
    return _Call(id=call.id, name=call.name, arguments=call.arguments)


def _tool(tool: Tool) -> _Tool:
    return _Tool(name=tool.name, description=tool.description, parameters=tool.parameters)
