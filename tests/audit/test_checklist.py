"""The checklists are whole: every item says something, in order, and names probes and drafts that exist."""

from __future__ import annotations

import tomllib
from importlib import resources

import pytest

from ocserve.audit import checklist
from ocserve.audit.probes import PROBES

# Boxes, free texts and blanks of the three lists, counted there.
ITEMS = {"Integration": 211, "Listing": 162, "Submission": 23}


def test_no_item_is_missing() -> None:
    counts = {each.title: sum(len(section.items) for section in each.sections) for each in checklist.load()}
    assert counts == ITEMS


def test_ids_are_unique() -> None:
    ids = [item.id for item in checklist.items()]
    assert len(set(ids)) == len(ids)


def test_every_probe_exists_and_proves_something() -> None:
    named = {name for item in checklist.items() for name in item.probes}
    assert named == PROBES.keys()


@pytest.mark.parametrize("item", checklist.items(), ids=lambda item: item.id)
def test_an_item_has_a_sentence_and_a_way_to_be_verified(item: checklist.Item) -> None:
    assert item.says.endswith(".")
    assert bool(item.probes) == (item.kind != "operator")


def test_every_draft_is_written_and_used() -> None:
    text = resources.files("ocserve.audit").joinpath("items", "drafts.toml").read_text(encoding="utf-8")
    written = tomllib.loads(text)
    assert {item.draft for item in checklist.items() if item.draft} == written.keys()
    assert all(versions.keys() <= {"said", "own", "any"} and versions for versions in written.values())


def test_every_probe_says_what_it_does() -> None:
    assert [probe.id for probe in PROBES.values() if not probe.about.endswith(".")] == []
