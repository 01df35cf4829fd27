"""Which models are served: those that were named, and beside them what is in the store, which changes at any time.

The store is looked at anew when it has changed, which two `stat`s tell. A model that has come is planned and offered;
one that has gone is withdrawn at once, and its engine ends when nobody uses it. A named model stays, and so does one of
the user's own files. Only models that are named or in memory are held against removal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import msgspec

from ocserve import config
from ocserve.catalog.errors import CatalogError, NotInstalled
from ocserve.catalog.fit import Fit
from ocserve.catalog.projectors import ProjectorFile, projector
from ocserve.catalog.store import Installed, Store
from ocserve.engine.desk import Describe
from ocserve.engine.fleet import Fleet
from ocserve.engine.handle import EngineHandle, LoadError, Supervision
from ocserve.engine.process import Spare
from ocserve.engine.residency import Memory, Rules
from ocserve.engine.wire import EngineSpec
from ocserve.machine import Device, HostMemory, host_memory
from ocserve.serving.planned import engine_spec, fit_alone, projector_bytes, refuse_context, served_model
from ocserve.telemetry import logs

# How long a request waits for a look at the store, whose disk may not answer; the look goes on without it.
_LOOK_WAIT_S = 2.0

# Told how each model is answered for, by its id and the default first.
OnChange = Callable[[Mapping[str, Describe]], None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where models run: GPUs and main memory as they were before any was loaded, and the environment of engines."""

    gpus: Sequence[Device]
    memory: HostMemory
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Member:
    """A model that is served. `stays`: it was named, or is a file of the user's own."""

    model: Installed
    fit: Fit
    projector: ProjectorFile | None
    spec: EngineSpec
    describe: Describe
    stays: bool


class Lineup:
    """The models that are served, and the fleet of their engines."""

    def __init__(
        self,
        tree: config.Config,
        named: Sequence[Installed],
        store: Store,
        place: Place,
        spare: Spare | None = None,
    ) -> None:
        """Plan the `named` models, the default first; `spare` is its engine process.

        Raises `DoesNotFit`, `ConfigError` where two share a name, and other errors of the catalogue.
        """
        self._tree = tree
        self._store = store
        self._place = place
        self._default = named[0].name
        self._spare = spare
        self._seen: tuple[int, ...] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._patience = 0.0  # until when that one is waited for
        self._told: set[tuple[str, str]] = set()
        self._added: set[str] = set()  # files of the user's own that came while the server ran
        self._members: dict[str, Member] = {}
        self._engines: dict[str, EngineHandle] = {}
        self._leaving: dict[str, EngineSpec] = {}  # of models that were withdrawn, while their engines last
        self._going: list[str] = []  # those of them that the fleet has yet to be told of
        self._on_change: OnChange = lambda models: None
        self._uses: dict[str, ExitStack] = {}
        memory = Memory({}, (place.memory.available_bytes, *(gpu.memory_free for gpu in place.gpus)), _available)
        wait_s = tree.model.room_wait_s
        self.fleet = Fleet({}, memory, _rules(tree), wait_s=wait_s, on_event=logs.event, on_gone=self._forget)
        self._published = {model.name for model in named}
        try:
            for model in by_name(named).values():
                member = self._planned(model, tree, stays=True)
                for note in member.fit.notes:
                    logs.event("notice", level="warning", detail=f"{model.name}: {note.text}")
                self._use(model)
                self._put(member)
        except BaseException:
            self.release()
            raise

    @property
    def described(self) -> dict[str, Describe]:
        """How each model is answered for, by its id and the default first."""
        return {name: member.describe for name, member in self._members.items()}

    @property
    def reads_images(self) -> bool:
        """Whether any model has a projector."""
        return any(member.projector is not None for member in self._members.values())

    def member(self, name: str) -> Member:
        """One of the models."""
        return self._members[name]

    def tell(self, on_change: OnChange) -> None:
        """Have `on_change` told what is served whenever that changes: of a model that goes, before its engine does."""
        self._on_change = on_change

    async def look(self) -> None:
        """Notice what has come into the store and what has gone.

        Once a look takes too long, nobody waits for it any more: what was known before holds until it ends.
        """
        loop = asyncio.get_running_loop()
        for _ in range(2):  # a look that has begun already may have missed the last change
            if self._store.stamp() == self._seen:
                return
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look(), name="look-at-store")
                self._patience = loop.time() + _LOOK_WAIT_S
            looking = self._looking
            await asyncio.wait({looking}, timeout=max(0.0, self._patience - loop.time()))
            if not looking.done():
                return
            looking.result()

    async def _look(self) -> None:
        seen, tree = self._store.stamp(), self._tree
        try:
            found = await asyncio.to_thread(self._survey)
        except Exception as error:  # noqa: BLE001 - what lies in a store must not fail requests for what is served
            logs.failure("store_unreadable", error)
            self._seen = seen
            return
        if tree is not self._tree:
            return  # it was planned by settings that hold no more
        waits = self._apply(found)
        self._publish()
        self._seen = None if waits else seen

    def _publish(self) -> None:
        come, gone = self._members.keys() - self._published, self._published - self._members.keys()
        if come or gone:
            words = [*(f"{name} is served" for name in sorted(come)), *(f"{name} is not" for name in sorted(gone))]
            logs.event("models_changed", count=len(self._members), detail=", ".join(words))
        self._published = set(self._members)
        self._on_change(self.described)
        for name in self._going:
            self.fleet.retire(name)
        self._going.clear()

    def _survey(self) -> dict[str, Member | CatalogError | config.ConfigError]:
        """What is in the store, by its folder: as it is served, or why it cannot be."""
        found: dict[str, Member | CatalogError | config.ConfigError] = {}
        known = {member.model.directory: member for member in list(self._members.values()) if not member.stays}
        tree = self._tree
        staying = {member.model.directory for member in list(self._members.values()) if member.stays}
        installed = self._store.installed()
        names = self._members.keys() | {model.name for model in installed}
        self._told -= {each for each in list(self._told) if each[0] not in names}
        for model in installed:
            if model.directory in staying:
                continue
            before = known.get(model.directory)
            if before is not None and before.model.files == model.files:
                found[model.directory] = before
                continue
            try:
                if model.header.pooling == "none":
                    refuse_context(tree.engine, model, model.header.context_length)
                found[model.directory] = self._planned(model, tree, stays=False)
            except (CatalogError, config.ConfigError) as error:
                found[model.directory] = error
                self._say_once(model.name, error.message)
        return found

    def _apply(self, found: Mapping[str, Member | CatalogError | config.ConfigError]) -> bool:
        """Serve what was found; whether a model has to wait until an engine of its name has ended."""
        for name, member in list(self._members.items()):
            now = found.get(member.model.directory)
            if not member.stays and (not isinstance(now, Member) or now.spec != member.spec):
                self._withdraw(name)
        waits = False
        for each in found.values() if self._tree.model.serve_installed else ():
            if not isinstance(each, Member):
                continue
            holder = self._members.get(each.model.name)
            if holder is None:
                waits = not self._offer(each) or waits
            elif holder.model.directory != each.model.directory:
                self._say_once(each.model.name, "another model of this name is served")
        return waits

    async def include(self, model: Installed) -> None:
        """Serve one more, from the store or a file of the user's own.

        Raises `CatalogError` for one that cannot be served, `ConfigError` where another has its name.
        """
        tree = None
        while tree is not self._tree:  # again where it was planned by settings that hold no more
            if self._holds(model):
                return
            tree = self._tree
            member = await asyncio.to_thread(self._planned, model, tree, stays=model.source == "file")
        if not self._holds(model) and not self._offer(member):
            raise config.ConfigError(f"Another model called {model.name} is being unloaded.")
        if model.source == "file":
            self._added.add(model.name)
        self._publish()

    def may_forget(self, name: str) -> bool:
        """Whether a model was added by its path while the server ran: nothing else would serve it again."""
        return name in self._added

    def forget(self, name: str) -> None:
        """Serve one of those no more; its engine ends when nobody uses it."""
        self._added.remove(name)
        if name in self._uses:
            self._uses.pop(name).close()
        self._withdraw(name)
        self._publish()

    async def changed(self, tree: config.Config, also: Sequence[Installed] | None) -> Callable[[], None]:
        """What applies other settings, with `also` named beside the default; None: those that are.

        Nothing changes before it is called. Raises as `include`.
        """
        named = [member.model for member in self._members.values() if member.stays]
        wanted = by_name(named if also is None else [self._members[self._default].model, *also])
        missing = [model for model in wanted.values() if not self._holds(model)]
        fresh = [await asyncio.to_thread(self._planned, model, tree, stays=True) for model in missing]
        return partial(self._obey, tree, wanted, fresh)

    def _holds(self, model: Installed) -> bool:
        """Whether a model is served; raises `ConfigError` where another one of its name is."""
        holder = self._members.get(model.name)
        if holder is not None and holder.model.path != model.path:
            raise config.ConfigError(f"Another model that is served is called {model.name}.")
        return holder is not None

    def _obey(self, tree: config.Config, wanted: Mapping[str, Installed], fresh: Sequence[Member]) -> None:
        served_installed = self._tree.model.serve_installed
        if tree.model.also != self._tree.model.also:
            self._added -= wanted.keys()  # the settings name them now
        self._tree, self._seen = tree, None
        for name, member in list(self._members.items()):
            stays = name in wanted or member.model.source == "file"
            if not stays and name in self._uses:
                self._uses.pop(name).close()
            describe = self._describe(member.model, tree, member.fit, member.projector)
            spec = msgspec.structs.replace(member.spec, images=tree.images)
            self._members[name] = replace(member, stays=stays, describe=describe, spec=spec)
            self._engines[name].obey(tree.images)
            if not stays and not tree.model.serve_installed and (member.stays or served_installed):
                self._withdraw(name)
        for member in fresh:
            self._offer(member)
        for model in wanted.values():
            self._use(model)
        self._publish()
        self.fleet.rule(_rules(tree), tree.model.room_wait_s)

    def release(self) -> None:
        """Hold no model against removal any more."""
        for use in self._uses.values():
            use.close()

    def _use(self, model: Installed) -> None:
        if model.name not in self._uses:
            with ExitStack() as use:
                use.enter_context(self._store.used(model))
                self._uses[model.name] = use.pop_all()

    def _planned(self, model: Installed, tree: config.Config, *, stays: bool) -> Member:
        """How the model would be loaded alone. Raises `CatalogError` and `ConfigError`."""
        is_default = model.name == self._default
        eyes = projector(model, tree.model.projector if is_default else None)
        fit = fit_alone(tree, model, self._place.gpus, self._place.memory, eyes)
        # A draft model has the vocabulary of one model.
        engine = tree.engine if is_default else msgspec.structs.replace(tree.engine, draft_model=None)
        spec = msgspec.structs.replace(
            engine_spec(engine, tree.cache, model, fit.plan),
            projector_path=eyes.path if eyes is not None else None,
            projector_digest=eyes.digest if eyes is not None else "",
            images=tree.images,
        )
        return Member(model, fit, eyes, spec, self._describe(model, tree, fit, eyes), stays)

    def _describe(self, model: Installed, tree: config.Config, fit: Fit, eyes: ProjectorFile | None) -> Describe:
        return partial(served_model, tree, model, fit.plan, model.name == self._default, eyes is not None)

    def _put(self, member: Member) -> None:
        name, place = member.model.name, self._place
        engine = EngineHandle(
            member.spec,
            place.environment,
            Supervision(
                heartbeat_timeout_s=self._tree.engine.heartbeat_timeout_s,
                load_timeout_s=self._tree.engine.load_timeout_s,
                restart_wait_s=self._tree.engine.restart_wait_s,
                on_event=partial(logs.event, model=name),
            ),
            spare=self._spare if name == self._default else None,
        )
        needed = member.fit.need
        need = (needed.host_bytes + projector_bytes(member.projector), *needed.gpu_bytes)
        self.fleet.add(name, engine, need, partial(self._held, member))
        self._engines[name] = engine
        self._members[name] = member

    def _offer(self, member: Member) -> bool:
        """Serve a model; False while an engine of its name, of another file, has yet to end."""
        name = member.model.name
        if name not in self.fleet.engines:
            self._leaving.pop(name, None)
            self._put(member)
            return True
        if self._leaving.get(name) != member.spec:
            return False
        self.fleet.restore(name)
        del self._leaving[name]
        self._members[name] = member
        return True

    def _withdraw(self, name: str) -> None:
        self._leaving[name] = self._members.pop(name).spec
        self._going.append(name)

    def _forget(self, name: str) -> None:
        """Let go of a model whose engine the fleet has let go of."""
        del self._engines[name]
        self._leaving.pop(name, None)

    @contextmanager
    def _held(self, member: Member) -> Iterator[None]:
        """Keep a model from being removed while it is in memory, and say for what it was lowered."""
        if not member.stays:
            for note in member.fit.notes:
                self._say_once(member.model.name, note.text)
        try:
            with self._store.used(member.model):
                yield
        except NotInstalled as error:
            raise LoadError(error.message) from None

    def _say_once(self, name: str, text: str) -> None:
        if (name, text) not in self._told:
            self._told.add((name, text))
            logs.event("notice", level="warning", detail=f"{name}: {text}")


def by_name(models: Sequence[Installed]) -> dict[str, Installed]:
    """The models by the name that requests use; raises `ConfigError` where two of them share one."""
    found: dict[str, Installed] = {}
    for model in models:
        other = found.setdefault(model.name, model)
        if other.path != model.path:
            raise config.ConfigError(
                f"Two of the models to serve are called {model.name}.", hint="Rename the file of one of them."
            )
    return found


def _rules(tree: config.Config) -> Rules:
    return Rules(idle_s=tree.model.idle_unload_s, most_loaded=tree.model.most_loaded)


def _available() -> int:
    return host_memory().available_bytes
