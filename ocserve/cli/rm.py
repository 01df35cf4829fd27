"""`ocserve rm MODEL`: delete an installed model."""

from __future__ import annotations

import click


@click.command("rm")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: str, as_json: bool) -> None:
    """Delete MODEL, or what an unfinished pull of it left, from this machine. A file of your own is never touched.

    A damaged model is named as `ocserve list` names it: by its folder.
    """
    from ocserve import config
    from ocserve.catalog.store import Store
    from ocserve.cli.model_output import print_json, size_text, view

    store = Store(config.load().config.store)
    if store.find(model) is None and (freed := store.discard(model)) is not None:
        if as_json:
            print_json({"event": "discarded", "reference": model, "freed_bytes": freed})
        else:
            click.echo(f"what was left of {model}, unfinished or damaged, is removed: {size_text(freed)} freed")
        return
    removed = store.remove(model)
    if as_json:
        print_json({"event": "removed", "model": view(removed)})
    else:
        click.echo(f"{removed.name} is removed: {size_text(removed.size_bytes)} freed")
