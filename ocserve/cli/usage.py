"""`ocserve usage`: what was used, by day, model and key; as a table, for programs, or as an invoice."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ocserve.accounts.balances import Credit, Standing
    from ocserve.accounts.usage import By, Line, Span, Sum
    from ocserve.config import Operator

_BAR = 24
_EIGHTHS = " ▏▎▍▌▋▊▉"
_CREDIT_FIELDS = ("id", "amount", "note", "correction", "credited_us", "balance")
_STANDING_FIELDS = ("month", "credited", "charged", "held", "month_charged", "month_held")
_DATE = click.DateTime(["%Y-%m-%d"])


@click.command("usage")
@click.option(
    "--by",
    "by",
    type=click.Choice(["day", "model", "key", "tier"]),
    multiple=True,
    help="Sum by this; may be given several times (default day).",
)
@click.option("--since", type=_DATE, help="First day, UTC.")
@click.option("--until", type=_DATE, help="Last day, UTC.")
@click.option("--month", type=click.DateTime(["%Y-%m"]), help="All days of a month, UTC.")
@click.option("--key", metavar="KEY", help="Only the requests of this key, by its name or id.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; costs are picodollars (1e-12 US dollars).")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV; costs are US dollars.")
@click.option("--invoice", "as_invoice", is_flag=True, help="Print an invoice as Markdown.")
def command(
    by: tuple[By, ...],
    since: datetime.datetime | None,
    until: datetime.datetime | None,
    month: datetime.datetime | None,
    key: str | None,
    **forms: bool,
) -> None:
    """Show what was used and what it cost, what was credited and what is left, from the ledger."""
    from ocserve import config
    from ocserve.accounts import usage
    from ocserve.accounts.ledger_schema import LedgerError
    from ocserve.cli import Failure, key_ids

    form = _form(forms, by)
    if month is not None:
        if since is not None or until is not None:
            raise click.UsageError("--month stands for --since and --until")
        since, until = month, (month + datetime.timedelta(days=31)).replace(day=1) - datetime.timedelta(days=1)
    settings = config.load().config
    file = config.ledger_file(settings.ledger)
    headings: tuple[By, ...] = tuple(dict.fromkeys(by)) or ("day",)
    try:
        whose = key and key_ids.key_id(key, settings)
        span = usage.Span(since=since and since.date(), until=until and until.date(), key=whose)
        names, credited, standings = key_ids.names(settings), usage.credited(file, span), usage.standings(file, span)
        if form == "invoice":
            balances = _ever_credited(standings)
            click.echo(_invoice(usage.invoice(file, span), credited, balances, span, names, settings.operator))
            return
        found = usage.sums(file, headings, span)
    except LedgerError as error:
        raise Failure(str(error), "`ocserve config show` names the settings ledger.directory and ledger.use") from None
    if form == "json":
        _print_json(headings, found, credited, standings, names)
    elif form == "csv":
        _print_csv(headings, found, names)
    else:
        _print_table(headings, found, names)
        _print_balances(_ever_credited(standings), names)


def _form(forms: Mapping[str, bool], by: tuple[By, ...]) -> str | None:
    """The one form that was asked for, if any."""
    given = [name.removeprefix("as_") for name in ("as_json", "as_csv", "as_invoice") if forms[name]]
    if len(given) > 1:
        raise click.UsageError(f"--{given[0]} and --{given[1]} are two forms; name one")
    if given == ["invoice"] and by:
        raise click.UsageError("--by and --invoice: an invoice has sums of its own")
    return given[0] if given else None


def _ever_credited(standings: Mapping[str, Standing]) -> dict[str, Standing]:
    """Those that have a balance to speak of."""
    return {key: each for key, each in standings.items() if each.credited}


def _print_json(
    headings: Sequence[str],
    found: Sequence[Sum],
    credited: Sequence[Credit],
    standings: Mapping[str, Standing],
    names: Mapping[str, str],
) -> None:
    import msgspec

    from ocserve.cli.model_output import print_json

    rows = []
    for each in found:
        fields = msgspec.to_builtins(each)
        named = dict(zip(headings, fields.pop("heading"), strict=True))
        if "key" in named:
            named = {**named, "key_name": names.get(named["key"])}
        rows.append({**named, **fields})
    print_json(
        {
            "usage": rows,
            "credits": [
                {
                    "key": each.key_id,
                    "key_name": names.get(each.key_id),
                    **{name: getattr(each, name) for name in _CREDIT_FIELDS},
                }
                for each in credited
            ],
            "balances": [
                {
                    "key": key,
                    "key_name": names.get(key),
                    "balance": each.balance,
                    **{name: getattr(each, name) for name in _STANDING_FIELDS},
                }
                for key, each in standings.items()
            ],
        }
    )


def _print_csv(headings: Sequence[str], found: Sequence[Sum], names: Mapping[str, str]) -> None:
    import csv
    import sys

    from ocserve.accounts.pricing import dollars

    if not found:
        return
    counts = found[0].__struct_fields__[1:-1]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*_titles(headings), *counts, "cost_usd"])
    for each in found:
        cells = _cells(headings, each, names)
        writer.writerow([*cells, *(getattr(each, name) for name in counts), dollars(each.cost)])


def _titles(headings: Sequence[str]) -> list[str]:
    """What rows are summed by, and beside a key's id its name."""
    return [title for each in headings for title in ((each, "key_name") if each == "key" else (each,))]


def _cells(headings: Sequence[str], row: Sum, names: Mapping[str, str]) -> list[str]:
    """A row's values for the titles; a key that is not known has an empty name."""
    found = []
    for heading, value in zip(headings, row.heading, strict=True):
        found += [value, names.get(value, "")] if heading == "key" else [value]
    return found


def _print_table(headings: Sequence[str], found: Sequence[Sum], names: Mapping[str, str]) -> None:
    from ocserve.accounts.pricing import dollars
    from ocserve.cli.tables import table

    if not found:
        click.echo("nothing is recorded for these days")
        return
    most = max(each.prompt_tokens + each.completion_tokens for each in found)
    rows = [
        (
            *_cells(headings, each, names),
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
    titles = [title.upper().replace("_", " ") for title in _titles(headings)]
    total = [
        *("total" if not number else "" for number in range(len(titles))),
        "",
        f"{sum(each.requests for each in found):,}",
        f"{sum(each.cancelled + each.failed + each.lost for each in found):,}",
        f"{sum(each.prompt_tokens for each in found):,}",
        f"{sum(each.cached_tokens for each in found):,}",
        f"{sum(each.completion_tokens for each in found):,}",
        dollars(sum(each.cost for each in found)),
    ]
    header = (*titles, "TOKENS", "REQUESTS", "CUT SHORT", "INPUT", "CACHED", "OUTPUT", "US$")
    table(header, [*rows, tuple(total)], left=len(titles) + 1)


def _print_balances(standings: Mapping[str, Standing], names: Mapping[str, str]) -> None:
    """What is left of keys that were credited."""
    from ocserve.accounts.pricing import dollars
    from ocserve.cli import key_ids
    from ocserve.cli.tables import table

    if not standings:
        return
    click.echo()
    rows = [
        (
            key_ids.shown(key, names),
            *map(dollars, (each.credited, each.charged, each.held, each.balance, each.month_charged)),
        )
        for key, each in standings.items()
    ]
    month = next(iter(standings.values())).month
    table(("KEY", "CREDITED", "CHARGED", "HELD", "BALANCE", f"CHARGED IN {month}"), rows)


def _bar(value: int, most: int) -> str:
    """A bar of at most `_BAR` characters, to an eighth of one; never empty where there is anything."""
    eighths = -(-value * _BAR * 8 // most) if most else 0
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def _invoice(
    lines: Sequence[Line],
    credited: Sequence[Credit],
    standings: Mapping[str, Standing],
    span: Span,
    names: Mapping[str, str],
    operator: Operator,
) -> str:
    from ocserve.accounts.pricing import dollars
    from ocserve.cli import key_ids

    first = span.since.isoformat() if span.since else "the beginning"
    last = span.until.isoformat() if span.until else datetime.datetime.now(datetime.UTC).date().isoformat()
    rows = [
        f"| {line.model}{_tier(line.tier)} | {line.kind} | {line.quantity:,} | {dollars(line.price)} "
        f"| {dollars(line.amount)} |"
        for line in lines
    ]
    total = dollars(sum(line.amount for line in lines))
    return "\n".join(
        [
            "# Invoice",
            "",
            *([f"From: {sender}  "] if (sender := _sender(operator)) else []),
            f"Key: {key_ids.shown(span.key, names) if span.key else 'all keys'}  ",
            f"Period: {first} to {last}, days in UTC  ",
            "Amounts: US dollars, not rounded",
            "",
            "| model | item | quantity | price of one | amount |",
            "|---|---|---:|---:|---:|",
            *rows,
            f"| | **total** | | | **{total}** |",
            *_credited(credited, names),
            *_balances(standings, names),
        ]
    )


def _sender(operator: Operator) -> str:
    """Who sends the invoice, as far as the settings say."""
    return ", ".join(_cell(each) for each in (operator.name, operator.email) if each)


def _tier(above: int) -> str:
    return f", above {above:,} tokens of a month" if above else ""


def _credited(credited: Sequence[Credit], names: Mapping[str, str]) -> list[str]:
    from ocserve.accounts.pricing import dollars
    from ocserve.cli import key_ids

    if not credited:
        return []
    days = [datetime.datetime.fromtimestamp(each.credited_us // 1_000_000, datetime.UTC).date() for each in credited]
    rows = [
        f"| {day} | {key_ids.shown(each.key_id, names)} | {_cell(each.note)} | {dollars(each.amount)} |"
        for day, each in zip(days, credited, strict=True)
    ]
    total = dollars(sum(each.amount for each in credited))
    return [
        "",
        "## Credits",
        "",
        "| day | key | note | amount |",
        "|---|---|---|---:|",
        *rows,
        f"| | | **total** | **{total}** |",
    ]


def _balances(standings: Mapping[str, Standing], names: Mapping[str, str]) -> list[str]:
    from ocserve.accounts.pricing import dollars
    from ocserve.cli import key_ids

    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines = [
        f"Balance of {key_ids.shown(key, names)} on {today}: {dollars(each.balance)}  "
        for key, each in standings.items()
    ]
    return ["", *lines] if lines else []


def _cell(note: str) -> str:
    """A note as a cell of a Markdown table."""
    return " ".join(note.replace("|", "\\|").split())
