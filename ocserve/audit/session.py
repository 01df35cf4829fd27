"""One audit: find the model, run the probes, and say of every item what was found. Nothing is skipped silently."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Any
from urllib.parse import urlsplit

import msgspec

from ocserve import peer
from ocserve.audit import checklist
from ocserve.audit.checklist import Item
from ocserve.audit.probes import PROBES
from ocserve.audit.server import Server, dig
from ocserve.audit.subject import Probe, Subject
from ocserve.audit.verdict import Fault, Status, Unproven, Unsaid, Verdict, clean

_TIMEOUT_S = 300.0
_REQUESTS_KEPT = 3
_UNSTATED = "for the operator to state"
_WORST_FIRST: tuple[Status, ...] = ("fail", "operator", "not_provable")


class Unusable(Exception):
    """There is nothing to audit; the text says what the server answered."""


class KeyNeeded(Unusable):
    """The server answers nobody without a key that it accepts."""


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What was found of one item of a checklist."""

    id: str
    status: Status
    evidence: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A finished audit. Times are UTC, figures in the units of their names."""

    url: str
    model: str
    began: str
    ended: str
    items: tuple[Found, ...]
    probes: tuple[Verdict, ...]
    figures: dict[str, float]

    def count(self, status: Status) -> int:
        """How many items have a status."""
        return sum(item.status == status for item in self.items)

    @property
    def passed(self) -> bool:
        """Whether nothing failed and something was proven: a probe, since an item may rest on others left out."""
        found = {verdict.status for verdict in self.probes}
        return self.count("fail") == 0 and "fail" not in found and "pass" in found


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to audit and how. `model` None is the first that generates text; `only` are probes, all if empty."""

    url: str
    key: str | None = None
    model: str | None = None
    suppress: tuple[int, ...] = ()
    quick: bool = False
    pages: dict[str, str] = {}
    only: tuple[str, ...] = ()


Drafts = Callable[[Subject, Mapping[str, Verdict]], Mapping[str, str]]


async def audit(order: Order, drafts: Drafts, on_probe: Callable[[Verdict], None]) -> Report:
    """Run the probes one after another. `drafts` gives the drafted texts by name. Raises `Unusable`."""
    began = _now()
    server = Server(order.url, order.key, _TIMEOUT_S)
    try:
        subject = await _discover(server, order)
        subject.is_ours = await _is_ours(subject)
        verdicts: dict[str, Verdict] = {}
        for probe in PROBES.values():
            if order.only and probe.id not in order.only:
                verdicts[probe.id] = _left_out(probe)
                continue
            verdicts[probe.id] = await _ask(probe, subject)
            on_probe(verdicts[probe.id])
    finally:
        await server.aclose()
    texts = drafts(subject, verdicts)
    return Report(
        url=peer.without_userinfo(server.url),
        model=clean(subject.model, 120),
        began=began,
        ended=_now(),
        items=tuple(_found(item, verdicts, texts) for item in checklist.items()),
        probes=tuple(verdicts.values()),
        figures=dict(subject.figures),
    )


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


async def _discover(server: Server, order: Order) -> Subject:
    """The model to audit, as it is listed. A server without a list can be audited if the model is named."""
    address = peer.without_userinfo(order.url)
    try:
        if not urlsplit(server.url).path and (await server.send("GET", "/v1/models")).status != 404:
            server.url = f"{server.url}/v1"  # mostly left out; a few have their routes at the root
            address = f"{address.rstrip('/')}/v1"
        reply = await server.send("GET", "/models")
        entries = dig(reply.json, "data") if reply.status == 200 else None
        answered = f"{address}/models answers with status {reply.status}"
    except Fault as fault:
        raise Unusable(f"{address} cannot be audited: {fault}") from None
    if reply.status == 401:
        why = "it needs a key, and none was sent" if order.key is None else "it does not accept the key that was sent"
        raise KeyNeeded(f"{answered}: {why}")
    listed = [entry for entry in (entries if isinstance(entries, list) else []) if isinstance(dig(entry, "id"), str)]
    generating = [entry for entry in listed if _generates(entry)] or listed
    name = order.model or (generating[0]["id"] if generating else None)
    if name is None:
        raise Unusable(f"{answered} and lists no model; name one with --model")
    entry: dict[str, Any] = next((entry for entry in listed if entry["id"] == name), {})
    return Subject(server, name, entry, order.suppress, order.quick, order.pages)


async def _is_ours(subject: Subject) -> bool:
    """Whether the server is an ocserve: only that names in a header what it accepts and has no use for."""
    try:
        reply = await subject.refused(user="audit", max_tokens=1)
    except Fault:
        return False
    return "x-ocserve-ignored" in reply.headers


def _generates(entry: Any) -> bool:
    outputs, capabilities = dig(entry, "output_modalities"), dig(entry, "capabilities")
    if isinstance(outputs, list):
        return "text" in outputs
    return not (isinstance(capabilities, list) and "embedding" in capabilities)


async def _ask(probe: Probe, subject: Subject) -> Verdict:
    exchanges = subject.server.exchanges
    before, began = len(exchanges), time.perf_counter()
    status: Status
    try:
        status, evidence = "pass", await probe.run(subject)
    except Unproven as unproven:
        status, evidence = "not_provable", str(unproven)
    except Unsaid as unsaid:
        status, evidence = "operator", str(unsaid)
    except Fault as fault:
        status, evidence = "fail", str(fault)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # JSON of another shape than any probe expects; what was expected is in the probe's own sentence.
        status, evidence = "fail", f"an answer has an unexpected form ({type(error).__name__}): {probe.about}"
    ids = [exchange.request_id for exchange in exchanges[before:] if exchange.request_id]
    return Verdict(
        probe=probe.id,
        status=status,
        evidence=clean(evidence),
        requests=tuple(ids[-_REQUESTS_KEPT:]),
        at=_now(),
        took_s=round(time.perf_counter() - began, 3),
    )


def _left_out(probe: Probe) -> Verdict:
    return Verdict(probe=probe.id, status="not_provable", evidence="left out by --probe", at=_now(), took_s=0.0)


def _found(item: Item, verdicts: Mapping[str, Verdict], texts: Mapping[str, str]) -> Found:
    """The item's status: as bad as the worst of its probes; without probes it is the operator's.

    What is published nowhere is the operator's to state, unless a request has to prove it.
    """
    draft = texts.get(item.draft) if item.draft else None
    if not item.probes:
        return Found(id=item.id, status="operator", evidence=draft or _UNSTATED)
    asked = [verdicts[name] for name in item.probes]
    statuses = {verdict.status for verdict in asked}
    if item.kind == "request" and "operator" in statuses:
        statuses.add("fail")
    status: Status = next((each for each in _WORST_FIRST if each in statuses), "pass")
    telling = [verdict for verdict in asked if status == "pass" or verdict.status != "pass"]
    evidence = "; ".join(_line(verdict) for verdict in telling)
    return Found(id=item.id, status=status, evidence=f"{evidence}. {draft}" if draft else evidence)


def _line(verdict: Verdict) -> str:
    source = ", ".join([*verdict.requests[-1:], verdict.at])
    return f"{verdict.probe}: {verdict.evidence} [{source}]"


def near_probes(name: str) -> list[str]:
    """The probes whose ids are most like `name`, the nearest first; there may be none."""
    return get_close_matches(name, PROBES, n=3, cutoff=0.4)
