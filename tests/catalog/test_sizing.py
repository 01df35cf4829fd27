"""Which model fits which machine: estimates err upward, the choice is explained, and there always is one."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from ocserve import config
from ocserve.catalog import cards, sizing
from ocserve.catalog.gguf import read_header
from ocserve.catalog.references import CatalogueReference
from ocserve.catalog.sizing import best_for_this_machine, cache_bytes_per_token, memory_needed
from ocserve.catalog.store import Store
from ocserve.machine import HostMemory
from tests.catalog.fake_hub import serving

pytestmark = pytest.mark.beside

GB = 1_000_000_000


def memory(gigabytes: float) -> HostMemory:
    return HostMemory(total_bytes=int(gigabytes * GB), available_bytes=int(gigabytes * GB))


def test_the_cache_of_smollm2_is_exact_from_its_header(smollm2: Path) -> None:
    assert cache_bytes_per_token(read_header(smollm2)) == 30 * 3 * (64 + 64) * 2


@pytest.mark.parametrize(
    ("name", "exact"),
    [("smollm2:135m", 23_040), ("llama3.2:3b", 114_688), ("qwen3:8b", 147_456), ("qwen3:32b", 262_144)],
)
def test_the_estimate_from_a_card_errs_upward_but_not_by_more_than_half(name: str, exact: int) -> None:
    estimate = cache_bytes_per_token(cards.find(CatalogueReference(name))[0])
    assert exact <= estimate <= exact * 1.6


def test_memory_grows_with_the_pool(smollm2: Path) -> None:
    header = read_header(smollm2)
    small, large = memory_needed(header, 98 * 10**6, 1024), memory_needed(header, 98 * 10**6, 16_384)
    growth = 23_040 * (16_384 - 1024)
    assert growth < large - small < 1.05 * growth  # the cache, and the masks over it
    assert 98 * 10**6 < small < 500 * 10**6


@pytest.mark.parametrize(
    ("gigabytes", "cores", "name"),
    [
        (0.1, 1, "smollm2:135m"),
        (1, 2, "smollm2:135m"),
        (32, 1, "smollm2:360m"),
        (32, 2, "smollm2:360m"),
        (32, 4, "smollm2:1.7b"),
        (16, 8, "qwen3:4b"),
        (256, 64, "qwen3:4b"),
    ],
)
def test_the_best_model_fits_memory_and_processor(gigabytes: float, cores: int, name: str) -> None:
    card, variant = best_for_this_machine(cards.load_cards(), memory(gigabytes), cores)
    assert card.name == name
    assert variant == card.variants[0]


def test_nobody_gets_a_model_under_special_terms_without_asking() -> None:
    for gigabytes in range(1, 300, 7):
        for cores in (1, 2, 4, 8, 64):
            card, _ = best_for_this_machine(cards.load_cards(), memory(gigabytes), cores)
            assert card.license in sizing.OPEN_LICENSES


@pytest.fixture
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "host_memory", lambda: memory(64))
    monkeypatch.setattr(sizing, "usable_cores", lambda: 8)


@pytest.mark.usefixtures("large_machine")
def test_the_default_is_the_best_model_where_the_hub_offers_it(tmp_path: Path) -> None:
    said: list[str] = []
    file = "Qwen_Qwen3-4B-Instruct-2507-Q4_K_M.gguf"
    with serving({"bartowski/Qwen_Qwen3-4B-Instruct-2507-GGUF": {file: b"GGUF"}}) as hub:
        settings = config.Store(directory=tmp_path, hub_endpoint=hub.host, hub_timeout_s=2)
        assert sizing.choose_default(settings, said.append) == "qwen3:4b"
    assert "2.50 GB will be downloaded" in said[0]


@pytest.mark.usefixtures("large_machine")
def test_the_default_is_smollm2_where_the_hub_does_not_answer(tmp_path: Path) -> None:
    said: list[str] = []
    settings = config.Store(directory=tmp_path, hub_endpoint="http://127.0.0.1:9", hub_timeout_s=1)
    assert sizing.choose_default(settings, said.append) == "smollm2:135m"
    assert said == [
        "the hub at 127.0.0.1:9 cannot be reached (ConnectError)",
        "SmolLM2 135M Instruct, 98 MB, will be downloaded",
    ]


@pytest.mark.usefixtures("large_machine")
def test_the_default_is_what_is_installed_and_a_better_one_is_named(
    tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config.Store(directory=tmp_path, hub_endpoint="http://127.0.0.1:9", hub_timeout_s=1)
    shutil.copytree(smollm2.parent, Store(settings).folder("smollm2:135m:Q4_1"))
    said: list[str] = []
    assert sizing.choose_default(settings, said.append) == "smollm2:135m"
    assert said == [
        "serving smollm2:135m, which is installed; `ocserve run qwen3:4b` would fetch the best model for this machine "
        "(2.50 GB)"
    ]
    monkeypatch.setattr(sizing, "host_memory", lambda: memory(1))  # here it is the best itself
    assert sizing.choose_default(settings, said.append) == "smollm2:135m"
    assert len(said) == 1
    assert hashlib.sha256(smollm2.read_bytes()).hexdigest().startswith("b179c952")
