"""What was read of a GGUF header before it is interpreted: keys with their values, and the sizes of tensors."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from ocserve.catalog.errors import GgufInvalid

Scalar = int | float | bool | str

_BLOCK = re.compile(r"blk\.(\d{1,4})\.(.+)")
# How ggml names the tensors of a layer that keeps state instead of keys: Mamba's, LFM2's, RWKV's.
_STATE_TENSORS = ("ssm_", "shortconv", "time_mix")
_KEY_TENSORS = ("attn_k.", "attn_kv")
_FUSED_TENSORS = ("attn_qkv.",)
_OUTPUT_TENSORS = ("output.", "output_norm.")


@dataclass(frozen=True, slots=True)
class Array:
    """An array that was measured and passed over; `numbers` holds a short numeric one."""

    type: int
    count: int
    offset: int
    numbers: tuple[int | float, ...] = ()


@dataclass(slots=True)
class Metadata:
    """The keys of a file. `byte_tokens` is 1 where a token is exactly <0xHH>."""

    scalars: dict[str, Scalar] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    byte_tokens: bytearray = field(default_factory=bytearray)

    def numbers(self, key: str, most: int) -> tuple[int, ...]:
        """The count or counts under `key`, none where the file is silent. Raises `GgufInvalid` for anything else."""
        value = self.scalars.get(key)
        array = self.arrays.get(key)
        if value is None and array is None:
            return ()
        values: tuple[object, ...] = (value,) if array is None else array.numbers
        counts = tuple(each for each in values if isinstance(each, int) and not isinstance(each, bool))
        if len(counts) != len(values) or any(not 0 <= each <= most for each in counts):
            raise GgufInvalid(f"{key.partition('.')[2] or key} is not a whole number from 0 to {most}")
        return counts

    def number(self, key: str, most: int) -> int:
        """A count, the largest entry of a per-layer array of counts, or 0 where the file is silent."""
        return max(self.numbers(key, most), default=0)

    def per_layer(self, key: str, most: int, layers: int) -> tuple[int, ...]:
        """One count for each layer; a short array is filled with its largest. Empty where the file is silent."""
        counts = self.numbers(key, most)
        if not counts:
            return ()
        return (counts + (max(counts),) * layers)[:layers] if key in self.arrays else counts * layers

    def text(self, key: str) -> str:
        """A text for people: printable and short, or empty."""
        value = self.scalars.get(key, "")
        return "".join(each for each in value if each.isprintable())[:200] if isinstance(value, str) else ""


@dataclass(slots=True)
class Block:
    """The tensors of one layer: their bytes, and whether it projects keys or keeps a state."""

    nbytes: int = 0
    has_keys: bool = False
    has_fused_keys: bool = False
    has_state: bool = False

    @property
    def attends(self) -> bool:
        """Linear attention fuses its projections too and keeps a state; separate keys beside a state are attention."""
        return self.has_keys or (self.has_fused_keys and not self.has_state)


@dataclass(slots=True)
class Tensors:
    """Sums over the tensors of a file, or of all parts of a split one. `vocabulary` is the rows of the embedding."""

    count: int = 0
    parameters: int = 0
    nbytes: int = 0
    embedding_bytes: int = 0
    output_bytes: int = 0
    has_output: bool = False
    vocabulary: int = 0
    blocks: dict[int, Block] = field(default_factory=dict)
    bytes_by_type: dict[str, int] = field(default_factory=dict)

    @property
    def largest_type(self) -> str:
        return max(self.bytes_by_type, key=lambda name: self.bytes_by_type[name], default="")

    def add(self, name: str, shape: tuple[int, ...], nbytes: int, type_name: str) -> None:
        """Count one tensor."""
        self.count += 1
        self.parameters += math.prod(shape)
        self.nbytes += nbytes
        self.bytes_by_type[type_name] = self.bytes_by_type.get(type_name, 0) + nbytes
        if match := _BLOCK.fullmatch(name):
            block = self.blocks.setdefault(int(match[1]), Block())
            block.nbytes += nbytes
            block.has_keys |= match[2].startswith(_KEY_TENSORS)
            block.has_fused_keys |= match[2].startswith(_FUSED_TENSORS)
            block.has_state |= match[2].startswith(_STATE_TENSORS)
        elif name.startswith(_OUTPUT_TENSORS):
            self.output_bytes += nbytes
            self.has_output |= name == "output.weight"
        elif name == "token_embd.weight":
            self.embedding_bytes = nbytes
            self.vocabulary = shape[1] if len(shape) > 1 else 0
