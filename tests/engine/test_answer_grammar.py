"""Random walks under the grammar of an answer: whatever may be sampled is read back as valid calls of given tools."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ocserve.chat import reasoning
from ocserve.chat.arguments import arguments_schema, bare_texts
from ocserve.chat.channels import Channels, Part
from ocserve.chat.grammar import MOST_CALLS, answer_grammar, offered
from ocserve.chat.reasoning import ReasoningFormat
from ocserve.chat.speech import Speech
from ocserve.chat.tool_formats import FORMATS, GENERIC, ToolFormat
from ocserve.engine import constraint, llama
from ocserve.engine.constraint import GrammarCompiler
from ocserve.errors import InvalidRequest
from ocserve.generation import GrammarConstraint, JsonConstraint, Tool, ToolChoice
from tests.engine.test_constraint import Walker, allowed, answer, compiler_of, load

pytestmark = pytest.mark.beside

PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 9}, "maxItems": 2},
        "exact": {"type": "boolean"},
    },
    "required": ["city", "days"],
}
NESTED = {
    "$defs": {"point": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
    "properties": {"at": {"$ref": "#/$defs/point"}, "label": {"type": ["string", "null"], "maxLength": 8}},
    "required": ["at"],
    "additionalProperties": False,
}
TOOLS = (
    Tool(name="get_weather", description="the weather", parameters=json.dumps(PLACE)),
    Tool(name="get", parameters=json.dumps(NESTED)),
    Tool(name="now"),
)
ALL: tuple[ToolFormat, ...] = (*FORMATS, GENERIC)
HERMES = next(form for form in FORMATS if form.name == "hermes")
THINK = next(form for form in reasoning.FORMATS if form.name == "think")
HARMONY = next(form for form in reasoning.FORMATS if form.name == "harmony")
# Marks that are control tokens in the vocabularies of their models.
CONTROL_MARKS = (
    *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"),
    *(
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
        "<|channel|>",
        "<|message|>",
        "<|start|>",
        "<|constrain|>",
        "<|end|>",
    ),
    *("<|START_ACTION|>", "<|END_ACTION|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|tool_call|>"),
    *("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    *("<|tool_calls_section_end|>", "<|/tool_call|>"),
)


@pytest.fixture(scope="module")
def vocab(smollm2: Path) -> llama.Vocab:
    return load(smollm2)


@pytest.fixture(scope="module")
def compiler(vocab: llama.Vocab) -> GrammarCompiler:
    compiler = compiler_of(vocab)
    compiler.build()
    return compiler


def speech_of(vocab: llama.Vocab, form: ToolFormat, thoughts: ReasoningFormat | None = None) -> Speech:
    """A speech whose control marks are tokens of this vocabulary that end nothing."""
    free = iter(token.id for token in vocab.marked() if token.kind == "control" and not vocab.is_end(token.id))
    texts = " ".join((*form.texts(), *((thoughts.begin, thoughts.end) if thoughts else ())))
    controls = {mark: next(free) for mark in CONTROL_MARKS if mark in texts}
    ends = frozenset(token for token in range(vocab.size) if vocab.is_end(token))
    if "<|call|>" in texts:
        controls["<|call|>"] = min(ends)
    return Speech.of(form, thoughts, controls, ends)


def parts_of(vocab: llama.Vocab, speech: Speech, ids: list[int], **rest: Any) -> list[Part]:
    channels = Channels(speech, **rest)
    parts: list[Part] = []
    pending = b""
    for token in ids:
        mark = speech.marks.by_id.get(token)
        pending += vocab.piece(token) if mark is None else b""
        try:
            text, pending = pending.decode(), b""
        except UnicodeDecodeError:
            continue
        parts += channels.feed(text + (mark or ""))
    return parts + channels.finish()


def calls_of(parts: list[Part]) -> list[tuple[str, Any]]:
    names = [part.name for part in parts if part.name is not None]
    arguments = [
        "".join(part.text for part in parts if part.channel == "call" and part.call == call)
        for call in range(len(names))
    ]
    return [(name, json.loads(text)) for name, text in zip(names, arguments, strict=True)]


def readable(tools: tuple[tuple[int, Tool], ...]) -> dict[str, frozenset[str]]:
    return {tool.name: bare_texts(tool) for _, tool in tools}


def check(calls: list[tuple[str, Any]], tools: tuple[tuple[int, Tool], ...]) -> None:
    by_name = {tool.name: tool for _, tool in tools}
    for name, arguments in calls:
        assert isinstance(arguments, dict)
        jsonschema.Draft7Validator(json.loads(arguments_schema(by_name[name]))).validate(arguments)


def ids_of(vocab: llama.Vocab, speech: Speech, text: str) -> list[int]:
    """A format's text as tokens."""
    marks = {mark: token for token, mark in speech.marks.by_id.items()}
    pieces = re.split(f"([{''.join(marks)}])", speech.marks.marked(text)) if marks else [text]
    return [
        token
        for piece in pieces
        for token in ([marks[piece]] if piece in marks else vocab.tokenize(piece, parse_special=False))
    ]


class Steered:
    """Walks at random, and brings strings to their end with the help of any text that a format needs."""

    def __init__(self, vocab: llama.Vocab, seed: int, helpful: list[list[int]]) -> None:
        self._walker = Walker(vocab, seed, free=12)
        self._random = random.Random(seed)
        self._path: list[int] = []
        self._helpful = [ids for ids in helpful if ids]

    def __call__(self, tokens: Any, step: int) -> int:
        usable = set(tokens.tolist())
        if not self._path and self._helpful and step > 12 and self._random.random() < 0.4:
            self._path = self._helpful.pop(self._random.randrange(len(self._helpful)))
        if self._path:
            token = self._path.pop(0)
            if token in usable:
                return token
            self._path = []
        return self._walker(tokens, step)


@pytest.mark.parametrize("form", ALL, ids=[form.name for form in ALL])
@pytest.mark.parametrize("mode", ["required", "one", "named", "auto"])
def test_random_walks_end_in_valid_calls(
    compiler: GrammarCompiler, vocab: llama.Vocab, form: ToolFormat, mode: str, full: bool
) -> None:
    thoughts = HARMONY if form.name == "harmony" else THINK if mode == "auto" else None
    speech = speech_of(vocab, form, thoughts)
    choice = {
        "required": ToolChoice(mode="required"),
        "one": ToolChoice(mode="required", parallel=False),
        "named": ToolChoice(mode="required", names=("get",)),
        "auto": ToolChoice(),
    }[mode]
    tools = offered(TOOLS, choice)
    grammar = answer_grammar(speech, TOOLS, choice, None)
    assert grammar is not None
    start = compiler.guide(grammar)
    texts = [
        *[form.argument.after if form.argument else ""] * 40,
        form.trigger,
        *([thoughts.end] * 40 if thoughts else []),
    ]
    closers = [ids_of(vocab, speech, text) for text in texts]
    seen = 0
    for seed in range(30 if full else 3):
        ids = answer(start.copy(), vocab, Steered(vocab, seed, list(closers)))
        parts = parts_of(vocab, speech, ids, tools=readable(tools))
        calls = calls_of(parts)
        check(calls, tools)
        seen += len(calls)
        if mode != "auto":
            assert calls
            assert not any(part.channel == "content" and part.text.strip() for part in parts)
            assert {name for name, _ in calls} <= {tool.name for _, tool in tools}
        if mode == "one" or not form.parallel:
            assert len(calls) <= 1
        assert len(calls) <= MOST_CALLS
    assert seen or mode == "auto"


def forced_text(vocab: llama.Vocab, compiler: GrammarCompiler, grammar: Any, text: str) -> tuple[bool, bool]:
    """Whether this text may be written from the start, and whether the answer may end behind it."""
    current, rest = compiler.guide(grammar), text.encode()
    while rest:
        choices = current.forced()[:1] or allowed(current, vocab).tolist()
        fitting = [token for token in choices if vocab.piece(token) and rest.startswith(vocab.piece(token))]
        if not fitting:
            return current.forced() != [] and vocab.piece(choices[0]).startswith(rest), False
        token = max(fitting, key=lambda each: len(vocab.piece(each)))
        current.accept(token)
        rest = rest[len(vocab.piece(token)) :]
    return True, current.may_end


def test_words_are_free_until_the_mark_and_calls_are_held_to_the_tools_after_it(
    compiler: GrammarCompiler, vocab: llama.Vocab
) -> None:
    grammar = answer_grammar(speech_of(vocab, HERMES), TOOLS, ToolChoice(), None)
    for text in ("Hello", "<tool>", "<tool_cal", '{"name": "x"}', "</tool_call>\n\n`1 < 2`"):
        assert forced_text(vocab, compiler, grammar, text) == (True, True)
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert forced_text(vocab, compiler, grammar, "Well. " + call) == (True, True)
    assert forced_text(vocab, compiler, grammar, call + "\n" + call) == (True, True)
    assert forced_text(vocab, compiler, grammar, call[:30]) == (True, False)
    for text in ("<tool_call>no", '<tool_call>\n{"name": "nobody"', call.replace("{}", '{"a":1}'), call + "More"):
        assert forced_text(vocab, compiler, grammar, text) == (False, False)


def test_llamas_answer_is_free_unless_it_begins_like_a_call_of_a_tool(
    compiler: GrammarCompiler, vocab: llama.Vocab
) -> None:
    llama_format = next(form for form in FORMATS if form.name == "llama")
    grammar = answer_grammar(speech_of(vocab, llama_format), TOOLS, ToolChoice(), None)
    for text in ("Hello", '{"name": "John"}', '{"name": "now"', "{}", "1"):
        assert forced_text(vocab, compiler, grammar, text)[0]
    assert forced_text(vocab, compiler, grammar, '{"name":"now", "parameters": {}}') == (True, True)
    assert forced_text(vocab, compiler, grammar, '{"name": "now", "oops') == (False, False)
    assert forced_text(vocab, compiler, grammar, '{"name": "now" now') == (False, False)


def test_a_thought_comes_first_and_is_free(compiler: GrammarCompiler, vocab: llama.Vocab) -> None:
    speech = speech_of(vocab, GENERIC, THINK)
    schema = JsonConstraint(schema='{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}')
    for thinking, begin in ((False, "<think>"), (True, "")):
        grammar = answer_grammar(speech, (), ToolChoice(), schema, thinking=thinking)
        thought = begin + "hm <tool_call> {</think>"
        for space in ("", "\n\n", "\n"):
            assert forced_text(vocab, compiler, grammar, thought + space + '{"a":1}') == (True, True)
        assert forced_text(vocab, compiler, grammar, thought + "\n\nNo") == (False, False)
        assert forced_text(vocab, compiler, grammar, begin + "hm")[1] is False
        assert forced_text(vocab, compiler, grammar, '{"a":1}') == ((True, False) if thinking else (True, True))
        calling = answer_grammar(speech, TOOLS, ToolChoice(mode="required"), None, thinking=thinking)
        assert forced_text(vocab, compiler, calling, thought + "\n\n<tool_call>")[0]
        free = answer_grammar(speech, TOOLS, ToolChoice(), None, thinking=thinking)
        assert forced_text(vocab, compiler, free, thought + "Words") == (True, True)
        assert forced_text(vocab, compiler, free, thought + "Words <tool_call>No") == (False, False)


def test_a_value_or_calls_where_both_are_asked_for(compiler: GrammarCompiler, vocab: llama.Vocab) -> None:
    schema = JsonConstraint(schema='{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}')
    grammar = answer_grammar(speech_of(vocab, GENERIC), TOOLS, ToolChoice(), schema)
    assert forced_text(vocab, compiler, grammar, '{"a":1}') == (True, True)
    assert forced_text(vocab, compiler, grammar, '<tool_call>\n{"name": "now"')[0]
    assert not forced_text(vocab, compiler, grammar, "Words")[0]


def test_grammars_of_clients(compiler: GrammarCompiler, vocab: llama.Vocab) -> None:
    regex = compiler.guide(GrammarConstraint(text="[a-c]{3}/x", syntax="regex"))
    assert vocab_text(vocab, answer(regex, vocab, Walker(vocab, 1)))[3:] == "/x"
    lark = compiler.guide(GrammarConstraint(text='start: "yes" | "no"', syntax="lark"))
    assert vocab_text(vocab, answer(lark, vocab, Walker(vocab, 1))) in ("yes", "no")
    for text in ('start: "canary', "start: other", '%llguidance {"no_forcing": true}\nstart: "a"', "x" * 70_000):
        with pytest.raises(InvalidRequest) as refusal:
            compiler.guide(GrammarConstraint(text=text, syntax="lark"))
        assert refusal.value.param == "response_format.grammar"
        assert "canary" not in str(refusal.value)


def vocab_text(vocab: llama.Vocab, ids: list[int]) -> str:
    return b"".join(map(vocab.piece, ids)).decode()


def test_a_refused_tool_is_named_by_its_index(compiler: GrammarCompiler, vocab: llama.Vocab) -> None:
    for bad in ('{"not": {}}', '{"type": "array", "uniqueItems": true}', "[1]", "{", '{"type": "array"}'):
        tools = (*TOOLS, Tool(name="bad", parameters=bad))
        grammar = answer_grammar(speech_of(vocab, GENERIC), tools, ToolChoice(), None)
        assert grammar is not None
        with pytest.raises(InvalidRequest) as refusal:
            compiler.guide(grammar)
        assert refusal.value.param == "tools[3].function.parameters"


def test_without_tools_to_call_or_a_value_nothing_is_constrained(vocab: llama.Vocab) -> None:
    speech = speech_of(vocab, GENERIC)
    assert answer_grammar(speech, TOOLS, ToolChoice(mode="none"), None) is None
    assert answer_grammar(speech, (), ToolChoice(), None) is None


def multiples(*numbers: int) -> tuple[Tool, ...]:
    schema = '{{"type": "object", "properties": {{"n": {{"type": "integer", "multipleOf": {}}}}}, "required": ["n"]}}'
    return tuple(Tool(name=f"tool_{number}", parameters=schema.format(number)) for number in numbers)


def test_many_tools_are_bounded_together(
    compiler: GrammarCompiler, vocab: llama.Vocab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what their schemas are known to take, and by the time that each of them took alone."""
    speech = speech_of(vocab, GENERIC)
    small = answer_grammar(speech, multiples(*range(5, 25)), ToolChoice(), None)
    large = answer_grammar(speech, multiples(*range(9_001, 9_161)), ToolChoice(), None)
    assert small is not None
    assert large is not None
    begun = time.thread_time()
    with pytest.raises(InvalidRequest, match="together") as refusal:
        compiler.guide(large)
    assert refusal.value.param == "tools"
    assert time.thread_time() - begun < 1
    with monkeypatch.context() as impatient:
        impatient.setattr(constraint, "_MOST_COMPILING_S", 1e-5)
        with pytest.raises(InvalidRequest, match="together") as refusal:
            compiler.guide(small)
    assert refusal.value.param == "tools"
    compiler.guide(small)


def test_a_tool_is_compiled_alone_once(
    compiler: GrammarCompiler, vocab: llama.Vocab, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    compile_grammar = compiler._compile

    def counted(grammar: str) -> Any:
        compiled.append(grammar)
        return compile_grammar(grammar)

    monkeypatch.setattr(compiler, "_compile", counted)
    speech, tools = speech_of(vocab, GENERIC), multiples(*range(31, 41))
    bad = Tool(name="bad", parameters='{"not": {"type": "null"}}')
    for offered_tools, times in ((tools[:8], 8 + 1), (tools, 2 + 1), ((*tools, bad), 1), ((*tools[:9],), 1)):
        grammar = answer_grammar(speech, offered_tools, ToolChoice(), None)
        assert grammar is not None
        compiled.clear()
        if bad in offered_tools:
            with pytest.raises(InvalidRequest, match="'not'") as refusal:
                compiler.guide(grammar)
            assert refusal.value.param == "tools[10].function.parameters"
        else:
            compiler.guide(grammar)
        assert len(compiled) == times
