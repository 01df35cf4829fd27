"""How an engine comes to be: what takes long runs side by side."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from ocserve.engine import assembly, encodings
from ocserve.engine.bindings import LlamaError
from tests.engine.test_handle import SPEC


def test_the_tokenizer_is_proven_while_llama_cpp_makes_its_memory(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = threading.Event()
    prove, warm_up = encodings.prove, assembly._warm_up

    def waits(*arguments: Any) -> encodings.PlainTokenizer:
        assert warm.wait(30), "the memory waits for the tokenizer"
        return prove(*arguments)

    def tells(*arguments: Any) -> None:
        warm_up(*arguments)
        warm.set()

    monkeypatch.setattr(encodings, "prove", waits)
    monkeypatch.setattr(assembly, "_warm_up", tells)
    spec = replace(SPEC, path=str(tiny_model), pool_tokens=1000, parallel=2, batch_tokens=64, threads_decode=1)
    engine = assembly.assemble(spec, lambda message: None)
    assert engine.facts.parallel == 2


def test_a_load_leaves_the_interpreter_as_it_was(tmp_path: Path) -> None:
    usual = sys.getswitchinterval()
    with pytest.raises(LlamaError):
        assembly.assemble(replace(SPEC, path=str(tmp_path / "none.gguf")), lambda message: None)
    assert gc.isenabled()
    assert sys.getswitchinterval() == usual


def test_an_engine_process_loads_nothing_of_the_front() -> None:
    listing = "import sys, ocserve.engine.worker; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True, timeout=60)
    loaded = {*done.stdout.split()}
    assert {"numpy", "tiktoken", "llama_cpp.llama_cpp"} <= loaded  # the list is the right one
    assert not loaded & {"asyncio", "ssl", "starlette", "click", "structlog", "huggingface_hub", "llama_cpp.llama"}
