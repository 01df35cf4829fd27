"""What is pulled from its owners at a scrape: frozen states, as they are at that moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class EngineCounts(Protocol):
    """What is read of an engine's counters; they begin anew with every engine process, as counters may."""

    @property
    def steps(self) -> int: ...
    @property
    def prefill_tokens(self) -> int: ...
    @property
    def decode_tokens(self) -> int: ...
    @property
    def forced_tokens(self) -> int: ...
    @property
    def resident_tokens(self) -> int: ...
    @property
    def host_tokens(self) -> int: ...
    @property
    def disk_tokens(self) -> int: ...
    @property
    def invalid_objects(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def evictions(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def cells_used(self) -> int: ...
    @property
    def cells_kept(self) -> int: ...
    @property
    def cells_total(self) -> int: ...


@dataclass(frozen=True, slots=True)
class EngineReading:
    """One model at the moment of a scrape. `owed` are answers being generated or waited for."""

    model: str
    loaded: bool
    owed: int
    restarts: int
    resident_bytes: int | None
    stats: EngineCounts


class CheckCounts(Protocol):
    """What is read of the content policy's checks of one stage."""

    @property
    def stage(self) -> str: ...
    @property
    def outcomes(self) -> Sequence[tuple[str, int]]: ...
    @property
    def bounds_s(self) -> tuple[float, ...]: ...
    @property
    def took(self) -> Sequence[int]: ...
    @property
    def took_s(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Reading:
    """The server at the moment of a scrape."""

    version: str
    started: float  # seconds since the epoch
    ready: bool
    active: int
    resident_bytes: int | None
    engines: tuple[EngineReading, ...]
    ledger_healthy: bool = True
    ledger_unwritten: int = 0
    checks: Sequence[CheckCounts] = ()
