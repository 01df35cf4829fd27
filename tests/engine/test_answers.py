"""What sampled tokens become for a client: thoughts, words and calls, each token counted once and where it belongs."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from ocserve.chat import reasoning
from ocserve.chat.speech import Speech
from ocserve.chat.tool_formats import FORMATS, GENERIC
from ocserve.generation import Finished, Message, Reasoning, ReasoningDelta, TextDelta, ToolCallDelta, ToolChoice
from tests.engine.talk import END, TOOLS, USER, Talk

THINK = next(form for form in reasoning.FORMATS if form.name == "think")
MISTRAL = next(form for form in FORMATS if form.name == "mistral")
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'


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


@pytest.mark.parametrize("first", ["Go ST", "Go "])
def test_what_a_stop_string_might_have_begun_with_stands_before_the_call_that_follows_it(first: str) -> None:
    talk = Talk(speech(thoughts=None), stop=("STOP",), logprobs=0)
    talk.say([first.encode(), b"S", CALL.encode(), b"TOP", b" on"])
    said = [(type(event), getattr(event, "text", "")) for event in talk.events]
    before = [text for kind, text in said[: [kind for kind, _ in said].index(ToolCallDelta)]]
    assert "".join(before) == first + "S"
    assert talk.text(TextDelta) == first + "STOP on"  # before and after a call are not one text
    assert talk.finished.reason == "tool_calls"
    told = [chance.chosen.piece for event in talk.events if isinstance(event, TextDelta) for chance in event.logprobs]
    assert told == [first.encode(), b"S", b"TOP", b" on"]


def test_log_probabilities_are_those_of_the_words_and_not_of_the_marks_before_them() -> None:
    marks = {"<|channel|>": 1, "<|message|>": 2, "<|end|>": 3, "<|start|>": 4}
    harmony = next(form for form in FORMATS if form.name == "harmony")
    thoughts = next(form for form in reasoning.FORMATS if form.name == "harmony")
    for tools in ((), TOOLS):
        talk = Talk(speech(harmony, thoughts, **marks), tools=tools, logprobs=0)
        talk.say([1, b"analysis", 2, b"Hm", 3, 4, b"assistant", 1, b"final", 2, b"Hello", b" there"])
        for kind, pieces in ((ReasoningDelta, [b"Hm"]), (TextDelta, [b"Hello", b" there"])):
            chances = [each for event in talk.events if isinstance(event, kind) for each in event.logprobs]
            assert [chance.chosen.piece for chance in chances] == pieces
        talk = Talk(speech(harmony, thoughts, **marks), tools=tools, logprobs=0)
        talk.say([1, b"final", 2, b"Hello", b" there"])
        assert [len(event.logprobs) for event in talk.events if isinstance(event, TextDelta)] == [2]


def test_a_turn_that_is_continued_has_begun_already() -> None:
    functionary = next(form for form in FORMATS if form.name == "functionary_v3.2")
    continued = (USER, Message(role="assistant", content="I look"))
    for choice in (ToolChoice(), ToolChoice(mode="none")):
        talk = Talk(speech(functionary, None), messages=continued, tool_choice=choice)
        talk.say([b" and", b" see >> it."])
        assert talk.text(TextDelta) == " and see >> it."
    talk = Talk(speech(functionary, None), messages=continued)
    talk.say([b" at once.>>>", b"now\n", b"{}"])
    assert (talk.text(TextDelta), talk.calls) == (" at once.", [("now", "{}")])
    talk = Talk(speech(functionary, None), messages=(USER,))
    talk.say([b"all\nHello"])
    assert talk.text(TextDelta) == "Hello"


def test_marks_that_are_control_tokens_are_seen_although_they_are_not_text() -> None:
    talk = Talk(speech(MISTRAL, None, **{"[TOOL_CALLS]": 1, "[ARGS]": 2}))
    talk.say([b"Look [ARGS]", 1, b"now", 2, b"{}"])
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
