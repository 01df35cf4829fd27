"""The three checklists as data: every item with its id, its sentence, how it is verified and which probes prove it."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Literal

import msgspec

NAMES = ("integration", "listing", "submission")


class Item(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"kind": "class"}):
    """One thing that is asked for. `draft` names the text that is drafted for it."""

    id: str
    kind: Literal["request", "inspection", "operator"]
    says: str
    probes: tuple[str, ...] = ()
    draft: str | None = None


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A numbered part of a checklist."""

    number: str
    title: str
    items: tuple[Item, ...]


class Checklist(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One checklist; ids of its items begin with its name and a dot."""

    title: str
    sections: tuple[Section, ...]


@cache
def load() -> tuple[Checklist, ...]:
    """All checklists."""
    return tuple(_read(name) for name in NAMES)


def _read(name: str) -> Checklist:
    text = resources.files("ocserve.audit").joinpath("items", f"{name}.toml").read_text(encoding="utf-8")
    raw = tomllib.loads(text)
    for section in raw["sections"]:
        for item in section["items"]:
            item["id"] = f"{name}.{item['id']}"
    return msgspec.convert(raw, Checklist)


def items() -> tuple[Item, ...]:
    """The items of all checklists, in order."""
    return tuple(item for checklist in load() for section in checklist.sections for item in section.items)
