"""How models and what goes wrong with them are shown by the commands that handle model files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import click
import msgspec

from ocserve.catalog.errors import CatalogError
from ocserve.catalog.store import Installed
from ocserve.config import ConfigError

SOURCES = {"hub": "the hub", "index": "the Python package index", "file": "a file of yours"}


class Failure(click.ClickException):
    """Exit status 1, with what happened and what helps on stderr."""

    def __init__(self, message: str, hint: str | None) -> None:
        super().__init__(message)
        self.hint = hint

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.message}", file=file, err=True)
        if self.hint:
            click.echo(f"hint: {self.hint}", file=file, err=True)


@contextmanager
def failures_shown() -> Iterator[None]:
    """Turns what the layers below raise into a failure of the command."""
    try:
        yield
    except (CatalogError, ConfigError) as error:
        raise Failure(error.message, error.hint) from error


class InstalledView(msgspec.Struct, frozen=True, kw_only=True):
    """An installed model in JSON output."""

    name: str
    reference: str
    quantisation: str
    size_bytes: int
    sha256: str | None
    path: str
    source: str
    source_detail: str
    installed_at: str
    architecture: str
    context_length: int
    parameters: int
    has_chat_template: bool
    license: str
    verified: bool


def view(model: Installed) -> InstalledView:
    """The public facts of an installed model."""
    return InstalledView(
        name=model.name,
        reference=model.reference,
        quantisation=model.quantisation,
        size_bytes=model.size_bytes,
        sha256=model.sha256,
        path=model.path,
        source=model.source,
        source_detail=model.source_detail,
        installed_at=model.installed_at.isoformat(timespec="seconds"),
        architecture=model.architecture,
        context_length=model.context_length,
        parameters=model.header.parameters,
        has_chat_template=model.has_chat_template,
        license=model.card.license,
        verified=is_verified(model),
    )


def is_verified(model: Installed) -> bool:
    """Whether this project ran this very file through its tests."""
    return any(variant.verified and variant.sha256 == model.sha256 for variant in model.card.variants)


def size_text(size_bytes: int) -> str:
    """Bytes for people, in the decimal units that hubs and disks use."""
    if size_bytes >= 1_000_000_000:
        return f"{size_bytes / 1e9:.2f} GB"
    return f"{size_bytes / 1e6:.0f} MB" if size_bytes >= 1_000_000 else f"{size_bytes / 1e3:.0f} kB"


def print_json(value: object) -> None:
    """One JSON document on one line of stdout."""
    click.echo(msgspec.json.encode(value).decode())


def print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Left-aligned columns on stdout."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
