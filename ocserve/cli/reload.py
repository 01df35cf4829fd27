"""`ocserve reload`: have a running server read its settings anew."""

from __future__ import annotations

from typing import Any

import click

from ocserve.cli.running import Running, options, show


@click.command("reload")
@options
def command(url: str | None, key_from: str | None, as_json: bool) -> None:
    """Have a running server read its settings and price list anew: the whole is applied, or nothing and why."""
    answer = Running(url, key_from).ask("POST", "/admin/reload")
    lines = [f"{name}: {_text(each['before'])} -> {_text(each['after'])}" for name, each in answer["changed"].items()]
    for model, each in answer["prices"].items():
        lines.append(f"prices of {model}: {_prices(each['before'])} -> {_prices(each['after'])}")
    if more := answer["more_prices"]:
        lines.append(f"prices of {more:,} more models")
    for notice in answer["notices"]:
        click.echo(f"warning: {notice}", err=True)
    show(answer, "\n".join(lines) or "neither a setting nor a price has changed", as_json=as_json)


def _prices(rows: list[dict[str, Any]]) -> str:
    return "; ".join(map(_listed, rows)) or "-"


def _listed(row: dict[str, Any]) -> str:
    conditions = [f"from {row['from']}"] if row["from"] else []
    conditions += [f"above {row['above']:,} tokens of a month"] if row["above"] else []
    prices = ", ".join(f"{kind} {price}" for kind, price in row["prices"].items())
    return f"{', '.join(conditions)}: {prices}" if conditions else prices


def _text(value: object) -> str:
    return "-" if value is None else str(value)
