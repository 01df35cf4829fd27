"""Golden transcripts of the two encoders, and the messages that they are made from."""

from __future__ import annotations

import json
from typing import Any

from ocserve.api import openai_chat, openai_completions
from ocserve.api.dialect import Encoder, Reply
from ocserve.errors import EngineCrashed
from ocserve.generation import Failed, Finished, GenerateEvent, Started, TextDelta, Usage
from tests.api.test_fields import parse

EVENTS: list[GenerateEvent] = [
    Started(prompt_tokens=7, cached_tokens=3),
    TextDelta(text="Hel", tokens=1),
    TextDelta(text="", tokens=1),
    TextDelta(text="lo", tokens=1),
    Finished(reason="stop", usage=Usage(prompt_tokens=7, cached_tokens=3, completion_tokens=4)),
]
USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 4,
    "total_tokens": 11,
    "prompt_tokens_details": {"cached_tokens": 3, "audio_tokens": 0, "image_tokens": 0},
    "completion_tokens_details": {
        "reasoning_tokens": 0,
        "audio_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    },
}


TOTAL = Usage(prompt_tokens=7, cached_tokens=3, completion_tokens=4)
# Two choices, interleaved, the second ending first.
TWO: list[GenerateEvent] = [
    Started(prompt_tokens=7, cached_tokens=3),
    TextDelta(text="Hel", tokens=1),
    TextDelta(text="By", tokens=1, index=1),
    Finished(reason="length", usage=Usage(prompt_tokens=7, cached_tokens=3, completion_tokens=1), index=1),
    TextDelta(text="lo", tokens=1),
    Finished(reason="stop", usage=Usage(prompt_tokens=7, cached_tokens=3, completion_tokens=3)),
]


def transcript(encoder: Encoder, events: list[GenerateEvent]) -> list[Any]:
    frames = [*encoder.open(), *(frame for event in events for frame in encoder.event(event))]
    if isinstance(events[-1], Finished):
        frames += encoder.close(TOTAL)
    return [frame.data if frame.data == b"[DONE]" else json.loads(frame.data) for frame in frames]


def reply(include_usage: bool = False, choices: int = 1) -> Reply:
    return Reply(id="abc", model="tiny", created=17, choices=choices, include_usage=include_usage)


def test_a_chat_stream_is_word_for_word_as_documented() -> None:
    head = {"id": "chatcmpl-abc", "object": "chat.completion.chunk", "created": 17, "model": "tiny"}

    def chunk(delta: Any, reason: str | None = None) -> Any:
        return {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}

    assert transcript(openai_chat.encoder(reply()), EVENTS) == [
        chunk({"role": "assistant", "content": "", "refusal": None}),
        chunk({"content": "Hel"}),
        chunk({"content": "lo"}),
        chunk({}, "stop"),
        {**head, "choices": [], "usage": USAGE},
        b"[DONE]",
    ]


def test_usage_is_null_on_earlier_chunks_only_if_it_was_asked_for() -> None:
    plain = transcript(openai_chat.encoder(reply()), EVENTS)[:-1]
    asked = transcript(openai_chat.encoder(reply(include_usage=True)), EVENTS)[:-1]
    assert ["usage" in chunk for chunk in plain] == [False] * 4 + [True]
    assert [chunk["usage"] for chunk in asked] == [None] * 4 + [USAGE]


def test_an_error_ends_the_stream_without_done() -> None:
    failed = Failed(error=EngineCrashed("The engine process died.").info)
    last = transcript(openai_chat.encoder(reply()), [*EVENTS[:2], failed])[-1]
    assert last == {
        "error": {
            "message": "The engine process died.",
            "type": "server_error",
            "param": None,
            "code": "engine_crashed",
        }
    }


def test_a_whole_chat_answer() -> None:
    assert json.loads(openai_chat.encoder(reply()).complete(EVENTS, TOTAL)) == {
        "id": "chatcmpl-abc",
        "object": "chat.completion",
        "created": 17,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }


def test_several_choices_keep_their_indices_in_a_stream() -> None:
    chunks = transcript(openai_chat.encoder(reply(choices=2)), TWO)
    assert [
        (choice["index"], choice["delta"], choice["finish_reason"]) for c in chunks[:-2] for choice in c["choices"]
    ] == [
        (0, {"role": "assistant", "content": "", "refusal": None}, None),
        (1, {"role": "assistant", "content": "", "refusal": None}, None),
        (0, {"content": "Hel"}, None),
        (1, {"content": "By"}, None),
        (1, {}, "length"),
        (0, {"content": "lo"}, None),
        (0, {}, "stop"),
    ]
    assert (chunks[-2]["choices"], chunks[-2]["usage"], chunks[-1]) == ([], USAGE, b"[DONE]")


def test_a_whole_answer_has_its_choices_in_order() -> None:
    chat = json.loads(openai_chat.encoder(reply(choices=2)).complete(TWO, TOTAL))
    text = json.loads(openai_completions.encoder(reply(choices=2)).complete(TWO, TOTAL))
    for answer, said in ((chat, lambda choice: choice["message"]["content"]), (text, lambda choice: choice["text"])):
        assert [(c["index"], said(c), c["finish_reason"]) for c in answer["choices"]] == [
            (0, "Hello", "stop"),
            (1, "By", "length"),
        ]
        assert answer["usage"] == USAGE


def test_drafted_tokens_are_reported_as_predictions() -> None:
    usage = Usage(prompt_tokens=1, completion_tokens=9, accepted_draft_tokens=5, rejected_draft_tokens=2)
    details = json.loads(openai_chat.encoder(reply()).complete(EVENTS, usage))["usage"]["completion_tokens_details"]
    assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (5, 2)


def test_a_completion_stream_and_a_whole_one() -> None:
    head = {"id": "cmpl-abc", "object": "text_completion", "created": 17, "model": "tiny"}

    def chunk(text: str, reason: str | None = None) -> Any:
        return {**head, "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]}

    assert transcript(openai_completions.encoder(reply()), EVENTS) == [
        chunk("Hel"),
        chunk("lo"),
        chunk("", "stop"),
        {**head, "choices": [], "usage": USAGE},
        b"[DONE]",
    ]
    assert json.loads(openai_completions.encoder(reply()).complete(EVENTS, TOTAL)) == {
        **chunk("Hello", "stop"),
        "usage": USAGE,
    }


def test_messages_become_turns() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = parse(
        messages=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "name": "ann", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "audio": None},
            {"role": "tool", "tool_call_id": "c1", "content": "4"},
        ]
    ).request.prompt.messages
    assert [turn.role for turn in turns] == ["developer", "user", "assistant", "tool"]
    assert (turns[1].content, turns[1].name) == ("ab", "ann")
    assert turns[2].tool_calls[0].name == "f"
    assert turns[3].tool_call_id == "c1"


def test_what_an_sdk_sends_back_as_history_is_accepted() -> None:
    dumped = {
        "role": "assistant",
        "content": "Hi",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
        "reasoning_content": "hm",
    }
    parsed = parse(messages=[{"role": "user", "content": "Hi"}, dumped, {"role": "user", "content": "Bye"}])
    assert parsed.ignored == ("messages[1].annotations",)
    assert parsed.request.prompt.messages[1].reasoning == "hm"
