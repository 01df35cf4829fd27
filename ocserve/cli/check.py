"""`ocserve check [URL]`: audit a server against the providers' checklists, by asking it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ocserve.cli import Failure, running, tables

if TYPE_CHECKING:
    from ocserve.audit.session import Order, Report
    from ocserve.audit.subject import Subject
    from ocserve.audit.verdict import Status, Verdict
    from ocserve.config import Config

_FILE = click.Path(path_type=Path, dir_okay=False)
_STATUSES: tuple[Status, ...] = ("pass", "fail", "not_provable", "operator")


def _tokens(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    texts = value.split(",") if value else []
    if not all(text.isascii() and text.isdigit() for text in texts):
        raise click.BadParameter("expected token ids separated by commas")
    return tuple(map(int, texts))


def _pages(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    from ocserve.audit.probes.documents import PAGES

    pages = dict(value.partition("=")[::2] for value in values)
    if wrong := [kind for kind, address in pages.items() if kind not in PAGES or not address]:
        raise click.BadParameter(f"`{wrong[0]}`: expected KIND=URL, where KIND is one of {', '.join(PAGES)}")
    return pages


def _probes(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    from ocserve.audit.probes import PROBES
    from ocserve.audit.session import near_probes

    for name in values:
        if name not in PROBES:
            near = ", ".join(f"`{each}`" for each in near_probes(name))
            meant = f" did you mean {near}?" if near else ""
            raise click.BadParameter(f"there is no probe `{name}`;{meant} `ocserve check --list` shows all")
    return values


def _list(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Every probe's id and what it does; nothing is asked."""
    from ocserve.audit.probes import PROBES

    if value:
        width = max(map(len, PROBES))
        for probe in PROBES.values():
            click.echo(f"{probe.id:{width}}  {probe.about}")
        ctx.exit()


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line."""

    url: str | None
    model: str | None
    key_from: str | None
    suppress: tuple[int, ...]
    quick: bool
    pages: Mapping[str, str]
    probes: tuple[str, ...]
    as_json: bool
    markdown: Path | None


@click.command("check")
@click.argument("url", required=False)
@click.option("--model", metavar="ID", help="Model to audit (default: the first that generates text).")
@click.option(
    "--key-from",
    metavar="NAME",
    help="Environment variable with the key. Without it only ocserve at the address of the settings gets one: theirs.",
)
@click.option("--suppress", metavar="N,N,…", callback=_tokens, help="Token ids that end answers, for the long stream.")
@click.option("--quick", is_flag=True, help="Leave out what takes minutes; it is then not provable.")
@click.option("--page", "pages", multiple=True, metavar="KIND=URL", callback=_pages, help="A page that you publish.")
@click.option(
    "--probe", "probes", multiple=True, metavar="ID", callback=_probes, help="Run only this probe; repeat it."
)
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=_list, help="List the probes' ids.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--markdown", type=_FILE, help="Write the filled checklists.")
def command(**options: Any) -> None:
    """Audit the server at URL, with its /v1 or without (default: ocserve at the address of the settings).

    Every item of the checklists is proven by requests, found not provable, or left to the operator with a draft. The
    exit status is 1 if anything fails. Published pages are looked for where ocserve has them, or at --page KIND=URL,
    where KIND is privacy, retention, pricing, status, terms, security, support, policy or limits. The audit sends some
    hundreds of requests and, last, more at once than a server should take.
    """
    _check(Options(**options))


def _check(options: Options) -> None:
    import msgspec

    from ocserve.audit import page, session
    from ocserve.audit.drafts import draft

    order, settings = _order(options)

    def drafts(subject: Subject, verdicts: Mapping[str, Verdict]) -> Mapping[str, str]:
        return draft(subject, verdicts, settings)

    with _progress(order, options) as on_probe:
        try:
            report = asyncio.run(session.audit(order, drafts, on_probe))
        except session.KeyNeeded as error:
            hint = "put a key into an environment variable and name that one with --key-from NAME"
            raise Failure(str(error), hint) from None
        except session.Unusable as error:
            raise Failure(str(error)) from None
    if options.markdown is not None:
        options.markdown.write_text(page.markdown(report), encoding="utf-8")
    if options.as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report)))
    else:
        _show_sums(report, options.probes)
    if not report.passed:
        raise click.exceptions.Exit(1)


@contextmanager
def _progress(order: Order, options: Options) -> Iterator[Callable[[Verdict], None]]:
    """The table grows by a row with each probe; where stdout is to hold JSON, a bar on stderr does."""
    from ocserve.audit.probes import PROBES

    names = order.only or tuple(PROBES)
    if options.as_json:
        with tables.progress(len(names), "Auditing") as step:
            yield lambda verdict: step()
        return
    width = max(map(len, names))

    def row(verdict: Verdict) -> None:
        click.echo(f"{verdict.probe:{width}}  {verdict.status:12}  {verdict.took_s:6.1f} s  {verdict.evidence}")

    click.echo(f"{'probe':{width}}  {'status':12}  {'took':>8}  evidence")
    yield row


def _order(options: Options) -> tuple[Order, Config | None]:
    """What to audit, and the settings of the server if it is ours. Nobody else gets our key."""
    from ocserve import config
    from ocserve.audit.session import Order

    settings = config.load().config
    own = running.address(settings.server)
    url = (options.url or own).rstrip("/")
    url = f"{own}/v1" if url == own else url
    own = f"{own}/v1"
    key = config.key_variable(options.key_from) if options.key_from else None
    if key is None and url == own:
        key = config.resolve_key(settings.auth)
    order = Order(
        url=url,
        key=key,
        model=options.model,
        suppress=options.suppress,
        quick=options.quick,
        pages=dict(options.pages),
        only=options.probes,
    )
    return order, settings if url == own else None


def _show_sums(report: Report, chosen: Collection[str]) -> None:
    """The items that count against the server, and how many items, or of chosen probes how many, have each status.

    Items rest on several probes: where only some were asked, their sums say little.
    """
    click.echo()
    for item in report.items:
        if item.status == "fail":
            click.echo(f"fail: {item.id}")
    if chosen:
        what = "probe"
        statuses = [verdict.status for verdict in report.probes if verdict.probe in chosen]
    else:
        what = "item"
        statuses = [item.status for item in report.items]
    sums = ", ".join(f"{statuses.count(each)} {each}" for each in _STATUSES)
    click.echo(f"{report.model} at {report.url}: {tables.counted(len(statuses), what)}, {sums}")
