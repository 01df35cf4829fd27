"""What is known of a model (`ModelCard`) and how it is served here (`ServedModel`).

A card is data: `models/<file>.toml` decodes straight into it. Sizes are bytes, contexts and limits are tokens.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

import msgspec
from msgspec.structs import replace

from ocserve.decoding import resolved

Capability = Literal["chat", "completion", "fim", "tools", "embedding", "vision", "reasoning", "rerank"]
Modality = Literal["text", "image", "embedding", "rerank"]
Money = Annotated[str, msgspec.Meta(pattern=r"^\d+(\.\d+)?$")]


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling used where a request is silent; None leaves the neutral value of `generation.Sampling`."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class Defaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model is served unless the settings say otherwise.

    `context` is the longest sequence, `parallel` the sequences decoded together, `pool_tokens` the KV cells they share.
    `max_output_tokens` is the largest `max_tokens` accepted (None: the context), `default_output_tokens` what is used
    when a request names none, `wall_clock_s` the longest a generation may run.
    """

    context: int = 8192
    parallel: int = 4
    pool_tokens: int | None = None
    max_output_tokens: int | None = None
    default_output_tokens: int = 2048
    wall_clock_s: float = 600.0
    sampling: SamplingDefaults = SamplingDefaults()

    @property
    def pool(self) -> int:
        """KV cells to allocate: two full contexts where the card does not say."""
        return self.pool_tokens or 2 * self.context


class HubFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a variant lies on the hub. A split file is named by its first part (`…-00001-of-0000N.gguf`)."""

    repo: str
    file: str
    revision: str = "main"


class IndexFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a variant lies in a wheel on the Python package index."""

    distribution: str
    version: str
    path: str


class Variant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One quantisation of a model. `sha256` is of the GGUF file, where it is known beforehand.

    `verified` says that this project ran this very file through its tests.
    """

    quantisation: str
    size_bytes: int
    sha256: str | None = None
    hub: HubFile | None = None
    index: IndexFile | None = None
    verified: bool = False


class Tier(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The prices of a key that has used `above` tokens of the model in this calendar month (UTC), and of those who have
    used more. None stays as it is in the tier before."""

    above: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    prompt: Money | None = None
    completion: Money | None = None
    cached_prompt: Money | None = None
    cache_write: Money | None = None
    image: Money | None = None
    request: Money | None = None


class Prices(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """US dollars per token as decimal strings, without sign or exponent; `image` and `request` are for one of them.

    `cached_prompt` is for prompt tokens that were read from the cache, `cache_write` for those that were computed and
    are kept there; None: as `prompt`. Of the others None is free. `tiers` are for whoever uses much, least first.
    """

    prompt: Money
    completion: Money
    cached_prompt: Money | None = None
    cache_write: Money | None = None
    image: Money | None = None
    request: Money | None = None
    tiers: tuple[Tier, ...] = ()

    @property
    def steps(self) -> tuple[tuple[int, Prices], ...]:
        """The whole prices, without tiers, from each number of tokens on: from 0 and from those of each tier."""
        found = [(0, replace(self, tiers=()))]
        for tier in self.tiers:
            named = {name: getattr(tier, name) for name in KINDS if getattr(tier, name) is not None}
            found.append((tier.above, replace(found[-1][1], **named)))
        return tuple(found)

    def step(self, tokens: int) -> tuple[int, Prices]:
        """That of `steps` which holds for a key that has used so many tokens."""
        return next(each for each in reversed(self.steps) if each[0] <= tokens)


# What there are prices of.
KINDS = tuple(name for name in Prices.__struct_fields__ if name != "tiers")


class DatedPrices(msgspec.Struct, frozen=True, kw_only=True):
    """Prices from a day on (UTC), None being always; `announced` for a day to come.

    `steps` are the prices of a key that has used so many tokens in the calendar month, from 0 on.
    """

    since: datetime.date | None
    announced: bool
    steps: tuple[tuple[int, Prices], ...]


@resolved
class ModelCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of one model. `name` is what a user types, `context_length` what the model was trained for.

    `shortest_vector` is how many of an embedding's numbers may be kept at least, where the model was trained so that
    its first numbers are an embedding of their own (Matryoshka); None: all of them are needed.
    `strengths`, `limitations` and `intended_use` are what the card's page says, in sentences.
    """

    name: str
    title: str
    family: str
    parameters: int
    license: str
    context_length: int
    variants: tuple[Variant, ...]
    summary: str = ""
    strengths: str = ""
    limitations: str = ""
    intended_use: str = ""
    publisher: str = ""
    license_url: str | None = None
    hugging_face_id: str | None = None
    released: str | None = None
    languages: tuple[str, ...] = ()
    input_modalities: tuple[Modality, ...] = ("text",)
    output_modalities: tuple[Modality, ...] = ("text",)
    capabilities: tuple[Capability, ...] = ("chat", "completion")
    aliases: tuple[str, ...] = ()
    chat_template: str | None = None
    shortest_vector: int | None = None
    defaults: Defaults = Defaults()


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model as this server answers for it, after settings, card and file have been reconciled.

    `id` is the name in answers; `aliases` (with `default`) are accepted in requests. `created` is Unix time, seconds.
    `capabilities` and modalities are what this server does with the model, which may be less than its card says.
    `architecture` is llama.cpp's word, `digest` the SHA-256 of the first file where it is known. Without `prices`
    nothing is charged.
    `dimensions` are the numbers of a vector of an embedding model, 0 of any other; neither that nor a reranking one
    generates, so that its `max_output_tokens` is 0. `image_urls`: images are fetched from the addresses that are named.
    `countries` are where it is computed, as ISO 3166 codes. `refused`: it has no price and is not given away.
    """

    id: str
    aliases: tuple[str, ...]
    card: ModelCard
    quantisation: str
    created: int
    context_length: int
    max_output_tokens: int
    default_output_tokens: int
    wall_clock_s: float
    parallel: int
    sampling: SamplingDefaults = SamplingDefaults()
    capabilities: tuple[Capability, ...] = ("chat", "completion")
    input_modalities: tuple[Modality, ...] = ("text",)
    output_modalities: tuple[Modality, ...] = ("text",)
    architecture: str = ""
    size_bytes: int = 0
    digest: str | None = None
    prices: Prices | None = None
    refused: bool = False
    dimensions: int = 0
    image_urls: bool = False
    countries: tuple[str, ...] = ()

    def answers_to(self, name: str) -> bool:
        """Whether a request for `name` means this model."""
        return name == self.id or name in self.aliases
