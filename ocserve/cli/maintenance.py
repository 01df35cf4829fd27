"""`ocserve maintenance START END`: announce that a running server will take nothing on from START to END."""

from __future__ import annotations

import datetime

import click

from ocserve.cli.running import Running, options, show


def _moment(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A moment as RFC 3339 has it; one without an offset is UTC."""
    if value is None:
        return None
    try:
        found = datetime.datetime.fromisoformat(value)
    except ValueError:
        raise click.BadParameter("expected a moment such as 2026-12-01T02:00Z", ctx, param) from None
    return (found if found.tzinfo else found.replace(tzinfo=datetime.UTC)).isoformat()


@click.command("maintenance")
@click.argument("starts", metavar="START", required=False, callback=_moment)
@click.argument("ends", metavar="END", required=False, callback=_moment)
@click.argument("message", default="")
@click.option("--cancel", is_flag=True, help="Take the announcement back.")
@options
def command(
    starts: str | None,
    ends: str | None,
    message: str,
    cancel: bool,
    url: str | None,
    key_from: str | None,
    as_json: bool,
) -> None:
    """Announce that a running server takes nothing on from START to END, with a MESSAGE if you like; else show what is.

    Both are moments such as 2026-12-01T02:00Z. What runs at START finishes, and at END service goes on by itself.
    """
    server = Running(url, key_from)
    if cancel:
        if starts is not None:
            raise click.UsageError("--cancel takes back whatever is announced; leave START and END out")
        show(server.ask("DELETE", "/admin/maintenance"), "no maintenance is announced", as_json=as_json)
        return
    if starts is None:
        found = server.ask("GET", "/admin/state")["maintenance"]
        show({"maintenance": found}, _told(found), as_json=as_json)
        return
    if ends is None:
        raise click.UsageError("name END too: when service goes on")
    body: dict[str, object] = {"starts": starts, "ends": ends, "message": message}
    answer = server.ask("PUT", "/admin/maintenance", body)
    show(answer, f"maintenance is announced from {answer['starts']} to {answer['ends']}", as_json=as_json)


def _told(announced: dict[str, str] | None) -> str:
    if announced is None:
        return "no maintenance is announced"
    message = f": {announced['message']}" if announced["message"] else ""
    return f"maintenance is announced from {announced['starts']} to {announced['ends']}{message}"
