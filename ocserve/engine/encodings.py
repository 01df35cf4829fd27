"""A fast tokenizer for byte-level BPE vocabularies: a `tiktoken` encoding that gives exactly llama.cpp's ids.

llama.cpp joins the pair of neighbours that stands first in the model's list of merges; tiktoken joins neighbours whose
joined bytes have the lowest rank, whatever the pair. The two are the same for every word if the ranks are those of the
*live* merges, in their order. A merge is live if its two halves, written one after the other, are tokenised as these
two halves by the merges before it. Any other merge never happens: what surrounds a pair cannot change how its own bytes
were joined before. A text has at most one live merge, and tokens without one are left out, so that tiktoken has no pair
to join that llama.cpp would not.

How text is cut into words is a regular expression in both, and those are only known to be equal: each is tried on a
probe text at load, and llama.cpp's tokenizer serves the models that have another vocabulary or fail the probe.
"""

from __future__ import annotations

import codecs
import functools
import mmap
import re
import struct
import sys
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import tiktoken

from ocserve.engine.llama import Vocab
from ocserve.engine.merges import ALPHABET, Unsupported, complete, live

_NO_TOKEN = -1
_MOST_TOKENS = 1 << 20
_MOST_MERGES = 1 << 22
_MOST_KEYS = 1 << 16

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# llama.cpp cuts at digits first and matches the rest piece by piece, so white space before a digit ends its piece.
_WORDS_AND_DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_CONTRACTIONS = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_THREE_DIGITS, _ONE_DIGIT = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)


@dataclass(frozen=True, slots=True)
class Splitting:
    """How text becomes words, and whether a word that is a token is taken whole although no merges lead to it."""

    pattern: str
    whole_words: bool = False


# `tokenizer.ggml.pre` -> splitting, from llama.cpp's src/llama-vocab.cpp (`llm_tokenizer_bpe` and the names above it).
# Names whose expressions cannot be written as one, or that no vocabulary at hand has proven, are not here.
SPLITTINGS = {
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "phi-2"), Splitting(_WORDS)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), Splitting(_WORDS_AND_DIGITS)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), Splitting(_THREE_DIGITS, whole_words=True)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), Splitting(_ONE_DIGIT)),
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a GGUF file says of its byte-level BPE: token texts by id in GPT-2's byte alphabet, merges in order."""

    splitting: Splitting
    tokens: list[str]
    merges: list[str]


class Encoding:
    """Text to token ids by tiktoken. Safe to use from several threads; releases the GIL while it computes."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Raises `Unsupported` where equality with llama.cpp cannot be had."""
        ids = {text: token for token, text in enumerate(vocabulary.tokens)}
        if len(ids) != len(vocabulary.tokens):
            raise Unsupported("the vocabulary has two tokens of one text")
        if vocabulary.splitting.whole_words:
            texts = complete(vocabulary.merges)
            texts += _whole_words(vocabulary.tokens, texts)
        else:
            texts = live(vocabulary.merges)
        if not ids.keys() >= set(texts[len(ALPHABET) :]):
            raise Unsupported("the result of a merge is not in the vocabulary")
        # llama.cpp drops a byte that the vocabulary does not have.
        self._ids = np.array([ids.get(text, _NO_TOKEN) for text in texts], dtype=np.int32)
        self._drops = bool((self._ids == _NO_TOKEN).any())
        self._encoding = tiktoken.Encoding(
            "gguf",
            pat_str=vocabulary.splitting.pattern,
            mergeable_ranks=dict(zip(_as_bytes(texts), range(len(texts)), strict=True)),
            special_tokens={},
        )
        self._encoding._mergeable_ranks = {}  # tiktoken has copied what it needs; this is megabytes

    def tokenize(self, text: str) -> list[int]:
        """The ids of `text`. Raises `Unsupported` for the rare text that tiktoken's search for words gives up on."""
        try:
            ranks = self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # the regular expression's limit on backtracking
            raise Unsupported("the text is beyond tiktoken's limit on backtracking") from None
        found = self._ids[ranks]
        if self._drops:
            found = found[found != _NO_TOKEN]
        tokens: list[int] = found.tolist()
        return tokens


class PlainTokenizer:
    """Text to ids, by tiktoken where that is known to be equal and by llama.cpp everywhere else.

    `name` says which of the two serves, `reason` why it is not tiktoken. Threads may share it.
    """

    def __init__(self, vocab: Vocab, encoding: Encoding | None = None, reason: str | None = None) -> None:
        """Takes `encoding` if it passes the probe."""
        self._vocab = vocab
        self._encoding = encoding
        self.reason = reason
        self._foreign: re.Pattern[str] | None = None
        if encoding is not None:
            # llama.cpp looks for user-defined tokens before it looks for words.
            foreign = [re.escape(token.text) for token in vocab.marked() if token.kind == "user_defined"]
            self._foreign = re.compile("|".join(foreign)) if foreign else None
            if any(self(text) != self._by_llama(text) for text in _probes()):
                self._encoding, self.reason = None, "tiktoken gave other ids than llama.cpp for the probe text"

    @property
    def name(self) -> Literal["tiktoken", "llama.cpp"]:
        """The library that tokenises."""
        return "llama.cpp" if self._encoding is None else "tiktoken"

    def __call__(self, text: str) -> list[int]:
        """Ids of `text`, with no special token parsed and none added."""
        if self._encoding is None or not self._is_known(text):
            return self._by_llama(text)
        try:
            return self._encoding.tokenize(text)
        except Unsupported:
            return self._by_llama(text)

    def _is_known(self, text: str) -> bool:
        if self._foreign is not None and self._foreign.search(text):
            return False
        return text.isascii() or not _unsure()[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)].any()

    def _by_llama(self, text: str) -> list[int]:
        return self._vocab.tokenize(text, parse_special=False)


def build(path: Path) -> Encoding:
    """The encoding of the model at `path`; raises `Unsupported`. Needs no llama.cpp: it can run while that loads."""
    return Encoding(read(path))


def prove(vocab: Vocab, encoding: Callable[[], Encoding]) -> PlainTokenizer:
    """The tokenizer for `vocab`: what `encoding` returns if it stands the probe, llama.cpp's otherwise."""
    try:
        return PlainTokenizer(vocab, encoding())
    except Unsupported as problem:
        return PlainTokenizer(vocab, reason=str(problem))


@functools.cache
def _unsure() -> npt.NDArray[np.bool_]:
    """For each code point whether one library may take it for a letter, a digit or white space and the other not.

    Their tables are of different versions of Unicode. Over all characters, the pinned llama.cpp and tiktoken 0.14
    differ exactly in `_UNICODE_16`; what Python does not know either may be news in a later tiktoken.
    """
    unsure = np.ones(sys.maxunicode + 1, dtype=np.bool_)
    unsure[:_ASSIGNED_END] = [unicodedata.category(chr(code)) == "Cn" for code in range(_ASSIGNED_END)]
    for first, last in _UNICODE_16:
        unsure[first : last + 1] = True
    return unsure


# Letters, marks and digits of Unicode 16 (its UnicodeData.txt) that llama.cpp's tables lack.
# fmt: off
_UNICODE_16 = (
    (0x1C89, 0x1C8A), (0xA7CB, 0xA7CD), (0xA7DA, 0xA7DC), (0x105C0, 0x105F3), (0x10D40, 0x10D65), (0x10D6F, 0x10D85),
    (0x10EC2, 0x10EC4), (0x11380, 0x11389), (0x1138B, 0x1138B), (0x1138E, 0x1138E), (0x11390, 0x113B5),
    (0x113B7, 0x113B7), (0x113D1, 0x113D1), (0x113D3, 0x113D3), (0x116D0, 0x116E3), (0x11BC0, 0x11BE0),
    (0x11BF0, 0x11BF9), (0x13460, 0x143FA), (0x16100, 0x1611D), (0x16130, 0x16139), (0x16D40, 0x16D6C),
    (0x16D70, 0x16D79), (0x18CFF, 0x18CFF), (0x1CCF0, 0x1CCF9), (0x1E5D0, 0x1E5ED), (0x1E5F0, 0x1E5FA),
)
# fmt: on
_ASSIGNED_END = 0x33480  # beyond: unassigned, private use, tags and variation selectors


@functools.cache
def _probes() -> tuple[str, ...]:
    """A few thousand tokens of what tokenizers disagree on: every neighbourhood of kinds of characters, and prose."""
    spaces = ("", " ", "  ", "   ", "\n", "\n\n", " \n", "\n ", "\t", "\r\n", "\u00a0", "\u3000 ", "\u2028", "\x85")
    words = (
        *("a", "Word", "don't", "WE'LL", "'sun", "12345", "3.14", "x86", "½²Ⅷ", "...", "!?\n", "(", "$_", "日本語です"),
        *("Grüße", "e\u0301a", "Привет", "مرحبا", "नमस्ते", "한국어", "ไทย", "🎈👩\u200d🚀"),
        *("\x00\x1f\x7f", "\ufffd", "ʰǅª"),
    )
    pairs = "".join(f"{one}{space}{other}" for space in spaces for one, other in pairwise((*words, *words[::-1])))
    lines = (
        "def step(self, n: int) -> None:\n    if n >= 10_000:\n\t\treturn  # don't\n\n\n",
        '{"id": 7, "tags": ["a", "b"], "x": -1.5e-10}\n<p class="q">It\'s 5 o\'clock, they\'re late.</p>\n',
        "supercalifragilisticexpialidocious Donaudampfschifffahrtsgesellschaft " + "ab" * 300 + " " * 100 + "=" * 100,
    )
    return (pairs, "".join(lines), *(space for space in spaces if space), *words)


def _whole_words(tokens: Iterable[str], merged: Iterable[str]) -> list[str]:
    """The tokens that no merge makes and a word may be equal to; raises where tiktoken would make one of two others."""
    texts = set(merged)
    found = [text for text in tokens if text not in texts and _ALPHABET_SET.issuperset(text)]
    if any(text[:at] in texts and text[at:] in texts for text in found for at in range(1, len(text))):
        raise Unsupported("two tokens whose texts make a third have no merge")
    return found


_ALPHABET_SET = frozenset(ALPHABET)
_TO_BYTES = codecs.charmap_build(ALPHABET)


def _as_bytes(texts: list[str]) -> list[bytes]:
    joined, _ = codecs.charmap_encode("".join(texts), "strict", _TO_BYTES)
    found, at = [], 0
    for text in texts:
        found.append(joined[at : at + len(text)])
        at += len(text)
    return found


class _Header:
    """A cursor over a GGUF header. Reading beyond the end raises `struct.error` or `IndexError`."""

    # GGUF value type -> bytes of a scalar (ggml's gguf.h); 8 is a string, 9 an array.
    SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # noqa: RUF012 - a constant
    STRING, ARRAY = 8, 9

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def u32(self) -> int:
        self._at += 4
        return int(struct.unpack_from("<I", self._data, self._at - 4)[0])

    def u64(self) -> int:
        self._at += 8
        return int(struct.unpack_from("<Q", self._data, self._at - 8)[0])

    def text(self) -> str:
        length = self.u64()
        self._skip(length)
        return self._data[self._at - length : self._at].decode()

    def texts(self, most: int) -> list[str]:
        """An array of strings, after its type."""
        kind, count = self.u32(), self.u64()
        if kind != self.STRING or count > most:
            raise Unsupported("a list in the file's header is not what it should be")
        # The one loop over the whole vocabulary: everything in local names.
        data, at, found, unpack = self._data, self._at, [], struct.Struct("<Q").unpack_from
        for _ in range(count):
            end = at + 8 + unpack(data, at)[0]
            found.append(data[at + 8 : end].decode())
            at = end
        self._at = at
        return found

    def skip_value(self, kind: int) -> None:
        if kind == self.STRING:
            self._skip(self.u64())
        elif kind == self.ARRAY:
            kind, count = self.u32(), self.u64()
            if kind in self.SIZES:
                self._skip(count * self.SIZES[kind])
            else:
                for _ in range(count):
                    self.skip_value(kind)
        else:
            self._skip(self.SIZES[kind])

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._data):
            raise IndexError("beyond the end of the file")


def read(path: Path) -> Vocabulary:
    """The byte-level BPE vocabulary of a GGUF file; raises `Unsupported` if it has another, or cannot be read."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Header(data))
    except (OSError, ValueError, KeyError, IndexError, OverflowError, RecursionError, struct.error):
        raise Unsupported("the file's header could not be read") from None


def _read(header: _Header) -> Vocabulary:
    texts: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    wanted = {"tokenizer.ggml.tokens": _MOST_TOKENS, "tokenizer.ggml.merges": _MOST_MERGES}
    header.u32()  # magic and version: llama.cpp has loaded this file
    header.u32()
    header.u64()
    for _ in range(min(header.u64(), _MOST_KEYS)):
        key, kind = header.text(), header.u32()
        if key in wanted and kind == header.ARRAY:
            lists[key] = header.texts(wanted[key])
        elif key in ("tokenizer.ggml.model", "tokenizer.ggml.pre") and kind == header.STRING:
            texts[key] = header.text()
        else:
            header.skip_value(kind)
        if key == "tokenizer.ggml.model" and texts.get(key) != "gpt2":
            raise Unsupported("the vocabulary is not byte-level BPE")
        if len(lists) == len(wanted) and len(texts) == 2:
            break
    splitting = SPLITTINGS.get(texts.get("tokenizer.ggml.pre", ""))
    if splitting is None:
        raise Unsupported("it is not known how this vocabulary's words are split")
    if len(lists) < len(wanted):
        raise Unsupported("the file lists no tokens or no merges")
    return Vocabulary(splitting, lists["tokenizer.ggml.tokens"], lists["tokenizer.ggml.merges"])
