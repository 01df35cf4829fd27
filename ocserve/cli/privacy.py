"""`ocserve privacy purge`: delete what this machine keeps of requests."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ocserve.config import Config


@click.group("privacy")
def command() -> None:
    """Delete what is kept of requests."""


@command.command("purge")
@click.option("--key", metavar="KEY", help="Only the rows of this key, by its name or id.")
@click.option("--until", type=click.DateTime(["%Y-%m-%d"]), help="Only rows up to this day, UTC.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def purge(key: str | None, until: datetime.datetime | None, yes: bool, as_json: bool) -> None:
    """Delete rows of the ledger for good; without --key and --until all stored prefixes too.

    Stored prefixes are not kept by key or day: only a purge without both options deletes them, those of all keys.
    With --key and without --until the key's credits, balance and sums go as well; else every balance stays. Running
    requests keep their rows. The server may go on meanwhile: it computes again what it finds no more.
    """
    from ocserve import config
    from ocserve.accounts import usage
    from ocserve.accounts.ledger_schema import LedgerError
    from ocserve.cli import Failure, key_ids
    from ocserve.cli.tables import counted

    tree = config.load().config
    try:
        span = usage.Span(until=until and until.date(), key=key and key_ids.key_id(key, tree))
    except LedgerError as error:
        raise Failure(str(error)) from None
    everything = key is None and until is None
    stored = _files(config.cache_directory(tree.cache) / "prefixes")
    prefixes, staying = (stored, []) if everything else ([], stored)
    file = config.ledger_file(tree.ledger)
    if not yes:
        whole = " with credits and balance" if key is not None and until is None else ""
        what = f"the rows{whole} of {_whose(span.key, tree)}{f' up to {until:%Y-%m-%d}' if until else ''} in {file}"
        what += f" and {counted(len(prefixes), 'file')} of stored prefixes" if prefixes else ""
        click.confirm(f"Delete {what}?", abort=True, err=True)
    try:
        rows = usage.purge(file, span) if file.exists() else 0
    except LedgerError as error:
        raise Failure(str(error)) from None
    for prefix in prefixes:
        prefix.unlink(missing_ok=True)
    if as_json:
        from ocserve.cli.model_output import print_json

        print_json({"event": "purged", "rows": rows, "prefixes": len(prefixes), "prefixes_left": len(staying)})
    else:
        click.echo(
            f"deleted: {counted(rows, 'row')} of the ledger, {counted(len(prefixes), 'file')} of stored prefixes"
        )
        if not everything:
            click.echo(
                f"left: {counted(len(staying), 'file')} of stored prefixes, which are not kept by key or day; only "
                "`ocserve privacy purge` without --key and --until deletes them, those of all keys"
            )


def _whose(key: str | None, tree: Config) -> str:
    from ocserve.cli import key_ids

    return "all keys" if key is None else key_ids.shown(key, key_ids.names(tree))


def _files(folder: Path) -> list[Path]:
    """What stored prefixes lie there."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()] if folder.is_dir() else []
