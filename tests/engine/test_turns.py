"""Assistant turns keep their tokens: the next prompt begins with what was computed, however it is tokenised."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ocserve.chat.specials import Control, Text, Verbatim
from ocserve.engine import llama
from ocserve.engine.tokens import PromptEncoder
from ocserve.engine.turns import Opening, Quoter, Turns
from ocserve.errors import InvalidRequest
from ocserve.generation import ChatPrompt, GenerateRequest, Message, Role, Sampling
from tests.chat import conftest as chat
from tests.engine.test_encodings import vocab_only

models_folder = chat.models_folder
real_templates = chat.real_templates

PLAIN = "{% for m in messages %}{{ m.role|upper }}:{{ m.content }}\n{% endfor %}ASSISTANT:"
# vocabulary and template: two of byte-level BPE, one that begins texts with a space, one without control tokens
CASES = (
    ("qwen2", "Qwen-Qwen2.5-7B-Instruct"),
    ("llama-bpe", "meta-llama-Llama-3.1-8B-Instruct"),
    ("phi-3", "microsoft-Phi-3.5-mini-instruct"),
    ("gpt-2", "plain"),
)
ANSWER = "It's unbelievable: 東京 has 13,960,000 inhabitants.\n\n```py\nprint('x' * 100)\n```"


def request(*contents: str, salt: bytes = b"one") -> GenerateRequest:
    roles: tuple[Role, ...] = ("user", "assistant")
    messages = tuple(Message(role=roles[index % 2], content=text) for index, text in enumerate(contents))
    prompt = ChatPrompt(messages=messages)
    return GenerateRequest(request_id="r", model="m", prompt=prompt, sampling=Sampling(), max_tokens=1, salt=salt)


def divided(vocab: llama.Vocab, text: str) -> list[int]:
    """The text as no tokenizer divides it: character by character, byte by byte where there is no such token."""
    ids = {piece: token for token, piece in enumerate(vocab.pieces())}
    found = []
    for char in text:
        data = char.encode()
        found += [ids[data]] if data in ids else [ids[bytes([byte])] for byte in data]
    return found


def text_of(vocab: llama.Vocab, ids: tuple[int, ...] | list[int]) -> str:
    return b"".join(map(vocab.piece, ids)).decode()


@pytest.fixture(params=CASES, ids=lambda case: case[1])
def encoder(
    request: pytest.FixtureRequest, models_folder: Path, real_templates: dict[str, str]
) -> tuple[llama.Vocab, PromptEncoder, Turns]:
    name, template = request.param
    vocab, turns = vocab_only(models_folder / f"ggml-vocab-{name}.gguf"), Turns()
    source = PLAIN if template == "plain" else real_templates[template]
    return vocab, PromptEncoder(vocab, source, context=8192, turns=turns), turns


def test_the_next_prompt_begins_with_the_last_one_and_its_sampled_tokens(
    encoder: tuple[llama.Vocab, PromptEncoder, Turns],
) -> None:
    vocab, encode, turns = encoder
    first = encode.encode(request("Hi")).ids
    sampled = tuple(divided(vocab, ANSWER))
    canonical = encode.encode(request("Hi", ANSWER, "Go on")).ids
    assert canonical[: len(first) + len(sampled)] != first + sampled

    turns.remember(b"one", ANSWER, sampled)
    second = encode.encode(request("Hi", ANSWER, "Go on")).ids
    assert second[: len(first) + len(sampled)] == first + sampled
    # Tokenised anew, a vocabulary of SentencePiece begins the answer with a space that was not sampled.
    assert text_of(vocab, second).replace(" ", "") == text_of(vocab, canonical).replace(" ", "")
    assert encode.encode(request("Hi", ANSWER, "Go on", salt=b"two")).ids == canonical

    again = tuple(divided(vocab, "Yes"))
    turns.remember(b"one", "Yes", again)
    third = encode.encode(request("Hi", ANSWER, "Go on", "Yes", "Yes ASSISTANT: Yes")).ids
    assert third[: len(second) + len(again)] == second + again
    assert encode.encode(request("Hi", ANSWER, "Go on", "Yes")).ids[-len(again) :] == again  # to be continued


def test_every_real_template_that_repeats_its_prompt_in_history_repeats_its_tokens(
    models_folder: Path, real_templates: dict[str, str], full: bool
) -> None:
    vocab = vocab_only(models_folder / "ggml-vocab-gpt-2.gguf")
    sampled = tuple(divided(vocab, ANSWER))
    repeating = 0
    for source in list(real_templates.values())[:: 1 if full else 4]:
        turns = Turns()
        encode = PromptEncoder(vocab, source, context=16384, turns=turns)
        try:
            first, canonical = encode.encode(request("Hi")).ids, encode.encode(request("Hi", ANSWER, "Go on")).ids
        except InvalidRequest:
            continue
        turns.remember(b"one", ANSWER, sampled)
        ids = encode.encode(request("Hi", ANSWER, "Go on")).ids
        assert text_of(vocab, ids) == text_of(vocab, canonical)
        if text_of(vocab, canonical).startswith(text_of(vocab, first) + ANSWER):
            assert ids[: len(first) + len(sampled)] == first + sampled
            repeating += 1
    assert repeating >= (20 if full else 5)


def test_a_trimming_template_keeps_the_tokens_before_the_trimmed_ones(models_folder: Path) -> None:
    vocab, turns = vocab_only(models_folder / "ggml-vocab-gpt-2.gguf"), Turns()
    encode = PromptEncoder(vocab, PLAIN.replace("m.content", "m.content|trim"), context=512, turns=turns)
    sampled = divided(vocab, "Well, yes \n")
    turns.remember(b"one", "Well, yes \n", sampled)
    ids = encode.encode(request("Hi", "Well, yes \n", "So")).ids
    kept = encode.encode(request("Hi")).ids + tuple(sampled[:-2])
    assert ids[: len(kept)] == kept
    assert text_of(vocab, ids) == "USER:Hi\nASSISTANT:Well, yes\nUSER:So\nASSISTANT:"


def test_remembered_control_tokens_never_come_from_content(models_folder: Path, real_templates: dict[str, str]) -> None:
    vocab, turns = vocab_only(models_folder / "ggml-vocab-qwen2.gguf"), Turns()
    encode = PromptEncoder(vocab, real_templates["Qwen-Qwen2.5-7B-Instruct"], context=8192, turns=turns)
    control = {token.id for token in vocab.marked() if token.kind == "control"}
    canonical = encode.encode(request("Hi", "Yes, no", "Go on")).ids
    ids = divided(vocab, "Yes, no")
    for token in sorted(control):
        turns.remember(b"one", "Yes, no", [*ids[:3], token, *ids[3:]])
        found = encode.encode(request("Hi", "Yes, no", "Go on")).ids
        assert [each for each in found if each in control] == [each for each in canonical if each in control]
        assert text_of(vocab, found) == text_of(vocab, canonical)


OPENING = Opening(Control("<a>"), "says: ")


def spell(token: int) -> bytes:
    return bytes([token])


def quote(text: str, content: str, ids: list[int], *, apart: bool = True) -> list[object]:
    quoter = Quoter(OPENING, spell, frozenset({0x7F}), apart=apart)
    message = Message(role="assistant", content=content)
    return list(quoter.quote((Control("<a>"), Text(text, (2, 9))), (message,), lambda _: tuple(ids)))


def test_quoted_words_are_cut_out_of_the_text_around_them() -> None:
    found = quote("says: Hello there", "Hello", list(b"Hello"))
    assert found == [Control("<a>"), Text("says: ", (2,)), Verbatim("Hello", tuple(b"Hello")), Text(" there")]


@pytest.mark.parametrize(
    ("text", "content", "ids"),
    [
        ("said: Hello", "Hello", b"Hello"),  # no opening
        ("says: Bye", "Hello", b"Hello"),  # another text
        ("says: \x7fHello", "\x7fHello", b"\x7fHello"),  # a control token, even one that has this text
        ("says: Hello", "Hello", b"\x7fHello"),
        ("says: é", "é", "é".encode()[:1]),  # half a character
    ],
)
def test_what_is_not_quoted_stays_text(text: str, content: str, ids: bytes) -> None:
    assert quote(text, content, list(ids)) == [Control("<a>"), Text(text, (2, 9))]


def test_text_after_a_turn_is_not_tokenised_apart_where_that_would_change_it() -> None:
    assert quote("says: Hello there", "Hello", list(b"Hello"), apart=False) == quote("says: Hello there", "?", [])
    assert Verbatim("Hello", tuple(b"Hello")) in quote("says: Hello", "Hello", list(b"Hello"), apart=False)


def test_an_answer_that_contains_an_opening_is_one_answer() -> None:
    quoter = Quoter(Opening(None, "A:"), spell, frozenset(), apart=True)
    answers = ("x A:x", "x")
    messages = [Message(role="assistant", content=text) for text in answers]
    parts = quoter.quote((Text("A:x A:x A:x"),), messages, lambda text: tuple(text.encode()))
    words = [Verbatim(text, tuple(text.encode())) for text in answers]
    assert parts == [Text("A:"), words[0], Text(" A:"), words[1]]


@given(st.text(), st.text(), st.integers(0, 40), st.text())
def test_quoting_never_changes_the_text(content: str, after: str, taken: int, other: str) -> None:
    ids = [*content.encode()[:taken], *other.encode()]
    text = f"says: {content}{after}"
    parts = Quoter(OPENING, spell, frozenset(), apart=True).quote(
        (Control("<a>"), Text(text)), (Message(role="assistant", content=content),), lambda _: tuple(ids)
    )
    assert "".join(part.text for part in parts) == f"<a>{text}"
    for part in parts:
        if isinstance(part, Verbatim):
            assert bytes(part.ids) == part.text.encode()


def test_turns_are_bounded_in_number_and_bytes_and_the_least_recent_go_first() -> None:
    turns = Turns(most_turns=3, most_bytes=1000)
    for text in "abc":
        turns.remember(b"s", text, [1])
    assert turns.recall(b"s", "a") == (1,)
    turns.remember(b"s", "d", [2])
    assert [turns.recall(b"s", text) for text in "abcd"] == [(1,), None, (1,), (2,)]
    turns.remember(b"s", "big", [0] * 240)
    assert len(turns) == 3
    turns.remember(b"s", "more", [0] * 240)
    assert turns.recall(b"s", "big") is None
    turns.remember(b"s", "too much", [0] * 251)
    assert len(turns) == 0


def test_a_tenant_never_recalls_anothers_turn() -> None:
    turns = Turns()
    turns.remember(b"a", "bc", [1])
    assert turns.recall(b"ab", "c") is None
    assert turns.recall(b"", "abc") is None
    assert turns.recall(b"b", "bc") is None
    assert turns.recall(b"a", "bc") == (1,)
    turns.remember(b"a", "what only the client may know", [1])
    assert "client" not in repr(vars(turns))
