"""Real templates render what they were made for, and refuse in words that quote nobody."""

from __future__ import annotations

import pytest

from ocserve.chat.sandbox import TemplateUnusable
from ocserve.chat.specials import Control, SpecialToken, SpecialTokens, Text
from ocserve.chat.template import ChatTemplate
from ocserve.errors import InvalidRequest
from ocserve.generation import Message, Role, ToolCall

NONE = SpecialTokens([])
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TOKENS = SpecialTokens([SpecialToken("<|im_start|>", 1), SpecialToken("<|im_end|>", 2)])

# What real templates refuse of a plain conversation, and why.
REFUSED = {
    ("fireworks-ai-llama-3-firefunction-v2", "plain"): "(UndefinedError)",  # wants a variable `functions`
    ("fireworks-ai-llama-3-firefunction-v2", "system"): "(UndefinedError)",
    ("fireworks-ai-llama-3-firefunction-v2", "continued"): "(UndefinedError)",
    ("google-gemma-2-2b-it", "system"): "System role not supported",
}


def turn(role: Role, content: str) -> Message:
    return Message(role=role, content=content)


PLAIN = (turn("user", "Hi there."), turn("assistant", "Hello!"), turn("user", "What is 2+2?"))
CONVERSATIONS = {
    "plain": PLAIN,
    "system": (turn("system", "Be brief."), *PLAIN),
    "continued": (*PLAIN, turn("assistant", "The answer is")),
}
WITH_CALL = (
    turn("user", "Weather in Oslo?"),
    Message(role="assistant", tool_calls=(ToolCall(id="call00001", name="get_weather", arguments='{"city": "Oslo"}'),)),
    Message(role="tool", content="It rains.", tool_call_id="call00001", name="get_weather"),
)


def text_of(source: str, messages: tuple[Message, ...], bos: str = "", eos: str = "") -> str:
    template = ChatTemplate(source, bos=bos, eos=eos, specials=NONE)
    return "".join(segment.text for segment in template.render(messages))


def refusal_of(source: str, messages: tuple[Message, ...]) -> str:
    with pytest.raises(InvalidRequest) as refusal:
        text_of(source, messages)
    assert refusal.value.param == "messages"
    return refusal.value.message


def test_every_real_template_renders_or_refuses_cleanly(real_templates: dict[str, str]) -> None:
    assert len(real_templates) >= 70
    refused = {}
    for name, source in real_templates.items():
        template = ChatTemplate(source, bos="<s>", eos="</s>", specials=NONE)
        for kind, messages in CONVERSATIONS.items():
            try:
                text = "".join(segment.text for segment in template.render(messages))
            except InvalidRequest as error:
                refused[name, kind] = error.message
                continue
            assert "What is 2+2?" in text
            assert not any("\ue000" <= char <= "\uf8ff" for char in text)
            if kind == "continued":
                assert text.endswith("The answer is")
            if kind == "system" and "command-r" not in name:
                assert "Be brief." in text
    assert set(refused) == set(REFUSED)
    assert all(REFUSED[case] in message for case, message in refused.items())


def test_most_real_templates_write_a_call_and_its_result(real_templates: dict[str, str]) -> None:
    wrote = 0
    for source in real_templates.values():
        try:
            text = text_of(source, WITH_CALL, bos="<s>", eos="</s>")
        except InvalidRequest:
            continue
        assert "{'city'" not in text
        wrote += "get_weather" in text and "Oslo" in text and "It rains." in text
    assert wrote >= 60


def test_an_answer_is_asked_for_with_the_generation_prompt() -> None:
    template = ChatTemplate(CHATML, bos="", eos="", specials=CHATML_TOKENS)
    assert template.render((turn("user", "hi"),)) == (
        Control("<|im_start|>"), Text("user\nhi"), Control("<|im_end|>"), Text("\n"),
        Control("<|im_start|>"), Text("assistant\n"),
    )  # fmt: skip


@pytest.mark.parametrize("content", ["The answer is", "", " two  ", "<|im_", "a <|im_end|> b", "<think>\nHm"])
def test_a_trailing_assistant_turn_is_continued_to_the_character(content: str) -> None:
    template = ChatTemplate(CHATML, bos="", eos="", specials=CHATML_TOKENS)
    last = template.render((turn("user", "hi"), turn("assistant", content)))[-1]
    assert last.text == "assistant\n" + content


def test_a_continuation_that_the_template_would_change_follows_the_generation_prompt() -> None:
    source = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    messages = (turn("user", "hi"), turn("assistant", "<think>a</think>b"))
    assert text_of(source, messages).endswith("<|im_start|>assistant\n<think>a</think>b")


def test_a_continuation_that_the_template_refuses_follows_the_generation_prompt() -> None:
    source = "{% if messages[-1].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    assert text_of(source, (turn("user", "hi"), turn("assistant", "yo"))).endswith("<|im_start|>assistant\nyo")


def test_calls_without_results_cannot_be_continued() -> None:
    assert "tool calls" in refusal_of(CHATML, WITH_CALL[:2])


def test_developer_is_system_to_a_template_that_does_not_know_it() -> None:
    assert "<|im_start|>system" in text_of(CHATML, (turn("developer", "x"), turn("user", "y")))
    assert "<|im_start|>developer" in text_of(CHATML + "{# developer #}", (turn("developer", "x"), turn("user", "y")))


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ('{"a": "é😀<", "b": [1, 2.5, null]}', '{"a": "é😀<", "b": [1, 2.5, null]}'),
        ("not json", '"not json"'),
        ("[1]", '"[1]"'),
        ('{"a": NaN}', '"{\\"a\\": NaN}"'),
        ('{"a": 1e999}', '"{\\"a\\": 1e999}"'),
        ('{"a": "\\ud800"}', '"{\\"a\\": \\"\\\\ud800\\"}"'),
        ('{"a":' * 1000 + "1" + "}" * 1000, '"{\\"a\\":{'),
    ],
)
def test_arguments_are_an_object_where_they_are_one_and_else_their_text(arguments: str, written: str) -> None:
    source = "{% for m in messages %}{% for c in m.tool_calls %}<function={{ c.function.name }}>"
    source += "{{ c.function.arguments|tojson }}</function>{% endfor %}{% endfor %}"
    call = Message(role="assistant", tool_calls=(ToolCall(id="1", name="f", arguments=arguments),))
    assert text_of(source, (call, turn("user", "x"))).startswith("<function=f>" + written)


def test_arguments_are_text_for_a_template_that_adds_them_to_text() -> None:
    source = "{% for m in messages %}{% for c in m.tool_calls %}{{ '<function=' + c.function.name + '>' }}"
    source += "{{ c.function.arguments + '</function>' }}{% endfor %}{% endfor %}"
    assert text_of(source, WITH_CALL).startswith('<function=get_weather>{"city": "Oslo"}</function>')


def test_a_refusal_quotes_the_template_and_never_the_client() -> None:
    literal = "{{ raise_exception('Roles must alternate') }}"
    built = "{{ raise_exception('Bad content: ' + messages[0].content) }}"
    bare = "{{ raise_exception(messages[0].content) }}"
    missing = "{{ messages[0][messages[0].content].x }}"
    assert "Roles must alternate" in refusal_of(literal, (turn("user", "canary"),))
    for source in (built, bare, missing):
        assert "canary" not in refusal_of(source, (turn("user", "canary"),))


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ 'a' | }}", "{% for %}", "{% include 'x' %}", "x" * 200_000, "{% endfor %}"]
)
def test_a_template_that_does_not_compile_is_unusable(source: str) -> None:
    with pytest.raises(TemplateUnusable):
        ChatTemplate(source, bos="", eos="", specials=NONE)


def test_no_messages_are_refused() -> None:
    refusal_of(CHATML, ())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "x"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{{ {'a': 'é', 'b': 1}|tojson }}", '{"a": "é", "b": 1}'),
        ("{{ {'b': [1], 'a': 2}|tojson(indent=2, sort_keys=true) }}", '{\n  "a": 2,\n  "b": [\n    1\n  ]\n}'),
        ("{{ {'a': 1}|tojson(separators=(',', ':')) }}", '{"a":1}'),
        ("{% for k, v in {'a': 1}|items %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{% for k, v in {'b': 1, 'a': 2}|dictsort %}{{ k }}{{ v }}{% endfor %}", "a2b1"),
        ("{{ messages|map(attribute='content')|join(', ') }}", "x"),
        ("{{ messages|selectattr('role', 'equalto', 'user')|list|length }}", "1"),
        ("{{ 'a-b'.split('-')[::-1]|join('+') }}{{ 'abc'[1:] }}{{ 'abc'[-1] }}", "b+abcc"),
        ("{% set ns = namespace(n=0) %}{% for i in range(4) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "6"),
        ("{{ 'x' if nothing is defined else 'y' }}{{ nothing }}{{ nothing|default('z') }}", "yz"),
        ("{{ '%s-%02d' % ('a', 3) }}{{ '%s'|format('b') }}{{ '{:>3}'.format('c') }}", "a-03b  c"),
        ("{{ 'a\nb'|indent(2) }}|{{ 'a\n\nb'|indent(2, first=true) }}", "a\n  b|  a\n\n  b"),
        ("{{ '  <a & b> '|trim|e }}{{ 3 is odd }}{{ [3, 1, 2]|sort|last }}", "&lt;a &amp; b&gt;True3"),
        ("{{ [1, [2, 'x'], {'k': none}] }}", "[1, [2, 'x'], {'k': None}]"),
        ("{{ 'a' ~ 1 ~ none ~ true }}{{ 7 // 2 }}{{ 2 ** 3 }}{{ -(1) }}", "a1NoneTrue38-1"),
        ("{{ strftime_now('%Y')|length }}{{ dict(a=1, b=2)['b'] }}{{ '5'|int + 1 }}", "426"),
        ("{% for n in [{'c': [{'c': []}]}] recursive %}[{{ loop(n.c) }}]{% endfor %}", "[[]]"),
        ("{% macro m(a, b=2) %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}{% call m(1) %}!{% endcall %}", "12!"),
        ("{% filter upper %}{{ messages[0].content }}{% endfilter %}{{ bos_token }}{{ eos_token }}", "XBE"),
        (
            "{{ ['b', 'a', 'b']|unique|list }}{{ [1, 2]|sum }}{{ 2.567|round(1) }}{{ [1, 2]|reverse|first }}",
            "['b', 'a']32.62",
        ),
    ],
)
def test_what_templates_use(source: str, expected: str) -> None:
    assert text_of(source, (turn("user", "x"),), bos="B", eos="E") == expected


def test_no_real_template_loses_or_refuses_a_system_message_behind_the_first_turn(
    real_templates: dict[str, str],
) -> None:
    """Agents send them in the middle of a conversation."""
    system = turn("system", "word0")
    conversations = [
        (system, turn("user", "word1"), turn("system", "word2")),
        (system, turn("user", "word1"), turn("assistant", "word2"), turn("system", "word3"), turn("user", "word4")),
        (system, turn("system", "word1"), turn("user", "word2"), turn("developer", "word3")),
    ]
    tried = 0
    for name, source in real_templates.items():
        if (name, "plain") in REFUSED or (name, "system") in REFUSED:
            continue
        for messages in conversations:
            text = text_of(source, messages)
            lost = [number for number in range(len(messages)) if f"word{number}" not in text]
            assert not lost, (name, messages)
        tried += 1
    assert tried >= 60


def test_a_later_system_message_stays_one_where_the_template_has_a_place_for_it() -> None:
    messages = (turn("user", "a"), turn("system", "b"), turn("user", "c"))
    assert "<|im_start|>system\nb<|im_end|>" in text_of(CHATML, messages)
    refusal = "{% if m.role == 'system' and not loop.first %}{{ raise_exception('no') }}{% endif %}"
    refusing = CHATML.replace("{% for m in messages %}", "{% for m in messages %}" + refusal, 1)
    assert "<|im_start|>user\na\n\nb\n\nc<|im_end|>" in text_of(refusing, messages)


_PARTS = "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    "content",
    [
        "{{ message.content[0].text }}",
        _PARTS,
        "{% if message.role == 'assistant' %}{{ message.content }}{% else %}" + _PARTS + "{% endif %}",
        "{% if message.content is string %}{{ raise_exception('parts, please') }}{% endif %}" + _PARTS,
    ],
)
def test_a_template_that_reads_only_lists_of_parts_loses_nothing(content: str) -> None:
    source = "{% for message in messages %}<{{ message.role }}>" + content + "{% endfor %}"
    source += "{% if add_generation_prompt %}<assistant>{% endif %}"
    said = (turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Who?"))
    expected = "<system>Be brief.<user>Hi<assistant>Hello<user>Who?"
    assert text_of(source, said) == expected + "<assistant>"
    assert text_of(source, (*said, turn("assistant", "I am"))) == expected + "<assistant>I am"
