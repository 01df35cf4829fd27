"""Several engines under one roof: loads them on demand and unloads what nobody uses.

`Residency` decides; the fleet carries out. A request takes a lease on its model's engine: the lease waits for the load,
which is one for all who wait, and while it is held the engine is not unloaded. Unloading ends the engine's process, so
all its memory is back. All of it runs on one event loop; nothing is locked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, nullcontext
from typing import Protocol

from ocserve.engine.handle import Engine, LoadError
from ocserve.engine.residency import Memory, Move, Phase, Residency, Rules, Standing
from ocserve.engine.wire import EngineFacts
from ocserve.errors import ApiError, EngineUnavailable, ModelNotFound, Overloaded

_WAIT_S = 30.0

# What is held while a model is in memory; entering raises `LoadError`.
Hold = Callable[[], AbstractContextManager[None]]


class LoadableEngine(Engine, Protocol):
    """An engine that can be started and ended, any number of times."""

    async def open(self) -> EngineFacts:
        """Load the model; raises `LoadError`."""

    async def close(self) -> None:
        """End the process; all its memory is back."""


class Fleet:
    """The engines of all models, by the model's id.

    A request waits at most `wait_s` for its model's load to begin; from then on the load's own time limit holds.
    `on_event` is told of loads and unloads by name (for the log), `on_gone` of a model whose engine is forgotten.
    """

    def __init__(
        self,
        engines: Mapping[str, LoadableEngine],
        memory: Memory,
        rules: Rules,
        *,
        wait_s: float = _WAIT_S,
        on_event: Callable[..., None] = lambda name, **facts: None,
        on_gone: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.engines: dict[str, LoadableEngine] = dict(engines)
        self._residency = Residency(memory, rules)
        self._wait_s = wait_s
        self._on_event = on_event
        self._on_gone = on_gone
        self._waiters: dict[str, set[asyncio.Future[None]]] = {name: set() for name in engines}
        self._holds: dict[str, Hold] = {}
        self._held: dict[str, ExitStack] = {}
        self._released = asyncio.Event()  # set and replaced whenever a model is used by nobody any more
        self._work: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def add(self, name: str, engine: LoadableEngine, need: tuple[int, ...], hold: Hold = nullcontext) -> None:
        """A further model. `need` is the memory that it takes, bytes by place; `hold` is held while it is in memory."""
        self._residency.add(name, need)
        self.engines[name] = engine
        self._waiters[name] = set()
        self._holds[name] = hold

    def retire(self, name: str) -> None:
        """Take nothing more for a model; when nobody uses it, it is gone."""
        self._residency.retire(name)
        self._act()

    def restore(self, name: str) -> None:
        """Take back that a model is to go; it still has its engine."""
        self._residency.restore(name)

    def rule(self, rules: Rules, wait_s: float) -> None:
        """Go by other rules from now on."""
        self._residency.rules, self._wait_s = rules, wait_s
        self._act()

    def phase(self, name: str) -> Phase:
        """Where the model is."""
        return self._residency.phase(name)

    def standing(self, name: str) -> Standing:
        """How the model is, by the event loop's clock."""
        return self._residency.standing(name)

    def can_serve(self, name: str) -> bool:
        """Whether a request for the model that arrives now would be taken: it is loaded, or it was and can be again.

        A request waits for an engine that restarts, so that counts as loaded, if it does not take long.
        """
        return self.obstacle(name) is None

    def obstacle(self, name: str) -> ApiError | None:
        """Why a request for the model that arrives now would not be taken; None if it would."""
        if name not in self.engines or self._residency.retired(name):
            return _not_ready("The model is being removed.")
        engine = self.engines[name]
        if engine.facts is None:
            return _not_ready("The model is being loaded for the first time.")
        if self.phase(name) is Phase.READY:
            long = "The model's engine stopped, and its restart takes long; the server's log says why."
            return None if engine.taking else _not_ready(long)
        retry_s = self._residency.retry_in_s(name, _now())
        return _load_failed(retry_s) if retry_s else None

    async def open(self, name: str) -> EngineFacts:
        """Load a model now, as the server's start does; raises `LoadError` with the reason for the operator.

        That its last load failed a moment ago does not matter. Raises `Overloaded` as `lease` does.
        """
        self._residency.pardon(name)
        async with self._leased(name):
            facts = self.engines[name].facts
            assert facts is not None
            return facts

    async def unload(self, name: str, wait_s: float) -> bool:
        """Unload a model now; False where somebody still uses it after `wait_s` seconds, or it loads for nobody."""
        deadline = _now() + wait_s
        while name in self.engines and self.phase(name) is not Phase.COLD:
            if self._residency.standing(name).leases:
                if (left := deadline - _now()) <= 0 or not await self._next_release(left):
                    return False
            elif self.phase(name) is Phase.READY:
                self._residency.dismiss(name)
                self._act()
            else:
                most = deadline - _now() if self.phase(name) is Phase.LOADING else None  # no load is broken off
                if most is not None and most <= 0:
                    return False
                await asyncio.wait(set(self._work), timeout=most, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.sleep(0)  # for what has ended to leave the set
        return True

    async def _next_release(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._released.wait(), seconds)
        except TimeoutError:
            return False
        return True

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[Engine]:
        """The model's engine, loaded, and safe from unloading until the block is left.

        Raises `EngineUnavailable` if the load fails or failed a moment ago, `Overloaded` if no room came free in time,
        and `ModelNotFound` for a model that has gone.
        """
        if name not in self.engines or self._residency.retired(name):
            raise ModelNotFound("The model named in the request has just been removed.", param="model")
        try:
            retry_s = self._residency.retry_in_s(name, _now())
            if retry_s:
                raise _load_failed(retry_s)
            async with self._leased(name):
                yield self.engines[name]
        except LoadError:
            retry_s = self._residency.retry_in_s(name, _now()) if name in self.engines else _WAIT_S
            raise _load_failed(retry_s) from None

    def refuse_waiting(self, error: ApiError) -> None:
        """End every wait for a load with `error`; the loads go on."""
        for waiters in self._waiters.values():
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(error)

    async def close(self) -> None:
        """End every engine; loads under way are given up."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        work = set(self._work)
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        await asyncio.gather(*(engine.close() for engine in self.engines.values()))
        for held in self._held.values():
            held.close()

    @asynccontextmanager
    async def _leased(self, name: str) -> AsyncIterator[None]:
        self._residency.acquire(name, _now())
        try:
            self._act()
            if self.phase(name) is not Phase.READY:
                await self._load_of(name)
            yield
        finally:
            self._residency.release(name, _now())
            if not self._residency.leases(name):
                self._released.set()
                self._released = asyncio.Event()
            self._act()

    async def _load_of(self, name: str) -> None:
        """Wait until the model is loaded."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiters[name].add(waiter)
        timer = loop.call_later(self._wait_s, self._give_up, name, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiters[name].discard(waiter)

    def _give_up(self, name: str, waiter: asyncio.Future[None]) -> None:
        if self.phase(name) is not Phase.LOADING and not waiter.done():
            waiter.set_exception(
                Overloaded(
                    "The model is not loaded: the models in use leave no room for it, or another one is being loaded.",
                    code="model_not_loaded",
                    retry_after_s=self._wait_s,
                )
            )

    def _act(self) -> None:
        """Carry out what is due, and come back when something else will be."""
        if self._closed:
            return
        for action in self._residency.plan(_now()):
            work = self._load(action.model) if action.move is Move.LOAD else self._unload(action.model)
            self._start(work, f"{action.move.value}-{action.model}")
        for name in self._residency.gone():
            del self.engines[name], self._waiters[name]
            self._holds.pop(name, None)
            self._on_gone(name)
        if self._timer is not None:
            self._timer.cancel()
        due = self._residency.next_due()
        self._timer = None if due is None else asyncio.get_running_loop().call_at(due, self._act)

    def _start(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _load(self, name: str) -> None:
        begun = _now()
        failure: LoadError | None = None
        held = ExitStack()
        try:
            held.enter_context(self._holds.get(name, nullcontext)())
            await self.engines[name].open()
            self._held[name] = held.pop_all()
        except Exception as error:  # noqa: BLE001  # whatever it was, the model must not stay half loaded for ever
            failure = error if isinstance(error, LoadError) else LoadError(type(error).__name__)
        finally:
            held.close()
        self._residency.done(name, Move.LOADED if failure is None else Move.FAILED, _now())
        if failure is None:
            self._on_event("model_loaded", model=name, load_s=round(_now() - begun, 2))
        else:
            retry_s = self._residency.retry_in_s(name, _now())
            self._on_event("model_load_failed", level="error", model=name, reason=str(failure), retry_s=retry_s)
        for waiter in self._waiters[name]:
            if not waiter.done():
                waiter.set_result(None) if failure is None else waiter.set_exception(failure)
        self._act()

    async def _unload(self, name: str) -> None:
        try:
            await self.engines[name].close()
        finally:
            if (held := self._held.pop(name, None)) is not None:
                held.close()
            self._residency.done(name, Move.UNLOADED, _now())
            self._on_event("model_unloaded", model=name)
            self._act()


def _now() -> float:
    return asyncio.get_running_loop().time()


def _not_ready(why: str) -> EngineUnavailable:
    return EngineUnavailable(why, code="not_ready")


def _load_failed(retry_s: float) -> EngineUnavailable:
    return EngineUnavailable(
        "The model could not be loaded; the server's log says why.", code="model_load_failed", retry_after_s=retry_s
    )
