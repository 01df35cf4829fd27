"""`ocserve reload`: have a running server read its settings anew."""

from __future__ import annotations

import click

from ocserve.cli.running import Running, options, show


@click.command("reload")
@options
def command(url: str | None, key_from: str | None, as_json: bool) -> None:
    """Have a running server read its settings and price list anew: the whole is applied, or nothing and why."""
    answer = Running(url, key_from).ask("POST", "/admin/reload")
    lines = [f"{name}: {_text(each['before'])} -> {_text(each['after'])}" for name, each in answer["changed"].items()]
    show(answer, "\n".join(lines) or "no setting has changed; prices were read anew", as_json=as_json)


def _text(value: object) -> str:
    return "-" if value is None else str(value)
