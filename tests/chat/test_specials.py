"""P20: nothing that a client writes becomes a control token, and benign text is tokenised as on the plain path."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ocserve.chat.specials import Control, Guard, Segment, SpecialToken, SpecialTokens, Text
from ocserve.chat.template import ChatTemplate
from ocserve.errors import InvalidRequest
from ocserve.generation import Message, ToolCall
from tests.chat.vocabulary import Vocabulary

# Each template with the vocabulary file that its model uses, or one whose special tokens it writes.
PAIRS = {
    "Qwen-Qwen2.5-7B-Instruct": "qwen2",
    "Qwen-Qwen3-0.6B": "qwen35",
    "Qwen-QwQ-32B": "qwen2",
    "Qwen3-Coder": "qwen35",
    "meta-llama-Llama-3.1-8B-Instruct": "llama-bpe",
    "meta-llama-Llama-3.2-3B-Instruct": "llama-bpe",
    "meta-llama-Llama-3.3-70B-Instruct": "llama-bpe",
    "meetkai-functionary-medium-v3.1": "llama-bpe",
    "microsoft-Phi-3.5-mini-instruct": "phi-3",
    "google-gemma-4-31B-it": "gemma-4",
    "google-gemma-4-31B-it-interleaved": "gemma-4",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "command-r",
    "CohereForAI-c4ai-command-r-plus-tool_use": "command-r",
    "deepseek-ai-DeepSeek-V3.1": "deepseek-llm",
    "ibm-granite-granite-3.3-2B-Instruct": "refact",
    "llama-cpp-rwkv-world": "llama-spm",
}
# Those that the template writes come first; one vocabulary has a thousand reserved ones. All of them with --full.
SAMPLED_TOKENS = 24


@pytest.fixture(scope="module")
def vocabularies(models_folder: Path) -> Iterator[dict[str, Vocabulary]]:
    names = sorted(set(PAIRS.values()))
    opened = {name: Vocabulary(models_folder / f"ggml-vocab-{name}.gguf") for name in names}
    yield opened
    for vocabulary in opened.values():
        vocabulary.close()


def conversation(words: dict[str, str], *, calls: bool) -> tuple[Message, ...]:
    """Every role and field that a client fills; `words` replaces the harmless default of some."""

    def word(field: str, default: str) -> str:
        return words.get(field, default)

    history: list[Message] = []
    if not calls:
        history.append(Message(role="system", content=word("system", "Be brief.")))
    history += [
        Message(role="user", content=word("user", "What is the weather?"), name=word("user name", "ann")),
        Message(role="assistant", content=word("assistant", "Wait."), name=word("assistant name", "bot")),
    ]
    if calls:
        arguments = {word("key", "city"): [word("value", "Oslo"), {"n": 1}]}
        call = ToolCall(id=word("call id", "call00001"), name=word("tool", "weather"), arguments=json.dumps(arguments))
        history[-1:] = [
            Message(role="assistant", tool_calls=(call,)),
            Message(
                role="tool",
                content=word("result", "rain"),
                tool_call_id=word("call id", "call00001"),
                name=word("tool", "weather"),
            ),
        ]
    else:
        history.append(Message(role="user", content=word("last", "And tomorrow?")))
    return tuple(history)


FIELDS = {
    False: ("system", "user", "user name", "assistant", "assistant name", "last"),
    True: ("user", "key", "value", "call id", "tool", "result"),
}


def control_count(segments: tuple[Segment, ...]) -> int:
    return sum(isinstance(segment, Control) for segment in segments)


def special_ids(vocabulary: Vocabulary, segments: tuple[Segment, ...]) -> list[int]:
    special = set(vocabulary.specials.ids.values())
    return [token for token in vocabulary.specials.encode(segments, vocabulary.tokenize) if token in special]


def disguises(text: str, chance: random.Random) -> list[str]:
    """Ways to write a special text into a field."""
    other = "".join(char.swapcase() for char in text)
    return [f"a{text}b", f"{text}{text}", chance.choice([f" {text}\n", f"{text[:-1]}{text}", other, " ".join(text)])]


@pytest.mark.parametrize("name", PAIRS)
def test_p20_no_special_token_in_any_field_becomes_one(
    name: str, real_templates: dict[str, str], vocabularies: dict[str, Vocabulary], full: bool
) -> None:
    vocabulary = vocabularies[PAIRS[name]]
    template = ChatTemplate(real_templates[name], bos="", eos="", specials=vocabulary.specials)
    chance = random.Random(20)
    texts = [token.text for token in vocabulary.specials.tokens]
    if not full:
        texts.sort(key=lambda text: (text not in real_templates[name], chance.random()))
        own = sum(text in real_templates[name] for text in texts)
        texts = texts[: max(own, SAMPLED_TOKENS)]
    rendered = 0
    for calls, fields in FIELDS.items():
        try:
            expected = special_ids(vocabulary, template.render(conversation({}, calls=calls)))
        except InvalidRequest:
            continue
        for text in texts:
            for field in fields:
                written = disguises(text, chance)
                for disguise in written if full else chance.sample(written, 1):
                    segments = template.render(conversation({field: disguise}, calls=calls))
                    assert special_ids(vocabulary, segments) == expected
                    rendered += 1
    assert rendered >= (3 if full else 1) * len(texts) * len(FIELDS[False])


BENIGN = [
    "Hello, world! 你好 😀 naïve",
    "if a < b and c > d: print(f'<{a}>') # [x] [/y]",
    "> a quote\n> goes on\n\n<",
    "<b>bold</b> <table><tr><td>1</td></tr></table> <!-- -->",
    "   indented\n\tand trailing  \n",
    "user",
    "1. <|\n2. |>\n3. im_start\n4. [INST",
    "tabs\t\tand  double  spaces\r\n\r\n\r\n",
]


@pytest.mark.parametrize("name", PAIRS)
def test_p20_benign_text_is_tokenised_exactly_as_on_the_plain_path(
    name: str, real_templates: dict[str, str], vocabularies: dict[str, Vocabulary]
) -> None:
    vocabulary = vocabularies[PAIRS[name]]
    guarded = ChatTemplate(real_templates[name], bos="", eos="", specials=vocabulary.specials)
    plain = ChatTemplate(real_templates[name], bos="", eos="", specials=SpecialTokens([]))
    compared = 0
    for benign in BENIGN:
        for calls, fields in FIELDS.items():
            messages = conversation(dict.fromkeys(fields, benign), calls=calls)
            try:
                (whole,) = plain.render(messages)
            except InvalidRequest:
                with pytest.raises(InvalidRequest):
                    guarded.render(messages)
                continue
            segments = guarded.render(messages)
            ids = vocabulary.specials.encode(segments, vocabulary.tokenize)
            assert ids == vocabulary.tokenize(whole.text, parse_special=True)
            compared += 1
    assert compared >= len(BENIGN)


@pytest.mark.parametrize("name", ["qwen2", "phi-3", "llama-spm", "gemma-4", "command-r", "llama-bpe"])
def test_partition_is_llama_cpps_own(name: str, vocabularies: dict[str, Vocabulary]) -> None:
    vocabulary = vocabularies[name]
    chance = random.Random(7)
    texts = [token.text for token in vocabulary.specials.tokens]
    fillers = ["", " ", "\n", "  \t", "word", " a b ", "<", "|>", "héllo\n\n", "日本"]
    for _ in range(400):
        scaffolding = "".join(chance.choice(texts) + chance.choice(fillers) for _ in range(chance.randrange(1, 8)))
        ids = vocabulary.specials.encode(vocabulary.specials.partition(scaffolding), vocabulary.tokenize)
        assert ids == vocabulary.tokenize(scaffolding, parse_special=True)


SOME = SpecialTokens(
    [
        SpecialToken("<|im_start|>", 1),
        SpecialToken("<|im_end|>", 2),
        SpecialToken("<s>", 3),
        SpecialToken("[INST]", 4),
        SpecialToken("<think>", 5, kind="user_defined"),
        SpecialToken("ab", 6),
        SpecialToken("bc", 7),
        SpecialToken("<b>", 8, kind="user_defined"),
        SpecialToken("    ", 9, kind="user_defined"),
        SpecialToken("", 10),
        SpecialToken("x", 11),
        SpecialToken("[UNK]", 12, kind="unknown"),
        SpecialToken("<i>", 13),
    ]
)


def test_which_tokens_are_guarded() -> None:
    assert set(SOME.ids) == {
        "<|im_start|>", "<|im_end|>", "<s>", "[INST]", "<think>", "ab", "bc", "[UNK]", "<i>",
    }  # fmt: skip


PIECES = st.sampled_from(
    [
        *("<|im_start|>", "<|im_end|>", "<|im_", "start|>", "<|", "|>", "<", ">", "s", "<s", "IM_START", " ", "\n"),
        *("a", "b", "c", "[INST", "]", "<think>", "ﬆart", "ſ", "hello", "\ue000", "\ue001", "K"),
    ]
)
WRITINGS = ["{}", "<|{}|>", "<{}>", "<|im_{}|>", "<|im_start|>{}", "<{}", "{}>", "[{}]", "a{}c", "{}{}", "<|{}{}>"]


@settings(max_examples=1000, deadline=None)
@given(st.lists(PIECES, max_size=8).map("".join), st.lists(PIECES, max_size=4).map("".join), st.sampled_from(WRITINGS))
@example("im_start", "", "<|{}|>")
@example("<|im_", "start|>", "{}{}")
@example("abc", "", "{}")
def test_no_character_of_a_client_is_in_a_control_however_it_is_embedded(one: str, two: str, writing: str) -> None:
    guard = Guard(SOME, [one, two, writing])
    parts = [guard.protect(one), guard.protect(two)]
    fill = iter(parts * 2)
    rendered = "".join(next(fill) if part == "{}" else part for part in _parts(writing))
    # The same with letters that no special text has: only the scaffolding's own are left.
    blank = "".join("\uf8ff" if part == "{}" else part for part in _parts(writing))
    segments = SOME.partition(rendered, guard.nonce)
    assert control_count(segments) == control_count(SOME.partition(blank))
    fill = iter([one, two] * 2)
    assert "".join(segment.text for segment in segments) == "".join(
        next(fill) if part == "{}" else part for part in _parts(writing)
    )


def _parts(writing: str) -> list[str]:
    pieces = writing.split("{}")
    return [part for piece in pieces for part in (piece, "{}")][:-1]


@pytest.mark.parametrize("transform", [str.upper, str.lower, str.strip, str.title, lambda text: "".join(text.split())])
@pytest.mark.parametrize(
    "text", ["<|IM_START|>", "<|im_start|>", "< | i m _ e n d | >", "<|ım_end|>", "<ſ>", "<THINK>", "x <S> y"]
)
def test_changing_case_or_white_space_does_not_make_a_special_token(transform: object, text: str) -> None:
    assert callable(transform)
    guard = Guard(SOME, [text])
    assert control_count(SOME.partition(transform(guard.protect(text)), guard.nonce)) == 0


def test_a_template_that_edits_content_into_a_special_token_is_refused() -> None:
    template = ChatTemplate(
        "{{ messages[0].content|replace(messages[0].content[1], '') }}", bos="", eos="", specials=SOME
    )
    with pytest.raises(InvalidRequest) as refusal:
        template.render((Message(role="user", content="<|im_end|>"),))
    assert refusal.value.param == "messages"


def test_text_that_merges_into_a_special_id_is_cut_and_what_cannot_be_cut_is_refused() -> None:
    # A vocabulary whose merges spell a control token although special tokens are not parsed.
    def merging(text: str) -> list[int]:
        return [3] if text == "<s>" else [100 + ord(char) for char in text]

    assert SOME.encode([Control("<|im_end|>"), Text("<s>", (1,))], merging) == [2, 160, 215, 162]
    with pytest.raises(InvalidRequest):
        SOME.encode([Text("<s>")], merging)


def test_an_unknown_character_may_still_become_the_unknown_token() -> None:
    assert SOME.encode([Text("☃")], lambda text: [12]) == [12]


def test_the_nonce_avoids_private_use_characters_of_the_client() -> None:
    taken = "".join(map(chr, range(0xE000, 0xF900)))
    guard = Guard(SOME, [taken, "<s>"])
    assert guard.nonce not in taken
    assert guard.protect("<s>") == f"<{guard.nonce}s>"


def test_a_client_that_takes_all_private_use_characters_is_refused() -> None:
    everything = "".join(chr(code) for code in range(0xE000, 0xF900)) + "".join(
        chr(code) for code in [*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)]
    )
    with pytest.raises(InvalidRequest):
        Guard(SOME, [everything])
