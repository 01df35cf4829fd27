"""Which model fits which machine: estimates err upward, the choice is explained, and there always is one."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

import pytest

from ocserve import config
from ocserve.catalog import cards, sizing
from ocserve.catalog.gguf import read_header
from ocserve.catalog.references import CatalogueReference
from ocserve.catalog.sizing import HostMemory, best_for_this_machine, cache_bytes_per_token, memory_needed
from ocserve.catalog.store import Store
from tests.catalog.fake_hub import serving

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
    assert large - small == 23_040 * (16_384 - 1024)
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


def test_this_machine_has_memory() -> None:
    seen = sizing.host_memory()
    assert 0 < seen.available_bytes <= seen.total_bytes


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("1000", "400", (1000, 600)), ("max", "400", None), ("1000", "2000", (1000, 0)), ("1000", "x", None)],
)
def test_a_containers_limit_counts(tmp_path: Path, limit: str, used: str, expected: tuple[int, int] | None) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    assert sizing._container_limit(tmp_path) == expected
    assert sizing._container_limit(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), ("nonsense", 8), ("1 0", 8)],
)
@pytest.mark.skipif(sys.platform != "linux", reason="affinity and quotas are Linux's")
def test_cores_are_those_this_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int
) -> None:
    monkeypatch.setattr(sizing.os, "sched_getaffinity", lambda _: set(range(8)))
    assert sizing.usable_cores(tmp_path) == 8
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert sizing.usable_cores(tmp_path) == expected


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
