"""The filled checklists as Markdown: every item with its status and evidence, every free text drafted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ocserve.audit import checklist
from ocserve.audit.checklist import Checklist, Item
from ocserve.audit.session import Found, Report
from ocserve.audit.verdict import Status

_MARKS: Mapping[Status, str] = {"pass": "[x]", "fail": "[ ]", "operator": "[ ]", "not_provable": "[ ]"}
_WORDS: Mapping[Status, str] = {
    "pass": "pass",
    "fail": "**fail**",
    "operator": "operator",
    "not_provable": "not provable",
}
_STATUSES: tuple[Status, ...] = ("pass", "fail", "not_provable", "operator")


def markdown(report: Report) -> str:
    """The whole page."""
    found = {item.id: item for item in report.items}
    return "\n".join([*_head(report), *(line for each in checklist.load() for line in _filled(each, found))]) + "\n"


def _head(report: Report) -> Iterator[str]:
    yield "# Audit"
    yield ""
    yield f"{escaped(report.model)} at {escaped(report.url)}, {report.began} to {report.ended}, by `ocserve check`."
    yield ""
    yield ", ".join(f"{report.count(status)} {status.replace('_', ' ')}" for status in _STATUSES)
    yield ""
    yield (
        "A ticked item was proven. One that is not provable says why, one that is the operator's holds a draft where "
        "settings or measurements allow one. In brackets: the last request's id and the time, UTC."
    )
    if report.figures:
        yield ""
        yield "| measured | |"
        yield "|---|---|"
        for name, value in report.figures.items():
            yield f"| {name} | {value:.3f} |"


def _filled(each: Checklist, found: Mapping[str, Found]) -> Iterator[str]:
    yield ""
    yield f"## {each.title}"
    for section in each.sections:
        yield ""
        yield f"### {section.number} {section.title}"
        yield ""
        for item in section.items:
            yield from _line(item, found[item.id])


def _line(item: Item, found: Found) -> Iterator[str]:
    yield f"- {_MARKS[found.status]} {item.says} _{_WORDS[found.status]}_ (`{item.id}`)"
    yield f"  > {escaped(found.evidence)}"


def escaped(text: str) -> str:
    """Text from elsewhere without effect on the page: no HTML, no links, no headings."""
    return re.sub(r"([\\`*_\[\]<>#|!])", r"\\\1", text)
