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
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from ocserve.catalog import gguf_format as fmt
from ocserve.catalog.errors import GgufInvalid
from ocserve.catalog.gguf_header import GgufHeader as GgufHeader
from ocserve.catalog.gguf_header import facts
from ocserve.catalog.gguf_metadata import Array, Metadata, Tensors
from ocserve.catalog.gguf_reader import WINDOW, Reader

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
_BYTE_TOKEN_TYPE = 6  # LLAMA_TOKEN_TYPE_BYTE


def read_header(path: str | Path, parts: Sequence[Path] = ()) -> GgufHeader:
    """The facts of the GGUF file at `path`, summed over the further `parts` of a split model, or `GgufInvalid`."""
    tensors = Tensors()
    version, metadata = _read_file(path, tensors)
    for part in parts:
        try:
            _read_file(part, tensors)
        except GgufInvalid as error:
            raise GgufInvalid(f"its part {part.name}: {error.message}") from error
    return facts(version, metadata, tensors)


def read_metadata(path: str | Path) -> Metadata:
    """What the file at `path` says of itself, if it keeps every rule above, or `GgufInvalid`."""
    return _read_file(path, Tensors())[1]


def _read_file(path: str | Path, tensors: Tensors) -> tuple[int, Metadata]:
    """Judge one file, adding its tensors to `tensors`."""
    try:
        status = os.stat(path)  # before opening, which would wait on a FIFO
        if not stat.S_ISREG(status.st_mode):
            raise GgufInvalid("not a regular file")
        with open(path, "rb", buffering=0) as file:
            return _read(file, os.fstat(file.fileno()).st_size, tensors)
    except OSError as error:
        raise GgufInvalid(f"cannot be read: {error.strerror or type(error).__name__}") from error
    except ValueError as error:  # a path with a NUL
        raise GgufInvalid(f"cannot be opened: {error}") from error


def _read(file: BinaryIO, size: int, tensors: Tensors) -> tuple[int, Metadata]:
    reader = Reader(file, size)
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
    _read_tensors(reader, tensor_count, _alignment(metadata), size, tensors)
    return version, metadata


def _read_metadata(reader: Reader, key_count: int) -> Metadata:
    metadata = Metadata()
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


def _read_string(reader: Reader) -> str:
    length = reader.string_length("a value", reader.left)
    if length > MAX_KEPT_STRING:
        reader.skip(length)
        return "…"  # stands for a text that is there and not needed, such as a long chat template
    return reader.take(length).decode("utf-8", errors="replace")


def _read_array(reader: Reader, key: str, metadata: Metadata) -> Array:
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
        return Array(kind, count, offset)
    if kind not in fmt.SCALARS:  # arrays of arrays included: llama.cpp has none, and depth is where parsers fall
        raise GgufInvalid(f"an array has the unknown element type {kind}")
    code, width = fmt.SCALARS[kind]
    if count * width > reader.left:
        raise GgufInvalid(f"an array claims {count} values, and {reader.left} bytes are left in the file")
    if 0 < count <= MAX_KEPT_NUMBERS:
        return Array(kind, count, offset, struct.unpack(f"<{count}{code}", reader.take(count * width)))
    reader.skip(count * width)
    return Array(kind, count, offset)


def _check_vocabulary(file: BinaryIO, metadata: Metadata) -> None:
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


def _check_byte_tokens(file: BinaryIO, types: Array, marks: bytearray) -> None:
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


def _alignment(metadata: Metadata) -> int:
    if "general.alignment" not in metadata.types:
        return 32
    alignment = metadata.scalars.get("general.alignment")
    if metadata.types["general.alignment"] != fmt.UINT32 or not isinstance(alignment, int):
        raise GgufInvalid("general.alignment is not a 32-bit number")
    if not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise GgufInvalid(f"general.alignment is {alignment}; a power of two up to {MAX_ALIGNMENT} is needed")
    return alignment


def _read_tensors(reader: Reader, count: int, alignment: int, size: int, tensors: Tensors) -> None:
    names: set[str] = set()
    extents: list[tuple[int, int]] = []
    for _ in range(count):
        name = reader.text("a tensor's name", MAX_NAME_BYTES)
        if not name or name in names:
            raise GgufInvalid("a tensor's name is empty or occurs twice")
        names.add(name)
        shape, nbytes, type_name = _read_extent(reader)
        offset = reader.u64()
        if offset % alignment:
            raise GgufInvalid(f"a tensor starts at offset {offset}, which is no multiple of {alignment}")
        tensors.add(name, shape, nbytes, type_name)
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


def _read_extent(reader: Reader) -> tuple[tuple[int, ...], int, str]:
    """(shape, bytes, type name) of the tensor entry whose dimensions come next."""
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
    return shape, elements // block * block_bytes, name
