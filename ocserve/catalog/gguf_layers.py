"""What each layer of a model holds: its weights, what it remembers of a token, what it remembers of a sequence.

The kinds follow from the tensors, so that they hold for architectures that are not known here. What only llama.cpp's
source tells is in the tables: which layers slide. Where a file's architecture is not in them, no layer is taken to
slide, and the estimate errs upward.
"""

from __future__ import annotations

import msgspec

from ocserve.catalog.gguf_metadata import Block, Metadata, Tensors

# Every n-th layer attends to everything, the others to a window: `set_swa_pattern` in llama.cpp's `src/models/`.
_SLIDING_PERIODS = {
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "cohere2": 4,
    "gpt-oss": 2,
    "llama4": 4,
    "olmo2": 4,
    "afmoe": 4,
    "plamo3": 8,
    "smallthinker": 4,
}
_FULL_LAYER_FIRST = frozenset({"smallthinker"})
_DEFAULT_WINDOWS = {"gemma2": 4096, "llama4": 8192, "smallthinker": 4096}
# Architectures that compute every input anew: `llama_model::create_memory` in llama.cpp.
_WITHOUT_CACHE = frozenset(
    {
        "bert", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert", "nomic-bert",
        "nomic-bert-moe",
    }
)  # fmt: skip


class Layer(msgspec.Struct, frozen=True, array_like=True):
    """One layer. `keys` and `values` are cache elements of a token, `state` F32 numbers of a sequence."""

    weight_bytes: int
    keys: int = 0
    values: int = 0
    state: int = 0
    slides: bool = False


def sliding_window(metadata: Metadata, architecture: str) -> int:
    """The window that llama.cpp uses, in tokens; 0 where no layer slides."""
    stated = metadata.number(f"{architecture}.attention.sliding_window", 1 << 32)
    return stated or _DEFAULT_WINDOWS.get(architecture, 0)


def layers(metadata: Metadata, tensors: Tensors, architecture: str, count: int) -> tuple[Layer, ...]:
    """The layers of a model of `count` layers. Raises `GgufInvalid` for a key that is no count."""
    slides = _sliding(metadata, architecture, count)
    keys, values = _widths(metadata, architecture, slides)
    with_cache = (
        0
        if architecture in _WITHOUT_CACHE
        else count - metadata.number(f"{architecture}.attention.shared_kv_layers", 1024)
    )
    state = _state(metadata, architecture)
    found = []
    for index in range(count):
        block = tensors.blocks.get(index, Block())
        attends = index < with_cache and (block.attends or not block.has_state)
        found.append(
            Layer(
                block.nbytes,
                keys[index] if attends else 0,
                values[index] if attends else 0,
                state if block.has_state else 0,
                slides[index],
            )
        )
    return tuple(found)


def _sliding(metadata: Metadata, architecture: str, count: int) -> tuple[bool, ...]:
    key = f"{architecture}.attention.sliding_window_pattern"
    if not sliding_window(metadata, architecture):
        return (False,) * count
    if key in metadata.arrays:
        return tuple(bool(each) for each in metadata.per_layer(key, 1024, count))
    if architecture not in _SLIDING_PERIODS:
        return (False,) * count
    period = metadata.number(key, 1024) or _SLIDING_PERIODS[architecture]
    full = 0 if architecture in _FULL_LAYER_FIRST else period - 1
    return tuple(index % period != full for index in range(count))


def _widths(metadata: Metadata, architecture: str, slides: tuple[bool, ...]) -> tuple[list[int], list[int]]:
    """Cache elements of a token in each layer, were it to attend: (keys, values)."""
    prefix = f"{architecture}.attention"
    count = len(slides)
    heads = metadata.per_layer(f"{prefix}.head_count", 1 << 16, count) or (0,) * count
    shared = metadata.per_layer(f"{prefix}.head_count_kv", 1 << 16, count) or heads
    embedding = metadata.number(f"{architecture}.embedding_length", 1 << 24)
    usual = embedding // max(heads) if max(heads, default=0) else 0
    # Latent attention caches one compressed row that serves as keys and values.
    latent = metadata.number(f"{prefix}.key_length_mla", 1 << 16) > 0

    def width(name: str) -> list[int]:
        length = metadata.number(f"{prefix}.{name}", 1 << 16) or usual
        sliding_length = metadata.number(f"{prefix}.{name}_swa", 1 << 16) or length
        return [n * (sliding_length if slide else length) for n, slide in zip(shared, slides, strict=True)]

    return width("key_length"), [0] * count if latent else width("value_length")


def _state(metadata: Metadata, architecture: str) -> int:
    """Numbers that a recurrent layer keeps of a sequence: `n_embd_r` + `n_embd_s` of llama.cpp's hparams."""

    def number(name: str) -> int:
        return metadata.number(f"{architecture}.{name}", 1 << 16)

    embedding = metadata.number(f"{architecture}.embedding_length", 1 << 24)
    if head := number("wkv.head_size"):
        return (number("token_shift_count") or 2) * embedding + embedding * head
    inner, state = metadata.number(f"{architecture}.ssm.inner_size", 1 << 24), number("ssm.state_size")
    if convolution := number("shortconv.l_cache"):
        return embedding * (convolution - 1) + state * inner
    shifted = max(number("ssm.conv_kernel") - 1, 0)
    return shifted * (inner + 2 * number("ssm.group_count") * state) + state * inner
