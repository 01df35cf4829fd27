"""`ocserve ps`: the models of a running server, and what they do."""

from __future__ import annotations

from typing import Any

import click

from ocserve.cli.running import Running, options, show


@click.command("ps")
@options
def command(url: str | None, key_from: str | None, as_json: bool) -> None:
    """List the models of a running server: their state, memory, and requests."""
    from ocserve.cli.model_output import print_table

    state = Running(url, key_from).ask("GET", "/admin/state")
    if as_json:
        show(state, "", as_json=True)
        return
    rows = [_row(name, model) for name, model in state["models"].items()]
    print_table(("MODEL", "STATE", "MEMORY", "CONTEXT", "IN USE", "UNTIL"), rows)
    for line in _remarks(state):
        click.echo(line)


def _row(name: str, model: dict[str, Any]) -> tuple[str, ...]:
    from ocserve.cli.model_output import size_text

    resident, needed = model["resident_bytes"], sum(model["need_bytes"])
    memory = f"needs {size_text(needed)}" if resident is None else size_text(resident)
    loaded = model["state"] == "ready"
    until = f"{model['unload_at'][11:19]} UTC" if model["unload_at"] else "room is needed" if loaded else ""
    in_use = f"{model['owed']} of {model['parallel']}" if loaded else str(model["owed"] or "")
    return name, model["state"], memory, f"{model['context']:,}", in_use, "" if model["leases"] else until


def _remarks(state: dict[str, Any]) -> list[str]:
    """What matters of the server as a whole."""
    found = []
    if state["stopping"]:
        found.append("the server is stopping")
    elif state["draining"]:
        found.append("the server takes nothing more; `ocserve drain --resume` ends that")
    if state["maintenance"] is not None:
        found.append(f"maintenance from {state['maintenance']['starts']} to {state['maintenance']['ends']}")
    if state["ledger"] == "failing":
        found.append("the ledger cannot be written, so nothing is taken on")
    return found
