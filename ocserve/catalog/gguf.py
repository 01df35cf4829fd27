"""Reads and judges a GGUF header in pure Python, before any native code sees the file.

`read_header` either returns the facts of a file that keeps every rule below, or raises `GgufInvalid`; nothing else
comes out of it for any bytes. It reads through a small window instead of a memory map, because a mapped file that is
truncated kills the process, and it never allocates by a number that the file states: a length is compared with the
bytes left first. What it knows of llama.cpp are the places where a hostile header has hurt it: string and array
lengths, tensor extents, offsets, vocabularies whose side arrays are shorter than the token list, byte tokens.
"""

from __future__ import annotations

import math
import os
import re
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import msgspec

from ocserve.catalog import gguf_format as fmt
from ocserve.catalog.errors import GgufInvalid

# Real files: below 100 keys, about 1,100 tensors (a 1T mixture of experts), 262,144 tokens.
MAX_KEYS = 10_000
MAX_TENSORS = 20_000
MAX_VOCABULARY = 1 << 22
MAX_KEY_BYTES = 256
MAX_TOKEN_BYTES = 65_535
MAX_NAME_BYTES = 63  # ggml keeps a tensor's name in 64 bytes with its NUL
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16
MAX_KEPT_STRING = 65_536  # a longer value is passed over, not kept
MAX_KEPT_NUMBERS = 4_096  # a per-layer array is kept whole, a longer one passed over
WINDOW = 256 * 1024

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_BYTE_TOKEN = re.compile(rb"<0x[0-9A-Fa-f]{2}>")
_ARCHITECTURE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_BYTE_TOKEN_TYPE = 6  # LLAMA_TOKEN_TYPE_BYTE

Scalar = int | float | bool | str


class GgufHeader(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of a valid file. Numbers it does not state are 0; later split parts have no `architecture`."""

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
    is_embedding: bool
    split_count: int
    split_index: int


@dataclass(frozen=True, slots=True)
class _Array:
    """An array that was measured and passed over; `numbers` holds a short numeric one."""

    type: int
    count: int
    offset: int
    numbers: tuple[int | float, ...] = ()


@dataclass(slots=True)
class _Metadata:
    scalars: dict[str, Scalar] = field(default_factory=dict)
    arrays: dict[str, _Array] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    byte_tokens: bytearray = field(default_factory=bytearray)  # 1 where a token is exactly <0xHH>


@dataclass(frozen=True, slots=True)
class _Tensors:
    count: int = 0
    parameters: int = 0
    bytes: int = 0
    largest_type: str = ""


class _Reader:
    """A forward cursor over the file that knows how many bytes are left and holds one window of them."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._window = b""
        self._start = 0
        self._at = 0

    @property
    def position(self) -> int:
        return self._start + self._at

    @property
    def left(self) -> int:
        return self._size - self.position

    def take(self, count: int) -> bytes:
        """The next `count` bytes; the caller has bounded `count`."""
        if count > self.left:
            raise GgufInvalid(f"the file ends inside its header, at byte {self._size}")
        if self._at + count > len(self._window):
            self._start, self._at = self.position, 0
            self._file.seek(self._start)
            self._window = self._file.read(min(max(count, WINDOW), self._size - self._start))
            if len(self._window) < count:
                raise GgufInvalid("the file became shorter while it was read")
        begin, self._at = self._at, self._at + count
        return self._window[begin : self._at]

    def skip(self, count: int) -> None:
        """Move on by `count` bytes without reading them."""
        if count > self.left:
            raise GgufInvalid(f"a value at byte {self.position} reaches beyond the end of the file")
        self._at += count
        if self._at > len(self._window):
            self._start, self._at, self._window = self.position, 0, b""

    def u32(self) -> int:
        return int(_U32.unpack(self.take(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack(self.take(8))[0])

    def string_length(self, what: str, longest: int) -> int:
        length = self.u64()
        if length > self.left:
            raise GgufInvalid(f"{what} claims {length} bytes, and {self.left} are left in the file")
        if length > longest:
            raise GgufInvalid(f"{what} claims {length} bytes; at most {longest} are allowed")
        return length

    def text(self, what: str, longest: int) -> str:
        raw = self.take(self.string_length(what, longest))
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise GgufInvalid(f"{what} is not UTF-8") from None
        if "\0" in text:
            raise GgufInvalid(f"{what} contains a NUL")
        return text

    def pass_strings(self, count: int, longest: int, marks: bytearray | None) -> None:
        """Move over `count` strings, each at most `longest` bytes; set `marks[i]` where string i is a byte token."""
        done = 0
        while done < count:
            done = self._pass_whole_strings(done, count, longest, marks)
            if done < count:  # this one does not lie wholly inside the window
                length = self.string_length("a string in an array", longest)
                if marks is not None and length == 6:
                    marks[done] = _BYTE_TOKEN.fullmatch(self.take(6)) is not None
                else:
                    self.skip(length)
                done += 1

    def _pass_whole_strings(self, done: int, count: int, longest: int, marks: bytearray | None) -> int:
        window, at, end = self._window, self._at, len(self._window)
        unpack, is_byte_token = _U64.unpack_from, _BYTE_TOKEN.match
        while done < count and at + 8 <= end:
            length = unpack(window, at)[0]
            if length > longest or at + 8 + length > end:
                break
            if marks is not None and length == 6 and is_byte_token(window, at + 8):
                marks[done] = 1
            at += 8 + length
            done += 1
        self._at = at
        return done


def read_header(path: str | Path) -> GgufHeader:
    """The facts of the GGUF file at `path`, or `GgufInvalid`."""
    try:
        status = os.stat(path)  # before opening, which would wait on a FIFO
        if not stat.S_ISREG(status.st_mode):
            raise GgufInvalid("not a regular file")
        with open(path, "rb", buffering=0) as file:
            return _read(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise GgufInvalid(f"cannot be read: {error.strerror or type(error).__name__}") from error
    except ValueError as error:  # a path with a NUL
        raise GgufInvalid(f"cannot be opened: {error}") from error


def _read(file: BinaryIO, size: int) -> GgufHeader:
    reader = _Reader(file, size)
    if size < 24 or reader.take(4) != fmt.MAGIC:
        raise GgufInvalid("not a GGUF file: it does not start with the magic bytes")
    version = reader.u32()
    if version not in fmt.VERSIONS:
        raise GgufInvalid(f"GGUF version {version} is not supported; versions 2 and 3 are")
    tensor_count, key_count = reader.u64(), reader.u64()
    if key_count > MAX_KEYS or tensor_count > MAX_TENSORS:
        raise GgufInvalid(
            f"it declares {key_count} keys and {tensor_count} tensors; the most are {MAX_KEYS} and {MAX_TENSORS}"
        )
    # The smallest key takes 13 bytes, the smallest tensor entry 32: a count cannot promise more than the file holds.
    if key_count * 13 + tensor_count * 32 > reader.left:
        raise GgufInvalid("it declares more keys and tensors than the file has room for")
    metadata = _read_metadata(reader, key_count)
    _check_vocabulary(file, metadata)
    tensors = _read_tensors(reader, tensor_count, _alignment(metadata), size)
    return _facts(version, metadata, tensors)


def _read_metadata(reader: _Reader, key_count: int) -> _Metadata:
    metadata = _Metadata()
    for _ in range(key_count):
        key = reader.text("a key", MAX_KEY_BYTES)
        if not key:
            raise GgufInvalid("a key is empty")
        if key in metadata.types:
            raise GgufInvalid("a key occurs twice")
        kind = reader.u32()
        metadata.types[key] = kind
        if kind == fmt.ARRAY:
            metadata.arrays[key] = _read_array(reader, key, metadata)
        elif kind == fmt.STRING:
            metadata.scalars[key] = _read_string(reader)
        elif kind in fmt.SCALARS:
            code, width = fmt.SCALARS[kind]
            value = struct.unpack("<" + code, reader.take(width))[0]
            if kind == fmt.BOOL and value > 1:
                raise GgufInvalid("a boolean is neither 0 nor 1")
            metadata.scalars[key] = bool(value) if kind == fmt.BOOL else value
        else:
            raise GgufInvalid(f"a key has the unknown value type {kind}")
    return metadata


def _read_string(reader: _Reader) -> str:
    length = reader.string_length("a value", reader.left)
    if length > MAX_KEPT_STRING:
        reader.skip(length)
        return "…"  # stands for a text that is there and not needed, such as a long chat template
    return reader.take(length).decode("utf-8", errors="replace")


def _read_array(reader: _Reader, key: str, metadata: _Metadata) -> _Array:
    kind, count, offset = reader.u32(), reader.u64(), reader.position
    if kind == fmt.STRING:
        if count * 8 > reader.left:
            raise GgufInvalid(f"an array claims {count} strings, and {reader.left} bytes are left in the file")
        if key == "tokenizer.ggml.tokens":
            if count > MAX_VOCABULARY:
                raise GgufInvalid(f"the vocabulary claims {count} tokens; the most are {MAX_VOCABULARY}")
            metadata.byte_tokens = bytearray(count)
            reader.pass_strings(count, MAX_TOKEN_BYTES, metadata.byte_tokens)
        else:
            reader.pass_strings(count, reader.left, None)
        return _Array(kind, count, offset)
    if kind not in fmt.SCALARS:  # arrays of arrays included: llama.cpp has none, and depth is where parsers fall
        raise GgufInvalid(f"an array has the unknown element type {kind}")
    code, width = fmt.SCALARS[kind]
    if count * width > reader.left:
        raise GgufInvalid(f"an array claims {count} values, and {reader.left} bytes are left in the file")
    if 0 < count <= MAX_KEPT_NUMBERS:
        return _Array(kind, count, offset, struct.unpack(f"<{count}{code}", reader.take(count * width)))
    reader.skip(count * width)
    return _Array(kind, count, offset)


def _check_vocabulary(file: BinaryIO, metadata: _Metadata) -> None:
    """llama.cpp indexes scores and token types by token, and turns byte tokens into array indices."""
    tokens = metadata.arrays.get("tokenizer.ggml.tokens")
    for key, kinds in (
        ("tokenizer.ggml.tokens", (fmt.STRING,)),
        ("tokenizer.ggml.merges", (fmt.STRING,)),
        ("tokenizer.ggml.scores", (fmt.FLOAT32,)),
        ("tokenizer.ggml.token_type", (fmt.INT32, fmt.UINT32)),
    ):
        array = metadata.arrays.get(key)
        if array is None:
            if key in metadata.types:
                raise GgufInvalid(f"{key} is not an array")
            continue
        if array.type not in kinds:
            raise GgufInvalid(f"{key} has the wrong element type {array.type}")
        if key.endswith(("scores", "token_type")) and (tokens is None or array.count != tokens.count):
            raise GgufInvalid(f"{key} has {array.count} entries for {tokens.count if tokens else 0} tokens")
    types = metadata.arrays.get("tokenizer.ggml.token_type")
    if types is not None:
        _check_byte_tokens(file, types, metadata.byte_tokens)


def _check_byte_tokens(file: BinaryIO, types: _Array, marks: bytearray) -> None:
    file.seek(types.offset)
    step = WINDOW // 4
    for first in range(0, types.count, step):
        count = min(step, types.count - first)
        raw = file.read(count * 4)
        if len(raw) < count * 4:
            raise GgufInvalid("the file became shorter while it was read")
        for index, kind in enumerate(struct.unpack(f"<{count}I", raw), first):
            if kind == _BYTE_TOKEN_TYPE and not marks[index]:
                raise GgufInvalid(f"token {index} is typed as a byte and is not written as <0xHH>")


def _alignment(metadata: _Metadata) -> int:
    if "general.alignment" not in metadata.types:
        return 32
    alignment = metadata.scalars.get("general.alignment")
    if metadata.types["general.alignment"] != fmt.UINT32 or not isinstance(alignment, int):
        raise GgufInvalid("general.alignment is not a 32-bit number")
    if not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise GgufInvalid(f"general.alignment is {alignment}; a power of two up to {MAX_ALIGNMENT} is needed")
    return alignment


def _read_tensors(reader: _Reader, count: int, alignment: int, size: int) -> _Tensors:
    names: set[str] = set()
    extents: list[tuple[int, int]] = []
    parameters = 0
    bytes_by_type: dict[str, int] = {}
    for _ in range(count):
        name = reader.text("a tensor's name", MAX_NAME_BYTES)
        if not name or name in names:
            raise GgufInvalid("a tensor's name is empty or occurs twice")
        names.add(name)
        elements, nbytes, type_name = _read_extent(reader)
        offset = reader.u64()
        if offset % alignment:
            raise GgufInvalid(f"a tensor starts at offset {offset}, which is no multiple of {alignment}")
        parameters += elements
        bytes_by_type[type_name] = bytes_by_type.get(type_name, 0) + nbytes
        extents.append((offset, nbytes))
    data_start = -(-reader.position // alignment) * alignment
    data_size = size - data_start
    previous_end = 0
    for offset, nbytes in sorted(extents):
        if offset + nbytes > data_size:
            raise GgufInvalid("a tensor reaches beyond the end of the file: it is damaged or cut off")
        if offset < previous_end:
            raise GgufInvalid("two tensors overlap")
        previous_end = offset + nbytes
    largest = max(bytes_by_type, key=lambda name: bytes_by_type[name], default="")
    return _Tensors(count, parameters, sum(bytes_by_type.values()), largest)


def _read_extent(reader: _Reader) -> tuple[int, int, str]:
    """(weights, bytes, type name) of the tensor entry whose dimensions come next."""
    dimensions = reader.u32()
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise GgufInvalid(f"a tensor has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are allowed")
    shape = struct.unpack(f"<{dimensions}Q", reader.take(8 * dimensions))
    elements = math.prod(shape)  # Python's integers do not wrap, so one comparison settles it
    if elements == 0 or elements >= 1 << 60:
        raise GgufInvalid("a tensor's dimensions are zero or overflow")
    kind = reader.u32()
    if kind not in fmt.TENSOR_TYPES:
        raise GgufInvalid(f"a tensor has the unknown type {kind}")
    name, block, block_bytes = fmt.TENSOR_TYPES[kind]
    if shape[0] % block:
        raise GgufInvalid(f"a tensor's row of {shape[0]} weights is no multiple of its {name} block of {block}")
    return elements, elements // block * block_bytes, name


def _facts(version: int, metadata: _Metadata, tensors: _Tensors) -> GgufHeader:
    scalars = metadata.scalars
    split_index = _number(metadata, "split.no", 65_535)
    architecture = scalars.get("general.architecture", "")
    if not isinstance(architecture, str) or (architecture and not _ARCHITECTURE.fullmatch(architecture)):
        raise GgufInvalid("general.architecture is not a name")
    if not architecture and split_index == 0:
        raise GgufInvalid("general.architecture is missing")
    file_type = scalars.get("general.file_type")
    tokens = metadata.arrays.get("tokenizer.ggml.tokens")
    heads = _number(metadata, f"{architecture}.attention.head_count", 1 << 16)
    embedding = _number(metadata, f"{architecture}.embedding_length", 1 << 24)
    head_size = embedding // heads if heads else 0
    return GgufHeader(
        version=version,
        architecture=architecture,
        name=_text(metadata, "general.name"),
        license=_text(metadata, "general.license"),
        quantisation=fmt.FILE_TYPES.get(file_type, tensors.largest_type)
        if isinstance(file_type, int)
        else tensors.largest_type,
        parameters=tensors.parameters,
        tensor_count=tensors.count,
        tensor_bytes=tensors.bytes,
        context_length=_number(metadata, f"{architecture}.context_length", 1 << 31),
        block_count=_number(metadata, f"{architecture}.block_count", 1024),
        embedding_length=embedding,
        head_count=heads,
        head_count_kv=_number(metadata, f"{architecture}.attention.head_count_kv", 1 << 16) or heads,
        key_length=_number(metadata, f"{architecture}.attention.key_length", 1 << 16) or head_size,
        value_length=_number(metadata, f"{architecture}.attention.value_length", 1 << 16) or head_size,
        sliding_window=_number(metadata, f"{architecture}.attention.sliding_window", 1 << 32),
        vocabulary_size=tokens.count if tokens else 0,
        has_chat_template=bool(scalars.get("tokenizer.chat_template")),
        has_fim_tokens=any(
            key in metadata.types for key in ("tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id")
        ),
        is_embedding=f"{architecture}.pooling_type" in metadata.types,
        split_count=_number(metadata, "split.count", 65_535),
        split_index=split_index,
    )


def _number(metadata: _Metadata, key: str, most: int) -> int:
    """A count, the largest entry of a per-layer array of counts, or 0 where the file is silent."""
    value = metadata.scalars.get(key)
    array = metadata.arrays.get(key)
    values: tuple[object, ...] = (value,) if array is None else array.numbers
    if value is None and array is None:
        return 0
    largest = 0
    for each in values:
        if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each <= most:
            raise GgufInvalid(f"{_shown(key)} is not a whole number from 0 to {most}")
        largest = max(largest, each)
    return largest


def _text(metadata: _Metadata, key: str) -> str:
    """A text for people: printable and short, or empty."""
    value = metadata.scalars.get(key, "")
    return "".join(each for each in value if each.isprintable())[:200] if isinstance(value, str) else ""


def _shown(key: str) -> str:
    return key.partition(".")[2] or key
