"""The catalogue: the cards in `models/*.toml` with their pages, and how a name typed by a user finds one of them."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from pathlib import Path

import msgspec
from msgspec.structs import replace

from ocserve.catalog.errors import ModelUnknown, StoreDamaged
from ocserve.catalog.gguf_header import GgufHeader
from ocserve.catalog.references import CatalogueReference
from ocserve.modelcard import Capability, Modality, ModelCard, Variant

# What this version serves; whatever else a card names, the model could do and this version does not offer.
SERVED: tuple[Capability, ...] = ("chat", "completion", "tools", "reasoning", "embedding", "rerank")
# Headings of a card's page, and the fields that they fill.
_QUOTED = {"Strengths": "strengths", "Limits": "limitations", "Intended use": "intended_use"}
DEFAULT_NAME = "smollm2:135m"  # small enough for any machine, and on the package index beside the hub


def models_directory() -> Path:
    """Where the cards lie: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "models"
    return inside if inside.is_dir() else package.parent / "models"


@functools.cache
def load_cards() -> tuple[ModelCard, ...]:
    """Every card of the catalogue, by name. Raises `StoreDamaged` naming the file that does not decode."""
    cards = []
    for path in sorted(models_directory().glob("*.toml")):
        try:
            card = msgspec.toml.decode(path.read_bytes(), type=ModelCard)
        except msgspec.DecodeError as error:
            raise StoreDamaged(f"the card {path.name} is not valid: {error}") from error
        page = path.with_suffix(".md")
        cards.append(replace(card, **_told(page.read_text(encoding="utf-8"))) if page.is_file() else card)
    return tuple(sorted(cards, key=lambda card: (card.family, card.parameters, card.name)))


def _told(page: str) -> dict[str, str]:
    """What a card's page says under the headings that listings quote."""
    sections = (section.partition("\n\n") for section in page.split("\n## ")[1:])
    return {_QUOTED[title]: " ".join(text.split()) for title, _, text in sections if title in _QUOTED}


def served(card: ModelCard) -> tuple[Capability, ...]:
    """What this version does with the model."""
    return tuple(each for each in card.capabilities if each in SERVED)


def unserved(card: ModelCard) -> tuple[Capability, ...]:
    """What the model could do and this version does not offer."""
    return tuple(each for each in card.capabilities if each not in SERVED)


def abilities(header: GgufHeader, *, has_chat_template: bool) -> tuple[tuple[Capability, ...], tuple[Modality, ...]]:
    """What is done with a model of this header, and what comes out of it."""
    if header.pooling == "rank":
        return ("rerank",), ("rerank",)
    if header.pooling != "none":
        return ("embedding",), ("embedding",)
    return ("chat", "completion") if has_chat_template else ("completion",), ("text",)


def find(reference: CatalogueReference, cards: Iterable[ModelCard] | None = None) -> tuple[ModelCard, Variant]:
    """The card and variant that `reference` means.

    A name is a card's own, an alias, or the part before the colon; the last means the smallest model of that name.
    Without a quantisation the card's first variant is taken. Raises `ModelUnknown` with the nearest name.
    """
    known = tuple(load_cards() if cards is None else cards)
    exact = [card for card in known if reference.name == card.name or reference.name in card.aliases]
    family = [card for card in known if card.name.partition(":")[0] == reference.name]
    matches = exact or sorted(family, key=lambda card: card.parameters)
    if not matches:
        raise ModelUnknown(
            f"the catalogue has no model named {reference.name}", hint=_suggestion(reference.name, known)
        )
    card = matches[0]
    if reference.quantisation is None:
        return card, card.variants[0]
    for variant in card.variants:
        if variant.quantisation == reference.quantisation:
            return card, variant
    offered = ", ".join(variant.quantisation for variant in card.variants)
    raise ModelUnknown(f"{card.name} has no variant {reference.quantisation}", hint=f"it is offered as {offered}")


def _suggestion(name: str, known: tuple[ModelCard, ...]) -> str:
    names = [each for card in known for each in (card.name, *card.aliases)]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "`ocserve list --all` shows the catalogue"
