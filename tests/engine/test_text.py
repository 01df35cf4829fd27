"""Pieces of bytes become text: the same whatever the borders, and never past a stop string."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ocserve.engine.answers import Answer, AnswerPlan

MULTILINGUAL = (
    "The quick brown fox — “jumps” over 13 lazy dogs. Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. "
    "Съешь же ещё этих мягких французских булок. いろはにほへと ちりぬるを。 我能吞下玻璃而不伤身体。 "
    "키스의 고유조건은 צדיק הוא כי יכתוב. أبجد هوز حطي كلمن. ऋषियों को सताने वाले. 👩‍👩‍👧‍👦🏳️‍🌈🇳🇴"
    " e\u0301 \U0010ffff\ue000\x00\n\t"
)


class TextStream:
    """The words of an answer that is nothing else."""

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self._answer: Answer = AnswerPlan().open(stop)

    def feed(self, piece: bytes) -> str:
        return "".join(part.text for part in self._answer.feed(0, piece))

    def finish(self) -> str:
        return "".join(part.text for part in self._answer.finish())

    @property
    def matched(self) -> str | None:
        return self._answer.matched


def stream(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[str, str | None]:
    text = TextStream(stop)
    emitted = [text.feed(piece) for piece in pieces]
    return "".join(emitted) + text.finish(), text.matched


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cuts), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def naive(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """The definition: the first character that completes a stop string ends the text; the longest there counts."""
    for end in range(len(text) + 1):
        ending = [word for word in stop if text[:end].endswith(word)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_p19_ten_thousand_random_splits_equal_the_whole() -> None:
    chance = random.Random(19)
    data = MULTILINGUAL.encode()
    for _ in range(10_000):
        cuts = [chance.randrange(len(data) + 1) for _ in range(chance.randrange(1, 60))]
        assert stream(split(data, cuts)) == (MULTILINGUAL, None)


def test_every_single_byte_split_equals_the_whole_with_stops() -> None:
    data = MULTILINGUAL.encode()
    stop = ("булок", "булка", "никогда")
    expected = naive(MULTILINGUAL, stop)
    assert expected[1] == "булок"
    for cut in range(len(data) + 1):
        assert stream([data[:cut], data[cut:]], stop) == expected
    assert stream([bytes([byte]) for byte in data], stop) == expected


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=20))
@example(b"\xf0\x9f\x98", [1, 2])
@example(b"\xff\xfe\xf0\x9f\x98\x80\xc3", [2, 4])
def test_invalid_bytes_become_the_replacement_exactly_where_python_says(data: bytes, cuts: list[int]) -> None:
    pieces = split(data, [min(cut, len(data)) for cut in cuts])
    assert stream(pieces) == (data.decode("utf-8", "replace"), None)


def test_an_incomplete_character_waits_and_a_complete_one_does_not() -> None:
    text = TextStream()
    emoji = "😀".encode()
    assert [text.feed(emoji[index : index + 1]) for index in range(4)] == ["", "", "", "😀"]
    assert text.feed(emoji[:3]) == ""
    assert text.finish() == "\ufffd"


@settings(max_examples=2000, deadline=None)
@given(
    st.text("abc", max_size=40),
    st.lists(st.text("abc", min_size=1, max_size=6), max_size=5),
    st.lists(st.integers(0, 40), max_size=10),
)
@example("abcd", ["abcx", "bc"], [1, 2, 3])
@example("aab", ["aab", "ab", "b"], [2])
@example("ababac", ["abac"], [1, 2, 3, 4, 5])
def test_stop_strings_agree_with_the_definition(text: str, stop: list[str], cuts: list[int]) -> None:
    pieces = split(text.encode(), [min(cut, len(text)) for cut in cuts])
    assert stream(pieces, tuple(stop)) == naive(text, tuple(stop))


@settings(max_examples=500, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4))
def test_text_is_held_back_exactly_as_long_as_it_may_still_match(text: str, stop: list[str]) -> None:
    out = TextStream(tuple(stop))
    emitted = ""
    for index, char in enumerate(text):
        emitted += out.feed(char.encode())
        if out.matched is not None:
            return
        seen = text[: index + 1]
        beginnings = [word[:length] for word in stop for length in range(1, len(word))]
        longest = max((len(begin) for begin in beginnings if seen.endswith(begin)), default=0)
        assert emitted == seen[: len(seen) - longest]


def test_of_a_stop_and_its_extension_the_shorter_ends_the_text_at_once() -> None:
    out = TextStream(("\n\n", "\n"))
    assert (out.feed(b"one\n"), out.matched) == ("one", "\n")


def test_after_a_match_nothing_comes_out() -> None:
    out = TextStream(("STOP",))
    assert out.feed(b"a ST") == "a "
    assert out.feed(b"OP and more") == ""
    assert (out.feed(b"more"), out.finish(), out.matched) == ("", "", "STOP")


def test_what_was_held_back_for_nothing_is_flushed() -> None:
    out = TextStream(("STOP",))
    assert out.feed(b"a STO") == "a "
    assert (out.finish(), out.matched) == ("STO", None)


def test_a_stop_may_match_in_the_replacement_of_an_incomplete_tail() -> None:
    out = TextStream(("x\ufffd",))
    assert out.feed(b"ax\xf0\x9f") == "a"
    assert (out.finish(), out.matched) == ("", "x\ufffd")


def test_an_empty_stop_string_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        TextStream(("",))
