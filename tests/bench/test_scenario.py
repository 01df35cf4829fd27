"""Scenarios are data: the shipped ones load, wrong ones are refused with the reason, texts have the size they say."""

from __future__ import annotations

import pytest

from ocserve.bench import scenario
from ocserve.bench.scenario import ScenarioError
from ocserve.bench.text import Scale, Texts


@pytest.mark.parametrize("name", scenario.names())
def test_every_shipped_scenario_loads(name: str) -> None:
    loaded = scenario.load(name)
    assert loaded.about
    assert loaded.requests > 0


def test_all_kinds_of_load_are_shipped() -> None:
    wanted = {"chat", "shared-system", "long-document", "agent", "code-edit", "structured", "burst", "restart"}
    assert wanted <= set(scenario.names())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('phases=[{name="a",groups=[{name="g"}]}]', "about"),
        ('about=""\nphases=[]', "length"),
        ('about=""\nphases=[{name="a",groups=[{name="g",speed=1}]}]', "speed"),
        ('about=""\nphases=[{name="a",groups=[{name="g"},{name="g"}]}]', "one name"),
        ('about=""\nphases=[{name="a",groups=[{name="g",continues="x"}]}]', "continues"),
        ('about=""\nphases=[{name="a",groups=[{name="g",during="x"}]}]', "not in phase"),
        ('about=""\nphases=[{name="a",groups=[{name="g",rate=1.0,concurrency=1}]}]', "concurrency and a rate"),
        ("about=", "TOML|Invalid"),
    ],
)
def test_what_is_wrong_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ScenarioError, match=reason):
        scenario.parse("mine", text)


def test_levels_of_concurrency_become_phases() -> None:
    curve = scenario.with_load(scenario.load("chat"), concurrency=(1, 32), requests=8)
    assert [(phase.name, phase.groups[0].concurrency, phase.groups[0].conversations) for phase in curve.phases] == [
        ("x1", 1, 8),
        ("x32", 32, 32),
    ]


def test_a_scenario_of_several_groups_keeps_its_load() -> None:
    with pytest.raises(ScenarioError, match="its own load"):
        scenario.with_load(scenario.load("long-document"), rate=1.0)


def test_texts_are_the_same_by_seed_and_label_only() -> None:
    assert Texts("a").prose("x", 50) == Texts("a").prose("x", 50)
    assert len({Texts("a").prose("x", 50), Texts("b").prose("x", 50), Texts("a").prose("y", 50)}) == 3


def test_texts_have_the_size_that_was_asked_for() -> None:
    scale = Scale.fitted((40, 90), (240, 490))  # two tokens a word, ten of template
    assert (scale.per_word, scale.overhead) == (2.0, 10.0)
    assert len(Texts("a", scale).prose("x", 500).split()) == 250
    with pytest.raises(ValueError, match="more words"):
        Scale.fitted((40, 7), (240, 7))
