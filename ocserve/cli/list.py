"""`ocserve list`: what is installed, or with `--all` what the catalogue offers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ocserve.catalog.store import Store


@click.command("list")
@click.option("--all", "everything", is_flag=True, help="Show the whole catalogue, not only what is installed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(everything: bool, as_json: bool) -> None:
    """List the models on this machine."""
    from ocserve import config
    from ocserve.catalog.store import Store

    store = Store(config.load().config.store)
    if everything:
        _show_catalogue(store, as_json)
    else:
        _show_installed(store, as_json)


def _show_installed(store: Store, as_json: bool) -> None:
    from ocserve.cli.model_output import is_verified, print_json, print_table, size_text, view

    for each in store.damaged():
        click.echo(f"damaged: {each.folder}: {each.reason}\nhint: {each.hint}", err=True)
    models = store.installed()
    if as_json:
        print_json({"models": [view(model) for model in models]})
    elif not models:
        click.echo("nothing is installed; `ocserve list --all` shows the catalogue, `ocserve pull NAME` brings a model")
    else:
        rows = [
            (
                model.name,
                model.quantisation,
                size_text(model.size_bytes),
                f"{model.context_length:,}",
                model.source,
                "verified" if is_verified(model) else "",
            )
            for model in models
        ]
        print_table(("NAME", "QUANT", "SIZE", "CONTEXT", "SOURCE", ""), rows)


def _show_catalogue(store: Store, as_json: bool) -> None:
    from ocserve.catalog.cards import load_cards, served, unserved
    from ocserve.cli.model_output import print_json, print_table, size_text

    installed = {model.card.name for model in store.installed()}
    cards = load_cards()
    if as_json:
        facts = [
            {"card": card, "installed": card.name in installed, "serves": served(card), "unserved": unserved(card)}
            for card in cards
        ]
        print_json({"models": facts})
        return
    rows = []
    for card in cards:
        marks = ["installed"] if card.name in installed else []
        marks += ["verified"] if any(variant.verified for variant in card.variants) else []
        first = card.variants[0]
        rows.append(
            (
                card.name,
                first.quantisation,
                size_text(first.size_bytes),
                card.license,
                ", ".join(served(card)),
                ", ".join(unserved(card)),
                ", ".join(marks),
            )
        )
    print_table(("NAME", "QUANT", "SIZE", "LICENCE", "SERVES", "NOT SERVED YET", ""), rows)
    click.echo("\nverified: this project ran this very file through its tests")
