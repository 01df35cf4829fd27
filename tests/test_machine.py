"""What this computer offers: memory and cores within a container's limits, and which devices can take layers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ocserve import machine
from ocserve.machine import Device, LlamaFacts


def test_this_machine_has_memory() -> None:
    seen = machine.host_memory()
    assert 0 < seen.available_bytes <= seen.total_bytes


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("1000", "400", (1000, 600)), ("max", "400", None), ("1000", "2000", (1000, 0)), ("1000", "x", None)],
)
def test_a_containers_limit_counts(tmp_path: Path, limit: str, used: str, expected: tuple[int, int] | None) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    assert machine.container_limit(tmp_path) == expected
    assert machine.container_limit(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), ("nonsense", 8), ("1 0", 8)],
)
@pytest.mark.skipif(sys.platform != "linux", reason="affinity and quotas are Linux's")
def test_cores_are_those_this_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int
) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)))
    assert machine.usable_cores(tmp_path) == 8
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert machine.usable_cores(tmp_path) == expected


def test_cached_files_do_not_use_up_a_container(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 600\ninactive_file 450\nactive_file 150\n")
    assert machine.container_limit(tmp_path) == (1000, 700)
    (tmp_path / "memory.stat").write_text("nonsense\n")
    assert machine.container_limit(tmp_path) == (1000, 100)


def facts(*kinds: str, offload: bool = True) -> LlamaFacts:
    devices = tuple(Device(f"{kind}{index}", "a device", kind, 1, 2) for index, kind in enumerate(kinds))
    return LlamaFacts("1.0", offload, "", devices)


@pytest.mark.parametrize(
    ("kinds", "offload", "usable"),
    [
        (("cpu",), True, []),
        (("cpu", "gpu"), True, ["gpu1"]),
        (("cpu", "gpu"), False, []),
        (("igpu", "cpu"), True, ["igpu0"]),
        (("igpu", "gpu", "gpu"), True, ["gpu1", "gpu2"]),
        (("accel", "cpu"), True, []),
    ],
)
def test_layers_go_to_gpus_and_to_an_integrated_one_only_where_it_is_alone(
    kinds: tuple[str, ...], offload: bool, usable: list[str]
) -> None:
    assert [gpu.name for gpu in facts(*kinds, offload=offload).usable_gpus] == usable


def test_an_integrated_gpu_has_no_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.sys, "platform", "linux")
    assert Device("a", "", "igpu", 1, 2).shares_host_memory
    assert not Device("a", "", "gpu", 1, 2).shares_host_memory
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    assert Device("a", "", "gpu", 1, 2).shares_host_memory
    assert not Device("a", "", "cpu", 1, 2).shares_host_memory
