"""`ocserve bench SCENARIO`: measure a server over HTTP, or two alternately, or the machine's own limit."""

from __future__ import annotations

import asyncio
import re
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ocserve.cli import tables

if TYPE_CHECKING:
    from ocserve.bench.ceiling import Ceiling, Share
    from ocserve.bench.session import Contender, Report, Work

_OWN = "http://127.0.0.1:11711/v1"


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Whole numbers from 0 on, separated by commas."""
    texts = value.split(",") if value else []
    if not all(text.isascii() and text.isdigit() for text in texts):
        raise click.BadParameter("expected whole numbers separated by commas")
    return tuple(map(int, texts))


def _counts(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    """The same, from 1 on and each once."""
    numbers = _numbers(ctx, param, value)
    if 0 in numbers or len(set(numbers)) < len(numbers):
        raise click.BadParameter("expected different numbers above 0")
    return numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line."""

    scenario: str | None
    url: str | None
    against: str | None
    serve: str | None
    serve_against: str | None
    model: str | None
    key_from: str | None
    against_key_from: str | None
    restart_command: str | None
    rounds: int
    concurrency: tuple[int, ...]
    rate: float | None
    requests: int | None
    trace: Path | None
    seed: str | None
    slo_ttft_ms: float | None
    slo_itl_ms: float | None
    suppress: tuple[int, ...]
    ceiling: Path | None
    threads: tuple[int, ...]
    streams: tuple[int, ...]
    tokens: int
    json_file: Path | None
    report: Path | None
    svg: Path | None


_FILE = click.Path(path_type=Path, dir_okay=False)
_PRESENT = click.Path(path_type=Path, dir_okay=False, exists=True)


@click.command("bench")
@click.argument("scenario", required=False)
@click.option("--url", metavar="URL", help=f"Server to measure, up to /v1 (default {_OWN}).")
@click.option("--serve", metavar="ARGS", help="Start `ocserve run ARGS` and measure it; NAME=VALUE may come first.")
@click.option("--against", metavar="URL", help="A second server, measured alternately.")
@click.option("--serve-against", metavar="ARGS", help="The second server is started, like --serve.")
@click.option("--model", metavar="ID", help="Model to ask for (default: the first that is listed).")
@click.option("--key-from", metavar="NAME", help="Environment variable with the key (default: auth.api_key).")
@click.option("--against-key-from", metavar="NAME", help="The same for the second server.")
@click.option("--restart-command", metavar="CMD", help="Shell command that restarts the server of --url.")
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True, help="Passes over each server.")
@click.option("--concurrency", metavar="N,N,…", callback=_counts, help="Closed loop; several levels make a curve.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Open loop: arrivals per second (Poisson).")
@click.option("--requests", type=click.IntRange(1), help="Conversations of a pass.")
@click.option("--trace", type=_PRESENT, help="Replay JSON lines: offset_s, prompt_tokens, output_tokens.")
@click.option("--seed", help="Makes texts and arrivals the same again; caches may then help.")
@click.option("--slo-ttft-ms", type=click.FloatRange(0, min_open=True), help="Goodput: time to first token.")
@click.option("--slo-itl-ms", type=click.FloatRange(0, min_open=True), help="Goodput: p95 inter-token latency.")
@click.option(
    "--suppress", metavar="N,N,…", callback=_numbers, help="Token ids kept from being chosen (ends of answers)."
)
@click.option("--ceiling", type=_PRESENT, metavar="GGUF", help="Measure the bare llama.cpp loop of a model file.")
@click.option(
    "--threads", metavar="N,N,…", default="1", show_default=True, callback=_counts, help="Threads of --ceiling."
)
@click.option(
    "--streams", metavar="N,N,…", default="1,2,4,8", show_default=True, callback=_counts, help="Batches of --ceiling."
)
@click.option("--tokens", type=click.IntRange(16), default=128, show_default=True, help="Answer length of --ceiling.")
@click.option("--json", "json_file", type=_FILE, help="Write all results to a file.")
@click.option("--report", type=_FILE, help="Write an HTML page.")
@click.option("--svg", type=_FILE, help="Write the figure.")
def command(**options: Any) -> None:
    """Measure a server with SCENARIO (default: chat); `ocserve bench list` shows them.

    With a second server the two are measured alternately and compared by paired ratios. With --ceiling alone the bare
    llama.cpp loop is measured; `ocserve bench throughput --ceiling GGUF` alternates it with an own server of the same
    threads and batch sizes, to which --serve may add arguments.
    """
    from ocserve.bench.arrivals import TraceError
    from ocserve.bench.ceiling import CeilingFailed
    from ocserve.bench.load import TargetUnusable
    from ocserve.bench.scenario import ScenarioError
    from ocserve.bench.servers import ServerFailed
    from ocserve.cli import Failure

    chosen = Options(**options)
    try:
        if chosen.scenario == "list":
            _list()
        elif chosen.ceiling is not None:
            _ceiling(chosen, chosen.ceiling)
        else:
            _measure(chosen)
    except (CeilingFailed, ScenarioError, ServerFailed, TargetUnusable, TraceError) as error:
        raise Failure(str(error)) from None


def _list() -> None:
    from ocserve.bench import scenario

    for name in scenario.names():
        click.echo(f"{name:16} {scenario.load(name).about}")


def _measure(options: Options) -> None:
    from ocserve.bench import session
    from ocserve.bench.measures import Objective

    work = _work(options)
    objective = Objective(ttft_s=_from_ms(options.slo_ttft_ms), itl_s=_from_ms(options.slo_itl_ms))
    with ExitStack() as stack:
        contenders = _contenders(options, work, stack)
        length = work.requests * options.rounds * len(contenders)
        with tables.progress(length, f"Measuring {work.scenario.name}") as step:
            report = session.run(
                work,
                contenders,
                rounds=options.rounds,
                seed=options.seed,
                objective=objective,
                on_sample=lambda sample: step(),
            )
    _show(report)
    _write(options, report)
    if not any(cell.ttft_s for cell in report.cells):  # nothing was measured
        raise click.exceptions.Exit(1)


def _work(options: Options) -> Work:
    from ocserve.bench import arrivals, scenario, session

    if options.trace is not None:
        if options.scenario or options.concurrency or options.rate or options.requests:
            raise click.UsageError("--trace is a load of its own")
        return session.traced(arrivals.read_trace(options.trace.read_text(encoding="utf-8")))
    chosen = scenario.load(options.scenario or "chat")
    return session.Work(
        scenario.with_load(chosen, concurrency=options.concurrency, rate=options.rate, requests=options.requests)
    )


def _contenders(options: Options, work: Work, stack: ExitStack) -> list[Contender]:
    if (options.url and options.serve) or (options.against and options.serve_against):
        raise click.UsageError("a server is either named by its address or started, not both")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ocserve-bench-")))
    first = _contender(options, work, stack, folder / "A", "A", options.url or _OWN, options.serve, options.key_from)
    if not options.against and not options.serve_against:
        return [first]
    url, words = options.against or "", options.serve_against
    return [first, _contender(options, work, stack, folder / "B", "B", url, words, options.against_key_from)]


def _contender(
    options: Options,
    work: Work,
    stack: ExitStack,
    folder: Path,
    label: str,
    url: str,
    words: str | None,
    key_from: str | None,
) -> Contender:
    from ocserve import config, peer
    from ocserve.bench import load, servers
    from ocserve.bench.client import Target
    from ocserve.bench.session import Contender

    key = config.key_variable(key_from) if key_from else None
    url = url.rstrip("/")
    if key is None and (words is not None or url == _OWN):  # our own servers have our key, and nobody else gets it
        key = config.resolve_key(config.load().config.auth)

    def restart() -> None:
        servers.restart_by_command(options.restart_command or "", url)

    if words is not None:
        server = servers.OwnServer(words, folder)
        stack.callback(server.stop)
        server.start()
        url, restart = server.url, server.restart
    elif work.scenario.restarts and (options.restart_command is None or label != "A"):
        raise click.UsageError(f"{work.scenario.name} restarts the server: use --serve, or say how (--restart-command)")
    model = options.model or asyncio.run(load.first_model(url, key))
    what = peer.without_userinfo(url) if words is None else f"ocserve run {_without_secrets(words)}"
    return Contender(Target(label, url, model, key, options.suppress), what, restart)


def _without_secrets(words: str) -> str:
    """A server's command line as it may stand in a report: keys and tokens without their values."""
    return re.sub(r"\b(\w*(?:KEY|TOKEN)\w*)=\S+", r"\1=…", words)


def _ceiling(options: Options, model: Path) -> None:
    from ocserve import config
    from ocserve.bench import ceiling

    if options.url or options.against or options.serve_against:
        raise click.UsageError("--ceiling is compared with a server that is started for it")
    if options.scenario is None:
        figures = len(options.threads) * (len(ceiling.CHUNKS) + len(options.streams))
        with tables.progress(figures, "Measuring the bare loop") as step:
            found = ceiling.bare(
                model, threads=options.threads, batches=options.streams, tokens=options.tokens, on_rate=step
            )
        _show_bare(found)
        _write_json(options, found)
        return
    if options.scenario != "throughput":
        raise click.UsageError("--ceiling goes with the scenario `throughput`, or with none")
    with (
        tempfile.TemporaryDirectory(prefix="ocserve-bench-") as folder,
        tables.progress(
            (options.rounds + 1) * len(options.threads) * len(options.streams), "Measuring throughput"
        ) as step,
    ):
        shares = ceiling.against_http(
            model,
            Path(folder),
            threads=options.threads,
            streams=options.streams,
            rounds=options.rounds,
            tokens=options.tokens,
            arguments=options.serve or "",
            key=config.resolve_key(config.load().config.auth),
            on_pair=step,
        )
    _show_shares(shares)
    _write_json(options, shares)


def _show(report: Report) -> None:
    from ocserve.bench import page
    from ocserve.bench.measures import COMPARED

    for target in report.targets:
        click.echo(f"{target.label}: {target.what}, model {target.model}")
    click.echo()
    tables.table(page.HEADINGS, [page.row(cell, with_target=len(report.targets) > 1) for cell in report.cells])
    for line in page.errors(report):
        click.echo(f"error: {line}")
    if report.ratios:
        click.echo()
        rows = [(each.name, COMPARED[each.measure], page.ratio_text(each)) for each in report.ratios]
        tables.table(("A / B", "measure", "ratio"), rows, left=3)
    for each in report.relations:
        click.echo(f"{each.name}: {page.ratio_text(each)}")
    if report.same_answers is not None:
        click.echo("{} of {} answers are the same".format(*report.same_answers))


def _show_bare(found: Ceiling) -> None:
    rows = [
        (str(each.threads), kind, str(size), f"{rate:.1f}")
        for each in found.rates
        for kind, rates in (("prefill", each.prefill), ("decode", each.decode))
        for size, rate in rates.items()
    ]
    tables.table(("threads", "work", "batch", "tok/s"), rows)


def _show_shares(shares: list[Share]) -> None:
    from statistics import median

    from ocserve.bench.page import ratio_text

    rows = [
        (
            str(each.threads),
            str(each.streams),
            f"{median(each.http):.1f}",
            f"{median(each.bare):.1f}",
            ratio_text(each.ratio),
            f"{each.of_best:.2f}",
        )
        for each in shares
    ]
    tables.table(("threads", "streams", "HTTP tok/s", "bare tok/s", "HTTP / bare", "of best threads"), rows)


def _write(options: Options, report: Report) -> None:
    from ocserve.bench import page

    _write_json(options, report)
    if options.report is not None:
        options.report.write_text(page.html(report), encoding="utf-8")
    if options.svg is not None:
        options.svg.write_text(page.svg(report), encoding="utf-8")


def _write_json(options: Options, results: object) -> None:
    import msgspec

    if options.json_file is not None:
        options.json_file.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")


def _from_ms(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
