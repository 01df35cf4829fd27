"""An answer that a test dictates token by token, through everything between the sampler and a client's events."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any, cast

from ocserve.chat.speech import Speech
from ocserve.engine.answers import AnswerPlan
from ocserve.engine.emission import Emitter
from ocserve.engine.llama import Vocab
from ocserve.engine.slots import Group, Sequence
from ocserve.engine.turns import Turns
from ocserve.engine.wire import Step
from ocserve.generation import (
    ChatPrompt,
    Finished,
    GenerateRequest,
    Message,
    Reasoning,
    Sampling,
    TextPrompt,
    TokenChance,
    TokenLogprob,
    Tool,
    ToolCallDelta,
)

END = 0
TOOLS = (Tool(name="now"), Tool(name="f", parameters='{"type":"object","properties":{"a":{"type":"string"}}}'))
USER = Message(role="user", content="x")


class Pieces:
    """A vocabulary that is made as it is needed: a token for every piece, beside control tokens without text."""

    def __init__(self, controls: Iterable[int] = ()) -> None:
        self.bytes = {END: b"", **dict.fromkeys(controls, b"")}
        self._free = max(self.bytes) + 1

    def token(self, piece: bytes) -> int:
        self.bytes[self._free] = piece
        self._free += 1
        return self._free - 1

    def piece(self, token: int) -> bytes:
        return self.bytes[token]

    def is_end(self, token: int) -> bool:
        return token == END


class NoSampler:
    def accept(self, token: int) -> None:
        pass

    def close(self) -> None:
        pass


class Talk:
    """One answer: tokens in, events out."""

    def __init__(
        self, speech: Speech | None, *, stop: tuple[str, ...] = (), thinking: bool = False, **rest: Any
    ) -> None:
        """Without a speech, the prompt is text and so is the answer. Control tokens of a speech have their own ids."""
        self.vocab, self.events, self.turns = Pieces(speech.marks.by_id if speech else ()), [], Turns()
        chat = ChatPrompt(
            messages=rest.pop("messages", (USER,)),
            tools=rest.pop("tools", TOOLS),
            reasoning=rest.pop("reasoning", Reasoning()),
        )
        prompt = chat if speech else TextPrompt(text="x")
        request = GenerateRequest(
            request_id="r", model="m", prompt=prompt, sampling=Sampling(), max_tokens=900, stop=stop, **rest
        )
        plan = AnswerPlan.of(request, speech, thinking=thinking, closing=(7, 8))
        self.sequence = Sequence(Group(request), (1,), max_tokens=900, sampler=NoSampler(), deadline=1e9, plan=plan)
        self.sequence.group.started = True
        self.emitter = Emitter(cast(Vocab, self.vocab), self.turns, self._emit)

    def _emit(self, step: Step) -> None:
        self.events += [event for _, event in step.events]

    def say(self, pieces: Iterable[bytes | int], *, flush: random.Random | None = None) -> None:
        """Sample pieces of text and control tokens, then the end; events leave now and then as `flush` will have it."""
        reason = None
        for piece in [*pieces, END]:
            token = self.vocab.token(piece) if isinstance(piece, bytes) else piece
            chance = TokenLogprob(chosen=TokenChance(token, self.vocab.piece(token), -1.0))
            reason = self.emitter.take(self.sequence, token, chance if self.sequence.wants_logprobs else None)
            if flush is not None and flush.random() < 0.5:
                self.emitter.flush()
            if reason is not None:
                break
        if reason is not None:
            self.emitter.finished(self.sequence, reason)
        self.emitter.flush()

    def text(self, kind: type) -> str:
        return "".join(event.text for event in self.events if isinstance(event, kind))

    @property
    def calls(self) -> list[tuple[str, str]]:
        found: dict[int, tuple[str, str]] = {}
        for event in self.events:
            if isinstance(event, ToolCallDelta):
                name, text = found.get(event.call, (event.name or "", ""))
                found[event.call] = name, text + event.arguments
        return list(found.values())

    @property
    def finished(self) -> Finished:
        *_, last = self.events
        assert isinstance(last, Finished)
        return last
