"""How models are shown by the commands that handle model files."""

from __future__ import annotations

from collections.abc import Sequence

import click
import msgspec

from ocserve.catalog.sizes import size_text as size_text
from ocserve.catalog.store import Installed

SOURCES = {"hub": "the hub", "index": "the Python package index", "file": "a file of yours"}


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


def print_json(value: object) -> None:
    """One JSON document on one line of stdout."""
    click.echo(msgspec.json.encode(value).decode())


def print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Left-aligned columns on stdout."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
