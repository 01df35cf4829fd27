"""What is installed: one folder per model with its files and a manifest, written last.

    <store>/<slug>-<hash of the reference>/manifest.json      says the model is complete
                                          /model.gguf …       its files, named by us or checked
    <store>/.locks/<slug>-<hash>.lock                         held while a model is pulled or removed
                                .used                         held by every server that has named or loaded it
                /changes                                      grows whenever a model has come or gone

A folder without a manifest is a download that has not finished; the next pull goes on with it.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import platformdirs

from ocserve import config, locks
from ocserve.catalog import cards, references
from ocserve.catalog.download import disk_errors, sync_directory, write_durably
from ocserve.catalog.errors import (
    CatalogError,
    GgufInvalid,
    ModelInUse,
    NotInstalled,
    ReferenceInvalid,
    StoreDamaged,
)
from ocserve.catalog.gguf import GgufHeader, read_header
from ocserve.catalog.gguf_header import REVISION
from ocserve.catalog.progress import OnProgress, Progress
from ocserve.decoding import resolved
from ocserve.modelcard import ModelCard

Source = Literal["hub", "index", "file"]
MANIFEST = "manifest.json"
_FOLDER = re.compile(r"[a-z0-9-]+-[0-9a-f]{12}")


class StoredFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of a model. `name` is relative to the model's folder; `sha256` is None where it was not hashed."""

    name: str
    size_bytes: int
    sha256: str | None = None


@resolved
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
            except OSError:
                return False
        return True


@dataclass(frozen=True, slots=True)
class Damaged:
    """A folder whose model cannot be used: its name in the store, why, and what helps."""

    folder: str
    reason: str
    hint: str


class Store:
    """The folder of installed models."""

    def __init__(self, settings: config.Store) -> None:
        self.directory = settings.directory or platformdirs.user_data_path("ocserve", appauthor=False) / "models"

    def stamp(self) -> tuple[int, ...]:
        """Tells one content of the store from another. A model's files are not looked at."""
        found: list[int] = []
        for path in (self.directory, self._changes):
            try:
                state = path.stat()
            except OSError:
                found.append(0)
            else:
                found += (state.st_mtime_ns, state.st_ino, state.st_size)
        return tuple(found)

    @property
    def _changes(self) -> Path:
        return self.directory / ".locks" / "changes"

    def _note_change(self) -> None:
        """Let servers see that a model has come or gone: the file grows, so no two stamps are the same."""
        with suppress(OSError), self._changes.open("ab") as changes:  # they see new folders without it
            changes.write(b"\n")

    def installed(self) -> list[Installed]:
        """Every complete model, by name. One that is damaged is passed over, so that it harms no other."""
        found, _ = self._survey()
        return sorted(found, key=lambda each: each.name)

    def damaged(self) -> list[Damaged]:
        """The folders that should hold a model and do not: the manifest is unreadable, or a file is not as it says."""
        _, damaged = self._survey()
        return sorted(damaged, key=lambda each: each.folder)

    def _survey(self) -> tuple[list[Installed], list[Damaged]]:
        found: list[Installed] = []
        damaged: list[Damaged] = []
        for manifest in self.directory.glob(f"*/{MANIFEST}"):
            folder = manifest.parent.name
            try:
                model = self._read(manifest)
            except StoreDamaged as error:
                damaged.append(Damaged(folder, error.message, f"`ocserve rm {folder}`, then pull the model again"))
                continue
            if model.is_intact():
                found.append(model)
            else:
                reason = f"a file of {model.name} is missing or has another size"
                damaged.append(Damaged(folder, reason, f"`ocserve pull {model.name}`, or `ocserve rm {folder}`"))
        return found, damaged

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

    @contextmanager
    def used(self, model: Installed) -> Iterator[None]:
        """Keep `model` from being removed while it is named or in memory. A file of the user's own is theirs."""
        if model.source == "file":
            yield
            return
        with locks.shared(self._use_of(Path(model.directory))) as is_shared:
            if not is_shared:
                raise NotInstalled(f"{model.name} is being removed by another process")
            yield

    def _use_of(self, folder: Path) -> Path:
        return self.directory / ".locks" / f"{folder.name}.used"

    def read(self, folder: Path) -> Installed | None:
        """The model in `folder`, if it is complete and intact. Raises `StoreDamaged` for an unreadable manifest."""
        manifest = folder / MANIFEST
        if not manifest.exists():
            return None
        found = self._read(manifest)
        return found if found.is_intact() else None

    def record(self, model: Installed, folder: Path) -> Installed:
        """Declare the model in `folder` complete."""
        for file in model.files:
            if not _is_plain(file.name):
                raise ReferenceInvalid(f"{file.name} is not a plain file name")
        write_durably(folder / MANIFEST, msgspec.json.encode(msgspec.structs.replace(model, directory="")))
        self._note_change()
        return msgspec.structs.replace(model, directory=str(folder))

    def remove(self, reference: str) -> Installed:
        """Delete an installed model and return what it was. Raises `NotInstalled` and `ModelInUse`."""
        model = self.find(reference)
        if model is None:
            raise NotInstalled(f"{reference} is not installed", hint="`ocserve list` shows what is")
        folder = Path(model.directory)
        with (
            disk_errors(model.name),
            self.lock(folder, _ignore_progress),
            locks.alone(self._use_of(folder)) as is_unused,
        ):
            if self.read(folder) is None:
                raise NotInstalled(f"{reference} was removed by another process")
            if not is_unused:
                raise ModelInUse(
                    f"{model.name} is in use by a running ocserve",
                    hint=f"`ocserve unload {model.name}` ends that; a server that was started with it has to stop",
                )
            (folder / MANIFEST).unlink()  # first: from here on it is not installed, whatever happens
            sync_directory(folder)
            self._note_change()
            shutil.rmtree(folder)
        return model

    def discard(self, reference: str) -> int | None:
        """Delete what is of no use under `reference`, a model or a folder of the store: an unfinished pull, a damaged
        model. Returns the bytes freed, None where there is no such thing."""
        named = self.directory / reference if _FOLDER.fullmatch(reference) else None
        folder = named if named is not None and named.is_dir() else self.folder(self.canonical(reference))
        if not folder.is_dir():
            return None
        with disk_errors(reference), self.lock(folder, _ignore_progress):
            if not folder.is_dir() or self._is_complete(folder):  # by the process we waited for
                return None
            freed = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
            shutil.rmtree(folder)
        return freed

    def _is_complete(self, folder: Path) -> bool:
        try:
            return self.read(folder) is not None
        except StoreDamaged:
            return False

    def _read(self, manifest: Path) -> Installed:
        try:
            if not stat.S_ISREG(manifest.stat().st_mode):  # before opening, which would wait on a FIFO
                raise ValueError("it is no regular file")
            model = msgspec.json.decode(manifest.read_bytes(), type=Installed)
            if not model.files or any(not _is_plain(file.name) for file in model.files):
                raise ValueError("it names no usable file")
        except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
            hint = f"`ocserve rm {manifest.parent.name}`, then pull the model again"
            raise StoreDamaged(f"the manifest {manifest} cannot be read: {error}", hint=hint) from error
        model = msgspec.structs.replace(model, directory=str(manifest.parent), card=_current_card(model))
        return model if model.header.revision == REVISION else _with_current_header(model)


def _is_plain(name: str) -> bool:
    """Whether a file of this name lies in the model's own folder."""
    return os.path.basename(name) == name and references.is_safe_path(name)


def _current_card(model: Installed) -> ModelCard:
    """The catalogue's card of today, so that an installed model follows it; the recorded one for other models."""
    try:
        reference = references.parse(model.reference)
        if isinstance(reference, references.CatalogueReference):
            return cards.find(reference)[0]
    except CatalogError:
        return model.card  # it has left the catalogue
    return model.card


def _with_current_header(model: Installed) -> Installed:
    """The model with the facts of its files as this version derives them; a manifest may be older."""
    first, *parts = (Path(model.directory) / file.name for file in model.files)
    try:
        return msgspec.structs.replace(model, header=read_header(first, parts))
    except GgufInvalid:
        return model  # a file is missing or damaged, which is told apart where the model is used


def _ignore_progress(_: Progress) -> None:
    """For operations that have nobody to tell."""
