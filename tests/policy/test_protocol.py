"""What whoever judges content is shown, and what counts as a verdict."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ocserve.generation import (
    ChatPrompt,
    EmbedRequest,
    FillPrompt,
    Image,
    Message,
    ReasoningDelta,
    ScoreRequest,
    TextDelta,
    TextPrompt,
    TokenPrompt,
    Tool,
    ToolCall,
    ToolCallDelta,
)
from ocserve.policy.protocol import Asker, NoVerdict, Question, Refusal, Said, verdict

ASKER = Asker("req-1", "key-1", "tiny")
HEAD = {"version": 1, "request_id": "req-1", "key": "key-1", "model": "tiny"}


def shown(question: Question) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(question.encoded())
    assert {name: found.pop(name) for name in HEAD} == HEAD
    return found


def test_a_conversation_is_shown_with_its_calls_and_tools_and_images_as_a_count() -> None:
    turns = (
        Message(role="system", content="Be kind."),
        Message(role="user", content="Look", images=(Image(data=b"secret pixels", at=0), Image(data=b"x", at=0))),
        Message(role="assistant", reasoning="Hm.", tool_calls=(ToolCall(id="c1", name="see", arguments='{"a":1}'),)),
        Message(role="tool", content="A cat", tool_call_id="c1", name="see"),
    )
    tools = (Tool(name="see", description="Looks.", parameters='{"type":"object"}'),)
    question = ASKER.of_prompt(ChatPrompt(messages=turns, tools=tools))
    assert b"pixels" not in question.encoded()
    assert shown(question) == {
        "stage": "prompt",
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Look", "images": 2},
            {
                "role": "assistant",
                "content": "",
                "reasoning": "Hm.",
                "tool_calls": [{"id": "c1", "name": "see", "arguments": '{"a":1}'}],
            },
            {"role": "tool", "content": "A cat", "tool_call_id": "c1", "name": "see"},
        ],
        "tools": [{"name": "see", "description": "Looks.", "parameters": '{"type":"object"}'}],
    }


def test_everything_else_is_a_text() -> None:
    fill = FillPrompt(prefix="def f(", suffix="): pass", files=(("a.py", "x = 1"),))
    assert shown(ASKER.of_prompt(TextPrompt(text="Once"))) == {"stage": "prompt", "text": "Once"}
    assert shown(ASKER.of_prompt(TokenPrompt(tokens=(1, 2)), "Hi"))["text"] == "Hi"
    assert shown(ASKER.of_prompt(fill))["text"] == "a.py\n\nx = 1\n\ndef f(\n\n): pass"
    embed = EmbedRequest(
        request_id="", model="m", inputs=(TextPrompt(text="a"), TokenPrompt(tokens=(1,)), TextPrompt(text="c"))
    )
    assert shown(ASKER.of_inputs(embed, ["b"]))["text"] == "a\n\nb\n\nc"
    score = ScoreRequest(request_id="", model="m", query="q", documents=("d", "e"))
    assert shown(ASKER.of_inputs(score))["text"] == "q\n\nd\n\ne"


def test_an_answer_is_shown_with_what_was_thought_and_called() -> None:
    said = Said()
    assert not said
    for event in (
        ReasoningDelta(text="Hm", tokens=1),
        TextDelta(text="Hel", tokens=1),
        TextDelta(text="lo", tokens=1),
        ToolCallDelta(call=0, name="f", arguments='{"a'),
        ToolCallDelta(call=1, name="g", arguments="{}"),
        ToolCallDelta(call=0, arguments='":1}'),
    ):
        said.add(event)
    assert said
    assert shown(ASKER.of_answer(said, 2)) == {
        "stage": "answer",
        "text": "Hello",
        "reasoning": "Hm",
        "tool_calls": [{"name": "f", "arguments": '{"a":1}'}, {"name": "g", "arguments": "{}"}],
        "choice": 2,
    }


def test_a_verdict_allows_or_says_what_is_held_against_the_content() -> None:
    assert verdict(b'{"allow": true}') is None
    assert verdict(b' {"allow": false, "category": "hate/threat", "message": "No."}\n') == Refusal("hate/threat", "No.")


@pytest.mark.parametrize(
    "answer",
    [
        *(b"", b"allow", b"{}", b"true", b'{"allow": 1}', b'{"allow": "true"}', b'{"allow": null}', b"\xff\xfe"),
        *(b'{"allow": true} {"allow": true}', b'{"allow": true, "note": ""}', b'{"allow": true, "category": "x"}'),
        *(b'{"allow": false}', b'{"allow": false, "category": "x"}', b'{"allow": false, "message": "x"}'),
        *(b'{"allow": false, "category": "x", "message": ""}', b'{"allow": false, "category": "", "message": "x"}'),
        b'{"allow": false, "category": "a b", "message": "x"}',
        b'{"allow": false, "category": "a\\n", "message": "x"}',
        b'{"allow": false, "category": "x", "message": "%b"}' % (b"x" * 1001),
    ],
)
def test_anything_else_is_no_verdict(answer: bytes) -> None:
    with pytest.raises(NoVerdict):
        verdict(answer)
