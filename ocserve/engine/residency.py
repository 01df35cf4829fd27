"""Which models are in memory: their states, who is loaded next and who has to go. Pure: no clock, no process.

    COLD ──load──▶ LOADING ──loaded──▶ READY ──unload──▶ UNLOADING ──unloaded──▶ COLD
      ▲               │
      └────failed─────┘

A lease on a model lasts from a request's arrival to its settlement; a leased model is never unloaded, so a model is
only ever taken from those that nobody uses, the least recently used first. Loads run one after another: what memory is
left is then known, and no load slows another. A model that is alone is loaded whatever the estimate says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

# After a failed load the next attempt waits, twice as long each time: a load can take minutes of a disk's time.
RETRY_FIRST_S, RETRY_LAST_S = 1.0, 60.0


class Phase(Enum):
    COLD = "cold"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"


class Move(Enum):
    LOAD = "load"
    LOADED = "loaded"
    FAILED = "failed"
    UNLOAD = "unload"
    UNLOADED = "unloaded"


TRANSITIONS: dict[tuple[Phase, Move], Phase] = {
    (Phase.COLD, Move.LOAD): Phase.LOADING,
    (Phase.LOADING, Move.LOADED): Phase.READY,
    (Phase.LOADING, Move.FAILED): Phase.COLD,
    (Phase.READY, Move.UNLOAD): Phase.UNLOADING,
    (Phase.UNLOADING, Move.UNLOADED): Phase.COLD,
}


class IllegalMove(Exception):
    """A transition that the table does not have, or the unloading of a leased model; nothing has changed."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What models may take, bytes by place: main memory, then each GPU.

    `need` is what each model takes by estimate and `capacity` what all loaded ones may take together, in each place.
    `available` measures what is left of main memory now: other programs take some too.
    """

    need: Mapping[str, tuple[int, ...]]
    capacity: tuple[int, ...]
    available: Callable[[], int]


@dataclass(frozen=True, slots=True)
class Rules:
    """`idle_s` unloads a model that nobody has used for so long, `most_loaded` bounds their number; None: never."""

    idle_s: float | None = None
    most_loaded: int | None = None


@dataclass(frozen=True, slots=True)
class Action:
    """A move that has been made and now has to be carried out: `LOAD` or `UNLOAD`."""

    move: Move
    model: str


@dataclass(eq=False, slots=True)
class _Model:
    """One model's facts. `waiting_since` orders the cold ones that are wanted."""

    name: str
    phase: Phase = Phase.COLD
    leases: int = 0
    used_at: float = 0.0
    waiting_since: float = 0.0
    failures: int = 0  # of loads, since the last that succeeded
    retry_at: float = 0.0

    def move(self, move: Move) -> None:
        target = TRANSITIONS.get((self.phase, move))
        if target is None or (move is Move.UNLOAD and self.leases):
            raise IllegalMove(f"{move.value} from {self.phase.value} with {self.leases} leases")
        self.phase = target


class Residency:
    """Decides. Every method takes the time, seconds of any steady clock; `plan` makes the moves that are due."""

    def __init__(self, memory: Memory, rules: Rules) -> None:
        self._models = {name: _Model(name) for name in memory.need}
        self._memory = memory
        self._rules = rules

    def phase(self, name: str) -> Phase:
        """Where a model is."""
        return self._models[name].phase

    def leases(self, name: str) -> int:
        """Requests that need the model now."""
        return self._models[name].leases

    def retry_in_s(self, name: str, now: float) -> float:
        """How long a model stays unloadable after a failed load; 0 if it may be loaded."""
        return max(0.0, self._models[name].retry_at - now)

    def acquire(self, name: str, now: float) -> None:
        """A request needs the model: it will be loaded if need be, and not unloaded before `release`."""
        model = self._models[name]
        if not model.leases:
            model.waiting_since = now
        model.leases += 1
        model.used_at = now

    def release(self, name: str, now: float) -> None:
        """A request no longer needs the model."""
        model = self._models[name]
        assert model.leases > 0
        model.leases -= 1
        model.used_at = now

    def done(self, name: str, move: Move, now: float) -> None:
        """An action has ended in `LOADED`, `FAILED` or `UNLOADED`; raises `IllegalMove` if it was not under way."""
        model = self._models[name]
        model.move(move)
        if move is Move.LOADED:
            model.failures, model.used_at = 0, now
        elif move is Move.FAILED:
            model.retry_at = now + min(RETRY_LAST_S, RETRY_FIRST_S * 2**model.failures)
            model.failures += 1

    def plan(self, now: float) -> list[Action]:
        """The moves that are due, already made: idle models go, and room is made for the models that are waited for."""
        actions = [self._begin(model, Move.UNLOAD) for model in self._idle() if self._is_overdue(model, now)]
        if any(model.phase is Phase.LOADING for model in self._models.values()):
            return actions
        for model in self._wanted(now):
            victims = self._victims(model)
            if victims is None:
                continue  # busy models hold the room; another one may fit
            actions += [self._begin(victim, Move.UNLOAD) for victim in victims]
            if not any(other.phase is Phase.UNLOADING for other in self._models.values()):
                actions.append(self._begin(model, Move.LOAD))
            break  # the room that comes free is this model's
        return actions

    def next_due(self) -> float | None:
        """When `plan` next has something to do that no event announces: an idle model's time."""
        if self._rules.idle_s is None:
            return None
        return min((model.used_at + self._rules.idle_s for model in self._idle()), default=None)

    @staticmethod
    def _begin(model: _Model, move: Move) -> Action:
        model.move(move)
        return Action(move, model.name)

    def _idle(self) -> list[_Model]:
        """Loaded models that nobody uses, the least recently used first."""
        idle = (model for model in self._models.values() if model.phase is Phase.READY and not model.leases)
        return sorted(idle, key=lambda model: model.used_at)

    def _is_overdue(self, model: _Model, now: float) -> bool:
        return self._rules.idle_s is not None and now >= model.used_at + self._rules.idle_s

    def _wanted(self, now: float) -> list[_Model]:
        """Cold models that requests wait for, those first that have been waited for longest."""
        models = self._models.values()
        wanted = [model for model in models if model.phase is Phase.COLD and model.leases and now >= model.retry_at]
        return sorted(wanted, key=lambda model: model.waiting_since)

    def _victims(self, wanted: _Model) -> list[_Model] | None:
        """Who has to go before `wanted` fits; None if it would not fit even then."""
        resident = [model for model in self._models.values() if model.phase is not Phase.COLD]
        staying = [model for model in resident if model.phase is not Phase.UNLOADING]
        need, available = self._memory.need, self._memory.available()
        available += sum(need[model.name][0] for model in resident if model.phase is Phase.UNLOADING)
        victims: list[_Model] = []
        for candidate in (*self._idle(), None):
            if self._fits(wanted, staying, available):
                return victims
            if candidate is not None:
                victims.append(candidate)
                staying.remove(candidate)
                available += need[candidate.name][0]
        return None

    def _fits(self, wanted: _Model, staying: list[_Model], available: int) -> bool:
        if not staying:
            return True
        most, need = self._rules.most_loaded, self._memory.need
        if (most is not None and len(staying) >= most) or need[wanted.name][0] > available:
            return False
        together = zip(*(need[model.name] for model in (*staying, wanted)), strict=True)
        return all(sum(taken) <= capacity for taken, capacity in zip(together, self._memory.capacity, strict=True))
