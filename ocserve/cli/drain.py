"""`ocserve drain`: have a running server take nothing more, and wait for what it accepted."""

from __future__ import annotations

import click

from ocserve.cli.running import Running, options, show

_LONGEST_S = 24 * 3600.0


@click.command("drain")
@click.option("--deadline", "deadline_s", type=click.FloatRange(0, _LONGEST_S), metavar="S",
              help="How long requests may go on (default: server.drain_s).")  # fmt: skip
@click.option("--resume", is_flag=True, help="Take requests again.")
@options
def command(deadline_s: float | None, resume: bool, url: str | None, key_from: str | None, as_json: bool) -> None:
    """Have a running server take nothing more until it is told to resume; returns when what ran has ended."""
    server = Running(url, key_from)
    if resume:
        if deadline_s is not None:
            raise click.UsageError("--deadline is for draining, not for --resume")
        answer = server.ask("POST", "/admin/resume")
        show(answer, "the server stops" if answer["draining"] else "the server takes requests", as_json=as_json)
        return
    body: dict[str, object] = {} if deadline_s is None else {"deadline_s": deadline_s}
    answer = server.ask("POST", "/admin/drain", body, within_s=_LONGEST_S)
    show(answer, "drained; `ocserve drain --resume` has the server take requests again", as_json=as_json)
