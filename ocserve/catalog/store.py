"""What is installed: one folder per model with its files and a manifest, written last.

    <store>/<slug>-<hash of the reference>/manifest.json      says the model is complete
                                          /model.gguf …       its files, named by us or checked
    <store>/.locks/<slug>-<hash>.lock                         held while a model is pulled or removed

A folder without a manifest is a download that has not finished; the next pull goes on with it.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import msgspec
import platformdirs

from ocserve import config
from ocserve.catalog import cards, locks, references
from ocserve.catalog.download import disk_errors, sync_directory, write_durably
from ocserve.catalog.errors import CatalogError, NotInstalled, ReferenceInvalid, StoreDamaged
from ocserve.catalog.gguf import GgufHeader
from ocserve.catalog.progress import OnProgress, Progress
from ocserve.modelcard import ModelCard

Source = Literal["hub", "index", "file"]
MANIFEST = "manifest.json"


class StoredFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of a model. `name` is relative to the model's folder; `sha256` is None where it was not hashed."""

    name: str
    size_bytes: int
    sha256: str | None = None


class Installed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model that is complete on this machine. It is the manifest, except for `directory`, which is where that lies.

    `name` is what users type and what is served. `source` "file" is a file of the user's own: used where it lies,
    neither copied nor hashed, because hashing tens of gigabytes would delay every start.
    """

    name: str
    reference: str
    card: ModelCard
    quantisation: str
    files: tuple[StoredFile, ...]
    source: Source
    source_detail: str
    installed_at: datetime.datetime
    header: GgufHeader
    directory: str = ""

    @property
    def path(self) -> str:
        """The file to load; llama.cpp finds the other parts of a split model beside it."""
        return os.path.join(self.directory, self.files[0].name)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def sha256(self) -> str | None:
        """Of the first file."""
        return self.files[0].sha256

    @property
    def architecture(self) -> str:
        return self.header.architecture

    @property
    def context_length(self) -> int:
        """What the model was trained for, as its file says."""
        return self.header.context_length

    @property
    def has_chat_template(self) -> bool:
        return self.header.has_chat_template

    def is_intact(self) -> bool:
        """Whether every file is there with its size. Contents were checked when they came."""
        for file in self.files:
            try:
                if os.stat(os.path.join(self.directory, file.name)).st_size != file.size_bytes:
                    return False
            except FileNotFoundError:
                return False
        return True


class Store:
    """The folder of installed models."""

    def __init__(self, settings: config.Store) -> None:
        self.directory = settings.directory or platformdirs.user_data_path("ocserve", appauthor=False) / "models"

    def installed(self) -> list[Installed]:
        """Every complete model, by name. Raises `StoreDamaged` for a manifest that cannot be read."""
        found = [self._read(path) for path in self.directory.glob(f"*/{MANIFEST}")]
        return sorted((each for each in found if each.is_intact()), key=lambda each: each.name)

    def find(self, reference: str) -> Installed | None:
        """The installed model that `reference` means: its name, its reference, or a name of the catalogue for it."""
        installed = self.installed()
        for each in installed:
            if reference in (each.name, each.reference):
                return each
        try:
            wanted = self.canonical(reference)
        except CatalogError:
            return None  # nothing in the catalogue has that name, so nothing installed does
        return next((each for each in installed if each.reference == wanted), None)

    def canonical(self, reference: str) -> str:
        """The spelling under which a model is stored: aliases resolved, the variant named."""
        parsed = references.parse(reference)
        if not isinstance(parsed, references.CatalogueReference):
            return str(parsed)
        card, variant = cards.find(parsed)
        return f"{card.name}:{variant.quantisation}"

    def folder(self, canonical: str) -> Path:
        """Where the model of a canonical reference lies. The name is readable, and unique through its hash."""
        slug = re.sub(r"[^A-Za-z0-9]+", "-", canonical).strip("-").lower()[:60] or "model"
        return self.directory / f"{slug}-{hashlib.sha256(canonical.encode()).hexdigest()[:12]}"

    def lock(self, folder: Path, on_progress: OnProgress) -> AbstractContextManager[None]:
        """Exclusive use of one model's folder."""

        def waiting() -> None:
            on_progress(Progress(phase="waiting", note="another process is pulling this model; waiting for it"))

        return locks.exclusive(self.directory / ".locks" / f"{folder.name}.lock", waiting)

    def read(self, folder: Path) -> Installed | None:
        """The model in `folder`, if it is complete and intact."""
        manifest = folder / MANIFEST
        if not manifest.is_file():
            return None
        found = self._read(manifest)
        return found if found.is_intact() else None

    def record(self, model: Installed, folder: Path) -> Installed:
        """Declare the model in `folder` complete."""
        for file in model.files:
            if os.path.basename(file.name) != file.name or not references.is_safe_path(file.name):
                raise ReferenceInvalid(f"{file.name} is not a plain file name")
        write_durably(folder / MANIFEST, msgspec.json.encode(msgspec.structs.replace(model, directory="")))
        return msgspec.structs.replace(model, directory=str(folder))

    def remove(self, reference: str) -> Installed:
        """Delete an installed model and return what it was. Raises `NotInstalled`."""
        model = self.find(reference)
        if model is None:
            raise NotInstalled(f"{reference} is not installed", hint="`ocserve list` shows what is")
        folder = Path(model.directory)
        with disk_errors(model.name), self.lock(folder, _ignore_progress):
            if self.read(folder) is None:
                raise NotInstalled(f"{reference} was removed by another process")
            (folder / MANIFEST).unlink()  # first: from here on it is not installed, whatever happens
            sync_directory(folder)
            shutil.rmtree(folder)
        return model

    def discard_partial(self, reference: str) -> int:
        """Delete what an unfinished pull of `reference` left; the bytes freed, 0 where there was nothing."""
        folder = self.folder(self.canonical(reference))
        if not folder.is_dir() or self.read(folder) is not None:
            return 0
        with disk_errors(reference), self.lock(folder, _ignore_progress):
            freed = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            shutil.rmtree(folder)
        return freed

    def _read(self, manifest: Path) -> Installed:
        try:
            model = msgspec.json.decode(manifest.read_bytes(), type=Installed)
        except (OSError, msgspec.DecodeError) as error:
            raise StoreDamaged(
                f"the manifest {manifest} cannot be read: {error}", hint="remove its folder and pull the model again"
            ) from error
        return msgspec.structs.replace(model, directory=str(manifest.parent), card=_current_card(model))


def _current_card(model: Installed) -> ModelCard:
    """The catalogue's card of today, so that an installed model follows it; the recorded one for other models."""
    try:
        reference = references.parse(model.reference)
        if isinstance(reference, references.CatalogueReference):
            return cards.find(reference)[0]
    except CatalogError:
        return model.card  # it has left the catalogue
    return model.card


def _ignore_progress(_: Progress) -> None:
    """For operations that have nobody to tell."""
