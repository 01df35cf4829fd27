"""What llama.cpp alone takes for a context: prints the bytes that become resident by loading and computing it.

A child process of the test: `python -m tests.e2e.bare_memory SPEC`, where SPEC is an engine's, as JSON.
"""

from __future__ import annotations

import sys

import msgspec
import psutil

from ocserve.engine import llama
from ocserve.engine.context import Context, Row
from ocserve.engine.wire import EngineSpec


def main() -> None:
    spec = msgspec.json.decode(sys.argv[1], type=EngineSpec)
    before = psutil.Process().memory_info().rss
    log = llama.LoadLog()
    model = llama.Model(spec.path, gpu_layers=spec.gpu_layers, log=log)
    context = Context(
        model,
        pool_tokens=spec.pool_tokens,
        sequences=spec.sequences,
        batch_tokens=spec.batch_tokens,
        threads=1,
        outputs=spec.outputs,
        kv_type=spec.kv_type,
        flash_attention=spec.flash_attention,
    )
    size = spec.batch_tokens
    for begin in (0, size):
        context.decode([Row(1000 + at, begin + at, 0, at == size - 1) for at in range(size)])
    context.forget(0)
    context.decode([Row(1000, 0, sequence, True) for sequence in range(min(spec.outputs, spec.sequences))])
    print(psutil.Process().memory_info().rss - before)


if __name__ == "__main__":
    main()
