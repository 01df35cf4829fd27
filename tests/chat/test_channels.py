"""Recorded texts of each family as thoughts, words and calls: the same for any division into pieces."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

import pytest

from ocserve.chat import reasoning, tool_formats
from ocserve.chat.channels import Channels, Part
from ocserve.chat.speech import Speech
from ocserve.chat.tool_formats import FORMATS, GENERIC, ToolFormat

REASONING = {form.name: form for form in reasoning.FORMATS}
TOOLS = {"get_weather": frozenset({"city"}), "add": frozenset[str](), "now": frozenset[str]()}
BY_NAME = {form.name: form for form in (*FORMATS, GENERIC)}


@dataclass
class Answer:
    """What a client gets to see."""

    content: str
    reasoning: str
    calls: list[tuple[str, str]]

    @classmethod
    def of(cls, parts: list[Part]) -> Answer:
        answer = cls("", "", [])
        for part in parts:
            if part.channel == "content":
                answer.content += part.text
            elif part.channel == "reasoning":
                answer.reasoning += part.text
            elif part.name is not None:
                assert part.call == len(answer.calls), "calls are numbered in order"
                answer.calls.append((part.name, part.text))
            else:
                name, arguments = answer.calls[part.call]
                answer.calls[part.call] = name, arguments + part.text
        return answer

    @property
    def parsed(self) -> list[tuple[str, Any]]:
        return [(name, json.loads(arguments)) for name, arguments in self.calls]


def read(
    text: str,
    tools: ToolFormat,
    thoughts: str | None = None,
    *,
    pieces: list[str] | None = None,
    thinking: bool = False,
    names: dict[str, frozenset[str]] | None = None,
    controls: dict[str, int] | None = None,
) -> Answer:
    speech = Speech.of(tools, REASONING[thoughts] if thoughts else None, controls or {})
    channels = Channels(speech, tools=TOOLS if names is None else names, thinking=thinking)
    parts = []
    for piece in pieces or [text]:
        parts += channels.feed(speech.marks.marked(piece) if controls else piece)
    parts += channels.finish()
    assert channels.finish() == []
    return Answer.of(parts)


def divided(text: str, rng: random.Random) -> list[str]:
    pieces = []
    while text:
        length = rng.choice((1, 1, 2, 3, 5, 9, 30))
        pieces.append(text[:length])
        text = text[length:]
    return pieces


WEATHER, SUM = ("get_weather", {"city": "Zürich"}), ("add", {"a": 1, "b": [2.5, {"c": '}]\\"'}]})
# (format, reasoning, prompt ends in a thought, text, content, thought, calls)
RECORDED: list[tuple[str, str | None, bool, str, str, str, list[tuple[str, Any]]]] = [
    (
        "hermes",
        None,
        False,
        'I\'ll look.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2.5, {"c": "}]\\\\\\""}]}}\n</tool_call>',
        "I'll look.",
        "",
        [WEATHER, SUM],
    ),
    (
        "hermes",
        "think",
        False,
        '<think>\nThe user wants <tool_call> weather.\n</think>\n\n<tool_call>\n{"name":"get_weather",'
        '"arguments":{"city":"Zürich"}}\n</tool_call>',
        "",
        "The user wants <tool_call> weather.",
        [WEATHER],
    ),
    ("hermes", "think", True, "So be it.\n</think>\n\nHello  there.\n", "Hello  there.\n", "So be it.", []),
    ("hermes", "think", False, "Use the <think> tag, 1 < 2.", "Use the <think> tag, 1 < 2.", "", []),
    (
        "qwen_coder",
        None,
        False,
        "Sure.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nZürich\n</parameter>\n</function>\n</tool_call>\n"
        '<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n[2.5, {"c": "}]\\\\\\""}]\n'
        "</parameter>\n</function>\n</tool_call>",
        "Sure.",
        "",
        [WEATHER, SUM],
    ),
    (
        "qwen_coder",
        None,
        False,
        '<tool_call>\n<function=get_weather>\n<parameter=city>\n  two\n"lines" </p>\n\n</parameter>\n</function>\n'
        "</tool_call>",
        "",
        "",
        [("get_weather", {"city": '  two\n"lines" </p>\n'})],
    ),
    (
        "qwen_coder",
        None,
        False,
        '<tool_call>\n<function=add>\n<parameter=b>\n["a</parameter>b", "\\"</parameter>"]\n</parameter>\n</function>\n'
        "</tool_call>",
        "",
        "",
        [("add", {"b": ["a</parameter>b", '"</parameter>']})],
    ),
    ("qwen_coder", None, False, "<tool_call>\n<function=now>\n</function>\n</tool_call>", "", "", [("now", {})]),
    (
        "seed",
        "seed",
        True,
        "hm</seed:think>\n<seed:tool_call>\n<function=get_weather>\n<parameter=city>Zürich</parameter>\n</function>\n"
        "</seed:tool_call>",
        "",
        "hm",
        [WEATHER],
    ),
    (
        "glm",
        "think",
        False,
        "<think>so</think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Zürich</arg_value>\n</tool_call>",
        "",
        "so",
        [WEATHER],
    ),
    (
        "minimax",
        "think",
        True,
        'so</think>\n\nI look.\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Zürich'
        '</parameter>\n</invoke>\n<invoke name="add"><parameter name="a">1</parameter>'
        '<parameter name="b">[2.5, {"c": "}]\\\\\\""}]'
        "</parameter></invoke>\n</minimax:tool_call>",
        "I look.",
        "so",
        [WEATHER, SUM],
    ),
    (
        "minimax",
        None,
        False,
        '<minimax:tool_call>\n{"name": "now", "arguments": {}}\n</minimax:tool_call>',
        "",
        "",
        [("now", {})],
    ),
    ("llama", None, False, '{"name": "get_weather", "parameters": {"city": "Zürich"}}', "", "", [WEATHER]),
    ("llama", None, False, '{"name": "John", "age": 3}', '{"name": "John", "age": 3}', "", []),
    (
        "mistral_list",
        None,
        False,
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Zürich"}}, {"name": "add", "arguments": {"a": 1, '
        '"b": [2.5, {"c": "}]\\\\\\""}]}, "id": "abcdef012"}]',
        "",
        "",
        [WEATHER, SUM],
    ),
    (
        "mistral",
        "mistral",
        False,
        '[THINK]Let me see.[/THINK]One moment.[TOOL_CALLS]get_weather[ARGS]{"city": "Zürich"}[TOOL_CALLS]now[ARGS]{}',
        "One moment.",
        "Let me see.",
        [WEATHER, ("now", {})],
    ),
    (
        "mistral_id",
        None,
        False,
        '[TOOL_CALLS]get_weather[CALL_ID]abcdef012[ARGS]{"city": "Zürich"}[TOOL_CALLS]now[CALL_ID]xbcdef012[ARGS]{}',
        "",
        "",
        [WEATHER, ("now", {})],
    ),
    (
        "deepseek",
        "think",
        True,
        "Hm.\n</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Zürich"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        "Hm.",
        [WEATHER, ("now", {})],
    ),
    (
        "deepseek_v3.1",
        None,
        False,
        'I go.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Zürich"}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "I go.",
        "",
        [WEATHER, ("now", {})],
    ),
    (
        "harmony",
        "harmony",
        False,
        "<|channel|>analysis<|message|>Need the weather.<|end|><|start|>assistant<|channel|>commentary to="
        'functions.get_weather <|constrain|>json<|message|>{"city":"Zürich"}<|call|>',
        "",
        "Need the weather.",
        [WEATHER],
    ),
    (
        "harmony",
        "harmony",
        False,
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>2 < 3",
        "2 < 3",
        "Easy.",
        [],
    ),
    (
        "command_r",
        None,
        False,
        'Action:\n```json\n[\n    {\n        "tool_name": "get_weather",\n        "parameters": {\n            "city": '
        '"Zürich"\n        }\n    }\n]\n```',
        "",
        "",
        [WEATHER],
    ),
    (
        "command_r7b",
        "command_r7b",
        False,
        '<|START_THINKING|>I will look.<|END_THINKING|><|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": '
        '"get_weather", "parameters": {"city": "Zürich"}},\n    {"tool_call_id": "1", "tool_name": "now", '
        '"parameters": {}}\n]<|END_ACTION|>',
        "",
        "I will look.",
        [WEATHER, ("now", {})],
    ),
    (
        "command_r7b",
        "command_r7b",
        False,
        "<|START_THINKING|>I know.<|END_THINKING|><|START_RESPONSE|>Here.<|END_RESPONSE|>",
        "Here.",
        "I know.",
        [],
    ),
    (
        "granite",
        "granite",
        False,
        "<think>Well.</think> <response>Yes.</response>",
        "Yes.",
        "Well.",
        [],
    ),
    (
        "granite",
        None,
        False,
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Zürich"}}, {"name": "now", "arguments": {}}]',
        "",
        "",
        [WEATHER, ("now", {})],
    ),
    (
        "phi",
        None,
        False,
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Zürich"}}]<|/tool_call|>',
        "",
        "",
        [WEATHER],
    ),
    (
        "functionary_v3.1",
        None,
        False,
        'Ok <function=get_weather>{"city": "Zürich"}</function><function=now>{}</function>',
        "Ok",
        "",
        [WEATHER, ("now", {})],
    ),
    (
        "functionary_v3.2",
        None,
        False,
        'all\nI do both.>>>get_weather\n{"city": "Zürich"}>>>now\n{}',
        "I do both.",
        "",
        [WEATHER, ("now", {})],
    ),
    ("functionary_v3.2", None, False, 'get_weather\n{"city": "Zürich"}', "", "", [WEATHER]),
    ("nemotron", None, False, '<TOOLCALL>[{"name": "now", "arguments": {}}]</TOOLCALL>', "", "", [("now", {})]),
    ("firefunction", None, False, ' functools[{"name": "now", "arguments": {}}]', "", "", [("now", {})]),
    (
        "kimi",
        None,
        False,
        "Hi<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Zürich"}<|tool_call_end|><|tool_calls_section_end|>',
        "Hi",
        "",
        [WEATHER],
    ),
    (
        "gemma",
        "gemma",
        False,
        '<|channel>thought\nHm.\n<channel|>Wait.<|tool_call>call:get_weather{"city": "Zürich"}<tool_call|>',
        "Wait.",
        "Hm.",
        [WEATHER],
    ),
    (
        "generic",
        None,
        False,
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "",
        "",
        [("now", {})],
    ),
]
IDS = [f"{form}-{index}" for index, (form, *_) in enumerate(RECORDED)]


@pytest.mark.parametrize("recorded", RECORDED, ids=IDS)
def test_a_recorded_answer_is_read_the_same_for_any_division(recorded: Any, full: bool) -> None:
    name, thoughts, thinking, text, content, thought, calls = recorded
    form = BY_NAME[name]
    whole = read(text, form, thoughts, thinking=thinking)
    assert (whole.content, whole.reasoning, whole.parsed) == (content, thought, calls)
    rng = random.Random(text)
    for _ in range(400 if full else 40):
        assert read(text, form, thoughts, thinking=thinking, pieces=divided(text, rng)) == whole


@pytest.mark.parametrize("recorded", RECORDED, ids=IDS)
def test_marks_that_are_control_tokens_are_read_as_such(recorded: Any) -> None:
    """Where the vocabulary has them, each arrives whole."""
    name, thoughts, thinking, text, content, thought, calls = recorded
    form = BY_NAME[name]
    words = {mark for mark in CONTROLS if mark in text}
    controls = {mark: 1000 + index for index, mark in enumerate(sorted(words))}
    found = read(text, form, thoughts, thinking=thinking, controls=controls)
    if name == "hermes" and thought.startswith("The user"):
        thought = "The user wants  weather."  # a control token in the midst of a thought is no text
    if "Use the" in content:
        content = content.replace("<think>", "")
    assert (found.content, found.reasoning, found.parsed) == (content, thought, calls)


CONTROLS = (
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]"),
    *("[/THINK]", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    *("<｜tool▁calls▁end｜>", "<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|constrain|>", "<|call|>"),
    *("<|START_ACTION|>", "<|END_ACTION|>", "<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>"),
    *("<|END_RESPONSE|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_calls_section_begin|>", "<|tool_call_begin|>"),
    *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>"),
    *("<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_calls_section_end|>"),
)


@pytest.mark.parametrize("recorded", RECORDED, ids=IDS)
def test_an_answer_cut_anywhere_loses_no_words_and_invents_no_call(recorded: Any) -> None:
    name, thoughts, thinking, text, _, thought, calls = recorded
    for end in range(len(text)):
        found = read(text[:end], BY_NAME[name], thoughts, thinking=thinking)
        assert [call for call, _ in found.calls] == [call for call, _ in calls[: len(found.calls)]]
        if found.reasoning.strip():
            assert thought.startswith(found.reasoning.strip()) or found.reasoning.startswith(thought)
        for got, wanted in zip(found.calls, calls, strict=False):
            complete = json.dumps(wanted[1], ensure_ascii=False)
            dense = "".join(got[1].split())
            assert "".join(complete.split()).startswith(dense)


NOT_CALLS = [
    ("hermes", '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
    ("hermes", "Write <tool_call> and then more."),
    ("hermes", "<tool_call>\n{broken"),
    ("qwen_coder", "<tool_call>\n<function=unknown>\n</function>\n</tool_call>"),
    ("llama", '{"name": "get_weather", "arguments": 5}'),
    ("functionary_v3.1", "<function=nobody>{}</function>"),
    ("deepseek_v3.1", "<｜tool▁calls▁begin｜>well"),
    ("mistral", "[TOOL_CALLS]unknown[ARGS]{}"),
]


@pytest.mark.parametrize(("name", "text"), NOT_CALLS)
def test_what_turns_out_to_be_no_call_is_given_back_as_words(name: str, text: str) -> None:
    rng = random.Random(text)
    for _ in range(20):
        found = read(text, BY_NAME[name], pieces=divided(text, rng))
        assert found.calls == []
        assert "".join(found.content.split()) == "".join(text.split())


def test_without_tools_nothing_is_taken_for_a_call() -> None:
    for name, _, _, text, *_ in RECORDED:
        form = BY_NAME[name]
        if form.say == ("", "") and not form.prompted:
            assert read(text, form, names={}).content == text


def test_text_is_not_held_back_longer_than_it_is_ambiguous() -> None:
    speech = Speech.of(BY_NAME["hermes"], REASONING["think"], {})
    channels = Channels(speech, tools=TOOLS)
    assert [part.text for part in channels.feed("Hello")] == ["Hello"]
    assert channels.feed(" <too") == []
    assert [part.text for part in channels.feed("th>")] == [" <tooth>"]
    channels.feed('<tool_call>\n{"name": "get_weather", "arguments": ')
    assert [part.text for part in channels.feed('{"ci')][-1] == '{"ci'
    assert [part.text for part in channels.feed('ty": "Z')] == ['ty": "Z']


def test_every_format_reads_what_it_writes() -> None:
    for form in (*FORMATS, GENERIC):
        calls = [("get_weather", '{"city": "Zürich"}'), ("now", "{}")][: 2 if form.parallel else 1]
        text = form.write(calls).removeprefix(form.prompted)
        assert read(text, form).calls == calls, form.name
        assert tool_formats.FORMATS.count(form) <= 1
