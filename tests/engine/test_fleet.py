"""The fleet over scripted engines, in virtual time: hours of idling cost a test nothing."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import pytest

from ocserve.engine.fleet import Fleet
from ocserve.engine.handle import LoadError
from ocserve.engine.residency import Memory, Phase, Rules
from ocserve.errors import EngineUnavailable, ModelNotFound, Overloaded
from tests.scripted import ScriptedEngine


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        self._ahead = 0.0
        selector = selectors.DefaultSelector()
        select = selector.select

        def jump(timeout: float | None = None) -> Any:
            self._ahead += timeout or 0.0
            return select(0)

        selector.select = jump  # type: ignore[method-assign]
        super().__init__(selector)

    def time(self) -> float:
        return self._ahead


Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture
def virtually() -> Iterator[Run]:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        yield runner.run


class Told:
    """What the fleet reported."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def __call__(self, name: str, *, model: str, **_: object) -> None:
        self.events.append((name.removeprefix("model_"), model))


def fleet(
    load_s: float = 5.0, capacity: int = 2, wait_s: float = 30.0, **rules: float | int
) -> tuple[Fleet, dict[str, ScriptedEngine], Told]:
    """Three models of one unit of memory each."""
    engines = {name: ScriptedEngine(load_s=load_s) for name in "abc"}
    loaded: Callable[[], int] = lambda: capacity - sum(engine.loaded for engine in engines.values())  # noqa: E731
    told = Told()
    memory = Memory(dict.fromkeys(engines, (1,)), (capacity,), loaded)
    made = Fleet(engines, memory, Rules(**rules), wait_s=wait_s, on_event=told)  # type: ignore[arg-type]
    return made, engines, told


def now() -> float:
    return asyncio.get_running_loop().time()


async def use(made: Fleet, name: str, seconds: float = 0.0) -> float:
    """Hold a lease for a while; returns how long it took to get."""
    begun = now()
    async with made.lease(name) as engine:
        assert isinstance(engine, ScriptedEngine)
        assert engine.loaded
        waited = now() - begun
        await asyncio.sleep(seconds)
        assert engine.loaded, "unloaded under a lease"
    return waited


def test_many_requests_for_a_cold_model_cause_one_load(virtually: Run) -> None:
    async def main() -> None:
        made, engines, _ = fleet()
        waits = await asyncio.gather(*(use(made, "a") for _ in range(50)))
        assert engines["a"].loads == 1
        assert waits == pytest.approx([5.0] * 50)

    virtually(main())


def test_a_model_is_unloaded_when_nobody_has_used_it_for_so_long_and_not_before(virtually: Run) -> None:
    async def main() -> None:
        made, engines, told = fleet(idle_s=600)
        await use(made, "a", seconds=10_000)  # busy far longer than that
        await asyncio.sleep(599)
        assert engines["a"].loaded
        await use(made, "a")
        await asyncio.sleep(599)
        assert engines["a"].loaded
        await asyncio.sleep(2)
        assert not engines["a"].loaded
        assert made.can_serve("a")
        await use(made, "a")
        assert told.events == [("loaded", "a"), ("unloaded", "a"), ("loaded", "a")]

    virtually(main())


def test_without_an_idle_time_a_model_stays(virtually: Run) -> None:
    async def main() -> None:
        made, engines, _ = fleet()
        await use(made, "a")
        await asyncio.sleep(1_000_000)
        assert engines["a"].loaded

    virtually(main())


@pytest.mark.parametrize("limit", [{"most_loaded": 2, "capacity": 9}, {"capacity": 2}])
def test_the_least_recently_used_makes_room(virtually: Run, limit: dict[str, int]) -> None:
    async def main() -> None:
        made, _, told = fleet(**limit)  # type: ignore[arg-type]
        for name in "abac":
            await use(made, name)
            await asyncio.sleep(1)
        assert told.events == [("loaded", "a"), ("loaded", "b"), ("unloaded", "b"), ("loaded", "c")]

    virtually(main())


def test_a_request_waits_for_room_and_gets_it_when_a_busy_model_comes_free(virtually: Run) -> None:
    async def main() -> None:
        made, engines, _ = fleet(capacity=1)
        busy = asyncio.create_task(use(made, "a", seconds=20))
        await asyncio.sleep(6)
        assert await use(made, "b") == pytest.approx(5 + 20 - 6 + 5)
        await busy
        assert not engines["a"].loaded

    virtually(main())


def test_what_cannot_have_room_in_time_is_told_so_with_a_moment_to_come_back(virtually: Run) -> None:
    async def main() -> None:
        made, engines, _ = fleet(capacity=1)
        busy = asyncio.create_task(use(made, "a", seconds=1000))
        await asyncio.sleep(6)
        begun = now()
        with pytest.raises(Overloaded) as refusal:
            await use(made, "b")
        assert now() - begun == pytest.approx(30)
        assert (refusal.value.code, refusal.value.retry_after_s) == ("model_not_loaded", 30)
        assert not engines["b"].loads
        await busy

    virtually(main())


def test_a_load_that_has_begun_may_take_longer_than_the_wait_for_room(virtually: Run) -> None:
    async def main() -> None:
        made, _, _ = fleet(load_s=300)
        assert await use(made, "a") == pytest.approx(300)

    virtually(main())


def test_a_failed_load_is_told_to_all_who_wait_and_hurts_nobody_else(virtually: Run) -> None:
    async def main() -> None:
        made, engines, told = fleet()
        other = asyncio.create_task(use(made, "b", seconds=100))
        await asyncio.sleep(6)
        engines["a"].load_error = LoadError("secret path is damaged")
        for refusal in await asyncio.gather(*(use(made, "a") for _ in range(5)), return_exceptions=True):
            assert isinstance(refusal, EngineUnavailable)
            assert (refusal.code, refusal.retry_after_s) == ("model_load_failed", 1.0)
            assert "secret" not in refusal.message
        with pytest.raises(EngineUnavailable):
            await use(made, "a")
        assert engines["a"].loads == 1
        assert not made.can_serve("a")
        await asyncio.sleep(1)
        engines["a"].load_error = None
        await use(made, "a")
        await other
        assert told.events == [("loaded", "b"), ("load_failed", "a"), ("loaded", "a")]

    virtually(main())


def test_the_first_load_fails_with_the_reason(virtually: Run) -> None:
    async def main() -> None:
        made, engines, _ = fleet()
        engines["a"].load_error = LoadError("no such file")
        with pytest.raises(LoadError, match="no such file"):
            await made.open("a")
        assert not made.can_serve("a")

    virtually(main())


def test_a_request_that_goes_away_while_its_model_loads_leaves_no_lease(virtually: Run) -> None:
    async def main() -> None:
        made, engines, _ = fleet(idle_s=60)
        gone = asyncio.create_task(use(made, "a"))
        await asyncio.sleep(1)
        gone.cancel()
        await asyncio.wait([gone])
        await asyncio.sleep(5)
        assert engines["a"].loaded  # what was begun is kept for the next one
        await asyncio.sleep(61)
        assert made.phase("a") is Phase.COLD

    virtually(main())


def test_a_request_that_comes_during_an_unload_has_the_model_loaded_again(virtually: Run) -> None:
    async def main() -> None:
        made, engines, _ = fleet(idle_s=60)
        await use(made, "a")
        while made.phase("a") is not Phase.UNLOADING:
            await asyncio.sleep(0 if now() >= 65 else 65 - now())
        await use(made, "a")
        assert engines["a"].loads == 2

    virtually(main())


def test_those_who_wait_can_be_refused_and_closing_ends_a_load(virtually: Run) -> None:
    async def main() -> None:
        made, engines, _ = fleet(load_s=1000)
        waiting = asyncio.create_task(use(made, "a"))
        await asyncio.sleep(1)
        made.refuse_waiting(EngineUnavailable("The server is shutting down.", code="shutting_down"))
        with pytest.raises(EngineUnavailable, match="shutting down"):
            await waiting
        begun = now()
        await made.close()
        assert now() - begun < 1
        assert not engines["a"].loaded

    virtually(main())


def test_random_traffic_never_breaks_a_lease(virtually: Run) -> None:
    """`use` and the scripted engine check: one load at a time of a model, none unloaded while it is used."""

    async def main() -> None:
        made, engines, _ = fleet(idle_s=30, capacity=2, wait_s=10_000)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(made.close)
            async with asyncio.TaskGroup() as group:
                for index in range(600):
                    group.create_task(use(made, "abc"[index * 7 % 11 % 3], seconds=index * 13 % 41))
                    await asyncio.sleep(index * 5 % 17)
                    assert sum(engine.loaded for engine in engines.values()) <= 2
        assert sum(engine.loads for engine in engines.values()) > 10

    virtually(main())


def test_a_retired_model_takes_nothing_more_and_goes_when_nobody_uses_it(virtually: Run) -> None:
    async def main() -> None:
        made, engines, _ = fleet()
        busy = asyncio.create_task(use(made, "a", seconds=100))
        await asyncio.sleep(6)
        made.retire("a")
        made.retire("b")
        assert set(made.engines) == {"a", "c"}
        with pytest.raises(ModelNotFound):
            await use(made, "a")
        await busy
        await asyncio.sleep(1)
        assert not engines["a"].loaded
        assert set(made.engines) == {"c"}

    virtually(main())


def test_a_model_that_was_to_go_can_stay_and_one_that_has_gone_can_come_back(virtually: Run) -> None:
    async def main() -> None:
        made, engines, _ = fleet()
        busy = asyncio.create_task(use(made, "a", seconds=100))
        await asyncio.sleep(6)
        made.retire("a")
        made.restore("a")
        assert await use(made, "a") == 0
        await busy
        made.retire("a")
        await asyncio.sleep(1)
        made.add("a", engines["a"], (1,))
        assert await use(made, "a") == pytest.approx(5)

    virtually(main())


def test_a_failed_load_of_a_retired_model_is_told_and_forgotten(virtually: Run) -> None:
    async def main() -> None:
        made, engines, _ = fleet()
        engines["a"].load_error = LoadError("no such file")
        waiting = asyncio.create_task(use(made, "a"))
        await asyncio.sleep(1)
        made.retire("a")
        with pytest.raises(EngineUnavailable):
            await waiting
        assert "a" not in made.engines

    virtually(main())


def test_a_busy_model_is_not_unloaded_and_one_that_comes_free_is(virtually: Run) -> None:
    async def main() -> None:
        made, engines, _ = fleet()
        busy = asyncio.create_task(use(made, "a", seconds=20))
        await asyncio.sleep(6)
        assert not await made.unload("a", 0)
        assert not await made.unload("a", 5)
        assert engines["a"].loaded
        assert await made.unload("a", 60)
        assert now() == pytest.approx(5 + 20)
        assert not engines["a"].loaded
        await busy
        assert await made.unload("a", 0)
        await use(made, "a")
        assert engines["a"].loads == 2

    virtually(main())


def test_a_model_that_loads_for_nobody_any_more_is_unloaded_when_it_has(virtually: Run) -> None:
    async def main() -> None:
        made, engines, _ = fleet()
        gone = asyncio.create_task(use(made, "a"))
        await asyncio.sleep(1)
        gone.cancel()
        await asyncio.wait([gone])
        assert not await made.unload("a", 0)
        assert not await made.unload("a", 1)
        assert now() == pytest.approx(2)
        assert await made.unload("a", 10)
        assert now() == pytest.approx(5)
        assert not engines["a"].loaded

    virtually(main())


def test_something_is_held_exactly_while_a_model_is_in_memory(virtually: Run) -> None:
    async def main() -> None:
        made, engines, _ = fleet()
        held: list[str] = []

        @contextmanager
        def hold() -> Iterator[None]:
            if refuse:
                raise LoadError("it is being removed")
            held.append("taken")
            yield
            held.append("left")

        refuse = True
        made.add("d", engines["a"], (1,), hold)
        with pytest.raises(LoadError, match="removed"):
            await made.open("d")
        refuse = False
        await made.open("d")  # at once, whatever has just failed
        assert held == ["taken"]
        assert await made.unload("d", 0)
        assert held == ["taken", "left"]
        await made.open("d")
        await made.close()
        assert held == ["taken", "left"] * 2

    virtually(main())


def test_other_rules_hold_at_once(virtually: Run) -> None:
    async def main() -> None:
        made, engines, _ = fleet()
        await use(made, "a")
        await asyncio.sleep(100)
        assert made.standing("a").goes_at is None
        made.rule(Rules(idle_s=200), 30)
        assert made.standing("a").goes_at == pytest.approx(5 + 200)
        await asyncio.sleep(101)
        assert not engines["a"].loaded

    virtually(main())
