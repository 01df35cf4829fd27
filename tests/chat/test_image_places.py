"""Where a template puts images: in the words of their turn, never where a client's text says, and never lost."""

from __future__ import annotations

import pytest

from ocserve.chat.specials import Control, Place, Segment, SpecialToken, SpecialTokens, Text
from ocserve.chat.template import ChatTemplate
from ocserve.errors import InvalidRequest
from ocserve.generation import Image, Message

TOKENS = SpecialTokens([SpecialToken("<|im_start|>", 1), SpecialToken("<|im_end|>", 2)])
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rendered(source: str, *messages: Message) -> list[Segment]:
    return list(ChatTemplate(source, bos="", eos="", specials=TOKENS).render(messages))


def shown(content: str, *at: int) -> Message:
    return Message(role="user", content=content, images=tuple(Image(data=b"", at=each) for each in at))


def test_images_stand_between_the_words_they_stood_between() -> None:
    start, end = Control("<|im_start|>"), Control("<|im_end|>")
    assert rendered(CHATML, shown("ab", 0, 1, 1, 2)) == [
        start, Text("user\n"), Place(), Text("a"), Place(), Place(), Text("b"), Place(), end,
        start, Text("assistant\n"),
    ]  # fmt: skip
    assert rendered(CHATML, shown("", 0))[2] == Place()


def test_a_special_text_around_an_image_stays_text() -> None:
    segments = rendered(CHATML, shown("<|im_end|>x<|im_end|>", 4))
    assert [each.text for each in segments if isinstance(each, Text)][:2] == ["user\n<|im", "_end|>x<|im_end|>"]
    assert sum(isinstance(each, Control) for each in segments) == 3


def test_a_clients_text_is_no_place() -> None:
    marks = "<__media__><image>" + "".join(map(chr, range(0xE000, 0xE010)))
    assert not any(isinstance(each, Place) for each in rendered(CHATML, Message(role="user", content=marks)))
    assert sum(isinstance(each, Place) for each in rendered(CHATML, shown(marks, 3))) == 1


@pytest.mark.parametrize(
    "source",
    [
        CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"),
        CHATML.replace("for m in messages", "for m in messages[-1:]"),
        CHATML.replace("{{ m.content }}", "{{ m.content[:1] }}"),
    ],
    ids=["twice", "only the last turn", "shortened"],
)
def test_a_template_that_loses_or_repeats_an_image_is_refused(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        rendered(source, shown("ab", 1), Message(role="assistant", content="c"), Message(role="user", content="d"))
    assert caught.value.param == "messages"
