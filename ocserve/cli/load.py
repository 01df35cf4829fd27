"""`ocserve load MODEL`: have a running server load a model now."""

from __future__ import annotations

import os

import click

from ocserve.cli.running import Running, options, show

_LONGEST_LOAD_S = 3600.0
_LONGEST_PULL_S = 24 * 3600.0


@click.command("load")
@click.argument("model")
@click.option("--pull", is_flag=True, help="Have the server pull it if it is not there.")
@options
def command(model: str, pull: bool, url: str | None, key_from: str | None, as_json: bool) -> None:
    """Have a running server load MODEL now, and serve it if it does not yet.

    MODEL is a name or reference, or the path of a GGUF file on the server's machine. Others that nobody uses make room.
    """
    if os.path.isfile(model):
        model = os.path.abspath(model)  # the server may have been started elsewhere
    within_s = _LONGEST_PULL_S if pull else _LONGEST_LOAD_S
    body: dict[str, object] = {"model": model, "pull": pull}
    answer = Running(url, key_from).ask("POST", "/admin/models/load", body, within_s=within_s)
    show(answer, f"{answer['model']} is loaded", as_json=as_json)
