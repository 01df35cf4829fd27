"""Golden transcripts of the two encoders, and the messages that they are made from."""

from __future__ import annotations

import json
from typing import Any

from msgspec.structs import replace

from ocserve.api import openai_chat, openai_completions
from ocserve.api.dialect import Encoder, Reply
from ocserve.api.openai_chunks import ChatEncoder
from ocserve.api.openai_wire import fingerprint
from ocserve.errors import EngineCrashed
from ocserve.generation import (
    Failed,
    Finished,
    GenerateEvent,
    ReasoningDelta,
    Started,
    TextDelta,
    TokenChance,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from tests.api.test_fields import parse
from tests.http.harness import MODEL

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


def reply(include_usage: bool | None = None, choices: int = 1) -> Reply:
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


def test_a_client_that_wants_no_usage_gets_none() -> None:
    assert not any(
        "usage" in chunk for chunk in transcript(openai_chat.encoder(reply(include_usage=False)), EVENTS)[:-1]
    )


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


CALL_EVENTS: list[GenerateEvent] = [
    Started(prompt_tokens=7, cached_tokens=3),
    ToolCallDelta(call=0, name="f", tokens=1),
    ToolCallDelta(call=0, arguments='{"a"', tokens=1),
    ToolCallDelta(call=0, arguments=":1}", tokens=1),
    ToolCallDelta(call=1, name="g", arguments="{}", tokens=1),
    Finished(reason="tool_calls", usage=Usage(prompt_tokens=7, cached_tokens=3, completion_tokens=4)),
]


def deltas(encoder: Encoder, events: list[GenerateEvent]) -> list[tuple[int, Any, str | None]]:
    return [
        (choice["index"], choice["delta"], choice["finish_reason"])
        for chunk in transcript(encoder, events)[:-2]
        for choice in chunk["choices"]
    ]


def call(index: int, name: str, arguments: str = "", choice: int = 0) -> dict[str, Any]:
    return {
        "id": f"call_abc{choice:02d}{index:02d}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def fragment(index: int, arguments: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}


def test_a_call_is_announced_with_the_role_and_said_once() -> None:
    assert deltas(ChatEncoder(reply(), calls=True), CALL_EVENTS) == [
        (
            0,
            {"role": "assistant", "content": None, "tool_calls": [{"index": 0, **call(0, "f")}], "refusal": None},
            None,
        ),
        (0, fragment(0, '{"a"'), None),
        (0, fragment(0, ":1}"), None),
        (0, {"tool_calls": [{"index": 1, **call(1, "g")}]}, None),
        (0, fragment(1, "{}"), None),
        (0, {}, "tool_calls"),
    ]


def test_words_before_a_call_are_content() -> None:
    events = [
        CALL_EVENTS[0],
        TextDelta(text="Let me see.", tokens=3),
        ToolCallDelta(call=0, name="g", arguments="{}", tokens=1),
        CALL_EVENTS[-1],
    ]
    assert deltas(ChatEncoder(reply(), calls=True), events)[:3] == [
        (0, {"role": "assistant", "content": "", "refusal": None}, None),
        (0, {"content": "Let me see."}, None),
        (0, {"tool_calls": [{"index": 0, **call(0, "g")}]}, None),
    ]
    message = json.loads(ChatEncoder(reply(), calls=True).complete(events, TOTAL))["choices"][0]["message"]
    assert (message["content"], message["tool_calls"]) == ("Let me see.", [call(0, "g", "{}")])


def test_a_whole_answer_with_calls_has_no_content() -> None:
    answer = json.loads(ChatEncoder(reply(), calls=True).complete(CALL_EVENTS, TOTAL))
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "tool_calls": [call(0, "f", '{"a":1}'), call(1, "g", "{}")],
            },
            "logprobs": None,
            "finish_reason": "tool_calls",
        }
    ]


def test_a_later_choice_that_speaks_first_announces_those_before_it() -> None:
    events: list[GenerateEvent] = [
        Started(prompt_tokens=1),
        ToolCallDelta(call=0, name="f", tokens=1, index=1),
        TextDelta(text="a", tokens=1),
        Finished(reason="tool_calls", usage=Usage(), index=1),
        Finished(reason="stop", usage=Usage()),
    ]
    said = deltas(ChatEncoder(reply(choices=2), calls=True), events)
    assert [index for index, _, _ in said] == [0, 1, 0, 1, 0]
    assert [delta.get("role") for _, delta, _ in said] == ["assistant", "assistant", None, None, None]


def test_an_answer_that_says_nothing_still_has_a_role() -> None:
    events: list[GenerateEvent] = [Started(prompt_tokens=1), Finished(reason="stop", usage=Usage())]
    assert deltas(ChatEncoder(reply(), calls=True), events) == [
        (0, {"role": "assistant", "content": "", "refusal": None}, None),
        (0, {}, "stop"),
    ]


THOUGHTS: list[GenerateEvent] = [
    Started(prompt_tokens=1),
    ReasoningDelta(text="Let me", tokens=2),
    ReasoningDelta(text=" think.", tokens=2),
    TextDelta(text="4", tokens=1),
    Finished(reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=5, reasoning_tokens=4)),
]


def test_thoughts_are_told_under_the_names_that_clients_look_for() -> None:
    first, second = (
        {
            "reasoning_content": text,
            "reasoning": text,
            "reasoning_details": [{"type": "reasoning.text", "text": text, "index": 0, **format_}],
        }
        for text, format_ in (("Let me", {"format": "unknown"}), (" think.", {}))
    )
    assert [delta for _, delta, _ in deltas(ChatEncoder(reply()), THOUGHTS)][1:] == [
        first,
        second,
        {"content": "4"},
        {},
    ]
    message = json.loads(ChatEncoder(reply()).complete(THOUGHTS, TOTAL))["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Let me think.", "4")


def test_thoughts_that_nobody_wants_to_see_are_left_out() -> None:
    hidden = Reply(id="abc", model="tiny", created=17, show_reasoning=False)
    said = [delta for _, delta, _ in deltas(ChatEncoder(hidden), THOUGHTS)]
    assert said[1:] == [{"content": "4"}, {}]
    assert "think" not in ChatEncoder(hidden).complete(THOUGHTS, TOTAL).decode()


def chance(text: bytes, logprob: float, *top: tuple[bytes, float]) -> TokenLogprob:
    others = tuple(TokenChance(0, piece, each) for piece, each in top)
    return TokenLogprob(chosen=TokenChance(0, text, logprob), top=others)


def test_log_probabilities_are_those_of_what_is_said() -> None:
    euro = "€".encode()
    events: list[GenerateEvent] = [
        Started(prompt_tokens=1),
        ReasoningDelta(text="hm", tokens=1, logprobs=(chance(b"hm", -9.0),)),
        TextDelta(text="Hi", tokens=1, logprobs=(chance(b"Hi", -0.5, (b"Hi", -0.5), (b"Yo", -1.5)),)),
        TextDelta(text="€", tokens=2, logprobs=(chance(euro[:2], -0.1), chance(euro[2:], -0.2))),
        ToolCallDelta(call=0, name="f", arguments="{}", tokens=1, logprobs=(chance(b"{}", -0.3),)),
        Finished(reason="tool_calls", usage=Usage()),
    ]
    encoder = ChatEncoder(reply(), calls=True, logprobs=True)
    listed = [c["logprobs"] for chunk in transcript(encoder, events)[:-2] for c in chunk["choices"]]
    assert listed[0] == {"content": [], "refusal": None}
    assert listed[-1] is None
    tokens = [token for each in listed if each for token in each["content"]]
    assert tokens[0] == {
        "token": "Hi",
        "logprob": -0.5,
        "bytes": [72, 105],
        "top_logprobs": [
            {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]},
            {"token": "Yo", "logprob": -1.5, "bytes": [89, 111]},
        ],
    }
    assert [token["token"] for token in tokens[1:]] == ["\\xe2\\x82", "\\xac", "{}"]
    assert bytes(tokens[1]["bytes"] + tokens[2]["bytes"]).decode() == "€"
    whole = json.loads(ChatEncoder(reply(), calls=True, logprobs=True).complete(events, TOTAL))
    assert whole["choices"][0]["logprobs"] == {"content": tokens, "refusal": None}


def test_what_computes_the_answer_has_a_name_that_stays() -> None:
    body = json.dumps(
        {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "service_tier": "auto"}
    ).encode()
    parsed = openai_chat.parse(body, lambda name: MODEL, refuse_unknown=True)
    assert parsed.encoder is not None
    answers = [json.loads(parsed.encoder(reply()).complete(EVENTS, TOTAL)) for _ in range(2)]
    assert answers[0]["system_fingerprint"] == answers[1]["system_fingerprint"]
    assert answers[0]["system_fingerprint"].startswith("fp_")
    assert answers[0]["service_tier"] == "default"
    assert fingerprint(MODEL) != fingerprint(replace(MODEL, quantisation="Q8_0"))


def test_a_prediction_that_nothing_is_drafted_from_is_named() -> None:
    def ignored(**extra: Any) -> tuple[str, ...]:
        said = {"type": "content", "content": "red, blue"}
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "prediction": said, **extra}
        return openai_chat.parse(json.dumps(body).encode(), lambda name: MODEL, refuse_unknown=True).ignored

    tool = {"type": "function", "function": {"name": "f"}}
    assert ignored() == ()
    assert ignored(tools=[tool], tool_choice="none") == ()
    for extra in ({"seed": 1}, {"response_format": {"type": "json_object"}}, {"tools": [tool]}):
        assert ignored(**extra) == ("prediction",)
