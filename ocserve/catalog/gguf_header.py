"""The facts of a GGUF file, from its keys and tensors. What is stated wrongly is `GgufInvalid`."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from ocserve.catalog import gguf_format as fmt
from ocserve.catalog import gguf_layers
from ocserve.catalog.errors import GgufInvalid
from ocserve.catalog.gguf_layers import Layer
from ocserve.catalog.gguf_metadata import Metadata, Tensors

# What is derived from a file changes with the code; facts that were stored under another number are read anew.
REVISION = 2

Pooling = Literal["none", "mean", "cls", "last", "rank"]

# enum llama_pooling_type, by its numbers.
_POOLINGS: tuple[Pooling, ...] = ("none", "mean", "cls", "last", "rank")
_ARCHITECTURE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


class GgufHeader(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of a valid file. Numbers it does not state are 0; later split parts have no `architecture`.

    `tensor_count`, `parameters`, the bytes and the layers are over all parts that were read together. `embedding_bytes`
    are the token embeddings, `output_bytes` what turns the last hidden state into logits, where it is not the
    embeddings again (`has_output`). `feed_forward_length` is the widest row that a feed-forward block computes, over
    the `experts_used` that run together; `state_width` the inner width of a recurrent layer. `pooling` makes one result
    of an input: a vector, or with "rank" how relevant it is; a model without it generates. `causal`: every token sees
    those before it only.
    """

    version: int
    architecture: str
    name: str
    license: str
    quantisation: str
    parameters: int
    tensor_count: int
    tensor_bytes: int
    context_length: int
    block_count: int
    embedding_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    value_length: int
    sliding_window: int
    vocabulary_size: int
    has_chat_template: bool
    has_fim_tokens: bool
    split_count: int
    split_index: int
    revision: int = 0
    pooling: Pooling = "none"
    causal: bool = True
    feed_forward_length: int = 0
    experts_used: int = 0
    state_width: int = 0
    embedding_bytes: int = 0
    output_bytes: int = 0
    has_output: bool = True
    layers: tuple[Layer, ...] = ()

    @property
    def takes_whole_inputs(self) -> bool:
        """Whether an input has to lie in one batch: what makes a result of it needs more than its last token."""
        return self.pooling != "none" and not (self.causal and self.pooling in ("last", "rank"))


def facts(version: int, metadata: Metadata, tensors: Tensors) -> GgufHeader:
    """Interpret what was read. Raises `GgufInvalid`."""
    scalars = metadata.scalars
    split_index = metadata.number("split.no", 65_535)
    architecture = scalars.get("general.architecture", "")
    if not isinstance(architecture, str) or (architecture and not _ARCHITECTURE.fullmatch(architecture)):
        raise GgufInvalid("general.architecture is not a name")
    if not architecture and split_index == 0:
        raise GgufInvalid("general.architecture is missing")
    file_type = scalars.get("general.file_type")
    tokens = metadata.arrays.get("tokenizer.ggml.tokens")
    heads = metadata.number(f"{architecture}.attention.head_count", 1 << 16)
    embedding = metadata.number(f"{architecture}.embedding_length", 1 << 24)
    blocks = metadata.number(f"{architecture}.block_count", 1024)
    head_size = embedding // heads if heads else 0
    return GgufHeader(
        revision=REVISION,
        pooling=_POOLINGS[metadata.number(f"{architecture}.pooling_type", len(_POOLINGS) - 1)],
        causal=scalars.get(f"{architecture}.attention.causal") is not False,
        version=version,
        architecture=architecture,
        name=metadata.text("general.name"),
        license=metadata.text("general.license"),
        quantisation=fmt.FILE_TYPES.get(file_type, tensors.largest_type)
        if isinstance(file_type, int)
        else tensors.largest_type,
        parameters=tensors.parameters,
        tensor_count=tensors.count,
        tensor_bytes=tensors.nbytes,
        context_length=metadata.number(f"{architecture}.context_length", 1 << 31),
        block_count=blocks,
        embedding_length=embedding,
        head_count=heads,
        head_count_kv=metadata.number(f"{architecture}.attention.head_count_kv", 1 << 16) or heads,
        key_length=metadata.number(f"{architecture}.attention.key_length", 1 << 16) or head_size,
        value_length=metadata.number(f"{architecture}.attention.value_length", 1 << 16) or head_size,
        sliding_window=gguf_layers.sliding_window(metadata, architecture),
        vocabulary_size=tokens.count if tokens else tensors.vocabulary,
        has_chat_template=bool(scalars.get("tokenizer.chat_template")),
        has_fim_tokens=any(
            key in metadata.types for key in ("tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id")
        ),
        split_count=metadata.number("split.count", 65_535),
        split_index=split_index,
        feed_forward_length=_feed_forward(metadata, architecture),
        experts_used=metadata.number(f"{architecture}.expert_used_count", 1 << 16),
        state_width=metadata.number(f"{architecture}.ssm.inner_size", 1 << 24),
        embedding_bytes=tensors.embedding_bytes,
        output_bytes=tensors.output_bytes,
        has_output=tensors.has_output,
        layers=gguf_layers.layers(metadata, tensors, architecture, blocks),
    )


def _feed_forward(metadata: Metadata, architecture: str) -> int:
    """Width of the feed-forward rows that are computed together for one token."""

    def number(name: str) -> int:
        return metadata.number(f"{architecture}.{name}", 1 << 24)

    experts = number("expert_feed_forward_length") * number("expert_used_count")
    return max(number("feed_forward_length"), experts + number("expert_shared_feed_forward_length"))
