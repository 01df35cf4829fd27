"""Every piece of two real vocabularies, as bytes and as text: what the model means, what a client gets."""

from __future__ import annotations

import mmap
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ocserve.chat import reasoning
from ocserve.chat.speech import Speech
from ocserve.chat.tool_formats import GENERIC
from ocserve.engine.answers import Answer, AnswerPlan
from ocserve.engine.llama import Vocab
from tests.engine.talk import Talk
from tests.engine.test_constraint import load
from tests.streams.surfaces import TEXTS

THINK = next(form for form in reasoning.FORMATS if form.name == "think")


def byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for what follows 255, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


LETTERS = byte_letters()


def of_letters(text: str) -> bytes:
    """The bytes of a token that is written in GPT-2's letters."""
    return bytes(LETTERS[letter] for letter in text)


def of_words(text: str) -> bytes:
    """The bytes of a token that is written as SentencePiece does it."""
    return text.replace("\u2581", " ").encode()


# Sizes of GGUF's numbers and flags by their type; 8 is a string, 9 an array.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Header:
    """The strings, and arrays of strings and 32-bit numbers, in the metadata of a GGUF file."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as self._data:
            self._at = 16
            self.values = {self._string().decode(): self._value(self._number("<I")) for _ in range(self._number("<Q"))}

    def _number(self, form: str) -> int:
        [number] = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return int(number)

    def _string(self) -> bytes:
        size = self._number("<Q")
        self._at += size
        return self._data[self._at - size : self._at]

    def _value(self, kind: int) -> Any:
        if kind == 8:
            return self._string()
        if kind != 9:
            self._at += SIZES[kind]
            return None
        of, count = self._number("<I"), self._number("<Q")
        if of == 8:
            return [self._string() for _ in range(count)]
        self._at += SIZES[of] * count
        return struct.unpack_from(f"<{count}i", self._data, self._at - 4 * count) if SIZES[of] == 4 else None


def spelled(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Every token of a model file and what its entry there spells; None for those that are no text."""
    values = Header(path).values
    read: Callable[[str], bytes] = of_letters if values["tokenizer.ggml.model"] == b"gpt2" else of_words
    kinds = values["tokenizer.ggml.token_type"]
    for token, (spelling, kind) in enumerate(zip(values["tokenizer.ggml.tokens"], kinds, strict=True)):
        text = spelling.decode()
        if kind == BYTE:
            yield token, bytes([int(text[3:5], 16)])
        elif kind in (NORMAL, USER_DEFINED):
            yield token, read(text) if kind == NORMAL else text.encode()
        else:
            assert kind in (UNKNOWN, CONTROL, UNUSED)
            yield token, None


@pytest.fixture(scope="module", params=["smollm2", "gemma"])
def model(request: pytest.FixtureRequest, full: bool) -> Path:
    if request.param == "gemma" and not full:
        pytest.skip("five times as many pieces: part of the full form")
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def vocab(model: Path) -> Vocab:
    return load(model)


def test_every_piece_is_what_the_model_file_spells(model: Path, vocab: Vocab) -> None:
    pieces = list(vocab.pieces())
    assert len(pieces) == vocab.size
    marks = {token.id for token in vocab.marked() if token.kind != "user_defined"}
    said = 0
    for token, wanted in spelled(model):
        # llama.cpp makes a control token of what ends an answer, also where the file does not.
        assert pieces[token] == (b"" if wanted is None or token in marks else wanted), token
        said += bool(pieces[token])
    assert said >= vocab.size - len(marks) > 0.95 * vocab.size


def text_of(answer: Answer, pieces: list[bytes]) -> str:
    parts = [part for token, piece in enumerate(pieces) for part in answer.feed(token, piece)]
    return "".join(part.text for part in (*parts, *answer.finish()))


@pytest.mark.timeout(3000)
def test_every_piece_alone_and_among_others_becomes_its_text(vocab: Vocab, full: bool) -> None:
    pieces = list(vocab.pieces())
    speech = Speech.of(GENERIC, THINK, {})
    plans = [AnswerPlan(), AnswerPlan(speech=speech, tools={"f": frozenset()})] if full else [AnswerPlan()]
    for plan in plans:
        for piece in pieces:
            assert text_of(plan.open(()), [piece]) == piece.decode("utf-8", "replace")
    chance = random.Random(11)
    for _ in range(2 if full else 1):
        chance.shuffle(pieces)
        assert text_of(AnswerPlan().open(("\ufffd no such end",)), pieces) == b"".join(pieces).decode(
            "utf-8", "replace"
        )


@pytest.mark.timeout(3000)
def test_every_piece_leaves_on_every_surface_as_its_text(vocab: Vocab, full: bool) -> None:
    pieces = [piece for piece in vocab.pieces() if piece]
    random.Random(12).shuffle(pieces)
    size = 400
    for begin in range(0, len(pieces) if full else size, size):
        some = pieces[begin : begin + size]
        talk = Talk(None, logprobs=0)
        talk.say(some, flush=random.Random(begin))
        text = b"".join(some).decode("utf-8", "replace")
        for surface in TEXTS:
            stream, whole = surface.both(talk.events)
            assert stream == whole
            assert whole.all("words") == text
            assert not whole.tokens or whole.tokens == some
