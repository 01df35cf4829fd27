"""What llama.cpp itself reserves, from its own log: `python -m tests.catalog.measured` with jobs as JSON on stdin.

With `allocate` false nothing is allocated and no weight is read, so that models of any size can be asked about.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ocserve.catalog.need import Plan

ROOT = Path(__file__).resolve().parent.parent.parent


class Job(msgspec.Struct, frozen=True):
    """A file and how it is loaded."""

    path: str
    plan: Plan
    allocate: bool = True


class Reserved(msgspec.Struct, frozen=True):
    """Bytes as llama.cpp logs them; weights are 0 where nothing was allocated. `resident` is of the whole process."""

    weights: float
    kv: float
    compute: float
    resident: int


def measure(jobs: Sequence[Job]) -> list[Reserved]:
    """Run the jobs one after another in one child."""
    finished = subprocess.run(
        [sys.executable, "-m", "tests.catalog.measured"],
        cwd=ROOT,
        input=msgspec.json.encode(jobs),
        capture_output=True,
        timeout=240,
        check=True,
    )
    return msgspec.json.decode(finished.stdout, type=list[Reserved])


def _load(job: Job, api: Any) -> tuple[object, object]:
    parameters = api.llama_model_default_params()
    if not job.allocate:
        parameters.no_alloc, parameters.load_mode = True, api.LLAMA_LOAD_MODE_NONE
    model = api.llama_model_load_from_file(job.path.encode(), parameters)
    settings, plan = api.llama_context_default_params(), job.plan
    settings.n_ctx, settings.kv_unified, settings.swa_full = plan.pool_tokens, True, plan.full_window
    settings.n_batch = settings.n_ubatch = plan.batch_tokens
    settings.n_seq_max = plan.sequences or plan.parallel
    settings.n_outputs_max = plan.outputs or plan.sequences or plan.parallel
    settings.type_k = settings.type_v = getattr(api, f"GGML_TYPE_{plan.kv_type.upper()}")
    context = api.llama_init_from_model(model, settings)
    assert model
    assert context
    return model, context


def main() -> None:
    import psutil

    from ocserve.engine.bindings import api

    lines: list[str] = []
    hook = api.llama_log_callback(lambda level, text, data: lines.append(text.decode(errors="replace")))
    api.llama_log_set(hook, None)
    api.llama_backend_init()
    results = []
    for job in msgspec.json.decode(sys.stdin.buffer.read(), type=list[Job]):
        lines.clear()
        loaded = _load(job, api)
        text = "".join(lines)

        def mebibytes(pattern: str, text: str = text) -> float:
            return sum(float(each) for each in re.findall(pattern + r" *= *([\d.]+) MiB", text)) * 2**20

        results.append(
            Reserved(
                mebibytes("Mapped model buffer size"),
                mebibytes(r"(?:kv_cache|memory_recurrent): size"),
                mebibytes("compute buffer size") + mebibytes("output buffer size"),
                psutil.Process().memory_info().rss,
            )
        )
        api.llama_free(loaded[1])
        api.llama_model_free(loaded[0])
    sys.stdout.write(json.dumps([msgspec.to_builtins(each) for each in results]))


if __name__ == "__main__":
    main()
