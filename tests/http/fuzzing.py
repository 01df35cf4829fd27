"""Schemathesis as a process of its own, pointed at a server: how it is set up and what it reports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Other paths of operations that are tried in the short form.
TWINS = "^/v1/models/.*:|^/api/v0/(chat|completions|embeddings)|^/v2/rerank|^/apply-template"

# `ignored_auth` has nothing to find: keys are optional on loopback. A request that fits its schema may be refused where
# JSON Schema cannot say all that is asked: which fields a role's messages or a part may have, which parameters need one
# another, what only a vocabulary or a store can know.
_CONFIG = """
hooks = "tests.http.fuzz_hooks"
continue-on-failure = true
request-timeout = 120
suppress-health-check = ["all"]
cache.enabled = false
[generation]
allow-x00 = true
no-shrink = true
database = "none"
max-examples = {examples}
[phases.stateful]
max-steps = 4
generation.max-examples = {sequences}
inference.algorithms = []
[checks.ignored_auth]
enabled = false
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 404, 422, 429]
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 429]
"""


def only(pattern: str, *settings: str) -> str:
    """Settings for the operations whose path matches."""
    return "\n".join(["[[operations]]", f"include-path-regex = '{pattern}'", *settings, ""])


def fuzz(url: str, folder: Path, *arguments: str, examples: int, sequences: int, overrides: str) -> dict[str, Any]:
    """What schemathesis reports of the server at `url`; fails with its account if it found anything.

    `examples` are random requests of each operation, `sequences` runs of up to four that follow from one another.
    """
    settings, report = folder / "schemathesis.toml", folder / "report.json"
    settings.write_text(_CONFIG.format(examples=examples, sequences=sequences) + overrides)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(settings), "--no-color", "run"]
    # A server that was told to drain, or to end, would be no subject any more.
    command += [
        "--exclude-path-regex",
        "^/admin/",
        f"{url}/openapi.json",
        "--report-json-path",
        str(report),
        *arguments,
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-20_000:] + ended.stderr[-2_000:]
    found: dict[str, Any] = json.loads(report.read_text())
    assert found["operations"]["tested"] == found["operations"]["selected"], found["operations"]
    assert {phase["status"] for phase in found["phases"].values()} <= {"success", "skip"}
    return found


def statuses(log: Path) -> Counter[int]:
    """How often the server answered with each status, by its own log."""
    lines = (json.loads(line) for line in log.read_text().splitlines() if line.startswith("{"))
    return Counter(line["status"] for line in lines if line["event"] == "request")
