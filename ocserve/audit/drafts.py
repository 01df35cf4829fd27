"""Texts drafted for what only the operator can state, from settings and from what was measured.

A text is filled with facts by name; where a fact is not known the text is left out rather than guessed.
"""

from __future__ import annotations

import string
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from ocserve import peer
from ocserve.audit.server import dig
from ocserve.audit.subject import Subject
from ocserve.audit.verdict import Verdict, clean
from ocserve.config import IMAGE_BODY_BYTES, TEXT_BODY_BYTES, Config

_PARAMETERS = (
    "max-tokens", "temperature", "top-p", "stop", "seed", "top-k", "min-p", "top-a", "frequency-penalty",
    "presence-penalty", "repetition-penalty", "logit-bias", "logprobs", "top-logprobs",
)  # fmt: skip
_MILLISECONDS = ("latency_mean", "latency_p50", "latency_p95", "ttft_p50", "ttft_p95", "load_latency_p95")


def draft(subject: Subject, verdicts: Mapping[str, Verdict], settings: Config | None) -> dict[str, str]:
    """The drafted texts by name. `settings` are those of the audited server, None where they are not at hand."""
    text = resources.files("ocserve.audit").joinpath("items", "drafts.toml").read_text(encoding="utf-8")
    facts = _facts(subject, verdicts)
    if settings is not None:
        facts |= _from_settings(settings, images=subject.takes("image"))
    drafted = {}
    for name, versions in tomllib.loads(text).items():
        kinds = ("said", "own", "any") if subject.is_ours else ("said", "any")
        candidates = [versions[kind] for kind in kinds if kind in versions]
        known = next((template for template in candidates if _fields(template) <= facts.keys()), None)
        if known is not None:
            drafted[name] = known.format_map(facts)
    return drafted


def _fields(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


def _facts(subject: Subject, verdicts: Mapping[str, Verdict]) -> dict[str, str]:
    """What was measured and listed. A fact that is not known is not there."""
    found: dict[str, Any] = {
        "url": peer.without_userinfo(subject.server.url),
        "root": peer.without_userinfo(subject.server.root),
        "model": clean(subject.model, 120),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "context": subject.context_length,
        "max_output": subject.max_output_tokens,
        "family": dig(subject.entry, "family") or dig(subject.entry, "tokenizer") or dig(subject.entry, "architecture"),
        "languages": _joined(dig(subject.entry, "languages")),
        "outputs": _joined(dig(subject.entry, "output_modalities")),
        "quantization": dig(subject.entry, "gguf_quantization") or dig(subject.entry, "quantization"),
        "description": dig(subject.entry, "strengths") or dig(subject.entry, "description"),
        "limitations": dig(subject.entry, "limitations"),
        "uses": _uses(subject),
        "source": _source(subject),
        "defaults": _defaults(subject),
        "prices": _prices(subject),
        "tiers": _tiers(subject),
        "images": _images(subject, verdicts),
        **{_named(name): verdict.evidence for name, verdict in verdicts.items() if verdict.status == "pass"},
        **_counts(verdicts),
    }
    for name, value in subject.figures.items():
        found[name] = f"{value:.1f}"
    for name in _MILLISECONDS:
        if (seconds := subject.figures.get(f"{name}_s")) is not None:
            found[f"{name}_ms"] = f"{seconds * 1000:.0f}"
    return {name: clean(value, 600) for name, value in found.items() if value not in (None, "", {})}


def _counts(verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    """How the probes went, in all and by subject."""
    statuses = [verdict.status for verdict in verdicts.values()]
    failed = [verdict for verdict in verdicts.values() if verdict.status == "fail"]
    return {
        "probes": len(statuses),
        "passed": statuses.count("pass"),
        "failed": statuses.count("fail"),
        "unproven": statuses.count("not_provable"),
        "gaps": "Gaps: " + ", ".join(verdict.probe for verdict in failed) + "." if failed else "No gap was found.",
        **_split(verdicts, "parameters", "parameters_missing", _PARAMETERS),
        **_split(verdicts, "tools_passed", "tools_missing", tuple(name for name in verdicts if name[:6] == "tools-")),
        **_split(
            verdicts,
            "schemas_passed",
            "schemas_missing",
            tuple(name for name in verdicts if name[:7] == "schema-" or name == "json-mode"),
        ),
    }


def _split(verdicts: Mapping[str, Verdict], good: str, other: str, names: tuple[str, ...]) -> dict[str, str]:
    passed = [name for name in names if verdicts[name].status == "pass"]
    rest = [f"{name} ({verdicts[name].status})" for name in names if verdicts[name].status != "pass"]
    return {good: ", ".join(passed) or "none", other: ", ".join(rest) or "none"}


def _joined(value: Any) -> str | None:
    return ", ".join(map(str, value)) if isinstance(value, list) else value if isinstance(value, str) else None


def _named(probe: str) -> str:
    """The fact that is a probe's evidence, if it passed."""
    return f"proof_{probe.replace('-', '_')}"


def _uses(subject: Subject) -> str | None:
    if isinstance(stated := dig(subject.entry, "intended_use"), str) and stated:
        return stated
    capabilities = dig(subject.entry, "capabilities")
    if not isinstance(capabilities, list):
        return None
    told = {
        "chat": "conversation and questions about a given text",
        "completion": "continuing and rewriting text",
        "tools": "calling tools",
        "fim": "filling in code between two pieces",
        "vision": "describing images",
        "reasoning": "problems that take several steps",
    }
    return "; ".join([*(told[name] for name in capabilities if name in told), "extracting JSON by a schema"])


def _source(subject: Subject) -> str | None:
    where, license_name = dig(subject.entry, "hugging_face_id"), dig(subject.entry, "license")
    if not isinstance(where, str):
        return None
    return f"https://huggingface.co/{where}, licence {license_name}; its model card names the training data."


def _defaults(subject: Subject) -> str | None:
    defaults = dig(subject.entry, "defaults")
    if not isinstance(defaults, dict):
        return None
    return ", ".join(f"{name} {defaults[name]}" for name in ("temperature", "top_p") if name in defaults)


def _prices(subject: Subject) -> str | None:
    pricing = dig(subject.entry, "pricing")
    if not isinstance(pricing, dict):
        return None
    return "As listed, in USD for one token: " + ", ".join(f"{name} {value}" for name, value in pricing.items())


def _tiers(subject: Subject) -> str:
    tiers = dig(subject.entry, "pricing_tiers")
    if not isinstance(tiers, list) or not tiers:
        return "None are configured."
    steps = (
        f"from {dig(tier, 'above')} tokens on " + ", ".join(f"{name} {value}" for name, value in pricing.items())
        for tier in tiers
        if isinstance(pricing := dig(tier, "pricing"), dict)
    )
    return "By the tokens of a model that a key used in the calendar month, in USD for one token: " + "; ".join(steps)


def _images(subject: Subject, verdicts: Mapping[str, Verdict]) -> str:
    if not subject.takes("image"):
        return "The audited model takes no images."
    names = [name for name in verdicts if name.startswith("image-")]
    return "; ".join(f"{name}: {verdicts[name].evidence}" for name in names)


def _from_settings(settings: Config, *, images: bool) -> dict[str, str]:
    def limit(value: int | None) -> str:
        return "unlimited" if value is None else str(value)

    def size(count: int) -> str:
        return f"{count / 2**30:g} GiB" if count >= 2**30 else f"{count / 2**20:g} MiB"

    return {
        "rpm": limit(settings.limits.requests_per_minute),
        "rpd": limit(settings.limits.requests_per_day),
        "tpm": limit(settings.limits.tokens_per_minute),
        "concurrent": limit(settings.limits.concurrent_requests),
        "queue": str(settings.limits.queue),
        "parallel": "as many as the model's card says"
        if settings.engine.parallel is None
        else str(settings.engine.parallel),
        "kv_type": settings.engine.kv_type,
        "cache_host": size(settings.cache.host_bytes),
        "cache_disk": size(settings.cache.disk_bytes),
        "drain": f"{settings.server.drain_s:g}",
        "max_body": size(settings.server.max_body_bytes or (IMAGE_BODY_BYTES if images else TEXT_BODY_BYTES)),
        "log_level": settings.log.level,
        "cors": ", ".join(settings.server.cors_origins) or "none",
    }
