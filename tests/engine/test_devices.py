"""Devices are asked in a child that may break, and only where the build has a GPU backend at all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ocserve import config
from ocserve.engine import devices


def test_this_build_says_what_it_sees() -> None:
    facts = devices.probe(config.engine_environment())
    assert any(device.kind == "cpu" for device in facts.devices)
    assert bool(facts.usable_gpus) <= devices.has_gpu_backend()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), False),
        (("libggml.so", "libggml-base.so", "libggml-cpu.so", "libllama.so"), False),
        (("libggml-cpu-haswell.so", "libggml-blas.so.0"), False),
        (("libggml-base.so", "libggml-cuda.so"), True),
        (("ggml-base.dll", "ggml-vulkan.dll"), True),
        (("libggml-metal.dylib",), True),
    ],
)
def test_a_gpu_backend_is_told_by_its_library(tmp_path: Path, names: tuple[str, ...], expected: bool) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert devices.has_gpu_backend(tmp_path) is expected


@pytest.mark.parametrize("has_backend", [False, True])
def test_the_child_is_spared_where_no_gpu_could_be_used(monkeypatch: pytest.MonkeyPatch, has_backend: bool) -> None:
    def probe(_: object) -> object:
        raise devices.ProbeFailed("asked")

    monkeypatch.setattr(devices, "has_gpu_backend", lambda: has_backend)
    monkeypatch.setattr(devices, "probe", probe)
    if has_backend:
        with pytest.raises(devices.ProbeFailed, match="asked"):
            devices.usable_gpus({})
    else:
        assert devices.usable_gpus({}) == ()


def test_a_driver_that_crashes_is_an_error_that_says_how() -> None:
    crash = (sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGABRT)")
    with pytest.raises(devices.ProbeFailed, match="killed by SIGABRT"):
        devices.probe(config.engine_environment(), crash)
