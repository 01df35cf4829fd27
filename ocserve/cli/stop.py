"""`ocserve stop`: end a running server as SIGTERM does."""

from __future__ import annotations

import click

from ocserve.cli.running import Running, options, show
from ocserve.cli.tables import counted


@click.command("stop")
@click.option("--deadline", "deadline_s", type=click.FloatRange(0, 86_400), metavar="S",
              help="How long requests may go on (default: server.drain_s).")  # fmt: skip
@options
def command(deadline_s: float | None, url: str | None, key_from: str | None, as_json: bool) -> None:
    """Have a running server take nothing more, finish what it accepted, and end."""
    body: dict[str, object] = {} if deadline_s is None else {"deadline_s": deadline_s}
    answer = Running(url, key_from).ask("POST", "/admin/stop", body)
    verb = "is" if answer["active"] == 1 else "are"
    show(answer, f"the server ends; {counted(answer['active'], 'request')} {verb} to finish", as_json=as_json)
