"""How one model is loaded and answered for: from files, card and settings to a plan, a spec and a listing."""

from __future__ import annotations

import os
from collections.abc import Sequence

from msgspec.structs import replace

from ocserve import config
from ocserve.catalog import cards, planning
from ocserve.catalog.fit import Fit
from ocserve.catalog.need import Plan
from ocserve.catalog.projectors import ProjectorFile
from ocserve.catalog.store import Installed
from ocserve.engine.wire import EngineFacts, EngineSpec
from ocserve.machine import Device, HostMemory
from ocserve.modelcard import Capability, ServedModel


def projector_bytes(file: ProjectorFile | None) -> int:
    """Memory that a projector takes: its weights, and as much again for what it computes with."""
    return 2 * file.size_bytes if file is not None else 0


def fit_alone(
    tree: config.Config,
    model: Installed,
    gpus: Sequence[Device],
    memory: HostMemory | None = None,
    file: ProjectorFile | None = None,
) -> Fit:
    """How a model is loaded so that it fits this machine alone; `memory` None: what there is now.

    Raises `DoesNotFit` and `ConfigError`.
    """
    if memory is not None:
        memory = replace(memory, available_bytes=max(0, memory.available_bytes - projector_bytes(file)))
    return planning.plan(model, tree.engine, tree.cache, gpus=gpus, memory=memory)


def engine_spec(
    engine: config.Engine, cache: config.Cache, installed: Installed, plan: Plan | None = None
) -> EngineSpec:
    """What the engine process is told: the settings and the plan; without one, what settings and card ask for."""
    plan = plan or planning.wanted(engine, cache, installed.card.defaults, installed.header).plan
    return EngineSpec(
        path=installed.path,
        context=plan.context,
        parallel=plan.parallel,
        pool_tokens=plan.pool_tokens,
        gpu_layers=plan.gpu_layers,
        require_gpu=engine.require_gpu,
        threads_decode=engine.threads_decode,
        threads_prefill=engine.threads_prefill,
        batch_tokens=plan.batch_tokens,
        sequences=plan.sequences,
        outputs=plan.outputs,
        chat_template=installed.card.chat_template,
        model_digest=_content_digest(installed),
        kv_type=engine.kv_type,
        flash_attention=plan.flash_attention,
        prefill_order=engine.prefill_order,
        prefix_cache=engine.prefix_cache,
        fast_forward=engine.fast_forward,
        speculation=engine.speculation,
        draft_path=engine.draft_model,
        host_cache_bytes=plan.host_cache_bytes,
        disk_cache_bytes=cache.disk_bytes if engine.prefix_cache else 0,
        cache_directory=str(config.cache_directory(cache)),
    )


def _content_digest(installed: Installed) -> str:
    """Names the content of a model's files: their digests, or of a user's own file its identity and last change."""
    if installed.source != "file":
        return ",".join(file.sha256 or "" for file in installed.files)
    states = [os.stat(os.path.join(installed.directory, file.name)) for file in installed.files]
    return ",".join(f"{each.st_dev}:{each.st_ino}:{each.st_size}:{each.st_mtime_ns}" for each in states)


def refuse_context(engine: config.Engine, installed: Installed, trained: int) -> None:
    """A context that was asked for and that the model was not trained for is refused; `trained` 0 is unknown."""
    asked = engine.context
    if asked is not None and 0 < trained < asked:
        raise config.ConfigError(
            f"engine.context is {asked}, but {installed.name} was trained for {trained} tokens.",
            hint=f"Set it to at most {trained}.",
        )


def served_model(
    tree: config.Config,
    installed: Installed,
    plan: Plan,
    is_default: bool,
    has_projector: bool,
    facts: EngineFacts | None,
) -> ServedModel:
    """The model as answered for: by what its engine said when it was last loaded, before that by its file and plan."""
    defaults = installed.card.defaults
    if facts is not None:
        context, parallel, has_chat = facts.context, facts.parallel, facts.has_chat_template
    else:
        context, parallel = min(plan.context, installed.header.context_length or plan.context), plan.parallel
        has_chat = installed.header.has_chat_template or installed.card.chat_template is not None
    capabilities, modalities = cards.abilities(installed.header, has_chat_template=has_chat)
    reads_images = "chat" in capabilities and (facts.images if facts is not None else has_projector)
    if "chat" in capabilities:
        capabilities = (*capabilities, *_of_chat(installed, facts), *(("vision",) if reads_images else ()))
    generates = "completion" in capabilities
    if generates and (facts.fim if facts is not None else installed.header.has_fim_tokens):
        capabilities = (*capabilities, "fim")
    most = min(defaults.max_output_tokens or context, context) if generates else 0
    reference = () if installed.source == "file" else (installed.reference,)  # a path is nobody's business
    ours = ("default", *tree.model.aliases) if is_default else ()
    names = (*ours, *reference, *installed.card.aliases)
    return ServedModel(
        id=installed.name,
        aliases=tuple(dict.fromkeys(name for name in names if name != installed.name)),
        card=installed.card,
        quantisation=installed.quantisation,
        created=int(installed.installed_at.timestamp()),
        context_length=context,
        max_output_tokens=most,
        default_output_tokens=min(defaults.default_output_tokens, most),
        wall_clock_s=defaults.wall_clock_s,
        parallel=parallel,
        sampling=defaults.sampling,
        architecture=installed.architecture,
        size_bytes=installed.size_bytes,
        digest=installed.sha256,
        capabilities=capabilities,
        input_modalities=("text", "image") if reads_images else ("text",),
        countries=tree.operator.locations,
        image_urls=tree.images.fetch != "off" or bool(tree.images.fetch_hosts),
        output_modalities=modalities,
        dimensions=(facts.dimensions if facts else installed.header.embedding_length) * ("embedding" in capabilities),
    )


def _of_chat(installed: Installed, facts: EngineFacts | None) -> tuple[Capability, ...]:
    """Whatever chats can be given tools; whether it thinks its template tells, once an engine has read that."""
    thinks = facts.reasoning if facts is not None else "reasoning" in installed.card.capabilities
    return ("tools", "reasoning") if thinks else ("tools",)
