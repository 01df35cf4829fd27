"""From settings and a model's card to what is wanted of this machine, and to the plan that fits it."""

from __future__ import annotations

from collections.abc import Sequence

from ocserve import config
from ocserve.catalog.fit import Fit, Lowerable, Machine, Wanted, fit
from ocserve.catalog.need import Plan
from ocserve.catalog.store import Installed
from ocserve.machine import Device, HostMemory, host_memory
from ocserve.modelcard import Defaults


def wanted(engine: config.Engine, cache: config.Cache, defaults: Defaults) -> Wanted:
    """The settings where they speak, the model's card elsewhere. A context of the user's own gets a pool of two."""
    context = engine.context or defaults.context
    pool = engine.pool_tokens or (2 * context if engine.context else defaults.pool)
    plan = Plan(
        context=context,
        parallel=engine.parallel or defaults.parallel,
        pool_tokens=max(pool, context),
        gpu_layers=engine.gpu_layers,
        kv_type=engine.kv_type,
        batch_tokens=max(engine.batch_tokens, engine.parallel or defaults.parallel),
        host_cache_bytes=cache.host_bytes if engine.prefix_cache else 0,
    )
    set_by_user: dict[Lowerable, bool] = {
        "context": engine.context is not None,
        "pool_tokens": engine.pool_tokens is not None,
        "gpu_layers": engine.gpu_layers >= 0,
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
    return fit(model.header, wanted(engine, cache, model.card.defaults), machine)
