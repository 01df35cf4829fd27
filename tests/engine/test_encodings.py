"""tiktoken's ids are llama.cpp's, or llama.cpp tokenises; and neither keeps the decode loop waiting."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from ocserve.engine import encodings, llama
from ocserve.engine import merges as merging
from ocserve.engine.bindings import api
from ocserve.engine.encodings import Encoding, PlainTokenizer, Splitting, Unsupported, Vocabulary
from ocserve.engine.merges import ALPHABET
from tests.chat import conftest as chat

models_folder = chat.models_folder

KNOWN = ("llama-bpe", "mpt", "gpt-2", "qwen2", "starcoder", "refact", "command-r")
MEGABYTE = 1_000_000
CHARACTERS = (
    "abcdesSTLlvmr'’ \t\n\r0123.,;!?{}()<>|_-=/\\\"#$%&*+~^`"
    "éßжЖ中あアㄱ한🎈👩ไนि٣½²Ⅷªʰǅ\u0301\u200d\u00a0\u3000\u2028\u2003\x00\x1f\x7f\x85\ufffd\ufeff\u1c89\U000105c0\U000e0001\U0010ffff"
)
PIECES = (
    "the ",
    " of",
    "'s",
    "'LL",
    "  ",
    "\n\n",
    "function",
    "tion",
    "2024",
    "<s>",
    "日本",
    "<|im_end|>",
    "::",
    "==",
    "//",
)


def vocab_only(path: Path) -> llama.Vocab:
    log = llama.LoadLog()
    parameters = api.llama_model_default_params()
    parameters.vocab_only = True
    vocab = llama.Vocab(api.llama_model_load_from_file(str(path).encode(), parameters))
    log.close()
    return vocab


def proven(path: Path) -> tuple[llama.Vocab, PlainTokenizer]:
    vocab = vocab_only(path)
    return vocab, encodings.prove(vocab, lambda: encodings.build(path))


def by_llama(vocab: llama.Vocab, text: str) -> list[int]:
    return vocab.tokenize(text, parse_special=False)


def random_texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    parts = (*CHARACTERS, *PIECES)
    texts = ["".join(draw.choices(parts, k=draw.randrange(1, 60))) for _ in range(count)]
    # Long words, of few letters: where merges compete, and where tiktoken changes its algorithm.
    return texts + ["".join(draw.choices(draw.sample(CHARACTERS, 2), k=draw.randrange(90, 700))) for _ in range(40)]


@pytest.fixture(scope="module")
def smol(smollm2: Path) -> tuple[llama.Vocab, PlainTokenizer]:
    return proven(smollm2)


def test_the_real_model_is_tokenised_by_tiktoken(smol: tuple[llama.Vocab, PlainTokenizer]) -> None:
    assert (smol[1].name, smol[1].reason) == ("tiktoken", None)


def test_any_text_has_llama_cpps_ids(smol: tuple[llama.Vocab, PlainTokenizer], full: bool) -> None:
    vocab, plain = smol
    texts = st.text() | st.lists(st.sampled_from((*CHARACTERS, *PIECES))).map("".join)

    @settings(max_examples=20_000 if full else 400, deadline=None)
    @given(texts)
    def check(text: str) -> None:
        assert plain(text) == by_llama(vocab, text)

    check()


@pytest.mark.parametrize("name", KNOWN)
def test_vocabularies_of_every_known_splitting(models_folder: Path, name: str, full: bool) -> None:
    if name not in KNOWN[:2] and not full:
        pytest.skip("building takes up to seconds: run with --full")
    vocab, plain = proven(models_folder / f"ggml-vocab-{name}.gguf")
    assert (plain.name, plain.reason) == ("tiktoken", None)
    for text in (Path(__file__).read_text(), *random_texts(20_000 if full else 200, seed=1)):
        assert plain(text) == by_llama(vocab, text)


def test_every_character_in_every_neighbourhood(smol: tuple[llama.Vocab, PlainTokenizer], full: bool) -> None:
    vocab, plain = smol
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000][:: 1 if full else 61]
    for at in range(0, len(codes), 256):
        chars = map(chr, codes[at : at + 256])
        text = "".join(f"a{c}b {c}{c} 1{c}1 .{c}.  {c}  {c}\n{c}'s{c}'s\n" for c in chars)
        assert plain(text) == by_llama(vocab, text)


def test_a_surrogate_alone_is_refused_by_both(smol: tuple[llama.Vocab, PlainTokenizer]) -> None:
    for tokenize in (smol[1], lambda text: by_llama(smol[0], text)):
        with pytest.raises(UnicodeEncodeError):
            tokenize("a\ud800b")


@pytest.mark.parametrize("name", ["llama-spm", "bert-bge", "gpt-neox", "falcon", "deepseek-llm", "qwen35", "gemma-4"])
def test_other_vocabularies_stay_with_llama_cpp_and_say_why(models_folder: Path, name: str) -> None:
    with pytest.raises(Unsupported, match=r"byte-level|words are split"):
        encodings.build(models_folder / f"ggml-vocab-{name}.gguf")


@pytest.mark.parametrize("pattern", [r"\S+|\s+", r" ?\p{L}+|\p{N}+|[^\p{L}\p{N}]", r".|\s"])
def test_an_encoding_that_fails_the_probe_is_not_used(models_folder: Path, pattern: str) -> None:
    path = models_folder / "ggml-vocab-gpt-2.gguf"
    vocab = vocab_only(path)
    wrong = Encoding(dataclasses.replace(encodings.read(path), splitting=Splitting(pattern)))
    plain = PlainTokenizer(vocab, wrong)
    assert plain.name == "llama.cpp"
    assert plain.reason is not None
    assert "probe" in plain.reason
    assert plain("It's 12 o'clock ") == by_llama(vocab, "It's 12 o'clock ")


def test_a_broken_header_is_a_reason_and_not_a_crash(models_folder: Path, tmp_path: Path) -> None:
    whole = (models_folder / "ggml-vocab-gpt-2.gguf").read_bytes()
    draw = random.Random(3)
    for _ in range(40):
        data = bytearray(whole[: draw.randrange(len(whole))])
        for _ in range(draw.randrange(3)):
            at = draw.randrange(min(len(data), 4000) or 1)
            data[at : at + 8] = draw.randbytes(8)
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(data)
        with pytest.raises(Unsupported):
            encodings.build(broken)
    with pytest.raises(Unsupported):
        encodings.build(tmp_path / "none.gguf")


def merged(text: str, merges: list[str], tokens: list[str], *, whole: bool) -> list[str]:
    """Byte-pair encoding as llama.cpp does it: the pair that stands first in the list, the leftmost of equals."""
    if whole and text in tokens:
        return [text]
    parts = list(text)
    while True:
        pairs = [f"{left} {right}" for left, right in pairwise(parts)]
        ranked = [(merges.index(pair), at) for at, pair in enumerate(pairs) if pair in merges]
        if not ranked:
            return parts
        _, at = min(ranked)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@st.composite
def merge_lists(draw: st.DrawFn) -> tuple[list[str], bool]:
    """Merges, and whether words are taken whole. Some merges never happen, some make the same text."""
    texts, merges = ["a", "b", "c"], []
    for _ in range(draw(st.integers(1, 14))):
        left, right = draw(st.sampled_from(texts)), draw(st.sampled_from(texts))
        if f"{left} {right}" not in merges and len(left + right) < 12:
            merges.append(f"{left} {right}")
            texts.append(left + right)
    if draw(st.booleans()):
        return merges, False
    # As tiktoken's vocabularies are converted: every pair that makes a token, token by token.
    order = draw(st.permutations(list(dict.fromkeys(texts))))
    splits = ((text[:at], text[at:]) for text in order for at in range(1, len(text)))
    return [f"{left} {right}" for left, right in splits if {left, right} <= {*order}], True


@settings(max_examples=300, deadline=None)
@given(merge_lists(), st.lists(st.text("abc", min_size=1, max_size=120), min_size=1, max_size=5))
def test_an_encoding_joins_what_the_list_of_merges_joins(drawn: tuple[list[str], bool], words: list[str]) -> None:
    merges, whole = drawn
    tokens = list(dict.fromkeys((*ALPHABET, *(merge.replace(" ", "") for merge in merges))))
    try:
        encoding = Encoding(Vocabulary(Splitting(r"\S+|\s+", whole_words=whole), tokens, merges))
    except Unsupported:
        reject()  # hypothesis complains if this is the rule
    for word in (*words, *tokens[256:]):
        found = [tokens[token] for token in encoding.tokenize(word)]
        assert found == merged(word, merges, tokens, whole=whole)


@settings(max_examples=300, deadline=None)
@given(merge_lists())
def test_merges_that_are_all_live_are_found_so_at_once(drawn: tuple[list[str], bool]) -> None:
    found = merging._all_live(drawn[0])
    try:
        texts = merging._live_one_by_one(drawn[0])
    except Unsupported:
        texts = []
    assert found == (texts if len(texts) == len(ALPHABET) + len(drawn[0]) else None)


def test_the_merges_of_a_real_model_are_asked_at_once(smollm2: Path) -> None:
    """One by one they are a third of a second of every start."""
    assert merging._all_live(encodings.read(smollm2).merges) is not None


@pytest.mark.parametrize(
    ("merges", "whole"),
    [
        (["ab c", "a b"], False),  # fires as soon as `ab` exists, ahead of what stands between
        (["a b", "b c", "ab c"], True),  # `a bc` makes the same text and is not in the list
        (["a b", "b c", "ab c", "c a", "a bc"], True),  # the merges that make `abc` are apart
    ],
)
def test_lists_that_ranks_cannot_express_are_refused(merges: list[str], whole: bool) -> None:
    tokens = [*ALPHABET, *dict.fromkeys(merge.replace(" ", "") for merge in merges)]
    with pytest.raises(Unsupported):
        Encoding(Vocabulary(Splitting(r"\S+|\s+", whole_words=whole), tokens, merges))


@pytest.mark.parametrize("text", ["a", "1", " ", "é"])
def test_a_megabyte_of_one_thing_takes_bounded_time(smol: tuple[llama.Vocab, PlainTokenizer], text: str) -> None:
    vocab, plain = smol
    long = (text * MEGABYTE)[:MEGABYTE]
    seconds = timed(lambda: plain(long))
    assert seconds < 8  # some tenths of a second on an idle machine; quadratic time would be minutes
    tenth = long[: MEGABYTE // 10]
    assert plain(tenth) == by_llama(vocab, tenth)


def timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def test_other_threads_go_on_while_a_megabyte_is_tokenised(smol: tuple[llama.Vocab, PlainTokenizer]) -> None:
    """A thread that wakes each millisecond, as a decode step does, waits a small part of the tokenising time."""
    text = (Path(__file__).read_text() * 100)[:MEGABYTE]
    stalls = []
    for _ in range(5):
        seconds: list[float] = []
        work = threading.Thread(target=lambda into=seconds: into.append(timed(lambda: smol[1](text))))
        work.start()
        worst = 0.0
        while work.is_alive():
            worst = max(worst, timed(lambda: time.sleep(0.001)))
        work.join()
        stalls.append(worst / seconds[0])
    assert min(stalls) < 0.3  # held throughout, the lock would make it 1
