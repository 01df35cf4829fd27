"""`ocserve usage`: what was used, by day, model and key; as a table, for programs, or as an invoice."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ocserve.accounts.usage import By, Line, Span, Sum

_BAR = 24
_EIGHTHS = " ▏▎▍▌▋▊▉"
_DATE = click.DateTime(["%Y-%m-%d"])


@click.command("usage")
@click.option(
    "--by",
    "by",
    type=click.Choice(["day", "model", "key"]),
    multiple=True,
    help="Sum by this; may be given several times (default day).",
)
@click.option("--since", type=_DATE, help="First day, UTC.")
@click.option("--until", type=_DATE, help="Last day, UTC.")
@click.option("--key", metavar="ID", help="Only this key's requests.")
@click.option("--json", "form", flag_value="json", help="Print JSON; costs are picodollars (1e-12 US dollars).")
@click.option("--csv", "form", flag_value="csv", help="Print CSV; costs are US dollars.")
@click.option("--invoice", "form", flag_value="invoice", help="Print an invoice as Markdown.")
def command(
    by: tuple[By, ...],
    since: datetime.datetime | None,
    until: datetime.datetime | None,
    key: str | None,
    form: str | None,
) -> None:
    """Show what was used and what it cost, from the ledger."""
    from ocserve import config
    from ocserve.accounts import usage
    from ocserve.accounts.ledger import LedgerError
    from ocserve.cli import Failure

    span = usage.Span(since=since and since.date(), until=until and until.date(), key=key)
    file = config.ledger_file(config.load().config.ledger)
    headings: tuple[By, ...] = tuple(dict.fromkeys(by)) or ("day",)
    try:
        if form == "invoice":
            click.echo(_invoice(usage.invoice(file, span), span))
            return
        found = usage.sums(file, headings, span)
    except LedgerError as error:
        raise Failure(str(error), "`ocserve config show` names the settings ledger.directory and ledger.use") from None
    if form == "json":
        _print_json(headings, found)
    elif form == "csv":
        _print_csv(headings, found)
    else:
        _print_table(headings, found)


def _print_json(headings: Sequence[str], found: Sequence[Sum]) -> None:
    import msgspec

    from ocserve.cli.model_output import print_json

    rows = []
    for each in found:
        fields = msgspec.to_builtins(each)
        named = dict(zip(headings, fields.pop("heading"), strict=True))
        rows.append({**named, **fields})
    print_json({"usage": rows})


def _print_csv(headings: Sequence[str], found: Sequence[Sum]) -> None:
    import csv
    import sys

    from ocserve.accounts.pricing import dollars

    if not found:
        return
    names = found[0].__struct_fields__[1:]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*headings, *names[:-1], "cost_usd"])
    for each in found:
        writer.writerow([*each.heading, *(getattr(each, name) for name in names[:-1]), dollars(each.cost)])


def _print_table(headings: Sequence[str], found: Sequence[Sum]) -> None:
    from ocserve.accounts.pricing import dollars
    from ocserve.cli.tables import table

    if not found:
        click.echo("nothing is recorded for these days")
        return
    most = max(each.prompt_tokens + each.completion_tokens for each in found)
    rows = [
        (
            *each.heading,
            _bar(each.prompt_tokens + each.completion_tokens, most),
            f"{each.requests:,}",
            f"{each.cancelled + each.failed + each.lost:,}",
            f"{each.prompt_tokens:,}",
            f"{each.cached_tokens:,}",
            f"{each.completion_tokens:,}",
            dollars(each.cost),
        )
        for each in found
    ]
    total = [
        *("total" if not number else "" for number in range(len(headings))),
        "",
        f"{sum(each.requests for each in found):,}",
        f"{sum(each.cancelled + each.failed + each.lost for each in found):,}",
        f"{sum(each.prompt_tokens for each in found):,}",
        f"{sum(each.cached_tokens for each in found):,}",
        f"{sum(each.completion_tokens for each in found):,}",
        dollars(sum(each.cost for each in found)),
    ]
    names = [heading.upper() for heading in headings]
    header = (*names, "TOKENS", "REQUESTS", "CUT SHORT", "INPUT", "CACHED", "OUTPUT", "US$")
    table(header, [*rows, tuple(total)], left=len(headings) + 1)


def _bar(value: int, most: int) -> str:
    """A bar of at most `_BAR` characters, to an eighth of one; never empty where there is anything."""
    eighths = -(-value * _BAR * 8 // most) if most else 0
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def _invoice(lines: Sequence[Line], span: Span) -> str:
    from ocserve.accounts.pricing import dollars

    first = span.since.isoformat() if span.since else "the beginning"
    last = span.until.isoformat() if span.until else datetime.datetime.now(datetime.UTC).date().isoformat()
    rows = [
        f"| {line.model} | {line.kind} | {line.quantity:,} | {dollars(line.price)} | {dollars(line.amount)} |"
        for line in lines
    ]
    total = dollars(sum(line.amount for line in lines))
    return "\n".join(
        [
            "# Invoice",
            "",
            f"Key: {span.key or 'all keys'}  ",
            f"Period: {first} to {last}, days in UTC  ",
            "Amounts: US dollars, not rounded",
            "",
            "| model | item | quantity | price of one | amount |",
            "|---|---|---:|---:|---:|",
            *rows,
            f"| | **total** | | | **{total}** |",
        ]
    )
