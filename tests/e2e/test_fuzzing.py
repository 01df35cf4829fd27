"""Schemathesis on a real model: what random requests do to template, tokenizer, grammars and samplers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.daemon import daemon
from tests.http.fuzzing import TWINS, fuzz, only, statuses


@pytest.mark.timeout(3600)
def test_no_request_surprises_a_real_engine(full: bool, smollm2: Path, model_cache: Path, tmp_path: Path) -> None:
    """300 requests. A small context keeps answers short; the engine process outlives them all."""
    if not full:
        pytest.skip("minutes; with --full")
    overrides = only(".*", "phases.coverage.enabled = false") + only(TWINS, "phases.fuzzing.enabled = false")
    with daemon("smollm2:135m", store=model_cache, env={"OCSERVE_ENGINE_CONTEXT": "256"}) as server:
        engine = server.engine_pid()
        found = fuzz(server.root, tmp_path, examples=12, sequences=8, overrides=overrides)
        assert server.engine_pid() == engine
        answered = statuses(server.log)
    print(f"{found['test_cases']['generated']} requests; statuses {dict(sorted(answered.items()))}")
    assert sum(answered.values()) >= 300
    assert max(answered) < 500
