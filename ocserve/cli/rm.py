"""`ocserve rm MODEL`: delete an installed model."""

from __future__ import annotations

import click


@click.command("rm")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: str, as_json: bool) -> None:
    """Delete MODEL from this machine. A file of your own is never touched."""
    from ocserve import config
    from ocserve.catalog.store import Store
    from ocserve.cli.model_output import failures_shown, print_json, size_text, view

    with failures_shown():
        removed = Store(config.load().config.store).remove(model)
    if as_json:
        print_json({"event": "removed", "model": view(removed)})
    else:
        click.echo(f"{removed.name} is removed: {size_text(removed.size_bytes)} freed")
