"""`ocserve reload`: have a running server read its settings anew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from ocserve.cli.running import Running, options, show
from ocserve.cli.tables import readable


@click.command("reload")
@options
def command(url: str | None, key_from: str | None, as_json: bool) -> None:
    """Have a running server read its settings and price list anew: the whole is applied, or nothing and why."""
    answer = Running(url, key_from).ask("POST", "/admin/reload")
    lines = [
        f"{name}: {readable(each['before'])} -> {readable(each['after'])}" for name, each in answer["changed"].items()
    ]
    for model, each in answer["prices"].items():
        lines += [f"prices of {model}{text}" for text in _differences(each["before"], each["after"])]
    if more := answer.get("more_prices"):
        lines.append(f"prices of {more:,} more models")
    for notice in answer["notices"]:
        click.echo(f"warning: {notice}", err=True)
    show(answer, "\n".join(lines) or "neither a setting nor a price has changed", as_json=as_json)


def _differences(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Iterator[str]:
    """What is other than it was, each time and tier in a line; of a price that stays nothing is said."""
    old, new = ({_condition(row): row["prices"] for row in rows} for rows in (before, after))
    for condition in dict.fromkeys((*old, *new)):
        if condition not in new:
            yield f"{condition}: no more"
        elif condition not in old:
            yield f"{condition}: {_listed(new[condition])} (new)"
        else:
            was, now = old[condition], new[condition]
            changed = [
                f"{kind} {readable(was.get(kind))} -> {readable(now.get(kind))}"
                for kind in dict.fromkeys((*was, *now))
                if was.get(kind) != now.get(kind)
            ]
            if changed:
                yield f"{condition}: {', '.join(changed)}"


def _condition(row: dict[str, Any]) -> str:
    conditions = [f" from {row['from']}"] if row["from"] else []
    conditions += [f" above {row['above']:,} tokens of a month"] if row["above"] else []
    return ",".join(conditions)


def _listed(prices: dict[str, str]) -> str:
    return ", ".join(f"{kind} {price}" for kind, price in prices.items())
