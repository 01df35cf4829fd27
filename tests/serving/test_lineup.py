"""Which models are served while a store changes under the server. No engine is started for it."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest
from msgspec.structs import replace

from ocserve import config
from ocserve.catalog.errors import ModelInUse
from ocserve.catalog.pull import describe_file
from ocserve.catalog.store import Installed, Store
from ocserve.machine import HostMemory
from ocserve.serving import lineup as module
from ocserve.serving.lineup import Lineup, Place
from tests.serving.models import install

GB = 1_000_000_000
MEMORY = HostMemory(total_bytes=8 * GB, available_bytes=8 * GB)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(config.Store(directory=tmp_path / "store"))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []

    def event(name: str, **facts: object) -> None:
        if name != "library":  # asyncio's, where a test before had every line logged
            lines.append(f"{facts['detail']}" if name == "notice" else f"{name}: {facts['detail']}")

    monkeypatch.setattr(module.logs, "event", event)
    return lines


def serves(store: Store, *named: Installed, memory: HostMemory = MEMORY, **settings: object) -> Lineup:
    tree = config.Config(model=replace(config.Model(), **settings))
    return Lineup(tree, named, store, Place((), memory, {}))


def named(folder: Path, tiny_model: Path, name: str = "named") -> Installed:
    file = folder / f"{name}.gguf"
    file.hardlink_to(tiny_model)
    return describe_file(str(file))


async def test_what_comes_into_the_store_is_served_and_what_goes_is_not(
    store: Store, tmp_path: Path, tiny_model: Path
) -> None:
    made = serves(store, named(tmp_path, tiny_model))
    told: list[list[str]] = []
    made.tell(lambda models: told.append(list(models)))
    await made.look()
    assert list(made.described) == ["named"]
    for _ in range(2):  # removed and pulled again, it is served again
        install(store, "later", tiny_model)
        await made.look()
        assert list(made.described) == told[-1] == ["named", "later"]
        await made.look()
        store.remove("later")
        await made.look()
        assert list(made.described) == told[-1] == ["named"]
        assert list(made.fleet.engines) == ["named"]
    assert len(told) == 5  # what has not changed is not told


async def test_a_pull_that_takes_its_time_is_noticed_at_its_end(store: Store, tmp_path: Path, tiny_model: Path) -> None:
    made = serves(store, named(tmp_path, tiny_model))
    store.folder("slow").mkdir(parents=True)
    (store.directory / ".locks").mkdir()
    await made.look()
    install(store, "slow", tiny_model)  # no folder comes or goes with it
    await made.look()
    assert list(made.described) == ["named", "slow"]


async def test_a_change_during_a_look_is_noticed_by_who_comes_after_it(
    store: Store, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = serves(store, named(tmp_path, tiny_model))
    installed, begun, go_on = store.installed, threading.Event(), threading.Event()

    def slowly() -> list[Installed]:
        found = installed()
        begun.set()
        assert go_on.wait(10)
        return found

    monkeypatch.setattr(store, "installed", slowly)
    first = asyncio.create_task(made.look())
    await asyncio.to_thread(begun.wait)
    install(store, "later", tiny_model)
    second = asyncio.create_task(made.look())
    await asyncio.sleep(0)
    go_on.set()
    await second
    assert list(made.described) == ["named", "later"]
    await first


async def test_a_change_that_ends_as_it_began_is_one_look(store: Store, tmp_path: Path, tiny_model: Path) -> None:
    install(store, "one", tiny_model)
    made = serves(store, named(tmp_path, tiny_model))
    await made.look()
    before = made.member("one")
    store.remove("one")
    install(store, "one", tiny_model)
    await made.look()
    assert made.member("one").spec == before.spec


async def test_named_models_alone_are_served_if_the_settings_say_so(
    store: Store, tmp_path: Path, tiny_model: Path
) -> None:
    install(store, "later", tiny_model)
    made = serves(store, named(tmp_path, tiny_model), serve_installed=False)
    await made.look()
    assert list(made.described) == ["named"]
    await made.include(store.installed()[0])  # as an administrator asks
    assert list(made.described) == ["named", "later"]
    store.remove("later")
    await made.look()
    assert list(made.described) == ["named"]


async def test_only_what_is_named_or_in_memory_cannot_be_removed(store: Store, tiny_model: Path) -> None:
    first = install(store, "first", tiny_model)
    install(store, "offered", tiny_model)
    made = serves(store, first)
    await made.look()
    assert list(made.described) == ["first", "offered"]
    with pytest.raises(ModelInUse):
        store.remove("first")
    with made._held(made.member("offered")), pytest.raises(ModelInUse):
        store.remove("offered")
    store.remove("offered")
    await made.look()
    made.release()
    store.remove("first")
    await made.look()
    assert list(made.described) == ["first"]  # whatever becomes of its file, the default stays


async def test_the_named_model_wins_a_name_and_the_log_says_so_once(
    store: Store, tmp_path: Path, tiny_model: Path, said: list[str]
) -> None:
    install(store, "named", tiny_model)
    mine = named(tmp_path, tiny_model)
    made = serves(store, mine)
    await made.look()
    install(store, "other", tiny_model)
    await made.look()
    assert list(made.described) == ["named", "other"]
    assert made.member("named").model == mine
    store.remove("other")
    await made.look()
    assert said == [
        "named: another model of this name is served",
        "models_changed: other is served",
        "models_changed: other is not",
    ]


async def test_what_does_not_fit_is_left_out_and_the_log_says_so_once(
    store: Store, tmp_path: Path, tiny_model: Path, said: list[str]
) -> None:
    made = serves(store, named(tmp_path, tiny_model))
    made._place = Place((), HostMemory(total_bytes=GB, available_bytes=1000), {})
    for name in ("later", "last"):
        install(store, name, tiny_model)
        await made.look()
    assert list(made.described) == ["named"]
    assert [line.split(":")[0] for line in said] == ["later", "last"]


async def test_other_models_can_be_named_while_it_runs(store: Store, tmp_path: Path, tiny_model: Path) -> None:
    one, two = (install(store, name, tiny_model) for name in ("one", "two"))
    made = serves(store, named(tmp_path, tiny_model), one, serve_installed=False)
    tree = config.Config(model=config.Model(serve_installed=False, aliases=("best",)))
    apply = await made.changed(tree, [two])
    assert list(made.described) == ["named", "one"]
    apply()
    assert list(made.described) == ["named", "two"]
    assert "best" in made.described["named"](None).aliases
    store.remove("one")
    with pytest.raises(ModelInUse):
        store.remove("two")
    apply = await made.changed(config.Config(), None)
    apply()
    await made.look()
    assert list(made.described) == ["named", "two"]


async def test_a_store_that_cannot_be_read_harms_nothing_that_is_served(
    store: Store, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[str] = []
    monkeypatch.setattr(module.logs, "failure", lambda name, error: failures.append(f"{name} {type(error).__name__}"))
    install(store, "later", tiny_model)
    made = serves(store, named(tmp_path, tiny_model))
    await made.look()
    monkeypatch.setattr(store, "installed", lambda: (tmp_path / "never").read_bytes())
    install(store, "last", tiny_model)
    for _ in range(3):
        await made.look()
    assert list(made.described) == ["named", "later"]
    assert failures == ["store_unreadable FileNotFoundError"]


async def test_a_manifest_that_is_no_file_keeps_nobody_waiting(store: Store, tmp_path: Path, tiny_model: Path) -> None:
    made = serves(store, named(tmp_path, tiny_model))
    install(store, "later", tiny_model)
    store.folder("never").mkdir()
    os.mkfifo(store.folder("never") / "manifest.json")
    looking = asyncio.create_task(made.look())
    done, _ = await asyncio.wait({looking}, timeout=1)
    if not done:  # let the thread that waits for a writer end
        (store.folder("never") / "manifest.json").write_text("")
    assert list(made.described) == ["named", "later"]
    assert done


async def test_a_look_that_takes_too_long_holds_up_nobody_and_goes_on(
    store: Store, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = serves(store, named(tmp_path, tiny_model))
    installed, go_on = store.installed, threading.Event()
    monkeypatch.setattr(store, "installed", lambda: go_on.wait(10) and installed())
    monkeypatch.setattr(module, "_LOOK_WAIT_S", 0.05)
    install(store, "later", tiny_model)
    try:
        async with asyncio.timeout(5):
            for _ in range(3):
                await made.look()
        assert list(made.described) == ["named"]
    finally:
        go_on.set()
    assert made._looking is not None
    await made._looking
    assert list(made.described) == ["named", "later"]


async def test_nothing_stays_of_models_that_have_gone(
    store: Store, tmp_path: Path, tiny_model: Path, said: list[str]
) -> None:
    made = serves(store, named(tmp_path, tiny_model))
    place = made._place
    for name in ("one", "two", "three"):
        made._place = place
        install(store, name, tiny_model)
        await made.look()
        made._place = Place((), HostMemory(total_bytes=GB, available_bytes=1000), {})
        install(store, f"large-{name}", tiny_model)
        await made.look()
        for each in (name, f"large-{name}"):
            store.remove(each)
        await made.look()
    assert sum("memory" in line for line in said) == 3
    assert list(made._engines) == ["named"]
    assert not made._leaving
    assert not made._told


async def test_a_model_that_comes_during_a_reload_is_planned_by_the_new_settings(
    store: Store, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = serves(store, named(tmp_path, tiny_model), serve_installed=False)
    later, plan = install(store, "later", tiny_model), made._planned
    loop = asyncio.get_running_loop()
    apply = await made.changed(tree := config.Config(images=config.Images(max_count=3)), None)

    def slowly(model: Installed, by: config.Config, *, stays: bool) -> module.Member:
        found = plan(model, by, stays=stays)
        if by is not tree:
            asyncio.run_coroutine_threadsafe(applied(), loop).result(5)
        return found

    async def applied() -> None:
        apply()

    monkeypatch.setattr(made, "_planned", slowly)
    await made.include(later)
    assert made.member("later").spec.images == tree.images
