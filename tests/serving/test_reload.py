"""What a running server takes over from its settings, and that a reload is the whole or nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from httpx2 import ASGITransport, AsyncClient
from msgspec.structs import replace

from ocserve import app, config
from ocserve.accounts.keys import Caller
from ocserve.accounts.keystore import ANONYMOUS
from ocserve.catalog.pull import describe_file
from ocserve.catalog.store import Store
from ocserve.errors import ApiError, Conflict, InvalidRequest, RateLimited
from ocserve.serving import control, reload
from tests.serving.models import install

CALLER = Caller(ANONYMOUS, b"", anonymous=True)
PRICES = '[[price]]\nmodel = "tiny"\nprompt = "{}"\ncompletion = "0.1"\n'


def test_every_setting_is_live_or_needs_a_restart() -> None:
    assert set(config.catalogue()) == reload.LIVE | reload.AT_START
    assert not reload.LIVE & reload.AT_START


def test_of_a_secret_nothing_is_told_but_that_it_has_changed() -> None:
    before, after = (config.load({"auth.api_key": key}, environ={}) for key in ("a" * 20, "b" * 20))
    found = reload.changes(before, after)
    assert reload.shown(found) == {"auth.api_key": ("set", "set")}
    assert reload.differing(after) == {"auth.api_key": "set"}


class Site:
    """A server of a tiny model whose settings lie in a file."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "config.toml"
        self.prices = folder / "prices.toml"
        self.store = Store(config.Store(directory=folder / "store"))
        self.prices.write_text(PRICES.format("0.1"))
        self.write("")

    def write(self, text: str) -> None:
        fixed = {"ledger": {"use": "'off'"}, "store": {"directory": f"'{self.store.directory}'"}}
        fixed |= {"cache": {"disk_bytes": "0"}, "auth": {"keys_file": f"'{self.file.with_name('keys.json')}'"}}
        sections = [f"[{name}]\n{field} = {value}\n" for name, each in fixed.items() for field, value in each.items()]
        self.file.write_text("".join(sections) + text)

    def read(self) -> config.Settings:
        return config.load({"model.aliases": ["always"]}, environ={}, path=self.file)


@asynccontextmanager
async def running(site: Site, tiny_model: Path) -> AsyncIterator[app.Daemon]:
    async with app.running(site.read(), [describe_file(str(tiny_model))], reread=site.read) as daemon:
        yield daemon


async def test_prices_that_meet_no_model_and_models_without_a_price_are_told(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, at a reload and when a model joins."""
    said: list[str] = []
    monkeypatch.setattr(
        control.logs, "event", lambda name, **facts: said.append(facts["detail"]) if name == "notice" else None
    )

    def told() -> list[str]:
        found = [each for each in said if each.startswith("billing.prices")]
        said.clear()
        return found

    site = Site(tmp_path)
    site.prices.write_text(PRICES.format("0.1").replace("tiny", "tinny"))
    site.write(f"[billing]\nprices = '{site.prices}'\n")
    no_model = "billing.prices has prices for tinny, which is not served at present"
    async with running(site, tiny_model) as daemon:
        assert told() == [no_model, "billing.prices has no price for tiny today: requests for it are free"]
        site.write(f"[billing]\nprices = '{site.prices}'\nunpriced = 'refuse'\n")
        answer = await daemon.control.reload()
        assert told() == [no_model, "billing.prices has no price for tiny today: requests for it are refused"]
        assert answer.notices == (no_model, "billing.prices has no price for tiny today: requests for it are refused")
        install(site.store, "other", tiny_model)
        await daemon.service.look()
        assert told() == ["billing.prices has no price for other today: requests for it are refused"]
        site.prices.write_text(PRICES.format("0.1") + PRICES.format("0.1").replace("tiny", "other"))
        await daemon.control.reload()
        assert told() == []
        site.write("[[limits.models]]\nmodel = 'default'\nrequests_per_day = 2\n")
        (notice,) = (await daemon.control.reload()).notices
        assert notice == (
            "limits.models has limits for default, which is another name of tiny: only under that one they hold"
        )


async def refused(daemon: app.Daemon) -> ApiError:
    with pytest.raises(ApiError) as found:
        await daemon.control.reload()
    return found.value


async def test_what_can_change_does_and_the_rest_is_refused_whole(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels: list[str] = []
    monkeypatch.setattr(control.logs, "configure", lambda settings: levels.append(settings.level))
    site = Site(tmp_path)
    install(site.store, "other", tiny_model)
    async with running(site, tiny_model) as daemon:
        service = daemon.service
        await _limits(site, daemon)
        await _prices(site, daemon, monkeypatch)
        await _models(site, daemon)
        await _edge(site, daemon)
        await _nothing_of_what_is_wrong(site, daemon)
        site.write("")
        await daemon.control.reload()
        assert service.limits == config.Limits()
        again = await daemon.control.reload()
        assert (again.settings, again.prices) == ({}, {})
    assert levels == ["error", "info"]


async def _limits(site: Site, daemon: app.Daemon) -> None:
    """Of a key that is here already, too."""
    limiter = daemon.service.limiter
    limiter.admit("acme").settle(0)
    site.write("[limits]\nrequests_per_minute = 2\nqueue = 3\n")
    found = await daemon.control.reload()
    assert found.settings == {"limits.requests_per_minute": (None, 2), "limits.queue": (64, 3)}
    assert found.prices == {}
    limiter.admit("acme").settle(0)  # what it has used stays used
    with pytest.raises(RateLimited):
        limiter.admit("acme")
    assert daemon.service.limits.queue == 3
    site.write("")
    await daemon.control.reload()
    limiter.admit("acme").settle(0)


async def _prices(site: Site, daemon: app.Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    def price() -> str | None:
        (model, *_) = daemon.service.open_to(CALLER).models
        return model.prices and model.prices.prompt

    assert price() is None
    site.write(f"[billing]\nprices = '{site.prices}'\ncancelled = 'free'\n")
    before, after = (await daemon.control.reload()).prices["tiny"]
    assert (before, [step.prompt for _, step in after[0].steps]) == ((), ["0.1"])
    assert price() == "0.1"
    assert "is not charged" in daemon.service.billing.policy
    site.prices.write_text(PRICES.format("0.2"))
    said: list[tuple[str, dict[str, Any]]] = []
    with monkeypatch.context() as patch:
        patch.setattr(control.logs, "event", lambda name, **facts: said.append((name, facts)))
        found = await daemon.control.reload()
    assert said[-1] == ("settings_reloaded", {"count": 1, "detail": "billing.prices"})
    assert found.settings == {}
    assert [dated.steps[0][1].prompt for (dated,) in found.prices["tiny"]] == ["0.1", "0.2"]
    assert price() == "0.2"
    site.prices.write_text(PRICES.format("free"))
    assert (await refused(daemon)).code == "settings_invalid"
    assert price() == "0.2"
    site.prices.write_text(PRICES.format("0.1"))


async def test_texts_to_publish_are_read_anew(tmp_path: Path, tiny_model: Path) -> None:
    site, text = Site(tmp_path), tmp_path / "sla.md"
    site.write("[operator]\nsla_text = 'sla.md'\n[images]\nfetch = 'off'\n")
    text.write_text("99 %")
    async with (
        running(site, tiny_model) as daemon,
        AsyncClient(transport=ASGITransport(daemon.asgi), base_url="http://localhost") as client,
    ):
        assert "99 %" in (await client.get("/support")).text
        assert 'href="support"' in (await client.get("/docs")).text
        text.write_text("98 %")
        site.write("[operator]\nsla_text = 'sla.md'\n[images]\nfetch = 'public'\n")
        assert (await daemon.control.reload()).settings == {"images.fetch": ("off", "public")}
        assert "98 %" in (await client.get("/support")).text
        assert "the hosts of images" in (await client.get("/privacy")).text.lower()
        text.write_bytes(b"\xff")
        assert (await refused(daemon)).code == "settings_invalid"
        text.write_text("")
        await daemon.control.reload()
        assert (await client.get("/support")).status_code == 404
        assert 'href="support"' not in (await client.get("/docs")).text


async def _models(site: Site, daemon: app.Daemon) -> None:
    service, names = daemon.service, lambda: [model.id for model in daemon.service.models]
    await service.look()
    assert names() == ["tiny", "other"]
    site.write("[model]\nserve_installed = false\nidle_unload_s = 1000\n")
    await daemon.control.reload()
    assert names() == ["tiny"]
    assert service.fleet.standing("tiny").goes_at is not None
    site.write("[model]\nserve_installed = false\nalso = ['other']\n")
    await daemon.control.reload()
    assert names() == ["tiny", "other"]
    site.write("[model]\nserve_installed = false\nalso = ['never']\n")
    error = await refused(daemon)
    assert "never is not installed" in error.message
    assert names() == ["tiny", "other"]
    assert service.models[0].aliases[:2] == ("default", "always")


async def _edge(site: Site, daemon: app.Daemon) -> None:
    site.write(
        "[server]\nunknown_parameters = 'ignore'\ndrain_s = 7\nstream_heartbeat_s = 3\n[images]\nmax_count = 2\n"
    )
    before = daemon.service.models[0].image_urls
    await daemon.control.reload()
    assert not daemon.edge.refuse_unknown
    assert (daemon.edge.now.drain_s, daemon.edge.now.stream_heartbeat_s) == (7, 3)
    site.write("[images]\nfetch = 'public'\n[log]\nlevel = 'error'\n")
    await daemon.control.reload()
    assert (before, daemon.service.models[0].image_urls) == (False, True)
    assert daemon.edge.refuse_unknown
    assert daemon.service.engine.ready  # it was told other limits of images, and lives


async def _nothing_of_what_is_wrong(site: Site, daemon: app.Daemon) -> None:
    for text, kind, code, words in (
        ("[limits]\nqueue = 5\n[server]\nport = 1\n", Conflict, "restart_needed", "server.port"),
        ("[limits]\nqueue = 5\nqeue = 6\n", InvalidRequest, "settings_invalid", "did you mean `limits.queue`"),
        ("[limits]\nqueue = 5\n[log]\nlevel = 'loud'\n", InvalidRequest, "settings_invalid", "log.level"),
    ):
        site.write(text)
        error = await refused(daemon)
        assert (type(error), error.code) == (kind, code)
        assert words in error.message
        assert daemon.service.limits.queue == 64


def standing(daemon: app.Daemon) -> tuple[object, ...]:
    """All that a reload can change."""
    control, service = daemon.control, daemon.service
    lineup, billing = control._lineup, service.billing
    return (
        control._settings,
        (service.limits, service.limiter._defaults),
        (billing._settings, billing._tariff, billing.policy),
        (lineup._tree, [replace(model, created=0) for model in service.models], service.fleet._residency.rules),
        control._fetcher._settings,
        (control._published.now, daemon.edge.now),
    )


async def test_a_refused_reload_changes_nothing_and_a_later_one_does(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels: list[str] = []
    monkeypatch.setattr(control.logs, "configure", lambda settings: levels.append(settings.level))
    site, text = Site(tmp_path), tmp_path / "sla.md"
    text.write_text("99 %")
    site.write("[operator]\nsla_text = 'sla.md'\n")
    install(site.store, "tiny", tiny_model)  # of the same name as the file that is served

    def want(*, also: str = "", server: str = "", sla: bytes = b"98 %", prices: str = PRICES.format("0.1")) -> None:
        site.write(
            "[limits]\nqueue = 5\n[log]\nlevel = 'error'\n[images]\nfetch = 'public'\n"
            f"[billing]\nprices = '{site.prices}'\nfailed = 'used'\n[model]\nidle_unload_s = 1000\n{also}\n"
            f"[server]\ndrain_s = 7\n{server}\n[operator]\nsla_text = 'sla.md'\n"
        )
        text.write_bytes(sla)
        site.prices.write_text(prices)

    async with running(site, tiny_model) as daemon:
        before = standing(daemon)
        for wrong, words in (
            ({"prices": PRICES.format("free")}, "price"),
            ({"prices": PRICES.format("0.1") + '[[price.tier]]\nabove = 5\nprompt = "0.01"\n'}, "tiers"),
            ({"sla": b"\xff"}, "sla_text"),
            ({"also": "also = ['never']"}, "never is not installed"),
            ({"also": "also = ['tiny']"}, "are called tiny"),
            ({"server": "port = 1"}, "server.port"),
        ):
            want(**wrong)  # type: ignore[arg-type]
            assert words in (await refused(daemon)).message
            assert standing(daemon) == before, wrong
            assert levels == []
        want()
        found = await daemon.control.reload()
        assert set(found.settings) == {
            *("limits.queue", "log.level", "images.fetch", "billing.prices", "billing.failed"),
            *("model.idle_unload_s", "server.drain_s"),
        }
        assert list(found.prices) == ["tiny"]
        assert levels == ["error"]
        assert not [old for old, new in zip(before, standing(daemon), strict=True) if old == new]


async def test_one_reload_reads_the_settings_after_the_other_has_applied_them(tmp_path: Path, tiny_model: Path) -> None:
    site, reading, most = Site(tmp_path), 0, 0

    def slow() -> config.Settings:
        nonlocal reading, most
        reading += 1
        most = max(most, reading)
        time.sleep(0.05)
        reading -= 1
        return site.read()

    async with app.running(site.read(), [describe_file(str(tiny_model))], reread=slow) as daemon:
        site.write("[limits]\nqueue = 5\n")
        found = await asyncio.gather(*(daemon.control.reload() for _ in range(3)))
    assert most == 1
    assert [len(each.settings) for each in found] == [1, 0, 0]
