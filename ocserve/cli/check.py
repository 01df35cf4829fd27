"""`ocserve check [URL]`: audit a server against the providers' checklists, by asking it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ocserve.cli import Failure, tables

if TYPE_CHECKING:
    from ocserve.audit.session import Order, Report
    from ocserve.audit.subject import Subject
    from ocserve.audit.verdict import Verdict
    from ocserve.config import Config

_FILE = click.Path(path_type=Path, dir_okay=False)


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
    from ocserve.audit.session import unknown_probes

    if unknown := unknown_probes(values):
        raise click.BadParameter(f"there is no probe `{unknown[0]}`")
    return values


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
@click.option("--key-from", metavar="NAME", help="Environment variable with the key (default: auth.api_key).")
@click.option("--suppress", metavar="N,N,…", callback=_tokens, help="Token ids that end answers, for the long stream.")
@click.option("--quick", is_flag=True, help="Leave out what takes minutes; it is then not provable.")
@click.option("--page", "pages", multiple=True, metavar="KIND=URL", callback=_pages, help="A page that you publish.")
@click.option("--probe", "probes", multiple=True, metavar="ID", callback=_probes, help="Run only this probe.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--markdown", type=_FILE, help="Write the filled checklists.")
def command(**options: Any) -> None:
    """Audit the server at URL, which ends in /v1 (default: ocserve on this machine).

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
        except session.Unusable as error:
            raise Failure(str(error)) from None
    if options.markdown is not None:
        options.markdown.write_text(page.markdown(report), encoding="utf-8")
    if options.as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report)))
    else:
        _show_sums(report)
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
    host = "127.0.0.1" if settings.server.host in ("0.0.0.0", "::") else settings.server.host  # noqa: S104
    own = f"http://{f'[{host}]' if ':' in host else host}:{settings.server.port}/v1"
    url = (options.url or own).rstrip("/")
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


def _show_sums(report: Report) -> None:
    """The items that count against the server, and how many there are of each status."""
    click.echo()
    for item in report.items:
        if item.status == "fail":
            click.echo(f"fail: {item.id}")
    sums = {status: report.count(status) for status in ("pass", "fail", "not_provable", "operator")}
    click.echo(f"{report.model} at {report.url}: {len(report.items)} items, ", nl=False)
    click.echo(", ".join(f"{count} {status}" for status, count in sums.items()))
