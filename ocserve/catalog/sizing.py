"""Which model suits this machine, before any file of it is here: estimates from cards that err upward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ocserve import config
from ocserve.catalog import cards, hub
from ocserve.catalog.errors import CatalogError
from ocserve.catalog.gguf import GgufHeader
from ocserve.catalog.need import OVERHEAD_BYTES, Plan, kv_bytes_per_token, need
from ocserve.catalog.references import HubReference
from ocserve.catalog.store import Store
from ocserve.machine import HostMemory, usable_cores
from ocserve.machine import host_memory as host_memory
from ocserve.modelcard import Defaults, ModelCard, Variant

# A 135M model prefills at 403 tokens/s on two cores, 27 G weights/s a core; 40 tokens/s is about where waiting for a
# page of prompt becomes unpleasant. That leaves 0.7 G weights a core.
WEIGHTS_PER_CORE = 700_000_000
MOST_WEIGHTS = 4_500_000_000
MEMORY_SHARE = 0.6  # of what is available now, so that the machine stays usable
# A model that nobody chose by name comes under terms that ask for nothing.
OPEN_LICENSES = frozenset({"apache-2.0", "mit", "bsd-3-clause"})


def memory_needed(model: GgufHeader | ModelCard, size_bytes: int, pool_tokens: int) -> int:
    """Bytes of main memory for weights of `size_bytes`, a KV pool of `pool_tokens` and the buffers around them."""
    if isinstance(model, GgufHeader):
        return need(model, Plan(context=pool_tokens, parallel=Defaults().parallel, pool_tokens=pool_tokens)).host_bytes
    return size_bytes + size_bytes // 20 + cache_bytes_per_token(model) * pool_tokens + OVERHEAD_BYTES


def cache_bytes_per_token(model: GgufHeader | ModelCard) -> int:
    """KV memory of one token in F16: exact from a header, an upper estimate from a card."""
    if isinstance(model, GgufHeader):
        return kv_bytes_per_token(model)
    # Fitted above SmolLM2 135M (23 kB), Llama 3.2 3B (115 kB), Qwen3 8B (147 kB) and Qwen3 32B (262 kB).
    return int(80_000 * (model.parameters / 1e9) ** 0.45)


def fits(card: ModelCard, variant: Variant, memory: HostMemory) -> bool:
    """Whether the variant, served by the card's defaults, leaves the machine usable."""
    needed = memory_needed(card, variant.size_bytes, card.defaults.pool)
    return needed <= memory.available_bytes * MEMORY_SHARE


def best_for_this_machine(
    known: Iterable[ModelCard], memory: HostMemory | None = None, cores: int | None = None
) -> tuple[ModelCard, Variant]:
    """The largest openly licensed chat model that fits and answers at a sensible speed on the processor alone.

    Models that reason before they answer are left to those who ask for them: on a processor the wait is long. Where
    nothing fits, the smallest chat model is the answer.
    """
    memory = memory or host_memory()
    most = min(MOST_WEIGHTS, WEIGHTS_PER_CORE * (cores or usable_cores()))
    chat = [card for card in known if "chat" in card.capabilities and card.license in OPEN_LICENSES]
    plain = [card for card in chat if not {"reasoning", "vision"} & set(card.capabilities)]
    suitable = [card for card in plain if card.parameters <= most and fits(card, card.variants[0], memory)]
    if suitable:
        best = max(suitable, key=lambda card: (card.parameters, card.released or ""))
    else:
        best = min(chat, key=lambda card: card.parameters)
    return best, best.variants[0]


def choose_default(settings: config.Store, say: Callable[[str], None]) -> str:
    """The reference that `ocserve run` serves when none is named; says what will be downloaded and why.

    1. The best model for this machine, if it is installed.
    2. Otherwise the largest installed chat model that fits.
    3. Otherwise the best model, if the hub offers it within `hub_timeout_s`.
    4. Otherwise SmolLM2 135M, which is on the package index too.
    """
    memory = host_memory()
    best, variant = best_for_this_machine(cards.load_cards(), memory)
    installed = [model for model in Store(settings).installed() if "chat" in model.card.capabilities]
    if any(model.name == best.name for model in installed):  # 1
        return best.name
    fitting = [
        model
        for model in installed
        if memory_needed(model.header, model.size_bytes, model.card.defaults.pool) <= memory.available_bytes
    ]
    if fitting:  # 2
        chosen = max(fitting, key=lambda model: model.header.parameters)
        if best.parameters > chosen.header.parameters:
            size = f"{variant.size_bytes / 1e9:.2f} GB"
            say(
                f"serving {chosen.name}, which is installed; `ocserve run {best.name}` would fetch the best model for "
                f"this machine ({size})"
            )
        return chosen.name
    if best.name != cards.DEFAULT_NAME and variant.hub is not None:
        place = HubReference(variant.hub.repo, variant.quantisation, variant.hub.file, variant.hub.revision)
        try:
            hub.resolve(place, settings)
        except CatalogError as error:
            say(error.message)
        else:  # 3
            say(f"{best.title} fits this machine; {variant.size_bytes / 1e9:.2f} GB will be downloaded from the hub")
            return best.name
    small = next(card for card in cards.load_cards() if card.name == cards.DEFAULT_NAME)  # 4
    say(f"{small.title}, {small.variants[0].size_bytes / 1e6:.0f} MB, will be downloaded")
    return small.name
