"""Whether a model fits this machine, and what has to be lowered so that it does. Pure: everything is passed in.

What the user has set is kept or refused, never lowered. Of the rest, what costs least goes first:

1. main memory for stored prefixes, down to none;
2. the pool, down to one context: fewer long sequences at once;
3. the context, down to `CONTEXT_FLOOR`, of embedding models to `INPUT_FLOOR`;
4. layers on the GPU, down to none: slower. What that leaves is given back to the context and the pool.

The cache's type is never changed: it changes answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ocserve.catalog import gguf_format
from ocserve.catalog.errors import DoesNotFit
from ocserve.catalog.gguf import GgufHeader
from ocserve.catalog.need import CELL_STEP, KvType, Need, Plan, need, score_bytes
from ocserve.catalog.sizes import size_text
from ocserve.machine import Device, HostMemory

CONTEXT_FLOOR = 4096
INPUT_FLOOR = 512  # of a model that makes one result of an input: a passage
SMALLEST_SUGGESTION = 512

Lowerable = Literal["context", "pool_tokens", "gpu_layers", "host_cache_bytes"]
Choice = Lowerable | Literal["flash_attention"]
# Without flash attention a batch's scores with all cells may take so much memory, if nobody asked for it.
MOST_SCORE_BYTES = 512 * 1024 * 1024

_UNQUANTISED: tuple[KvType, ...] = ("f16", "bf16", "f32")

_NAMES: dict[Lowerable, str] = {
    "context": "the context",
    "pool_tokens": "the pool of all sequences",
    "gpu_layers": "the GPU's share",
    "host_cache_bytes": "main memory for stored prefixes",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """The plan that settings and model card ask for, and which parts of it the user has set."""

    plan: Plan
    fixed: frozenset[Choice] = frozenset()


@dataclass(frozen=True, slots=True)
class Machine:
    """Main memory, and the GPUs on which this build of llama.cpp can place layers."""

    host: HostMemory
    gpus: tuple[Device, ...] = ()


@dataclass(frozen=True, slots=True)
class Note:
    """One thing that was lowered: its name, from what to what (tokens, layers or bytes), and why, with the numbers."""

    lowered: Lowerable
    asked: int
    used: int
    reason: str

    @property
    def text(self) -> str:
        """The note as a sentence."""
        amounts = [_amount(self.lowered, value) for value in (self.asked, self.used)]
        return f"{_NAMES[self.lowered]} is lowered from {amounts[0]} to {amounts[1]}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Fit:
    """The plan that fits, what it takes, and what was lowered for it."""

    plan: Plan
    need: Need
    notes: tuple[Note, ...] = ()


def fit(header: GgufHeader, wanted: Wanted, machine: Machine) -> Fit:
    """The plan nearest to `wanted` that fits `machine`. Raises `DoesNotFit` with the numbers."""
    plan = _resolved(header, wanted.plan, machine)
    _check_kv_type(header, plan)
    if "flash_attention" not in wanted.fixed:
        plan = _with_attention(header, plan, machine)
    search = _Search(header, machine, wanted.fixed)
    lean = plan if "host_cache_bytes" in wanted.fixed else replace(plan, host_cache_bytes=0)  # 1
    found = search.nearest(lean) or search.with_fewer_gpu_layers(lean)
    if found is None:
        raise _refusal(header, search.leanest(lean), machine, wanted.fixed)
    found = search.with_host_cache(found, plan.host_cache_bytes)
    reason = _shortage(need(header, plan, machine.gpus), machine)
    names: tuple[Lowerable, ...] = ("host_cache_bytes", "pool_tokens", "context", "gpu_layers")
    notes = tuple(
        Note(name, getattr(plan, name), getattr(found, name), reason)
        for name in names
        if getattr(found, name) < getattr(plan, name)
    )
    return Fit(found, need(header, found, machine.gpus), notes)


def describe(needed: Need, plan: Plan) -> str:
    """The need in words: its parts with their sizes."""
    parts = [f"weights {size_text(needed.weights_bytes)}"]
    if needed.kv_bytes:
        parts.append(f"KV {size_text(needed.kv_bytes)} for {plan.pool_tokens:,} tokens in {plan.kv_type}")
    parts.append(f"compute {size_text(needed.compute_bytes)}")
    parts.append(f"processes {size_text(needed.overhead_bytes)}")
    if needed.host_cache_bytes:
        parts.append(f"stored prefixes {size_text(needed.host_cache_bytes)}")
    return ", ".join(parts)


def fits(needed: Need, machine: Machine) -> bool:
    """Whether every place has what is needed of it."""
    return all(wanted <= free for _, wanted, free in _places(needed, machine))


@dataclass(frozen=True, slots=True)
class _Search:
    """Finds the largest values that fit. Memory grows with each of them, so halving finds them."""

    header: GgufHeader
    machine: Machine
    fixed: frozenset[Choice]

    def fits(self, plan: Plan) -> bool:
        return fits(need(self.header, plan, self.machine.gpus), self.machine)

    def nearest(self, plan: Plan) -> Plan | None:
        """`plan`, or with a smaller pool (2), or with a smaller context (3)."""
        if self.fits(plan):
            return plan
        if "pool_tokens" in self.fixed:  # a context below it would free nothing
            return None
        one = replace(plan, pool_tokens=plan.context)
        if self.fits(one):
            return self._largest(one, plan.pool_tokens, lambda tokens: replace(plan, pool_tokens=tokens))
        lean = self.leanest(plan)
        if not self.fits(lean):
            return None
        return self._largest(lean, plan.context, lambda tokens: replace(plan, context=tokens, pool_tokens=tokens))

    def leanest(self, plan: Plan) -> Plan:
        """The smallest pool and context that may be chosen."""
        if "pool_tokens" in self.fixed:
            return plan
        floor = CONTEXT_FLOOR if self.header.pooling == "none" else INPUT_FLOOR
        context = plan.context if "context" in self.fixed else min(plan.context, floor)
        return replace(plan, context=context, pool_tokens=context)

    def with_fewer_gpu_layers(self, plan: Plan) -> Plan | None:
        """As many layers on the GPU as fit with the smallest context (4), then as much context as that leaves."""
        if "gpu_layers" in self.fixed or not self.machine.gpus:
            return None
        for layers in range(plan.gpu_layers - 1, -1, -1):
            if self.fits(replace(self.leanest(plan), gpu_layers=layers)):
                return self.nearest(replace(plan, gpu_layers=layers))
        return None

    def with_host_cache(self, plan: Plan, most: int) -> Plan:
        """What main memory is left for stored prefixes, up to `most`, in whole MiB."""
        if self.fits(full := replace(plan, host_cache_bytes=most)) or "host_cache_bytes" in self.fixed:
            return full
        step = 1 << 20
        return self._largest(plan, most, lambda size: replace(plan, host_cache_bytes=size), step=step, low=0)

    def _largest(
        self, known: Plan, high: int, changed: Callable[[int], Plan], *, step: int = CELL_STEP, low: int | None = None
    ) -> Plan:
        """The plan with the largest value below `high`, a multiple of `step`, that fits; `known` fits."""
        below = (known.pool_tokens if low is None else low) // step
        above = -(-high // step)
        best = known
        while above - below > 1:
            middle = (below + above) // 2
            candidate = changed(middle * step)
            if self.fits(candidate):
                below, best = middle, candidate
            else:
                above = middle
        return best


def _resolved(header: GgufHeader, plan: Plan, machine: Machine) -> Plan:
    """`plan` with "all layers" made a number where there are GPUs, and the context bounded by what the model knows."""
    context = min(plan.context, header.context_length or plan.context)
    most = len(header.layers) + 1
    layers = plan.gpu_layers
    if machine.gpus:
        layers = most if layers < 0 else min(layers, most)
    return replace(plan, context=context, pool_tokens=max(plan.pool_tokens, context), gpu_layers=layers)


def _with_attention(header: GgufHeader, plan: Plan, machine: Machine) -> Plan:
    """`plan` with the faster kind of attention.

    On a CPU llama.cpp computes flash attention row by row where a batch has fewer than 64 rows: for a model of 135M and
    2,000 cells on two cores 17 ms a row of 16, 28 ms for one alone; without it 9 and 19. But then each row pays for all
    cells in use, so that prefixes nobody uses must be left to the tiers, which cannot take every state of a window.
    """
    without = replace(plan, flash_attention=False)
    on_cpu = not (machine.gpus and plan.gpu_layers)
    plain = all(layer.keys and not layer.slides and not layer.state for layer in header.layers)
    exact = plan.kv_type in _UNQUANTISED and header.pooling == "none"
    if on_cpu and plain and exact and score_bytes(header, without) <= MOST_SCORE_BYTES:
        return without if fits(need(header, without, machine.gpus), machine) else plan
    return plan


def _check_kv_type(header: GgufHeader, plan: Plan) -> None:
    kv_type = plan.kv_type
    if not plan.flash_attention and kv_type not in _UNQUANTISED:
        raise DoesNotFit(
            f"a cache of {kv_type} can only be read by flash attention, which is turned off",
            hint="use --kv-type f16, or leave engine.flash_attention at auto",
        )
    block = next(weights for name, weights, _ in gguf_format.TENSOR_TYPES.values() if name.lower() == kv_type)
    if any(layer.keys for layer in header.layers) and (header.key_length % block or header.value_length % block):
        raise DoesNotFit(
            f"a cache of {kv_type} stores {block} numbers together, and this model's heads have "
            f"{header.key_length} and {header.value_length}",
            hint="use --kv-type f16",
        )


def _places(needed: Need, machine: Machine) -> Iterator[tuple[str, int, int]]:
    """(name, bytes needed, bytes free) of every place. A GPU that has no memory of its own takes main memory."""
    shared = 0
    for gpu, wanted in zip(machine.gpus, needed.gpu_bytes, strict=True):
        yield f"{gpu.name}'s memory", wanted, gpu.memory_free
        shared += wanted if gpu.shares_host_memory else 0
    yield "main memory", needed.host_bytes + shared, machine.host.available_bytes


def _shortage(needed: Need, machine: Machine) -> str:
    """The places that are too small, with both numbers."""
    return " and ".join(
        f"{size_text(wanted)} of {name} would be needed and {size_text(free)} are available"
        for name, wanted, free in _places(needed, machine)
        if wanted > free
    )


def _refusal(header: GgufHeader, plan: Plan, machine: Machine, fixed: frozenset[Choice]) -> DoesNotFit:
    needed = need(header, plan, machine.gpus)
    return DoesNotFit(
        f"the model needs {size_text(needed.total_bytes)}: {describe(needed, plan)}; {_shortage(needed, machine)}",
        hint="; ".join(_remedies(header, plan, machine, fixed)),
    )


def _remedies(header: GgufHeader, plan: Plan, machine: Machine, fixed: frozenset[Choice]) -> Iterator[str]:
    """What would make it fit: flags that were tried out here, then what always helps."""
    free = fixed - {"context", "pool_tokens"}
    smallest = replace(plan, context=SMALLEST_SUGGESTION, pool_tokens=SMALLEST_SUGGESTION)
    if (fewer := _Search(header, machine, free)).fits(smallest):
        lower = fewer._largest(
            smallest, plan.pool_tokens, lambda tokens: replace(plan, context=tokens, pool_tokens=tokens)
        )
        yield f"try --ctx {lower.context}" + (f" --pool {lower.pool_tokens}" if "pool_tokens" in fixed else "")
    smaller = replace(plan, kv_type="q8_0")
    blocks = header.key_length % 32 == 0 and header.value_length % 32 == 0
    if plan.kv_type in _UNQUANTISED and blocks and fits(need(header, smaller, machine.gpus), machine):
        yield "try --kv-type q8_0"
    if "gpu_layers" in fixed and _Search(header, machine, fixed - {"gpu_layers"}).with_fewer_gpu_layers(plan):
        yield "leave out --gpu-layers"
    yield "a smaller quantisation or model needs less"


def _amount(name: Lowerable, value: int) -> str:
    if name == "host_cache_bytes":
        return size_text(value)
    return f"{value:,} layers" if name == "gpu_layers" else f"{value:,} tokens"
