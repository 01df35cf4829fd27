"""What sampled tokens become for a client: thoughts, words and calls, each token counted once and where it belongs."""

from __future__ import annotations

import json
import random
from typing import Any, cast

import pytest

from ocserve.chat import reasoning
from ocserve.chat.speech import Speech
from ocserve.chat.tool_formats import FORMATS, GENERIC
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
    ReasoningDelta,
    Sampling,
    TextDelta,
    TokenChance,
    TokenLogprob,
    Tool,
    ToolCallDelta,
    ToolChoice,
)

THINK = next(form for form in reasoning.FORMATS if form.name == "think")
MISTRAL = next(form for form in FORMATS if form.name == "mistral")
END = 0
TOOLS = (Tool(name="now"), Tool(name="f", parameters='{"type":"object","properties":{"a":{"type":"string"}}}'))
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'


class Pieces:
    """A vocabulary that is made as it is needed: a token for every piece."""

    def __init__(self) -> None:
        self.bytes = {END: b""}

    def token(self, piece: bytes) -> int:
        self.bytes[len(self.bytes)] = piece
        return len(self.bytes) - 1

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

    def __init__(self, speech: Speech, *, stop: tuple[str, ...] = (), thinking: bool = False, **rest: Any) -> None:
        self.vocab, self.events, self.turns = Pieces(), [], Turns()
        prompt = ChatPrompt(
            messages=(Message(role="user", content="x"),),
            tools=rest.pop("tools", TOOLS),
            reasoning=rest.pop("reasoning", Reasoning()),
        )
        request = GenerateRequest(
            request_id="r", model="m", prompt=prompt, sampling=Sampling(), max_tokens=900, stop=stop, **rest
        )
        plan = AnswerPlan.of(request, speech, thinking=thinking, closing=(7, 8))
        self.sequence = Sequence(Group(request), (1,), max_tokens=900, sampler=NoSampler(), deadline=1e9, plan=plan)
        self.emitter = Emitter(cast(Vocab, self.vocab), self.turns, self._emit)

    def _emit(self, step: Step) -> None:
        self.events += [event for _, event in step.events]

    def say(self, pieces: list[bytes], *, end: bool = True, flush: random.Random | None = None) -> None:
        reason = None
        for piece in [*pieces, *([b""] if end else [])]:
            token = self.vocab.token(piece) if piece else END
            chance = TokenLogprob(chosen=TokenChance(token, piece, -1.0))
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


def speech(form: Any = GENERIC, thoughts: Any = THINK, **controls: int) -> Speech:
    return Speech.of(form, thoughts, controls, frozenset({END}))


def divided(data: bytes, rng: random.Random) -> list[bytes]:
    pieces = []
    while data:
        length = rng.choice((1, 1, 2, 4, 8))
        pieces.append(data[:length])
        data = data[length:]
    return pieces


def test_what_a_client_sees_does_not_depend_on_how_the_text_is_divided_into_tokens(full: bool) -> None:
    text = f"<think>\nÄh <tool_call>\n</think>\n\nWell é.\n{CALL}\n{CALL}".encode()
    rng = random.Random(3)
    for _ in range(2000 if full else 150):
        talk = Talk(speech(), logprobs=rng.choice((None, 0)))
        pieces = divided(text, rng)
        talk.say(pieces, flush=rng)
        assert talk.text(ReasoningDelta) == "Äh <tool_call>"
        assert talk.text(TextDelta) == "Well é."
        assert [(name, json.loads(arguments)) for name, arguments in talk.calls] == [("f", {"a": "é"})] * 2
        usage = talk.finished.usage
        assert talk.finished.reason == "tool_calls"
        assert usage.completion_tokens == len(pieces) + 1
        assert 0 < usage.reasoning_tokens < usage.completion_tokens
        told = [event for event in talk.events if not isinstance(event, Finished)]
        assert sum(event.tokens for event in told) <= usage.completion_tokens
        if talk.sequence.wants_logprobs:
            assert all(event.tokens == len(event.logprobs) for event in told)
        assert [event.name for event in told if isinstance(event, ToolCallDelta) and event.name] == ["f", "f"]


def test_reasoning_tokens_are_those_of_thoughts_with_their_marks() -> None:
    talk = Talk(speech())
    talk.say([b"<think>", b"\n", b"One", b" two", b"\n", b"</think>", b"\n\n", b"Three", b" four"])
    assert talk.finished.usage.reasoning_tokens == 6
    assert talk.finished.usage.completion_tokens == 10
    assert talk.text(ReasoningDelta) == "One two"
    assert talk.text(TextDelta) == "Three four"


def test_a_thought_that_the_prompt_has_begun_is_one_from_the_first_token() -> None:
    talk = Talk(speech(), thinking=True)
    talk.say([b"One", b"</think>", b"Two"])
    assert (talk.text(ReasoningDelta), talk.text(TextDelta)) == ("One", "Two")
    assert talk.finished.usage.reasoning_tokens == 2


def test_stop_strings_end_words_and_nothing_else() -> None:
    talk = Talk(speech(), stop=("STOP", "é"))
    talk.say([b"<think>", b"STOP ", b"here</think>", CALL.encode(), b"\nGo ", b"ST", b"OP on"])
    assert talk.text(ReasoningDelta) == "STOP here"
    assert talk.calls == [("f", '{"a": "é"}')]
    assert talk.text(TextDelta) == "Go "
    assert talk.finished.stop_sequence == "STOP"


def test_marks_that_are_control_tokens_are_seen_although_they_are_not_text() -> None:
    talk = Talk(speech(MISTRAL, None, **{"[TOOL_CALLS]": 1, "[ARGS]": 2}))
    assert talk.vocab.token(b"") == 1
    assert talk.vocab.token(b"") == 2
    for token in (talk.vocab.token(b"Look [ARGS]"), 1, talk.vocab.token(b"now"), 2, talk.vocab.token(b"{}"), END):
        reason = talk.emitter.take(talk.sequence, token)
    assert reason == "stop"
    talk.emitter.finished(talk.sequence, reason)
    talk.emitter.flush()
    assert talk.text(TextDelta) == "Look [ARGS]"
    assert talk.calls == [("now", "{}")]


def test_without_tools_or_thoughts_all_is_words() -> None:
    for choice, tools in ((ToolChoice(mode="none"), TOOLS), (ToolChoice(), ())):
        talk = Talk(speech(thoughts=None), tool_choice=choice, tools=tools)
        talk.say([CALL.encode()])
        assert talk.text(TextDelta) == CALL
        assert talk.finished.reason == "stop"


def test_a_thought_beyond_its_budget_is_to_be_closed_at_a_whole_character() -> None:
    talk = Talk(speech(), reasoning=Reasoning(max_tokens=3), thinking=True)
    answer, sequence = talk.sequence.answer, talk.sequence
    for piece, due in ((b"a", False), (b"b", False), ("é".encode()[:1], False), ("é".encode()[1:], True)):
        talk.emitter.take(sequence, talk.vocab.token(piece))
        assert bool(answer.overdue(sequence.reasoning_tokens + len(sequence.unseen))) == due
    assert answer.overdue(sequence.reasoning_tokens) == (7, 8)
    talk.emitter.take(sequence, talk.vocab.token(b"</think>"))
    assert answer.overdue(sequence.reasoning_tokens) == ()


def test_turns_of_words_are_remembered_and_others_are_not() -> None:
    plain = Talk(speech())
    plain.say([b"Hello", b" there"])
    assert len(plain.turns) == 1
    for text in (b"<think>x</think>Hello", CALL.encode()):
        talk = Talk(speech())
        talk.say([text])
        assert len(talk.turns) == 0


@pytest.mark.parametrize("length", range(1, 60, 7))
def test_an_answer_that_is_cut_ends_as_length(length: int) -> None:
    talk = Talk(speech())
    talk.sequence.max_tokens = length
    talk.say([bytes([byte]) for byte in CALL.encode()])
    assert talk.finished.reason == "length"
    assert talk.finished.usage.completion_tokens == length
