"""What the loop has done since load."""

from __future__ import annotations

from dataclasses import dataclass

from ocserve.engine.kv import KvMemory
from ocserve.engine.wire import EngineStats


@dataclass(slots=True)
class Counts:
    """The loop's own counters; see `EngineStats` for what they mean."""

    steps_by_sequences: list[int]
    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0
    parked: int = 0
    resumed: int = 0
    forced: int = 0
    drafted: int = 0
    accepted: int = 0
    invalid: int = 0

    def step(self, sequences: int, decode_tokens: int, prefill_tokens: int, *, steps: int = 1) -> None:
        """A batch was computed in which `sequences` decoded, or several with so many tokens in all."""
        self.steps += steps
        self.steps_by_sequences[sequences] += steps
        self.decode_tokens += decode_tokens
        self.prefill_tokens += prefill_tokens

    def snapshot(self, kv: KvMemory, *, running: int, waiting: int) -> EngineStats:
        """The counters and those of memory, with how many sequences there are now."""
        return EngineStats(
            steps=self.steps,
            prefill_tokens=self.prefill_tokens,
            decode_tokens=self.decode_tokens,
            steps_by_sequences=tuple(self.steps_by_sequences),
            running=running,
            waiting=waiting,
            cells_used=kv.cells,
            cells_total=kv.capacity,
            cells_kept=kv.cells_kept,
            preemptions=self.preemptions,
            parked=self.parked,
            resumed=self.resumed,
            evictions=kv.evictions,
            resident_tokens=kv.hits.resident,
            host_tokens=kv.hits.host,
            disk_tokens=kv.hits.disk,
            forced_tokens=self.forced,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
            invalid_objects=self.invalid,
        )
