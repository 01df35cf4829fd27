"""Schemathesis holds the server to its own API reference: by examples, edge values, random requests and sequences.

Requests are valid and invalid, and hold NUL bytes. No answer may be a 5xx, have a status, media type or shape that the
reference does not know, or take what the reference forbids.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.http.fuzzing import ROOT, TWINS, fuzz, only, statuses

CAPABLE = {
    "capabilities": ["chat", "completion", "embedding", "fim", "rerank", "tools"],
    "input_modalities": ["text", "image"],
    "dimensions": 2,
}
# So many parameters that their edge values alone are hundreds of requests.
LARGE = "^/v1/(chat/)?completions|^/v1/(messages|responses)|^/v1beta/.*:|^/api/(chat|generate)|^/(completion|infill)$"
# Of these the schemas say all that is asked: what fits them is answered.
PRECISE = (
    "^/v1(beta)?/models(/{id})?$|rerank$|^/(de)?tokenize$|^/api/(tags|ps|version|v0/models)"
    "|^/(props|health|ready|docs|openapi.json|openrouter/models)$"
)


@contextmanager
def scripted(log: Path) -> Iterator[str]:
    """A server process over a scripted engine that can do everything, at this URL."""
    command = [sys.executable, "-m", "tests.http.serve_scripted", json.dumps({"model": CAPABLE})]
    with log.open("wb") as stderr, subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr) as server:
        try:
            assert server.stdout is not None
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.kill()


@pytest.mark.timeout(3600)
def test_no_request_surprises_the_server(full: bool, tmp_path: Path) -> None:
    """In the short form a few hundred requests, the same ones each time; 10,000 in the full form, others each time."""
    overrides = only(PRECISE, 'checks.positive_data_acceptance.expected-statuses = ["2xx", 422]')
    if not full:
        overrides += only(TWINS, "phases.coverage.enabled = false", "phases.fuzzing.enabled = false")
        overrides += only(LARGE, "phases.coverage.enabled = false")
    seed = () if full else ("--seed", "1")
    log = tmp_path / "server.log"
    with scripted(log) as url:
        found = fuzz(
            url, tmp_path, *seed, examples=20 if full else 1, sequences=100 if full else 8, overrides=overrides
        )
    answered = statuses(log)
    print(f"{found['test_cases']['generated']} requests; statuses {dict(sorted(answered.items()))}")
    assert sum(answered.values()) >= (10_000 if full else 300)
    assert max(answered) < 500
    assert {200, 400, 404, 405, 415} <= set(answered)
