"""What a published page says, whether it is JSON or HTML."""

from __future__ import annotations

from ocserve.audit.published import Page


def test_of_json_the_leaves_that_say_something_are_its_words() -> None:
    text = '{"a": {"b": [1, "x"], "none": null, "empty": [], "blank": ""}, "list": [{"no": false}, {"zero": 0}]}'
    page = Page.of("/x", text)
    assert page.words.split("\n") == ["a.b: 1, x", "list.no: False", "list.zero: 0"]
    assert page.json["a"]["none"] is None


def test_of_html_neither_tags_nor_styles_are_its_words() -> None:
    page = Page.of("/x", "<style>p { privacy }</style><p class='policy'>We keep <b>nothing</b> &amp; forget.</p>")
    assert page.json is None
    assert " ".join(page.words.split()) == "We keep nothing & forget."
    assert page.quote("privacy") is None
    assert page.quote("policy") is None


def test_a_quote_has_every_pattern_or_there_is_none() -> None:
    page = Page.of("/x", '{"one": "first thing", "two": "second thing"}')
    assert page.quote("FIRST", "second") == "one: first thing … two: second thing"
    assert page.quote("first", "third") is None


def test_a_quote_is_short_however_long_the_page() -> None:
    quote = Page.of("/x", "word " * 100_000 + "needle" + " word" * 100_000).quote("needle")
    assert quote is not None
    assert "needle" in quote
    assert len(quote) <= 160
