"""`ocserve check` on ocserve with a real model: what a request can prove is proven."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

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


def test_what_a_request_can_prove_is_proven(smollm2: Path, model_cache: Path, full: bool) -> None:
    environment = {"OCSERVE_API_KEY": KEY, "OCSERVE_AUTH_ANONYMOUS": "false"}
    with daemon("smollm2:135m", store=model_cache, env=environment) as running:
        only = [] if full else [word for name in SHORT for word in ("--probe", name)]
        command = [
            sys.executable,
            "-m",
            "ocserve",
            "check",
            running.base_url,
            "--key-from",
            "CHECK_KEY",
            "--json",
            *only,
        ]
        finished = subprocess.run(
            command, env={**os.environ, "CHECK_KEY": KEY}, capture_output=True, timeout=280, check=False
        )
    report = json.loads(finished.stdout)
    failed = {each["probe"]: each["evidence"] for each in report["probes"] if each["status"] == "fail"}
    assert failed == {}
    assert finished.returncode == 0
    counts = Counter(each["status"] for each in report["probes"])
    assert counts["pass"] >= (100 if full else len(SHORT)), counts
