"""`ocserve check` on ocserve with a real model: what a request can prove is proven."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.e2e.daemon import daemon

KEY = "sk-check-0123456789abcdef"
# The rest takes minutes; all of it runs with --full.
SHORT = (
    "models-list", "models-match", "chat-whole", "chat-roles", "stream-sse", "stream-done", "stream-deltas",
    "stream-usage", "stream-usage-always", "stream-incremental", "stream-equals-whole", "completions-whole",
    "completions-stream-usage", "usage-whole", "usage-completion", "usage-cache", "max-tokens", "temperature", "top-k",
    "seed", "stop", "logit-bias", "schema-flat", "tools-required", "tools-stream", "error-key", "error-model",
    "error-json", "error-shape", "error-parameter", "unicode-answers", "cancellation", "anthropic-messages",
    "google-generate", "responses-stream", "error-none-of-ours",
)  # fmt: skip


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


@pytest.mark.timeout(3600)
def test_what_a_request_can_prove_is_proven(smollm2: Path, model_cache: Path, full: bool) -> None:
    report, code = check(model_cache, *(() if full else SHORT))
    failed = {each["probe"]: each["evidence"] for each in report["probes"] if each["status"] == "fail"}
    assert failed == {}
    assert code == 0
    counts = Counter(each["status"] for each in report["probes"])
    assert counts["pass"] >= (100 if full else len(SHORT)), counts


def test_limits_that_are_set_are_announced_and_hold(smollm2: Path, model_cache: Path) -> None:
    names = ("limit-headers", "token-limit-headers", "limit-enforced")
    settings = {"OCSERVE_LIMITS_REQUESTS_PER_MINUTE": "30", "OCSERVE_LIMITS_TOKENS_PER_MINUTE": "1000000"}
    report, _ = check(model_cache, *names, **settings)
    statuses = {each["probe"]: each["status"] for each in report["probes"] if each["probe"] in names}
    assert statuses == dict.fromkeys(names, "pass"), report["probes"]


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
