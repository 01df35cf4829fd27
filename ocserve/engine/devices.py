"""Which devices llama.cpp sees, asked in a child process: a GPU driver that crashes or hangs takes only that down."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

import msgspec

from ocserve.machine import Device, LlamaFacts

PROBE = (sys.executable, "-m", "ocserve.engine.probe")
PROBE_TIMEOUT_S = 60.0

# The backends that compute in main memory on the processor: ggml builds each backend as a library of its own.
_BACKEND = re.compile(r"(?:lib)?ggml-([a-z0-9]+)")
_NO_GPU = frozenset({"base", "cpu", "blas", "rpc"})


class ProbeFailed(Exception):
    """llama.cpp could not say what it sees. `message` says how it ended, `hint` what may help."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def probe(environment: Mapping[str, str], argv: Sequence[str] = PROBE) -> LlamaFacts:
    """llama.cpp's build and devices. Raises `ProbeFailed`."""
    reinstall = "reinstall with: pip install --force-reinstall ocserve"
    try:
        finished = subprocess.run(
            argv, env=dict(environment), capture_output=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ProbeFailed(f"did not start within {PROBE_TIMEOUT_S:g} s", "a GPU driver may hang") from None
    except OSError as error:
        raise ProbeFailed(f"the probe cannot be used ({type(error).__name__})", reinstall) from None
    if finished.returncode != 0:
        lines = finished.stderr.decode(errors="replace").strip().splitlines()
        last = f", {lines[-1][:200]}" if lines else ""
        raise ProbeFailed(f"does not load: {_ending(finished.returncode)}{last}", reinstall)
    try:
        return msgspec.json.decode(finished.stdout, type=LlamaFacts)
    except msgspec.DecodeError as error:
        raise ProbeFailed(f"the probe cannot be used ({type(error).__name__})", reinstall) from None


def usable_gpus(environment: Mapping[str, str]) -> tuple[Device, ...]:
    """The GPUs on which layers can be placed, with what is free on them now. Raises `ProbeFailed`.

    The child is spared where the installed build has no GPU backend: it takes half a second of every start.
    """
    return probe(environment).usable_gpus if has_gpu_backend() else ()


def has_gpu_backend(libraries: Path | None = None) -> bool:
    """Whether llama-cpp-python was built for a GPU, told from its libraries without loading them."""
    if libraries is None:
        # `importlib.util.find_spec` asks a module that is loaded already, and the engine's way of loading gives none.
        spec = PathFinder.find_spec("llama_cpp")
        if spec is None or not spec.submodule_search_locations:
            return False  # the engine's own refusal says so
        libraries = Path(spec.submodule_search_locations[0]) / "lib"
    names = (match[1] for file in libraries.glob("*ggml-*") if (match := _BACKEND.match(file.name)))
    return any(name not in _NO_GPU for name in names)


def _ending(status: int) -> str:
    """A child's exit status in words."""
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
