"""Stored measurements: timings per model and machine, and the machine's waiting policy, under `<cache>/profiles/`.

A profile is kept only as it was measured; what an engine learns while it serves belongs to that hour's load and is not
written back. Files are private (0600), replaced in one piece, and verified when read: anything odd counts as absent,
and the engine measures again. Losing them costs some seconds of the next start.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from ocserve.decoding import resolved
from ocserve.engine.costs import Timing

VERSION = 1
FOLDER = "profiles"
_MOST_BYTES = 256 * 1024
_MOST_TIMINGS = 2000
_LONGEST_STEP_S = 3600.0


class ProfileKey(msgspec.Struct, frozen=True, kw_only=True):
    """What timings depend on. `cores` are those the process may use, `gpu_layers` as they were asked for."""

    model_digest: str
    llama_cpp: str
    processor: str
    cores: int
    gpu_layers: int
    kv_type: str
    flash_attention: bool
    batch_tokens: int
    parallel: int


@resolved
class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A key's timings; `spread` is how far repeats lay apart."""

    version: int = VERSION
    key: ProfileKey
    timings: Annotated[tuple[Timing, ...], Meta(min_length=1, max_length=_MOST_TIMINGS)]
    spread: float

    def covers(self, threads: Collection[int | None]) -> bool:
        """Whether each of these thread counts was measured."""
        return {*threads} <= {timing.threads for timing in self.timings}


@resolved
class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """How often OpenMP's threads look at a barrier before they sleep, as `ocserve tune` found best for a machine."""

    version: int = VERSION
    processor: str
    cores: int
    spin_count: Annotated[int, Meta(ge=0, le=10**9)]


_Stored = TypeVar("_Stored", Profile, Waiting)


def load(directory: Path, key: ProfileKey) -> Profile | None:
    """The profile of `key` in the cache `directory`, None if there is none that can be trusted."""
    profile = _read(_path(directory, key), Profile)
    if profile is None or profile.key != key or not all(_is_possible(timing) for timing in profile.timings):
        return None
    return profile


def save(directory: Path, profile: Profile) -> None:
    """Store a profile in place of an earlier one of its key. Raises `OSError`."""
    _write(_path(directory, profile.key), profile)


def load_waiting(directory: Path, cores: int) -> Waiting | None:
    """The waiting policy that was tuned on this machine, if any."""
    waiting = _read(directory / FOLDER / "waiting.json", Waiting)
    return waiting if waiting is not None and (waiting.processor, waiting.cores) == (processor(), cores) else None


def save_waiting(directory: Path, waiting: Waiting) -> None:
    """Store the waiting policy. Raises `OSError`."""
    _write(directory / FOLDER / "waiting.json", waiting)


def waiting_environment(directory: Path, cores: int) -> dict[str, str]:
    """The variables that give an engine process the tuned policy; OpenMP reads them once, when it is loaded."""
    waiting = load_waiting(directory, cores)
    return {} if waiting is None else {"GOMP_SPINCOUNT": str(waiting.spin_count)}


def processor() -> str:
    """The processor's model name, as well as the system tells it."""
    with contextlib.suppress(OSError):  # only Linux has the file
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _path(directory: Path, key: ProfileKey) -> Path:
    return directory / FOLDER / f"{hashlib.sha256(msgspec.json.encode(key)).hexdigest()[:32]}.json"


def _is_possible(timing: Timing) -> bool:
    return min(timing.threads, timing.rows) >= 1 and timing.cells >= 0 and 0 < timing.seconds <= _LONGEST_STEP_S


def _read(path: Path, kind: type[_Stored]) -> _Stored | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            if not _is_ours(os.fstat(descriptor)):
                return None
            stored = msgspec.json.decode(file.read(_MOST_BYTES), type=kind)
    except (OSError, UnicodeDecodeError, RecursionError, msgspec.MsgspecError):
        return None
    return stored if stored.version == VERSION else None


def _is_ours(status: os.stat_result) -> bool:
    """A regular file that nobody else could have written."""
    if not stat.S_ISREG(status.st_mode):
        return False
    if os.name != "posix":
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)


def _write(path: Path, stored: Profile | Waiting) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.unlink(missing_ok=True)  # of a process of that id that died
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(msgspec.json.encode(stored))
            file.flush()
            os.fsync(descriptor)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
