"""Models that an administrator asks for: from the store, a path, or the hub. No engine is started for it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from ocserve import config
from ocserve.accounts.limits import Limiter
from ocserve.accounts.pricing import Changes, Tariff
from ocserve.catalog.pull import describe_file
from ocserve.catalog.store import Store
from ocserve.errors import ApiError
from ocserve.http.admin import Administration
from ocserve.http.edge.current import Edge
from ocserve.http.fetch import ImageFetcher
from ocserve.http.server import Stop
from ocserve.machine import HostMemory
from ocserve.pages.publication import Publication, Published
from ocserve.service import Service
from ocserve.serving.control import Control
from ocserve.serving.lineup import Lineup, Place
from tests.catalog.fake_hub import FakeHub, serving
from tests.serving.models import install

MEMORY = HostMemory(total_bytes=10**10, available_bytes=8 * 10**9)
HUB = "hf:acme/tiny-GGUF:F32"


@dataclass
class Site:
    control: Control
    service: Service
    lineup: Lineup
    store: Store
    published: Published

    @property
    def names(self) -> list[str]:
        return [model.id for model in self.service.models]


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[FakeHub]:
    with serving({"acme/tiny-GGUF": {"tiny-F32.gguf": tiny_model.read_bytes()}}) as found:
        yield found


@pytest.fixture
async def site(tmp_path: Path, tiny_model: Path, hub: FakeHub) -> Site:
    flags = {"store.directory": str(tmp_path / "store"), "store.hub_endpoint": hub.host, "store.reserve_bytes": 0}
    flags["policy.text"] = str(policy := tmp_path / "policy.md")
    policy.write_text("No spam.")
    flags["billing.prices"] = str(prices := tmp_path / "prices.toml")
    prices.write_text("")
    settings = config.load(flags, environ={})
    tree = settings.config
    store = Store(tree.store)
    lineup = Lineup(tree, [describe_file(str(tiny_model))], store, Place((), MEMORY, {}))
    service = Service(lineup.fleet, lineup.described, Limiter(tree.limits), tree.limits, look=lineup.look)
    lineup.tell(service.offer)
    edge, fetcher, published = Edge(tree.server), ImageFetcher(tree.images), Published(Publication())
    return Site(
        Control(settings, lambda: settings, lineup, service, edge, fetcher, published, Stop()),
        service,
        lineup,
        store,
        published,
    )


async def test_a_reload_renders_another_text_beside_the_loop(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await site.control.reload()
    assert site.published.now.texts.policy.html == "<p>No spam.</p>"
    (tmp_path / "policy.md").write_text("*Still* no spam.")
    where: list[int] = []
    parse = MarkdownIt.parse

    def watched(markdown: MarkdownIt, src: str) -> list[Token]:
        where.append(threading.get_ident())
        return parse(markdown, src)

    monkeypatch.setattr(MarkdownIt, "parse", watched)
    await site.control.reload()
    assert site.published.now.texts.policy.html == "<p><em>Still</em> no spam.</p>"
    assert len(where) == 1
    assert where[0] != threading.get_ident()


async def test_a_price_list_that_is_a_fifo_is_refused_by_name_and_the_next_reload_goes_well(
    site: Site, tmp_path: Path
) -> None:
    prices = tmp_path / "prices.toml"
    prices.unlink()
    os.mkfifo(prices)
    try:
        async with asyncio.timeout(10):
            with pytest.raises(ApiError, match=r"billing\.prices: .*no regular file") as found:
                await site.control.reload()
    finally:
        os.close(os.open(prices, os.O_RDWR))  # whoever waits for a writer is let go
    assert found.value.code == "settings_invalid"
    prices.unlink()
    prices.write_text("")
    await site.control.reload()


async def test_a_long_price_list_is_compared_beside_the_loop_and_told_in_part(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: list[int] = []
    changes = Tariff.changes

    def watched(*args: Any) -> Changes:
        where.append(threading.get_ident())
        return changes(*args)

    monkeypatch.setattr(Tariff, "changes", watched)
    entry = '[[price]]\nmodel = "m{:03}"\nprompt = "0.1"\ncompletion = "0.1"\n'
    (tmp_path / "prices.toml").write_text("".join(map(entry.format, range(300))))
    found = await site.control.reload()
    assert list(found.prices) == [f"m{number:03}" for number in range(100)]
    assert found.more_prices == 200
    assert len(where) == 1
    assert where[0] != threading.get_ident()
    named = [notice for notice in found.notices if notice.startswith("billing.prices has prices")]
    assert len(named) == 101
    assert "m099" in named[99]
    assert "200 more names" in named[100]
    again = await site.control.reload()
    assert (again.prices, again.more_prices) == ({}, 0)


async def refused(site: Site, reference: str, *, may_pull: bool = False) -> ApiError:
    with pytest.raises(ApiError) as found:
        await site.control.include(reference, may_pull=may_pull)
    assert site.names == ["tiny"]
    return found.value


async def test_a_model_of_the_store_or_a_file_is_served_from_now_on(
    site: Site, tmp_path: Path, tiny_model: Path
) -> None:
    assert await site.control.include(str(tiny_model), may_pull=False) == "tiny"
    install(site.store, "later", tiny_model)
    assert await site.control.include("later", may_pull=False) == "later"
    mine = tmp_path / "mine.gguf"
    mine.hardlink_to(tiny_model)
    assert await site.control.include(str(mine), may_pull=False) == "mine"
    assert site.names == ["tiny", "later", "mine"]
    site.store.remove("later")
    await site.service.look()
    assert site.names == ["tiny", "mine"]  # one's own file is nobody's to take away


async def test_a_file_that_was_added_can_be_forgotten_and_comes_back_when_asked_for(
    site: Site, tmp_path: Path, tiny_model: Path
) -> None:
    install(site.store, "later", tiny_model)
    mine = tmp_path / "mine.gguf"
    mine.hardlink_to(tiny_model)
    administration = Administration(site.service, site.control)
    for _ in range(2):
        for reference in ("later", str(mine)):
            await site.control.include(reference, may_pull=False)
        (await site.lineup.changed(config.Config(), None))()  # a reload keeps it
        assert site.names == ["tiny", "later", "mine"]
        for staying in ("tiny", "later"):
            with pytest.raises(ApiError, match="can be forgotten") as found:
                await administration.unload(f'{{"model": "{staying}", "forget": true}}'.encode())
            assert (found.value.status, found.value.code) == (409, "model_stays")
        assert (await administration.unload(b'{"model": "mine"}')).state == "cold"
        assert site.names == ["tiny", "later", "mine"]
        moved = await administration.unload(b'{"model": "mine", "forget": true}')
        assert (moved.model, moved.state) == ("mine", "cold")
        assert site.names == ["tiny", "later"]
        assert not site.control.may_forget("mine")
    assert mine.exists()


async def test_a_file_that_the_settings_name_since_it_was_added_stays(
    site: Site, tmp_path: Path, tiny_model: Path
) -> None:
    mine = tmp_path / "mine.gguf"
    mine.hardlink_to(tiny_model)
    await site.control.include(str(mine), may_pull=False)
    named = config.Config(model=config.Model(also=(str(mine),)))
    (await site.lineup.changed(named, [describe_file(str(mine))]))()
    assert not site.control.may_forget("mine")
    assert site.names == ["tiny", "mine"]


async def test_only_who_may_pull_brings_a_model_here(site: Site) -> None:
    error = await refused(site, HUB)
    assert (error.status, error.code, error.param) == (404, "model_not_installed", "model")
    assert await site.control.include(HUB, may_pull=True) == HUB
    await site.service.look()
    assert site.names == ["tiny", HUB]


async def test_what_cannot_be_served_says_why(site: Site, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(tiny_model.read_bytes()[:100])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tiny.gguf").hardlink_to(tiny_model)
    for reference, status, code in (
        (str(tmp_path / "broken.gguf"), 400, "model_not_servable"),
        (str(tmp_path / "never.gguf"), 404, "model_not_installed"),
        (str(tmp_path / "other" / "tiny.gguf"), 409, "model_not_servable"),
        ("no model\n", 400, "model_not_servable"),
    ):
        error = await refused(site, reference)
        assert (error.status, error.code) == (status, code), reference
    site.lineup._place = Place((), HostMemory(total_bytes=10**9, available_bytes=1000), {})
    install(site.store, "large", tiny_model)
    error = await refused(site, "large")
    assert (error.status, error.code) == (409, "model_does_not_fit")


async def test_a_pull_ends_with_the_server(site: Site) -> None:
    site.service.doors.stop()
    error = await refused(site, HUB, may_pull=True)
    assert "shutting down" in error.message
