"""Which models are in memory: their states, who is loaded next and who has to go. Pure: no clock, no process.

    COLD ──load──▶ LOADING ──loaded──▶ READY ──unload──▶ UNLOADING ──unloaded──▶ COLD
      ▲               │
      └────failed─────┘

A lease on a model lasts from a request's arrival to its settlement; a leased model is never unloaded, so a model is
only ever taken from those that nobody uses, the least recently used first. Loads run one after another: what memory is
left is then known, and no load slows another. A model that is alone is loaded whatever the estimate says.

Models come and go. One that is retired is loaded for nobody new; when nobody uses it any more it is unloaded, and then
it is `gone`.
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

    `need` is what each model takes by estimate that is there from the start, and `capacity` what all loaded ones may
    take together, in each place.
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
class Standing:
    """How a model is: `need` in bytes by place; times are seconds of the residency's clock.

    `used_at` is None for one that nobody has asked for, `goes_at` when it will be unloaded if nobody uses it.
    """

    phase: Phase
    leases: int
    need: tuple[int, ...]
    used_at: float | None
    goes_at: float | None
    retry_at: float


@dataclass(frozen=True, slots=True)
class Action:
    """A move that has been made and now has to be carried out: `LOAD` or `UNLOAD`."""

    move: Move
    model: str


@dataclass(eq=False, slots=True)
class _Model:
    """One model's facts. `waiting_since` orders the cold ones that are wanted."""

    name: str
    need: tuple[int, ...]
    phase: Phase = Phase.COLD
    leases: int = 0
    used_at: float | None = None
    waiting_since: float = 0.0
    retired: bool = False
    dismissed: bool = False  # to be unloaded at once, if nobody uses it
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
        self._models = {name: _Model(name, need) for name, need in memory.need.items()}
        self._memory = memory
        self.rules = rules

    def add(self, name: str, need: tuple[int, ...]) -> None:
        """A further model, cold."""
        assert name not in self._models
        self._models[name] = _Model(name, need)

    def retire(self, name: str) -> None:
        """Have a model go as soon as nobody uses it."""
        self._models[name].retired = True

    def restore(self, name: str) -> None:
        """Take back that a model is to go."""
        self._models[name].retired = False

    def retired(self, name: str) -> bool:
        """Whether a model is to go."""
        return self._models[name].retired

    def gone(self) -> list[str]:
        """Forget the retired models that are in no memory and used by nobody; their names."""
        names = [each.name for each in self._models.values() if each.retired and each.phase is Phase.COLD]
        found = [name for name in names if not self._models[name].leases]
        for name in found:
            del self._models[name]
        return found

    def dismiss(self, name: str) -> None:
        """Have a model unloaded that nobody uses, however short a time ago it was used."""
        self._models[name].dismissed = True

    def pardon(self, name: str) -> None:
        """Let a model be loaded although its last load failed a moment ago."""
        self._models[name].retry_at = 0.0

    def standing(self, name: str) -> Standing:
        """How a model is."""
        model = self._models[name]
        idle = model.phase is Phase.READY and not model.leases
        goes_at = self._goes_at(model) if idle else None
        return Standing(model.phase, model.leases, model.need, model.used_at, goes_at, model.retry_at)

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
        model.dismissed = False

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
        elif move is Move.UNLOADED:
            model.dismissed = False
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
        times = (self._goes_at(model) for model in self._idle())
        return min((at for at in times if at is not None), default=None)

    @staticmethod
    def _begin(model: _Model, move: Move) -> Action:
        model.move(move)
        return Action(move, model.name)

    def _idle(self) -> list[_Model]:
        """Loaded models that nobody uses, the least recently used first."""
        idle = (model for model in self._models.values() if model.phase is Phase.READY and not model.leases)
        return sorted(idle, key=lambda model: model.used_at or 0.0)

    def _goes_at(self, model: _Model) -> float | None:
        """When an idle model is to go; None: when its room is needed."""
        used_at = model.used_at or 0.0
        if model.retired or model.dismissed:
            return used_at
        return None if self.rules.idle_s is None else used_at + self.rules.idle_s

    def _is_overdue(self, model: _Model, now: float) -> bool:
        goes_at = self._goes_at(model)
        return goes_at is not None and now >= goes_at

    def _wanted(self, now: float) -> list[_Model]:
        """Cold models that requests wait for, those first that have been waited for longest."""
        models = self._models.values()
        wanted = [model for model in models if model.phase is Phase.COLD and model.leases and now >= model.retry_at]
        return sorted(wanted, key=lambda model: model.waiting_since)

    def _victims(self, wanted: _Model) -> list[_Model] | None:
        """Who has to go before `wanted` fits; None if it would not fit even then."""
        resident = [model for model in self._models.values() if model.phase is not Phase.COLD]
        staying = [model for model in resident if model.phase is not Phase.UNLOADING]
        available = self._memory.available()
        available += sum(model.need[0] for model in resident if model.phase is Phase.UNLOADING)
        victims: list[_Model] = []
        for candidate in (*self._idle(), None):
            if self._fits(wanted, staying, available):
                return victims
            if candidate is not None:
                victims.append(candidate)
                staying.remove(candidate)
                available += candidate.need[0]
        return None

    def _fits(self, wanted: _Model, staying: list[_Model], available: int) -> bool:
        if not staying:
            return True
        most = self.rules.most_loaded
        if (most is not None and len(staying) >= most) or wanted.need[0] > available:
            return False
        together = zip(*(model.need for model in (*staying, wanted)), strict=True)
        return all(sum(taken) <= capacity for taken, capacity in zip(together, self._memory.capacity, strict=True))
