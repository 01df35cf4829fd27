"""Probes of statements: what the published pages say of privacy, payment, support and the like, in their words.

They find that it is said and quote it; whether it is true is the operator's to answer for.
"""

from __future__ import annotations

from ocserve.audit.published import PATHS
from ocserve.audit.server import dig
from ocserve.audit.subject import Probe, Subject, named
from ocserve.audit.verdict import Unsaid, clean

# What both prompts and answers are called where people write of them.
_PROMPTS, _ANSWERS = r"(prompt|input|data|content)", r"(completion|output|answer|response|data|content)"

_COSTS = r".{0,120}(charg|bill|free|used)"


def _said(name: str, about: str, kinds: tuple[str, ...], *patterns: str) -> Probe:
    """A probe that one of the pages of these kinds says something: all of the patterns match there."""

    async def run(subject: Subject) -> str:
        for kind in kinds:
            for page in await subject.published(kind):
                if (quote := page.quote(*patterns)) is not None:
                    return f"{page.address}: {clean(quote, 240)}"
        looked = (
            place for kind in kinds for place in ([subject.pages[kind]] if kind in subject.pages else PATHS[kind])
        )
        raise Unsaid(f"not said at {clean(', '.join(dict.fromkeys(looked)), 200)}")

    run.__doc__ = about
    return Probe(f"says-{name}", run)


def _chosen(name: str, about: str, kind: str, place: tuple[str, ...], value: object) -> Probe:
    """A probe that of two things the published page states this one; the other one is no failure."""

    async def run(subject: Subject) -> str:
        for page in await subject.published(kind):
            stated = dig(page.json, *place)
            if stated == value:
                return f"{page.address}: {'.'.join(place)} is {stated}"
            if stated is not None:
                raise Unsaid(f"{page.address}: {'.'.join(place)} is {clean(stated, 40)}")
        raise Unsaid(f"no page on {kind} states {'.'.join(place)}")

    run.__doc__ = about
    return Probe(name, run)


async def says_maintenance(subject: Subject) -> str:
    """It is published whether maintenance is announced, or how it will be."""
    for kind in ("status", "support"):
        for page in await subject.published(kind):
            if isinstance(page.json, dict) and "maintenance" in page.json:
                return f"{page.address}: maintenance {clean(page.json['maintenance'] or 'none', 120)}"
            if (quote := page.quote(r"maintenance")) is not None:
                return f"{page.address}: {clean(quote, 120)}"
    raise Unsaid(f"maintenance is not spoken of at {' or '.join((*PATHS['status'], *PATHS['support']))}")


async def says_tiers(subject: Subject) -> str:
    """It is published whether there are prices by volume, and which."""
    for page in await subject.published("pricing"):
        models = dig(page.json, "models")
        if isinstance(models, list) and models and all(isinstance(dig(each, "tiers"), list) for each in models):
            count = sum(len(each["tiers"]) for each in models)
            names = len({str(dig(each, "id")) for each in models})
            return f"{page.address}: {count or 'no'} tiers for {names} models"
        if (quote := page.quote(r"volume|discount|commit")) is not None:
            return f"{page.address}: {clean(quote, 120)}"
    raise Unsaid("no page on prices says whether there are tiers")


PROBES = (
    _said("training", "It is published whether prompts and answers are used for training.", ("privacy",),
          rf"train.{{0,80}}{_PROMPTS}|{_PROMPTS}.{{0,80}}train", rf"train.{{0,80}}{_ANSWERS}|{_ANSWERS}.{{0,80}}train"),
    _said("logging", "It is published what is logged.", ("privacy", "retention"), r"\blog"),
    _said("deletion", "It is published how data are deleted.", ("privacy", "retention"), r"delet|erase"),
    _said("locations", "The countries are published in which answers are computed.", ("privacy", "support"),
          r"locat|countr|region|data cent"),
    _said("company", "It is published who runs the server.", ("privacy", "support", "terms"),
          r"operator\.name: \S|\b(gmbh|inc|ltd|llc|corp|s\.a)\b|©"),
    _said("email", "An address for mail to the operator is published.", ("support", "privacy", "terms"),
          r"[\w.+-]+@[\w-]+(\.[\w-]+)+"),
    _said("cancelled", "It is published whether requests that are cancelled are charged.",
          ("pricing", "terms", "reference"),
          rf"(cancel|disconnect|client goes){_COSTS}|charg.{{0,120}}(cancel|disconnect)"),
    _said("failed", "It is published whether requests that fail are charged.",
          ("pricing", "terms", "reference"), rf"\bfail{_COSTS}|charg.{{0,120}}\bfail"),
    _said("tokenizer", "The reference names the tokenizer.", ("reference",), r"tokeni[sz]er"),
    _said("counting", "The reference says how tokens are counted, control tokens among them.", ("reference",),
          r"tokens (is|are) counted|counts? (each|every)|token (count|account)ing", r"(control|special) token"),
    _said("gdpr", "A statement on the GDPR is published.", ("security", "privacy"), r"gdpr|2016/679"),
    _said("soc2", "A SOC 2 report is published.", ("security", "privacy"), r"soc ?2"),
    _said("hipaa", "A statement on HIPAA is published.", ("security", "privacy"), r"hipaa"),
    _said("uptime", "An uptime is promised.", ("terms", "support", "status"), r"9\d([.,]\d+)? ?%"),
    _said("incidents", "It is published how incidents are handled.", ("support", "terms", "status"), r"incident"),
    _said("cards", "It is published whether credit cards are taken.", ("pricing", "terms"), r"\bcards?\b"),
    _said("automatic", "It is published whether payment is automatic.", ("pricing", "terms"), r"automat|top.?up"),
    _said("invoices", "It is published whether there are invoices.", ("pricing", "terms"), r"invoice"),
    _said("payment-period", "It is published how often is paid.", ("pricing", "terms"),
          r"month|week|daily|prepa(id|y)|in advance|quarter"),
    *named(says_maintenance, says_tiers),
    _chosen("trains-on-prompts", "The published policy is that prompts are used for training.", "privacy",
            ("training_on_prompts",), True),
    _chosen("spares-prompts", "The published policy is that prompts are not used for training.", "privacy",
            ("training_on_prompts",), False),
    _chosen("trains-on-answers", "The published policy is that answers are used for training.", "privacy",
            ("training_on_completions",), True),
    _chosen("spares-answers", "The published policy is that answers are not used for training.", "privacy",
            ("training_on_completions",), False),
    _chosen("charges-cancelled", "The published policy is that cancelled requests are charged.", "pricing",
            ("policy", "cancelled"), "used"),
    _chosen("spares-cancelled", "The published policy is that cancelled requests are free.", "pricing",
            ("policy", "cancelled"), "free"),
    _chosen("charges-failed", "The published policy is that failed requests are charged.", "pricing",
            ("policy", "failed"), "used"),
    _chosen("spares-failed", "The published policy is that failed requests are free.", "pricing",
            ("policy", "failed"), "free"),
)  # fmt: skip
