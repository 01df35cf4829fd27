"""Which file lets a model read images."""

from __future__ import annotations

from pathlib import Path

import pytest

from ocserve import config
from ocserve.catalog.errors import GgufInvalid
from ocserve.catalog.projectors import projector
from ocserve.catalog.pull import pull
from ocserve.catalog.store import Installed
from tests import tiny, tiny_projector


@pytest.fixture
def model(tmp_path: Path) -> Installed:
    path = tiny.write(tmp_path / "model.gguf")
    return pull(str(path), config.Store(directory=tmp_path / "store"), lambda progress: None)


def test_the_one_beside_the_model_that_fits_it_is_taken(model: Installed, tmp_path: Path) -> None:
    assert projector(model, None) is None
    tiny_projector.write(tmp_path / "mmproj-of-another.gguf", embedding=64)
    (tmp_path / "mmproj-broken.gguf").write_bytes(b"GGUF")
    assert projector(model, None) is None
    ours = tiny_projector.write(tmp_path / "model.mmproj-f32.gguf")
    found = projector(model, None)
    assert found is not None
    assert (found.path, found.size_bytes) == (str(ours), ours.stat().st_size)
    tiny_projector.write(tmp_path / "mmproj-second.gguf", seed=2)
    assert projector(model, None) is None  # which of the two is for the operator to say


def test_the_one_that_is_asked_for_must_be_one(model: Installed, tmp_path: Path) -> None:
    ours = tiny_projector.write(tmp_path / "eyes.gguf")
    found = projector(model, str(ours))
    assert found is not None
    assert found.digest
    for wrong in (model.path, str(tmp_path / "absent.gguf")):
        with pytest.raises(GgufInvalid):
            projector(model, wrong)
