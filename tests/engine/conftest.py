"""What several tests of the engine start from."""

from __future__ import annotations

import pytest

from ocserve.engine import llama
from tests import tiny
from tests.engine.schedules import load


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> llama.Model:
    """A loaded tiny model with plain attention."""
    return load(tiny.write(tmp_path_factory.mktemp("model") / "m.gguf"))
