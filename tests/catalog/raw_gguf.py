"""Writes GGUF headers piece by piece, so that a test can bend any one number of a valid file."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

STRING, ARRAY, UINT32, INT32, FLOAT32, BOOL = 8, 9, 4, 5, 6, 7


@dataclass(frozen=True)
class Piece:
    """A part of the file: a number of `kind` u32 or u64, or raw bytes."""

    kind: str
    data: bytes
    label: str = ""


def u32(value: int, label: str = "") -> Piece:
    return Piece("u32", struct.pack("<I", value & 0xFFFFFFFF), label)


def u64(value: int, label: str = "") -> Piece:
    return Piece("u64", struct.pack("<Q", value & 0xFFFFFFFFFFFFFFFF), label)


def text(value: str | bytes, label: str = "") -> list[Piece]:
    raw = value.encode() if isinstance(value, str) else value
    return [u64(len(raw), f"{label}.length"), Piece("raw", raw, label)]


@dataclass
class Tensor:
    name: str
    shape: tuple[int, ...]
    kind: int = 0
    bytes_per_weight: float = 4


@dataclass
class Header:
    """A small model. `pieces` is the file, in order."""

    tokens: list[str] = field(default_factory=lambda: ["<s>", "<0x00>", "<0x0A>", "hello", "world"])
    types: list[int] = field(default_factory=lambda: [3, 6, 6, 1, 1])
    merges: list[str] = field(default_factory=lambda: ["h e", "l l"])
    tensors: list[Tensor] = field(
        default_factory=lambda: [Tensor("token_embd.weight", (32, 5)), Tensor("output_norm.weight", (32,))]
    )
    alignment: int | None = 32
    extra: list[list[Piece]] = field(default_factory=list)

    def keys(self) -> list[list[Piece]]:
        keys = [
            self.string("general.architecture", "llama"),
            self.string("general.name", "raw"),
            self.number("general.file_type", 0),
            self.number("llama.context_length", 512),
            self.number("llama.block_count", 2),
            self.number("llama.embedding_length", 32),
            self.number("llama.attention.head_count", 4),
            self.string("tokenizer.ggml.model", "llama"),
            self.array("tokenizer.ggml.tokens", STRING, [piece for token in self.tokens for piece in text(token)]),
            self.array("tokenizer.ggml.token_type", INT32, [u32(each) for each in self.types], len(self.types)),
            self.array(
                "tokenizer.ggml.scores",
                FLOAT32,
                [Piece("raw", struct.pack("<f", 0.5)) for _ in self.tokens],
                len(self.tokens),
            ),
            self.array("tokenizer.ggml.merges", STRING, [piece for merge in self.merges for piece in text(merge)]),
            self.string("tokenizer.chat_template", "{{ messages }}"),
        ]
        if self.alignment is not None:
            keys.append(self.number("general.alignment", self.alignment))
        return keys + self.extra

    @staticmethod
    def string(key: str, value: str) -> list[Piece]:
        return [*text(key, "key"), u32(STRING, "type"), *text(value, key)]

    @staticmethod
    def number(key: str, value: int, kind: int = UINT32) -> list[Piece]:
        return [*text(key, "key"), u32(kind, "type"), u32(value, key)]

    @staticmethod
    def array(key: str, kind: int, items: list[Piece], count: int | None = None) -> list[Piece]:
        length = len(items) // 2 if count is None else count
        return [*text(key, "key"), u32(ARRAY, "type"), u32(kind, "element type"), u64(length, f"{key}.count"), *items]

    def pieces(self) -> list[Piece]:
        keys = self.keys()
        pieces = [Piece("raw", b"GGUF", "magic"), u32(3, "version"), u64(len(self.tensors), "tensors")]
        pieces.append(u64(len(keys), "keys"))
        pieces += [piece for key in keys for piece in key]
        alignment, offset = self.alignment or 32, 0
        for tensor in self.tensors:
            pieces += [*text(tensor.name, "tensor name"), u32(len(tensor.shape), "dimensions")]
            pieces += [u64(each, "dimension") for each in tensor.shape]
            pieces += [u32(tensor.kind, "tensor type"), u64(offset, "offset")]
            size = int(tensor.bytes_per_weight)
            for each in tensor.shape:
                size *= each
            offset += -(-size // alignment) * alignment
        length = sum(len(piece.data) for piece in pieces)
        pieces.append(Piece("raw", b"\0" * (-length % alignment), "padding"))
        pieces.append(Piece("raw", b"\1" * offset, "data"))
        return pieces

    def bytes(self) -> bytes:
        return joined(self.pieces())


def joined(pieces: list[Piece]) -> bytes:
    return b"".join(piece.data for piece in pieces)


def bent(pieces: list[Piece], label: str, value: int, occurrence: int = 0) -> bytes:
    """The file with the number called `label` replaced."""
    matching = [index for index, piece in enumerate(pieces) if piece.label == label and piece.kind != "raw"]
    index = matching[occurrence]
    make = u32 if pieces[index].kind == "u32" else u64
    return joined([*pieces[:index], make(value), *pieces[index + 1 :]])
