"""What this computer offers a model: cores, main memory, devices. The front and the engine count alike.

Standard library and msgspec, plus psutil where it is called: every layer may use this.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from ocserve.decoding import resolved

_CONTROL_GROUP = Path("/sys/fs/cgroup")


class Device(msgspec.Struct, frozen=True):
    """A compute device as ggml lists it. Memory is bytes; `kind` is `cpu`, `gpu`, `igpu`, `accel` or `meta`."""

    name: str
    description: str
    kind: str
    memory_free: int
    memory_total: int

    @property
    def is_gpu(self) -> bool:
        return self.kind in ("gpu", "igpu")

    @property
    def shares_host_memory(self) -> bool:
        """Whether its memory is main memory: an integrated GPU, or Apple's."""
        return self.kind == "igpu" or (self.is_gpu and sys.platform == "darwin")


@resolved
class LlamaFacts(msgspec.Struct, frozen=True):
    """The build of llama.cpp and what it sees, as `ocserve.engine.probe` prints it.

    `gpu_makers` are those of the GPUs whose drivers are loaded, whether or not the build can use them.
    """

    llama_cpp: str
    supports_gpu_offload: bool
    system_info: str
    devices: tuple[Device, ...]
    gpu_makers: tuple[str, ...] = ()

    @property
    def usable_gpus(self) -> tuple[Device, ...]:
        """The GPUs on which layers can be placed; like llama.cpp, integrated ones only where there are no others."""
        gpus = tuple(device for device in self.devices if device.is_gpu and self.supports_gpu_offload)
        return tuple(gpu for gpu in gpus if gpu.kind == "gpu") or gpus


class HostMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Main memory that this process can use, with a container's limit taken into account. Bytes."""

    total_bytes: int
    available_bytes: int


def host_memory() -> HostMemory:
    """Main memory now."""
    import psutil

    memory = psutil.virtual_memory()
    limit = container_limit()
    if limit is None:
        return HostMemory(total_bytes=memory.total, available_bytes=memory.available)
    total, left = limit
    return HostMemory(total_bytes=min(total, memory.total), available_bytes=min(left, memory.available))


def resident_bytes(pid: int | None = None) -> int | None:
    """Main memory that a process occupies, this one by default; None where there is no such process (any more)."""
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def container_limit(group: Path = _CONTROL_GROUP) -> tuple[int, int] | None:
    """(limit, what is left of it) under cgroup v2; None where there is no limit or no such thing.

    Pages of files are charged to the group and given back under pressure, so they count as left: otherwise a model
    that was read once would seem to leave no room for itself.
    """
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    return (int(limit), max(int(limit) - max(used - _file_pages(group), 0), 0)) if limit.isdecimal() else None


def _file_pages(group: Path) -> int:
    """Bytes of cached files that the kernel may drop."""
    try:
        entries = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(entries["inactive_file"]) + int(entries["active_file"])
    except (OSError, ValueError, KeyError):
        return 0


def usable_cores(group: Path = _CONTROL_GROUP) -> int:
    """Cores this process may compute on: its affinity, capped by a container's CPU quota."""
    if sys.platform != "linux":
        import psutil

        return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    cores = len(os.sched_getaffinity(0))
    try:
        limit, period = (group / "cpu.max").read_text().split()
        return cores if limit == "max" else min(cores, max(1, int(limit) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return cores
