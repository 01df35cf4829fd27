"""`ocserve show MODEL`: everything that is known of a model, installed or not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import msgspec

from ocserve.catalog.need import KvType, Need

if TYPE_CHECKING:
    from ocserve import config
    from ocserve.catalog.store import Installed
    from ocserve.modelcard import ModelCard


@click.command("show")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: str, as_json: bool) -> None:
    """Show what is known of MODEL: card, variants, defaults, licence, and the installed file."""
    from ocserve import config
    from ocserve.cli.model_output import print_json, view

    settings = config.load().config
    card, installed = _look_up(model, settings.store)
    if as_json:
        facts = {"card": card, "installed": view(installed) if installed else None}
        print_json({**facts, "memory": _memory(installed, settings) if installed else None})
        return
    _print_card(card)
    _print_defaults(card)
    if installed:
        _print_installed(installed)
        _print_memory(_memory(installed, settings))
    else:
        click.echo(f"\nnot installed: `ocserve pull {card.name}`")


def _look_up(model: str, settings: config.Store) -> tuple[ModelCard, Installed | None]:
    from ocserve.catalog import cards, pull, references
    from ocserve.catalog.errors import NotInstalled
    from ocserve.catalog.store import Store

    installed = Store(settings).find(model)
    if installed is not None:
        return installed.card, installed
    parsed = references.parse(model)
    if isinstance(parsed, references.FileReference):
        installed = pull.describe_file(parsed.path)
        return installed.card, installed
    if isinstance(parsed, references.CatalogueReference):
        return cards.find(parsed)[0], None
    raise NotInstalled(f"{model} is not installed, so nothing is known of it", hint=f"`ocserve pull {model}`")


def _print_card(card: ModelCard) -> None:
    from ocserve.catalog import cards
    from ocserve.cli.model_output import size_text

    click.echo(f"{card.title} ({card.name})")
    if card.summary:
        click.echo(card.summary)
    click.echo()
    _row("publisher", card.publisher)
    _row("released", card.released)
    _row("licence", f"{card.license} {card.license_url or ''}".strip())
    _row("parameters", f"{card.parameters:,}")
    _row("context", f"{card.context_length:,} tokens")
    _row("serves", ", ".join(cards.served(card)))
    _row("not served yet", ", ".join(cards.unserved(card)))
    _row("languages", ", ".join(card.languages))
    _row("also called", ", ".join(card.aliases))
    click.echo("\nvariants")
    for index, variant in enumerate(card.variants):
        name = card.name if index == 0 else f"{card.name}:{variant.quantisation}"
        places = [f"hf:{variant.hub.repo}/{variant.hub.file}"] if variant.hub else []
        places += [f"pypi:{variant.index.distribution}=={variant.index.version}"] if variant.index else []
        mark = "  verified" if variant.verified else ""
        click.echo(f"  {variant.quantisation:<8} {size_text(variant.size_bytes):>9}  {name}{mark}")
        for place in places:
            click.echo(f"           {place}")


def _print_defaults(card: ModelCard) -> None:

    defaults, sampling = card.defaults, card.defaults.sampling
    click.echo("\ndefaults")
    _row("context", f"{defaults.context:,} tokens")
    _row("parallel", f"{defaults.parallel} sequences sharing {defaults.pool:,} cells")
    _row("max output", f"{defaults.max_output_tokens or defaults.context:,} tokens")
    _row("output", f"{defaults.default_output_tokens:,} tokens where a request names none")
    _row("wall clock", f"{defaults.wall_clock_s:g} s")
    named = {name: getattr(sampling, name) for name in sampling.__struct_fields__}
    _row("sampling", ", ".join(f"{name} {value:g}" for name, value in named.items() if value is not None) or "neutral")


def _print_installed(model: Installed) -> None:
    from ocserve.cli.model_output import SOURCES, size_text

    click.echo("\ninstalled")
    _row("file", model.path)
    _row("size", f"{size_text(model.size_bytes)} in {len(model.files)} file(s)")
    _row("sha256", model.sha256 or "not computed for a file of yours")
    _row("source", f"{SOURCES[model.source]}, {model.source_detail}")
    _row("since", model.installed_at.isoformat(timespec="seconds"))
    _row("architecture", model.architecture)
    _row("chat template", "in the file" if model.has_chat_template else "none in the file")


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What a model takes on this machine's processor with the present settings. Bytes; the cache in `kv_type`.

    `remarks` say what was lowered so that it fits; or why it does not fit, and then it is what was asked for.
    `kv_bytes_per_token` is what each further token of context takes, `other_kv_types` the same for the other types.
    """

    need: Need
    context: int
    parallel: int
    pool_tokens: int
    kv_type: KvType
    kv_bytes_per_token: int
    other_kv_types: dict[KvType, int]
    remarks: tuple[str, ...] = ()


def _memory(model: Installed, settings: config.Config) -> Memory:
    from ocserve.catalog import planning
    from ocserve.catalog.errors import DoesNotFit
    from ocserve.catalog.need import KV_TYPES, kv_bytes_per_token, need

    remarks: tuple[str, ...]
    try:
        fitted = planning.plan(model, settings.engine, settings.cache)
    except DoesNotFit as error:
        plan = planning.wanted(settings.engine, settings.cache, model.card.defaults, model.header).plan
        needed, remarks = need(model.header, plan), (error.message,)
    else:
        plan, needed, remarks = fitted.plan, fitted.need, tuple(note.text for note in fitted.notes)
    others = {each: kv_bytes_per_token(model.header, each) for each in KV_TYPES if each != plan.kv_type}
    return Memory(
        need=needed,
        context=plan.context,
        parallel=plan.parallel,
        pool_tokens=plan.pool_tokens,
        kv_type=plan.kv_type,
        kv_bytes_per_token=kv_bytes_per_token(model.header, plan.kv_type),
        other_kv_types=others,
        remarks=remarks,
    )


def _print_memory(memory: Memory) -> None:
    from ocserve.cli.model_output import size_text

    needed = memory.need
    click.echo("\nmemory, estimated upward, with the present settings")
    _row("in all", size_text(needed.total_bytes))
    _row("weights", size_text(needed.weights_bytes))
    where = f"for {memory.pool_tokens:,} tokens and {memory.parallel} sequences, context {memory.context:,}"
    _row("KV", f"{size_text(needed.kv_bytes)} {where}, in {memory.kv_type}")
    others = ", ".join(f"{size_text(each)} in {name}" for name, each in memory.other_kv_types.items())
    _row("KV per token", f"{size_text(memory.kv_bytes_per_token)} ({others})")
    _row("compute", size_text(needed.compute_bytes))
    _row("processes", size_text(needed.overhead_bytes))
    _row("prefixes", f"up to {size_text(needed.host_cache_bytes)}" if needed.host_cache_bytes else None)
    for remark in memory.remarks:
        _row("note", remark)


def _row(label: str, value: str | None) -> None:
    if value:
        click.echo(f"  {label:<14} {value}")
