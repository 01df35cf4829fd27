"""`ocserve unload MODEL`: have a running server unload a model."""

from __future__ import annotations

import click

from ocserve.cli.running import Running, options, show


@click.command("unload")
@click.argument("model")
@click.option("--wait", "wait_s", type=click.FloatRange(0, 3600), default=0.0, metavar="S",
              help="Wait so long for requests that use it.")  # fmt: skip
@click.option("--forget", is_flag=True, help="Serve it no more, if it was loaded by its path.")
@options
def command(model: str, wait_s: float, forget: bool, url: str | None, key_from: str | None, as_json: bool) -> None:
    """Have a running server unload MODEL, which it loads again at the next request for it unless it is to --forget."""
    body: dict[str, object] = {"model": model, "wait_s": wait_s, "forget": forget}
    answer = Running(url, key_from).ask("POST", "/admin/models/unload", body, within_s=wait_s)
    show(answer, f"{answer['model']} is unloaded{' and served no more' if forget else ''}", as_json=as_json)
