"""Real chat templates and vocabularies, read from the source distribution of the llama.cpp binding in use.

The distribution is fetched once with pip and kept in the user's cache folder.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import platformdirs
import pytest

from tests.locked import locked

DISTRIBUTION = "llama-cpp-python"
_WANTED = ("/models/templates/", "/models/ggml-vocab-")


def _models_folder() -> Path:
    version = importlib.metadata.version(DISTRIBUTION)
    kept = platformdirs.user_cache_path("ocserve-tests") / f"{DISTRIBUTION}-{version}-models"
    with locked(kept):
        if not kept.exists():
            _fetch(version, kept)
    return kept


def _fetch(version: str, kept: Path) -> None:
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        # pip prepares metadata for an sdist, which takes its build requirements but compiles nothing.
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", DISTRIBUTION),
                *("--dest", scratch, f"{DISTRIBUTION}=={version}"),
            ],
            check=True,
            timeout=240,
        )
        (archive,) = Path(scratch).glob("*.tar.gz")
        unpacked = Path(scratch) / "unpacked"
        with tarfile.open(archive) as tar:
            members = [member for member in tar if any(part in member.name for part in _WANTED)]
            tar.extractall(unpacked, members=members, filter="data")
        (models,) = unpacked.glob("*/vendor/llama.cpp/models")
        models.rename(kept)


@pytest.fixture(scope="session")
def models_folder() -> Path:
    return _models_folder()


@pytest.fixture(scope="session")
def real_templates(models_folder: Path) -> dict[str, str]:
    """The source of each real template, by its file's name without the ending."""
    return {path.stem: path.read_text() for path in sorted((models_folder / "templates").glob("*.jinja"))}
