"""`ocserve check` on ocserve with a real model: what a request can prove is proven."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from ocserve.audit import checklist
from ocserve.audit.probes import PROBES
from tests import tiny
from tests.e2e.daemon import daemon

KEY = "sk-check-0123456789abcdef"
PRICES = """
[[price]]
model = "smollm2:135m"
prompt = "0.00000002"
cached_prompt = "0.000000005"
cache_write = "0.000000025"
completion = "0.00000006"
request = "0.000001"

[[price.tier]]
above = 1_000_000_000
completion = "0.00000005"

[[price]]
model = "all-minilm-l6-v2-f16"
prompt = "0.00000001"
completion = "0"
"""
# What the operator writes, by the setting that names the file.
TEXTS = {
    "OCSERVE_OPERATOR_PRIVACY_TEXT": "Processing follows the GDPR; the log has counts and times, never text.",
    "OCSERVE_OPERATOR_PAYMENT_TEXT": "Credit cards are taken, with automatic top-up; invoices are sent every month.",
    "OCSERVE_OPERATOR_SLA_TEXT": "99.9 % uptime a month. Mail is answered within a working day.",
    "OCSERVE_OPERATOR_INCIDENT_TEXT": "Incidents are answered within an hour. Maintenance is announced a week before.",
    "OCSERVE_POLICY_TEXT": "Nothing illegal may be asked for.",
}
# A provider's settings, beside its prices and keys. What a key may do is more than an audit asks for.
PROVIDER = {
    "OCSERVE_AUTH_ANONYMOUS": "false",
    "OCSERVE_LIMITS_REQUESTS_PER_MINUTE": "60000",
    "OCSERVE_LIMITS_REQUESTS_PER_DAY": "1000000",
    "OCSERVE_LIMITS_TOKENS_PER_MINUTE": "600000",
    "OCSERVE_OPERATOR_NAME": "Example Inference GmbH",
    "OCSERVE_OPERATOR_EMAIL": "support@example.org",
    "OCSERVE_OPERATOR_LOCATIONS": "DE,FI",
    "OCSERVE_OPERATOR_CERTIFICATIONS": "GDPR",
}
# The rest takes minutes; all of it runs with --full.
SHORT = (
    "models-list", "models-match", "models-pricing", "chat-whole", "chat-roles", "stream-sse", "stream-done",
    "stream-deltas", "stream-usage", "stream-usage-always", "stream-incremental", "stream-equals-whole",
    "completions-whole", "completions-stream-usage", "usage-whole", "usage-completion", "usage-cache", "max-tokens",
    "temperature", "top-k", "seed", "stop", "logit-bias", "schema-flat", "tools-required", "tools-stream", "error-key",
    "error-model", "error-json", "error-shape", "error-parameter", "unicode-answers", "cancellation",
    "anthropic-messages", "google-generate", "responses-stream", "error-none-of-ours", "cost-exact", "idempotency",
    "page-privacy", "page-retention", "page-pricing", "page-status", "page-terms", "page-security", "page-support",
    "page-policy", "says-training", "says-logging", "says-deletion", "says-locations", "says-company", "says-email",
    "says-gdpr", "says-uptime", "says-incidents", "says-cards", "says-automatic", "says-invoices",
    "says-payment-period", "says-maintenance", "says-tiers", "spares-prompts", "spares-answers", "charges-cancelled",
    "spares-failed", "prices-published", "prices-equal",
    "metrics", "health", "page-limits", "limits-published", "limits-raised", "limit-headers", "token-limit-headers",
    "token-limit-enforced", "concurrent-limit", "reference-errors", "reference-curl", "reference-sdks",
    "reference-auth", "reference-header", "reference-rotation", "reference-finish-reasons", "says-cancelled",
    "says-failed", "says-tokenizer", "says-counting", "states-uses", "states-strengths", "states-limitations",
    "price-images-made", "price-cache-read", "price-cache-write",
)  # fmt: skip
# What this model, this machine or a server without a fault cannot show, whatever the server does.
ELSEWHERE = {
    "https": "there is no TLS without the reverse proxy",
    "error-server": "no request leads to a server error",
    "long-stream": "the model's context is shorter; a test of its own has another model",
    "limit-enforced": "the limits are far; a test of its own has near ones",
    **dict.fromkeys(("tools-parallel", "tools-parallel-stream"), "the model makes one call at a time"),
    **dict.fromkeys(
        ("image-png", "image-jpeg", "image-gif", "image-webp", "image-several", "image-wrong", "image-url",
         "models-image-pricing"),
        "the model takes no images",
    ),
}  # fmt: skip


def expected(report: Any, ran: Collection[str], *kinds: str) -> dict[str, str]:
    """What the report says of the items of these classes that the probes that ran prove, and that it has to say."""
    return {
        item.id: next(each["status"] for each in report["items"] if each["id"] == item.id)
        for item in checklist.items()
        if item.kind in kinds and set(item.probes) <= set(ran)
    }


def check(model_cache: Path, *probes: str, model: str = "smollm2:135m", **settings: str) -> tuple[Any, int]:
    """The report and the exit status."""
    environment = {"OCSERVE_API_KEY": KEY, "OCSERVE_AUTH_ANONYMOUS": "false", **settings}
    with daemon(model, store=model_cache, env=environment) as running:
        only = [word for name in probes for word in ("--probe", name)]
        command = [sys.executable, "-m", "ocserve", "check", running.base_url, "--key-from", "CHECK_KEY", "--json"]
        finished = subprocess.run(
            [*command, *only], env={**os.environ, "CHECK_KEY": KEY}, capture_output=True, check=False
        )
    return json.loads(finished.stdout), finished.returncode


@pytest.fixture
def provider(tmp_path: Path) -> dict[str, str]:
    """The settings of a server that is run as a provider."""
    prices = tmp_path / "prices.toml"
    prices.write_text(PRICES)
    stated = {name: tmp_path / f"{name.lower()}.md" for name in TEXTS}
    for name, file in stated.items():
        file.write_text(TEXTS[name])
    return {
        **PROVIDER,
        **{name: str(file) for name, file in stated.items()},
        "OCSERVE_BILLING_PRICES": str(prices),
        "OCSERVE_LEDGER_DIRECTORY": str(tmp_path),
    }


@pytest.mark.timeout(3600)
def test_what_a_request_can_prove_is_proven(
    smollm2: Path, model_cache: Path, provider: dict[str, str], request: pytest.FixtureRequest, full: bool
) -> None:
    if full:  # every endpoint, those for vectors too
        provider["OCSERVE_MODEL_ALSO"] = str(request.getfixturevalue("minilm").path)
    report, code = check(model_cache, *(() if full else SHORT), **provider)
    failed = {each["probe"]: each["evidence"] for each in report["probes"] if each["status"] == "fail"}
    assert failed == {}
    assert code == 0
    proven = expected(report, PROBES.keys() - ELSEWHERE.keys() if full else SHORT, "request")
    assert {name: status for name, status in proven.items() if status != "pass"} == {}
    published = expected(report, SHORT, "request", "inspection")
    assert {name: status for name, status in published.items() if status != "pass"} == {}
    assert len(proven) >= (190 if full else 90)
    assert len(published) >= 120


NEAR = (
    "limit-headers", "token-limit-headers", "limits-published", "concurrent-limit", "token-limit-enforced",
    "limit-enforced",
)  # fmt: skip


def test_limits_that_are_set_are_announced_published_and_hold(smollm2: Path, model_cache: Path) -> None:
    settings = {
        "OCSERVE_LIMITS_REQUESTS_PER_MINUTE": "30",
        "OCSERVE_LIMITS_TOKENS_PER_MINUTE": "5000",
        "OCSERVE_LIMITS_CONCURRENT_REQUESTS": "3",
    }
    report, _ = check(model_cache, *NEAR, **settings)
    statuses = {each["probe"]: each["status"] for each in report["probes"] if each["probe"] in NEAR}
    assert statuses == dict.fromkeys(NEAR, "pass"), report["probes"]
    proven = expected(report, NEAR, "request", "inspection")
    assert proven.keys() >= {
        "listing.load-limits",
        "listing.rate-requests",
        "integration.limits-concurrent",
        "integration.limits-tokens-minute",
        "submission.limits-enforced",
    }
    assert set(proven.values()) == {"pass"}


def test_what_no_request_can_prove_here_is_little() -> None:
    lost = {item.id for item in checklist.items() if item.kind == "request" and set(item.probes) & ELSEWHERE.keys()}
    near = {item.id for item in checklist.items() if "limit-enforced" in item.probes}
    long = {item.id for item in checklist.items() if "long-stream" in item.probes}
    assert len(lost - near - long) <= 11


@pytest.mark.timeout(3600)
def test_a_stream_of_ten_thousand_tokens_arrives_whole(
    model_cache: Path, request: pytest.FixtureRequest, tmp_path: Path, full: bool
) -> None:
    """On random weights and on a real model, which has to make 17 tokens a second for it."""
    if not full:
        pytest.skip("ten thousand tokens take half a minute; --full makes them")
    for model in (tiny.write(tmp_path / "tiny.gguf", context=12288), request.getfixturevalue("gemma")):
        report, code = check(model_cache, "long-stream", model=str(model), OCSERVE_ENGINE_CONTEXT="12288")
        [verdict] = [each for each in report["probes"] if each["probe"] == "long-stream"]
        assert verdict["status"] == "pass", verdict
        assert code == 0
