"""Models in a store, as a pull leaves them."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from ocserve.catalog.pull import describe_file
from ocserve.catalog.store import Installed, Store


def install(store: Store, name: str, file: Path) -> Installed:
    """Have a copy of `file` in the store, called `name`."""
    folder = store.folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    (store.directory / ".locks").mkdir(exist_ok=True)
    shutil.copyfile(file, folder / "model.gguf")
    model = describe_file(str(folder / "model.gguf"))
    return store.record(msgspec.structs.replace(model, name=name, reference=name, source="hub"), folder)
