"""The composition root: what an engine is told follows from settings, card and what fits this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from ocserve import app, config
from ocserve.accounts.keystore import KeyStore
from ocserve.catalog import planning
from ocserve.catalog.errors import DoesNotFit
from ocserve.catalog.need import need
from ocserve.catalog.pull import describe_file
from ocserve.catalog.store import Installed, Store
from ocserve.engine import wire
from ocserve.machine import Device, HostMemory
from ocserve.serving import planned
from ocserve.serving.lineup import Lineup, Place
from tests.catalog import shapes

GB = 1_000_000_000


@pytest.fixture
def model(tmp_path: Path) -> Installed:
    """Llama 3 8B's shape, as a file of the user's own."""
    return describe_file(str(shapes.write(tmp_path / "llama.gguf", "llama3-8b")))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged."""
    lines: list[str] = []

    def event(name: str, **facts: object) -> None:
        if name == "notice":  # asyncio may say something of its own
            lines.append(str(facts["detail"]))

    monkeypatch.setattr(app.logs, "event", event)
    return lines


def on_machine(monkeypatch: pytest.MonkeyPatch, host: float) -> None:
    memory = HostMemory(total_bytes=int(host * GB), available_bytes=int(host * GB))
    monkeypatch.setattr(planning, "host_memory", lambda: memory)


async def test_an_engine_is_told_the_plan_that_fits_and_the_log_what_was_lowered(
    model: Installed, said: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tree = config.Config(cache=config.Cache(host_bytes=0))
    on_machine(monkeypatch, 10.5)
    found = planned.fit_alone(tree, model, ())
    spec = app.engine_spec(tree.engine, tree.cache, model, found.plan)
    assert (spec.context, spec.gpu_layers, spec.kv_type) == (8192, -1, "f16")
    assert 8192 <= spec.pool_tokens == found.plan.pool_tokens < 16_384
    place = Place((), planning.host_memory(), {})
    assert Lineup(tree, [model], Store(config.Store(directory=tmp_path)), place).member("llama").spec == spec
    (line,) = said
    assert line.startswith("llama: the pool of all sequences is lowered from 16,384 tokens to ")


def test_layers_go_to_the_gpus_that_llama_cpp_can_use(
    model: Installed, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machine(monkeypatch, 64)
    tree, card = config.Config(), Device("GPU0", "", "gpu", 24 * GB, 24 * GB)
    found = planned.fit_alone(tree, model, (card,))
    assert app.engine_spec(tree.engine, tree.cache, model, found.plan).gpu_layers == 33
    assert said == []


def test_a_model_that_cannot_fit_is_refused(model: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine(monkeypatch, 4)
    with pytest.raises(DoesNotFit, match=r"weights 8\.53 GB"):
        planned.fit_alone(config.Config(), model, ())


def test_without_a_plan_an_engine_is_told_what_settings_and_card_ask_for(model: Installed) -> None:
    spec = app.engine_spec(config.Engine(context=1024, parallel=2), config.Cache(host_bytes=9), model)
    assert (spec.context, spec.pool_tokens, spec.parallel, spec.host_cache_bytes) == (1024, 2048, 2, 9)
    assert need(
        model.header, planning.wanted(config.Engine(), config.Cache(), model.card.defaults, model.header).plan
    ).kv_bytes


def test_a_server_that_reads_images_takes_photographs_unless_it_is_told_otherwise() -> None:
    unset, told = config.Server(), config.Server(max_body_bytes=1000)
    assert app.sized(unset, reads_images=True).most_body_bytes == config.IMAGE_BODY_BYTES > 4 * 5_000_000 * 4 // 3
    assert app.sized(unset, reads_images=False).most_body_bytes == config.TEXT_BODY_BYTES
    assert app.sized(told, reads_images=True).most_body_bytes == 1000
    settings = {"server.max_body_bytes": wire.MAX_FRAME_BYTES}
    assert config.load(settings, environ={}).config.server.most_body_bytes == wire.MAX_FRAME_BYTES
    with pytest.raises(config.ConfigError):
        config.load({"server.max_body_bytes": wire.MAX_FRAME_BYTES + 1}, environ={})


def test_where_nothing_can_be_recorded_a_laptop_is_served_and_a_provider_is_not(
    tmp_path: Path, said: list[str]
) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    prices = tmp_path / "prices.toml"
    prices.write_text('[[price]]\nmodel = "tiny"\nprompt = "0.1"\ncompletion = "0.1"\n')
    nowhere = config.Ledger(directory=tmp_path / "file" / "folder")
    assert app.open_billing(config.Config(ledger=nowhere), has_key=False).ledger is None
    assert "Requests are not recorded" in said[0]
    for tree, has_key in (
        (config.Config(ledger=nowhere), True),
        (config.Config(ledger=replace(nowhere, use="on")), False),
        (config.Config(ledger=nowhere, billing=config.Billing(prices=prices)), False),
    ):
        with pytest.raises(config.ConfigError, match="cannot be used"):
            app.open_billing(tree, has_key=has_key)
    off = config.Config(ledger=replace(nowhere, use="off"), billing=config.Billing(prices=prices))
    assert app.open_billing(off, has_key=True).ledger is None


def test_tiers_without_a_ledger_are_refused_and_keys_have_names_in_billing(tmp_path: Path) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text(
        '[[price]]\nmodel = "tiny"\nprompt = "0.1"\ncompletion = "0.1"\n[[price.tier]]\nabove = 9\nprompt = "0"'
    )
    tree = config.Config(ledger=config.Ledger(directory=tmp_path, use="off"), billing=config.Billing(prices=prices))
    with pytest.raises(config.ConfigError, match="tiers"):
        app.open_billing(tree, has_key=False)
    store = KeyStore(tmp_path / "keys.json")
    key, _ = store.create("acme")
    billing = app.open_billing(replace(tree, ledger=replace(tree.ledger, use="on")), has_key=True, store=store)
    assert (billing.key("acme"), billing.key("nobody")) == (key, None)
    assert billing.ledger is not None
    billing.ledger.close()


def test_requests_are_recorded_unless_that_is_turned_off(tmp_path: Path) -> None:
    billing = app.open_billing(config.Config(ledger=config.Ledger(directory=tmp_path / "new")), has_key=False)
    assert billing.ledger is not None
    assert billing.state == "ok"
    assert billing.ledger.close() == 0
    assert (tmp_path / "new" / "ledger.db").exists()
