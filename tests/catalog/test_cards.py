"""The catalogue is data that decodes, agrees with itself and tells a reader what a model is."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from ocserve.catalog import cards
from ocserve.catalog.errors import ModelUnknown, ReferenceInvalid
from ocserve.catalog.references import CatalogueReference, HubReference, IndexReference, parse
from ocserve.modelcard import ModelCard

DIRECTORY = cards.models_directory()
FILES = sorted(DIRECTORY.glob("*.toml"))
PARTS = ["What it is", "Publisher", "Licence", "Strengths", "Limits", "Intended use", "Sources", "Verification"]
QUANTISATION = re.compile(r"F32|F16|BF16|MXFP4|I?Q\d[A-Z0-9_]*")


def load(path: Path) -> ModelCard:
    return msgspec.toml.decode(path.read_bytes(), type=ModelCard)


def test_the_catalogue_has_a_dozen_models_of_every_kind() -> None:
    known = cards.load_cards()
    assert len(known) >= 12
    assert min(card.parameters for card in known) < 200_000_000
    assert max(card.parameters for card in known) > 30_000_000_000
    kinds = {capability for card in known for capability in card.capabilities}
    assert kinds >= {"chat", "fim", "embedding", "vision", "tools", "reasoning"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_card_is_complete(path: Path) -> None:
    card = load(path)
    assert path.stem == card.name.replace(":", "-")
    assert parse(card.name) == CatalogueReference(card.name)
    assert card.name.partition(":")[0] == card.family
    for text in (card.title, card.summary, card.publisher, card.license, card.hugging_face_id, card.released):
        assert text
    assert str(card.license_url).startswith("https://")
    assert card.variants
    assert len({variant.quantisation for variant in card.variants}) == len(card.variants)
    for variant in card.variants:
        assert QUANTISATION.fullmatch(variant.quantisation)
        assert parse(f"{card.name}:{variant.quantisation}")
        assert variant.hub or variant.index
        assert card.parameters / 8 < variant.size_bytes < card.parameters * 4
        assert variant.sha256 is None or re.fullmatch("[0-9a-f]{64}", variant.sha256)
        assert variant.sha256 or not variant.verified
        if variant.hub:
            text = f"hf:{variant.hub.repo}/{variant.hub.file}@{variant.hub.revision}"
            assert parse(text) == HubReference(variant.hub.repo, None, variant.hub.file, variant.hub.revision)
        if variant.index:
            text = f"pypi:{variant.index.distribution}=={variant.index.version}/{variant.index.path}"
            assert isinstance(parse(text), IndexReference)
    assert card.defaults.context <= card.context_length
    assert ("image" in card.input_modalities) == ("vision" in card.capabilities)
    assert ("embedding" in card.output_modalities) == (card.capabilities == ("embedding",))
    assert ("rerank" in card.output_modalities) == (card.capabilities == ("rerank",))
    assert card.shortest_vector is None or "embedding" in card.capabilities


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_card_has_its_page_with_every_part(path: Path) -> None:
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    card = load(path)
    assert page.startswith(f"# {card.title}\n")
    sections = dict(re.findall(r"^## (.+?)\n\n(.+?)(?=\n## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert list(sections) == PARTS
    assert all(len(text.strip()) > 5 for text in sections.values())
    assert card.license in sections["Licence"]
    assert ("was run through this project's tests" in page) == any(variant.verified for variant in card.variants)


def test_listings_quote_what_a_cards_page_says() -> None:
    [card] = [card for card in cards.load_cards() if card.name == "smollm2:135m"]
    page = (DIRECTORY / "smollm2-135m.md").read_text(encoding="utf-8")
    for text in (card.strengths, card.limitations, card.intended_use):
        assert text in " ".join(page.split())
    assert card.limitations.startswith("Knows little and invents the rest")
    assert card.intended_use.endswith("for facts.")
    assert all(each.strengths and each.limitations and each.intended_use for each in cards.load_cards())


def test_every_page_has_its_card() -> None:
    assert {path.stem for path in DIRECTORY.glob("*.md")} == {path.stem for path in FILES}


def test_names_and_aliases_mean_one_model_each() -> None:
    names = [name for card in cards.load_cards() for name in (card.name, *card.aliases)]
    assert len(names) == len(set(names))


def test_only_the_file_of_the_tests_is_called_verified() -> None:
    verified = [
        (card.name, each.quantisation) for card in cards.load_cards() for each in card.variants if each.verified
    ]
    assert verified == [("smollm2:135m", "Q4_1")]


def test_the_default_is_the_file_of_the_package_index() -> None:
    card, variant = cards.find(CatalogueReference(cards.DEFAULT_NAME))
    assert variant.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert variant.size_bytes == 98_362_432
    assert variant.index is not None
    assert (card.defaults.context, card.defaults.parallel, card.defaults.pool_tokens) == (8192, 8, 16384)
    assert (card.defaults.sampling.temperature, card.defaults.sampling.top_p) == (0.2, 0.9)


@pytest.mark.parametrize(
    ("typed", "name", "quantisation"),
    [
        ("smollm2:135m", "smollm2:135m", "Q4_1"),
        ("smollm2", "smollm2:135m", "Q4_1"),
        ("smollm2-135m", "smollm2:135m", "Q4_1"),
        ("smollm2:135m:Q4_K_M", "smollm2:135m", "Q4_K_M"),
        ("qwen3", "qwen3:8b", "Q4_K_M"),
        ("llama3.2", "llama3.2:3b", "Q4_K_M"),
    ],
)
def test_names_find_their_card(typed: str, name: str, quantisation: str) -> None:
    reference = parse(typed)
    assert isinstance(reference, CatalogueReference)
    card, variant = cards.find(reference)
    assert (card.name, variant.quantisation) == (name, quantisation)


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("smolm2:135m", "did you mean smollm2:135m?"),
        ("qwen3:9b", "did you mean qwen3:"),
        ("zzzz", "`ocserve list --all` shows the catalogue"),
        ("smollm2:135m:Q9_9", "it is offered as Q4_1, Q4_K_M"),
    ],
)
def test_a_near_miss_is_an_error_with_the_nearest_name(typed: str, hint: str) -> None:
    reference = parse(typed)
    assert isinstance(reference, CatalogueReference)
    with pytest.raises(ModelUnknown) as caught:
        cards.find(reference)
    assert str(caught.value.hint).startswith(hint)


def test_a_name_in_capitals_is_not_a_name() -> None:
    with pytest.raises(ReferenceInvalid):
        parse("SMOLLM2")


def test_what_this_version_serves_is_told_from_what_a_model_could_do() -> None:
    by_name = {card.name: card for card in cards.load_cards()}
    assert all(cards.served(card) for card in by_name.values())
    assert cards.served(by_name["nomic-embed-text:v1.5"]) == ("embedding",)
    vision = by_name["qwen2.5-vl:7b"]
    assert cards.served(vision) == ("chat", "completion")
    assert "vision" in cards.unserved(vision)
