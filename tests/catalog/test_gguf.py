"""P18: no GGUF header hurts the process that reads it. Valid files pass, everything else is `GgufInvalid`, quickly."""

from __future__ import annotations

import os
import random
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from ocserve.catalog.errors import GgufInvalid
from ocserve.catalog.gguf import GgufHeader, read_header
from ocserve.catalog.gguf_layers import layers
from ocserve.catalog.gguf_metadata import Array, Metadata, Tensors
from tests import tiny
from tests.catalog import raw_gguf
from tests.catalog.raw_gguf import ARRAY, STRING, UINT32, Header, Piece, Tensor, bent, joined, text, u32, u64

pytestmark = pytest.mark.beside

INTERESTING = (0, 1, 2, 3, 5, 7, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**60, 2**63 - 1, 2**63, 2**64 - 1)


def write(folder: Path, content: bytes) -> Path:
    path = folder / "case.gguf"
    path.write_bytes(content)
    return path


def refusal(folder: Path, content: bytes) -> str:
    with pytest.raises(GgufInvalid) as caught:
        read_header(write(folder, content))
    return caught.value.message


@pytest.mark.parametrize("family", ["attention", "sliding", "recurrent"])
def test_real_files_of_every_family_pass(tmp_path: Path, family: tiny.Family) -> None:
    header = read_header(tiny.write(tmp_path / "tiny.gguf", family))
    assert header.architecture == {"attention": "llama", "sliding": "gemma3", "recurrent": "mamba"}[family]
    assert header.name == f"tiny-{family}"
    assert header.context_length == tiny.CONTEXT
    assert header.block_count == 2
    assert header.quantisation == "F32"
    assert header.has_chat_template
    assert header.tensor_bytes == header.parameters * 4
    assert header.sliding_window == (64 if family == "sliding" else 0)


def test_the_hand_written_file_is_valid_so_that_its_mutations_mean_something(tmp_path: Path) -> None:
    header = read_header(write(tmp_path, Header().bytes()))
    assert (header.vocabulary_size, header.parameters, header.head_count) == (5, 32 * 5 + 32, 4)
    assert header.key_length == 8


def test_smollm2_is_read_with_its_facts(smollm2: Path) -> None:
    began = time.thread_time()
    header = read_header(smollm2)
    assert time.thread_time() - began < 0.5
    assert header.architecture == "llama"
    assert header.quantisation == "Q4_1"
    assert header.parameters == 134_515_008
    assert (header.context_length, header.block_count, header.embedding_length) == (8192, 30, 576)
    assert (header.head_count, header.head_count_kv, header.vocabulary_size) == (9, 3, 49_152)


def test_a_vocabulary_of_262k_is_read_in_under_a_second_and_16_mb(tmp_path: Path, full: bool) -> None:
    tokens = [f"token{index}" for index in range(262_144)]
    header = Header(
        tokens=tokens, types=[1] * len(tokens), merges=[f"a{index} b" for index in range(500_000 if full else 100_000)]
    )
    path = write(tmp_path, header.bytes())
    began = time.thread_time()
    assert read_header(path).vocabulary_size == 262_144
    assert time.thread_time() - began < 1.0
    tracemalloc.start()
    try:
        read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 16 * 1024 * 1024
    finally:
        tracemalloc.stop()


def test_a_1_kb_file_that_declares_2_to_the_60_strings_costs_nothing(tmp_path: Path) -> None:
    content = bent(Header().pieces(), "tokenizer.ggml.tokens.count", 2**60)
    assert len(content) < 2048
    path = write(tmp_path, content)
    tracemalloc.start()
    try:
        began = time.thread_time()
        with pytest.raises(GgufInvalid, match="claims 1152921504606846976 strings"):
            read_header(path)
        assert time.thread_time() - began < 0.05
        assert tracemalloc.get_traced_memory()[1] < 10 * 1024 * 1024
    finally:
        tracemalloc.stop()


PIECES = Header().pieces()
SHAPES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "magic only": lambda: b"GGUF",
    "other magic": lambda: b"GGML" + Header().bytes()[4:],
    "version 1": lambda: bent(PIECES, "version", 1),
    "big endian": lambda: bent(PIECES, "version", 3 << 24),
    "too many keys": lambda: bent(PIECES, "keys", 2**40),
    "too many tensors": lambda: bent(PIECES, "tensors", 2**63),
    "more tensors than fit": lambda: bent(PIECES, "tensors", 1000),
    "key longer than the file": lambda: bent(PIECES, "key.length", 2**63),
    "string that wraps when its header is added": lambda: bent(PIECES, "general.name.length", 2**64 - 1),
    "array that wraps when multiplied": lambda: bent(PIECES, "tokenizer.ggml.token_type.count", 2**62),
    "unknown value type": lambda: bent(PIECES, "type", 13),
    "negative value type": lambda: bent(PIECES, "type", 2**32 - 1),
    "unknown element type": lambda: bent(PIECES, "element type", 99),
    "array of arrays": lambda: Header(
        extra=[[*text("x.nested"), u32(ARRAY), u32(ARRAY), u64(1), u32(ARRAY), u64(1), u32(UINT32), u64(0)]]
    ).bytes(),
    "duplicate key": lambda: Header(extra=[Header.string("general.name", "again")]).bytes(),
    "empty key": lambda: Header(extra=[Header.number("", 1)]).bytes(),
    "key with NUL": lambda: Header(extra=[Header.number("a\0b", 1)]).bytes(),
    "key not UTF-8": lambda: Header(extra=[[*text(b"\xff\xfe"), u32(UINT32), u32(1)]]).bytes(),
    "boolean 2": lambda: Header(extra=[[*text("x.flag"), u32(raw_gguf.BOOL), Piece("raw", b"\2")]]).bytes(),
    "duplicate tensor": lambda: Header(tensors=[Tensor("a", (32,)), Tensor("a", (32,))]).bytes(),
    "tensor name of 64 bytes": lambda: Header(tensors=[Tensor("a" * 64, (32,))]).bytes(),
    "tensor without dimensions": lambda: bent(PIECES, "dimensions", 0),
    "tensor of five dimensions": lambda: Header(tensors=[Tensor("a", (1, 1, 1, 1, 1))]).bytes(),
    "dimension zero": lambda: bent(PIECES, "dimension", 0),
    "negative dimension": lambda: bent(PIECES, "dimension", 2**64 - 1),
    "dimensions that overflow": lambda: bent(PIECES, "dimension", 2**62),
    "unknown tensor type": lambda: bent(PIECES, "tensor type", 1000),
    "removed tensor type": lambda: bent(PIECES, "tensor type", 4),
    "row that is no multiple of its block": lambda: Header(tensors=[Tensor("a", (33,), kind=8)]).bytes(),
    "tensor beyond the file": lambda: bent(PIECES, "dimension", 2**30),
    "offset beyond the file": lambda: bent(PIECES, "offset", 2**40),
    "offset that wraps": lambda: bent(PIECES, "offset", 2**64 - 32),
    "offset out of alignment": lambda: bent(PIECES, "offset", 1),
    "overlapping tensors": lambda: bent(PIECES, "offset", 0, occurrence=1),
    "data cut off": lambda: Header().bytes()[:-1],
    "alignment zero": lambda: Header(alignment=None, extra=[Header.number("general.alignment", 0)]).bytes(),
    "alignment 33": lambda: Header(alignment=None, extra=[Header.number("general.alignment", 33)]).bytes(),
    "alignment 2^31": lambda: Header(alignment=None, extra=[Header.number("general.alignment", 2**31)]).bytes(),
    "alignment as text": lambda: Header(alignment=None, extra=[Header.string("general.alignment", "32")]).bytes(),
    "byte token with a sign": lambda: Header(tokens=["<s>", "<0x-1>", "<0x0A>", "a", "b"]).bytes(),
    "byte token too long": lambda: Header(tokens=["<s>", "<0x100>", "<0x0A>", "a", "b"]).bytes(),
    "byte token that is a word": lambda: Header(tokens=["<s>", "nobyte", "<0x0A>", "a", "b"]).bytes(),
    "fewer token types than tokens": lambda: Header(types=[3, 6, 6, 1]).bytes(),
    "token types of text": lambda: Header(types=[]).bytes().replace(b"token_type", b"token_tyPe"),
    "tokens as a number": lambda: Header(extra=[Header.number("tokenizer.ggml.tokens", 1)]).bytes(),
    "a token of 70 kB": lambda: Header(tokens=["a" * 70_000, "<0x00>", "<0x0A>", "a", "b"]).bytes(),
    "context length as text": lambda: joined(PIECES).replace(
        joined(Header.number("llama.context_length", 512)), joined(Header.string("llama.context_length", "512"))
    ),
    "block count of a million": lambda: bent(PIECES, "llama.block_count", 1_000_000),
    "architecture with a slash": lambda: joined(PIECES).replace(b"llama", b"../ma", 1),
}
HARMLESS = {"token types of text"}  # a key of another name: the file is valid


@pytest.mark.parametrize("shape", SHAPES)
def test_every_known_attack_is_refused(tmp_path: Path, shape: str) -> None:
    content = SHAPES[shape]()
    if shape in HARMLESS:
        read_header(write(tmp_path, content))
    else:
        assert refusal(tmp_path, content)


def test_things_that_are_no_files_are_refused(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.gguf"
    os.mkfifo(fifo)
    for path in (tmp_path, tmp_path / "absent.gguf", fifo, Path("/dev/zero"), "nul\0.gguf"):
        with pytest.raises(GgufInvalid):
            read_header(path)


def test_a_file_that_shrinks_while_it_is_read_is_refused_and_does_not_kill_the_reader(tmp_path: Path) -> None:
    tokens = [f"token{index}" for index in range(50_000)]
    content = Header(tokens=tokens, types=[1] * len(tokens)).bytes()
    path = write(tmp_path, content)
    stop = threading.Event()

    def shrink() -> None:
        while not stop.is_set():
            os.truncate(path, 1000)
            path.write_bytes(content)

    thread = threading.Thread(target=shrink)
    thread.start()
    try:
        for _ in range(30):
            try:
                read_header(path)
            except GgufInvalid:
                continue
    finally:
        stop.set()
        thread.join()


def test_mutated_headers_are_refused_or_valid_quickly_and_in_little_memory(tmp_path: Path, full: bool) -> None:
    """10,000 structure-aware mutations (1,000 in the short form), each under 50 ms of CPU and 16 MB."""
    chance = random.Random(18)
    path = tmp_path / "case.gguf"
    accepted = refused = 0
    slowest, largest = 0.0, 0
    tracemalloc.start()
    try:
        for _ in range(10_000 if full else 1_000):
            path.write_bytes(mutated(chance))
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            began = time.thread_time()
            try:
                header = read_header(path)
                assert isinstance(header, GgufHeader)
                accepted += 1
            except GgufInvalid:
                refused += 1
            slowest = max(slowest, time.thread_time() - began)
            largest = max(largest, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    print(f"accepted {accepted}, refused {refused}, slowest {slowest * 1e3:.1f} ms, largest {largest / 1e6:.2f} MB")
    assert refused > accepted > 0
    assert slowest < 0.05
    assert largest < 16 * 1024 * 1024


def mutated(chance: random.Random) -> bytes:
    """A valid file with one to three changes that know its structure."""
    tokens = [chance.choice(["a", "<0x41>", "<0x4>", "é", ""]) for _ in range(chance.randint(0, 40))]
    pieces = Header(
        tokens=tokens,
        types=[6 if token == "<0x41>" else 1 for token in tokens],
        tensors=[
            Tensor(f"t{index}", tuple(chance.choice([1, 2, 4, 8]) for _ in range(chance.randint(1, 4))))
            for index in range(chance.randint(0, 6))
        ],
        alignment=chance.choice([None, 1, 8, 32, 64]),
    ).pieces()
    for _ in range(chance.randint(1, 3)):
        pieces = chance.choice([_bend, _bend, _bend, _drop, _double, _swap, _scramble])(chance, pieces)
    content = joined(pieces)
    if chance.random() < 0.2:
        content = content[: chance.randint(0, len(content))]
    if chance.random() < 0.1:
        content += chance.randbytes(chance.randint(1, 4096))
    return content


def _bend(chance: random.Random, pieces: list[Piece]) -> list[Piece]:
    index = chance.choice([index for index, piece in enumerate(pieces) if piece.kind != "raw"])
    piece = pieces[index]
    value = struct.unpack("<I" if piece.kind == "u32" else "<Q", piece.data)[0]
    value = chance.choice([*INTERESTING, value + 1, value - 1, value * 2, -value, chance.getrandbits(64)])
    return [*pieces[:index], (u32 if piece.kind == "u32" else u64)(value), *pieces[index + 1 :]]


def _drop(chance: random.Random, pieces: list[Piece]) -> list[Piece]:
    index = chance.randrange(len(pieces))
    return [*pieces[:index], *pieces[index + 1 :]]


def _double(chance: random.Random, pieces: list[Piece]) -> list[Piece]:
    index, count = chance.randrange(len(pieces)), chance.randint(1, 8)
    return [*pieces[:index], *pieces[index : index + count], *pieces[index:]]


def _swap(chance: random.Random, pieces: list[Piece]) -> list[Piece]:
    first, second = sorted(chance.randrange(len(pieces)) for _ in range(2))
    moved = list(pieces)
    moved[first], moved[second] = moved[second], moved[first]
    return moved


def _scramble(chance: random.Random, pieces: list[Piece]) -> list[Piece]:
    index = chance.randrange(len(pieces))
    raw = bytearray(pieces[index].data)
    for _ in range(min(len(raw), chance.randint(1, 8))):
        raw[chance.randrange(len(raw))] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.getrandbits(8)])
    return [*pieces[:index], Piece(pieces[index].kind, bytes(raw), pieces[index].label), *pieces[index + 1 :]]


def test_a_string_value_may_be_longer_than_what_is_kept(tmp_path: Path) -> None:
    template = Header.string("tokenizer.chat_template_long", "x" * 300_000)
    assert read_header(write(tmp_path, Header(extra=[template]).bytes())).has_chat_template


def test_the_element_type_of_a_string_array_is_a_string(tmp_path: Path) -> None:
    assert STRING == 8  # as the format says
    bytes_array = [*text("x.bytes"), u32(ARRAY), u32(0), u64(100_000), Piece("raw", b"\0" * 100_000)]
    read_header(write(tmp_path, Header(extra=[bytes_array]).bytes()))


def test_the_parts_of_a_split_model_are_one_model(tmp_path: Path) -> None:
    norm, key = Tensor("blk.0.attn_norm.weight", (32,)), Tensor("blk.1.attn_k.weight", (32, 32))
    whole = Header(tensors=[*Header().tensors, norm, key])
    (tmp_path / "whole.gguf").write_bytes(whole.bytes())
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    first.write_bytes(Header(tensors=[*Header().tensors, norm]).bytes())
    second.write_bytes(Header(tensors=[key]).bytes())
    assert read_header(first, [second]) == read_header(tmp_path / "whole.gguf")
    assert [layer.weight_bytes for layer in read_header(first, [second]).layers] == [128, 4096]
    second.write_bytes(Header(tensors=[key]).bytes()[:-1])
    with pytest.raises(GgufInvalid, match=r"its part second\.gguf: a tensor reaches beyond"):
        read_header(first, [second])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"llama.attention.key_length": 1 << 20}, "attention.key_length is not a whole number"),
        ({"llama.ssm.state_size": 1 << 20}, "ssm.state_size is not a whole number"),
        ({"llama.expert_used_count": 1 << 30}, "expert_used_count is not a whole number"),
    ],
)
def test_sizes_beyond_any_model_are_refused(tmp_path: Path, keys: dict[str, int], message: str) -> None:
    extra = [Header.number(key, value) for key, value in keys.items()]
    assert message in refusal(tmp_path, Header(extra=extra).bytes())


@pytest.mark.parametrize(
    ("architecture", "window", "pattern", "slides"),
    [
        ("gemma3", 64, None, [True] * 5 + [False] + [True] * 2),
        ("gemma2", 0, None, [True, False] * 4),  # llama.cpp's default window
        ("smallthinker", 0, None, [False, True, True, True] * 2),
        ("gemma3", 64, 4, [True, True, True, False] * 2),
        ("cohere2", 0, None, [False] * 8),  # no window, nothing slides
        ("llama", 64, None, [False] * 8),  # llama.cpp reads no window for it
    ],
)
def test_which_layers_slide_follows_llama_cpp(
    architecture: str, window: int, pattern: int | None, slides: list[bool]
) -> None:
    metadata = Metadata()
    if window:
        metadata.scalars[f"{architecture}.attention.sliding_window"] = window
    if pattern:
        metadata.scalars[f"{architecture}.attention.sliding_window_pattern"] = pattern
    assert [layer.slides for layer in layers(metadata, Tensors(), architecture, 8)] == slides


def test_per_layer_keys_and_shared_caches_are_read() -> None:
    metadata = Metadata()
    prefix = "gemma4.attention."
    metadata.scalars |= {"gemma4.embedding_length": 64, prefix + "head_count": 4, prefix + "sliding_window": 8}
    metadata.scalars |= {prefix + "key_length": 32, prefix + "value_length": 32, prefix + "shared_kv_layers": 1}
    metadata.scalars |= {prefix + "key_length_swa": 16, prefix + "value_length_swa": 16}
    metadata.arrays[prefix + "head_count_kv"] = Array(4, 4, 0, (2, 1, 2, 1))
    metadata.arrays[prefix + "sliding_window_pattern"] = Array(7, 4, 0, (1, 0, 1, 0))
    found = layers(metadata, Tensors(), "gemma4", 4)
    assert [(layer.keys, layer.values, layer.slides) for layer in found] == [
        (32, 32, True),
        (32, 32, False),
        (32, 32, True),
        (0, 0, False),
    ]
