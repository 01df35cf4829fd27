"""The clients, installed; and one real server for the plain answers of them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clients.catalogue import CLIENTS
from tests.clients.installing import Missing, install
from tests.e2e.daemon import RunningDaemon, daemon


@pytest.fixture(scope="session")
def installed(model_cache: Path, full: bool) -> Callable[[str], Path]:
    """The folder of a client by its name; a test of one that cannot be had here is skipped with the reason."""

    def find(name: str) -> Path:
        try:
            return install(CLIENTS[name], model_cache / "clients", fetch_large=full)
        except Missing as missing:
            pytest.skip(str(missing))

    return find


@pytest.fixture(scope="session")
def real(smollm2: Path, model_cache: Path) -> Iterator[RunningDaemon]:
    with daemon("smollm2:135m", store=model_cache) as running:
        yield running
