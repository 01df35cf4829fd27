"""Projectors: the files beside a model that let it read images. Their headers are judged like those of models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ocserve.catalog.errors import GgufInvalid
from ocserve.catalog.gguf import read_metadata
from ocserve.catalog.store import Installed

_PATTERN = "*mmproj*.gguf"


@dataclass(frozen=True, slots=True)
class ProjectorFile:
    """A file that holds a projector of images. `digest` names its content by its identity and last change."""

    path: str
    size_bytes: int
    digest: str


def projector(model: Installed, asked: str | None) -> ProjectorFile | None:
    """The projector to load with `model`: the one that was `asked` for, else the one that lies beside the model's file.

    Beside it counts one that fits the model, and only if there is no other. Raises `GgufInvalid` where what was asked
    for is no projector of images; whether it fits llama.cpp then says.
    """
    if asked is not None:
        found = _read(Path(asked).expanduser())
        if found is None:
            raise GgufInvalid(f"{asked} is no projector of images")
        return found[0]
    beside = [found for path in sorted(Path(model.directory).glob(_PATTERN)) if (found := _found(path)) is not None]
    fitting = [file for file, width in beside if width == model.header.embedding_length]
    return fitting[0] if len(fitting) == 1 else None


def _found(path: Path) -> tuple[ProjectorFile, int] | None:
    try:
        return _read(path)
    except GgufInvalid:
        return None  # nobody named it


def _read(path: Path) -> tuple[ProjectorFile, int] | None:
    """The file and the width of its embeddings; None for a GGUF file without a projector of images."""
    metadata = read_metadata(path)
    if metadata.scalars.get("clip.has_vision_encoder") is not True:
        return None
    state = path.stat()
    digest = f"{state.st_dev}:{state.st_ino}:{state.st_size}:{state.st_mtime_ns}"
    width = metadata.number("clip.vision.projection_dim", 1 << 20)
    return ProjectorFile(str(path), state.st_size, digest), width
