"""From settings and a model's card to what is wanted of this machine, and to the plan that fits it."""

from __future__ import annotations

from collections.abc import Sequence

from ocserve import config
from ocserve.catalog.fit import Choice, Fit, Machine, Wanted, fit
from ocserve.catalog.gguf_header import GgufHeader
from ocserve.catalog.need import Plan
from ocserve.catalog.store import Installed
from ocserve.machine import Device, HostMemory, host_memory
from ocserve.modelcard import Defaults

# Kept prefixes hold a sequence id of llama.cpp each. It reserves a distribution for every id, and where layers slide or
# have states a window or a state of cells too.
_MOST_SEQUENCES, _DISTRIBUTION_BYTES, _KEPT_STATES = 128, 32 * 1024 * 1024, 9
# Rows of a batch for which a sequence may ask for a distribution: its newest token and as many drafted ones.
_ROWS_WITH_DRAFTS = 9
_MOST_IDS = 256  # llama.cpp's own
_MOST_INPUTS = 64  # of a batch: 256 tokens hold so many queries of four tokens


def wanted(engine: config.Engine, cache: config.Cache, defaults: Defaults, header: GgufHeader) -> Wanted:
    """The settings where they speak, the model's card elsewhere. A context of the user's own gets a pool of two."""
    context = engine.context or min(defaults.context, engine.pool_tokens or defaults.context)
    if header.pooling != "none" and header.context_length:  # a setting for the longest conversation may be more
        context = min(context, header.context_length)
    pool = engine.pool_tokens or (2 * context if engine.context else defaults.pool)
    if pool < context:
        raise config.ConfigError(
            f"engine.pool_tokens is {pool}, and engine.context {context} does not fit in it.",
            hint="Raise the pool or lower the context.",
        )
    parallel = engine.parallel or defaults.parallel
    pools = header.pooling != "none"
    sequences = _sequences(header, parallel, engine)
    batch_tokens = max(engine.batch_tokens, sequences)
    plan = Plan(
        context=context,
        parallel=parallel,
        pool_tokens=context if pools else max(pool, context),
        gpu_layers=engine.gpu_layers,
        kv_type=engine.kv_type,
        flash_attention=engine.flash_attention != "off",
        batch_tokens=batch_tokens,
        sequences=sequences,
        outputs=min(batch_tokens, max(sequences, parallel * _ROWS_WITH_DRAFTS)),
        host_cache_bytes=cache.host_bytes if engine.prefix_cache and not pools else 0,
    )
    set_by_user: dict[Choice, bool] = {
        "flash_attention": engine.flash_attention != "auto",
        "context": engine.context is not None,
        "pool_tokens": engine.pool_tokens is not None,
        "gpu_layers": engine.gpu_layers >= 0,
        "host_cache_bytes": cache.host_bytes != config.Cache().host_bytes,
    }
    return Wanted(plan, frozenset(name for name, is_set in set_by_user.items() if is_set))


def plan(
    model: Installed,
    engine: config.Engine,
    cache: config.Cache,
    *,
    gpus: Sequence[Device] = (),
    memory: HostMemory | None = None,
) -> Fit:
    """How `model` is loaded here. Raises `DoesNotFit`. `memory` is what main memory it may have; None: all there is."""
    machine = Machine(memory or host_memory(), tuple(gpus))
    return fit(model.header, wanted(engine, cache, model.card.defaults, model.header), machine)


def _sequences(header: GgufHeader, parallel: int, engine: config.Engine) -> int:
    """Sequence ids: those that run, one for copying, and those that keep prefixes; else the inputs of a batch."""
    if header.pooling != "none":
        return _MOST_INPUTS
    if any(layer.slides or layer.state for layer in header.layers):
        kept = _KEPT_STATES
    else:
        kept = min(_MOST_SEQUENCES, _DISTRIBUTION_BYTES // (4 * max(1, header.vocabulary_size))) - parallel - 1
    return min(_MOST_IDS, parallel + 1 + max(kept, parallel, 1)) if engine.prefix_cache else parallel + 1
