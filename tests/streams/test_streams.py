"""Stream equals whole equals bytes: for any division into tokens, for any token, on every surface that generates."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from ocserve.chat import reasoning
from ocserve.chat.speech import Speech
from ocserve.chat.tool_formats import FORMATS, GENERIC
from ocserve.generation import Tool
from tests.chat.test_channels import CONTROLS, IDS, RECORDED
from tests.engine.talk import Talk
from tests.engine.test_text import naive
from tests.streams.surfaces import CHATS, TEXTS, Shown, Surface

FULL, SHORT = 10_000, 70
BY_NAME = {form.name: form for form in (*FORMATS, GENERIC)}
THOUGHTS = {form.name: form for form in reasoning.FORMATS}
# Emoji of several code points, combining characters, scripts of two and three bytes, controls, and no UTF-8 at all.
WILD = (
    *(
        "a",
        " ",
        "\n",
        "\n\n",
        "the ",
        "STOP",
        "\u0000",
        "e\u0301",
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈",
        "Ж",
        "日本",
        "한",
        "\U0010ffff",
        "\ufffd",
        "```",
    ),
    *("<tool_call>", "[TOOL_CALLS]", "<think>", "</think>", '{"name": "', "<|channel|>", ">>>", "\r\n", "\\", '"'),
)
BROKEN = (b"\xff", b"\xf0\x9f", b"\xc3", b"\xed\xa0\x80", b"\xc0\xaf", b"\x80")
RICH = b"Z\xc3\xbcr\xff\xf0\x9fich \xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f\x91\xa7 e\xcc\x81 \xe6\x97\xa5\xe6\x9c\xac"
TOOLS = (
    Tool(name="get_weather", parameters='{"type":"object","properties":{"city":{"type":"string"}}}'),
    Tool(name="add"),
    Tool(name="now"),
)


def divided(data: bytes, chance: random.Random) -> list[bytes]:
    pieces = []
    longest = chance.choice((1, 2, 4, 12, 60))
    while data:
        length = chance.randint(1, longest)
        pieces.append(data[:length])
        data = data[length:]
    return pieces


def shown(surface: Surface, talk: Talk) -> Shown:
    """What an answer is on a surface, the same as a stream and as a whole."""
    stream, whole = surface.both(talk.events)
    if surface.ordered:
        assert stream == whole
    for kind in ("thought", "words", "call"):
        assert stream.all(kind) == whole.all(kind)
    assert (stream.reason, stream.tokens) == (whole.reason, whole.tokens)
    return whole


@pytest.mark.timeout(3000)
def test_words_are_their_bytes_up_to_the_stop_string(full: bool) -> None:
    chance = random.Random(7)
    for number in range(FULL if full else SHORT):
        parts = [chance.choice(WILD).encode() for _ in range(chance.randint(0, 16))]
        for _ in range(chance.choice((0, 0, 1, 3))):
            parts.insert(chance.randint(0, len(parts)), chance.choice(BROKEN))
        data = b"".join(parts)
        stop = tuple(
            chance.choices(("STOP", "STOPS", "the STOP", "\n\n", "日本", "本", "\ufffd", "👧‍👦"), k=number % 3)
        )
        text, matched = naive(data.decode("utf-8", "replace"), stop)
        talk = Talk(None, stop=stop, logprobs=0)
        talk.say(divided(data, chance), flush=chance)
        for surface in TEXTS:
            found = shown(surface, talk)
            assert found.all("words") == text
            assert found.all("thought") == ""
            assert found.all("call") == []
            told = b"".join(found.tokens or ())
            if found.tokens:
                assert data.startswith(told)
                assert told == data or (matched is not None and told.decode("utf-8", "replace").startswith(text))
        assert talk.finished.stop_sequence == matched


def speech_of(recorded: Any, *, marked: bool) -> Speech:
    name, thoughts, _, text, *_ = recorded
    words = sorted(mark for mark in CONTROLS if marked and mark in text)
    controls = {mark: 1 + index for index, mark in enumerate(words)}
    return Speech.of(BY_NAME[name], THOUGHTS[thoughts] if thoughts else None, controls, frozenset({0}))


def tokens(data: bytes, speech: Speech, chance: random.Random | None) -> list[bytes | int]:
    """Marks that are control tokens, and between them pieces of any length; without `chance` all that lies between."""
    ids = {speech.marks.plain(mark).encode(): token for token, mark in speech.marks.by_id.items()}
    between = re.split(b"(" + b"|".join(map(re.escape, ids)) + b")", data) if ids else [data]
    found: list[bytes | int] = []
    for piece in filter(None, between):
        if piece in ids:
            found.append(ids[piece])
        else:
            found += [piece] if chance is None else divided(piece, chance)
    return found


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("recorded", RECORDED, ids=IDS)
def test_an_answer_of_any_format_is_the_same_for_any_division_on_every_surface(recorded: Any, full: bool) -> None:
    _, _, thinking, text, content, thought, calls = recorded
    chance = random.Random(text)
    data = text.encode().replace("Zürich".encode(), RICH)
    city = RICH.decode("utf-8", "replace")
    undivided: dict[tuple[bool, tuple[str, ...]], tuple[Talk, list[Shown]]] = {}
    for number in range(FULL // len(RECORDED) + 1 if full else SHORT // len(RECORDED) + 1):
        marked = bool(number % 2) and "<" not in thought + content
        speech = speech_of(recorded, marked=marked)
        stop = ((), ("Zürich?", "I doubt", "4", "\n\n\n"), (content[2:5] or "x",))[number % 3]
        if (marked, stop) not in undivided:
            whole = Talk(speech, stop=stop, thinking=thinking, tools=TOOLS, logprobs=0)
            whole.say(tokens(data, speech, None))
            undivided[marked, stop] = whole, [shown(surface, whole) for surface in CHATS]
        whole, expectations = undivided[marked, stop]
        talk = Talk(speech, stop=stop, thinking=thinking, tools=TOOLS, logprobs=0)
        talk.say(tokens(data, speech, chance), flush=chance)
        for surface, expected in zip(CHATS, expectations, strict=True):
            found = shown(surface, talk)
            for kind in ("thought", "words", "call"):
                assert found.all(kind) == expected.all(kind)
            assert found.reason == expected.reason
            if talk.finished.stop_sequence is None:
                rich = [(name, {k: city if v == "Zürich" else v for k, v in given.items()}) for name, given in calls]
                assert (found.all("thought"), found.all("words"), found.all("call")) == (thought, content, rich)
        assert talk.finished.stop_sequence == whole.finished.stop_sequence
