"""A vocabulary's merges: which of them ever happen, and what they make.

A merge is live if its two halves, written one after the other, are tokenised as these two halves by the merges before
it; `encodings` says why the others do not matter.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt


class Unsupported(Exception):
    """Why this vocabulary is left to llama.cpp's tokenizer; the text is about the model, never about a prompt."""


def _pairs(merges: Iterable[str]) -> Iterator[tuple[str, str]]:
    for merge in merges:
        blank = merge.find(" ", 1)  # as llama.cpp looks for it
        yield merge[:blank], merge[blank + 1 :]


def _byte_alphabet() -> str:
    """GPT-2's printable character for each byte: itself where it prints, otherwise the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


ALPHABET = _byte_alphabet()


def live(merges: list[str]) -> list[str]:
    """The texts of the live merges, in their order, after the 256 bytes.

    Vocabularies that were trained as they are used have no other merges: that is asked of all merges at once first.
    """
    return _all_live(merges) or _live_one_by_one(merges)


def _all_live(merges: list[str]) -> list[str] | None:
    """What `live` returns if every merge is live, else None. Computes in arrays what `_LiveMerges` does one by one."""
    bytes_, count = len(ALPHABET), len(merges)
    lefts, _, rights = zip(*(merge.partition(" ") for merge in merges), strict=True) if merges else ((), (), ())
    texts = [*ALPHABET, *map(operator.add, lefts, rights)]
    ranks = dict(zip(texts, range(len(texts)), strict=True))
    if len(ranks) != len(texts) or not ranks.keys() >= {*lefts, *rights}:
        return None
    left, right = (
        np.fromiter((ranks[half] for half in halves), dtype=np.int64, count=count) for halves in (lefts, rights)
    )
    limit = np.arange(bytes_, bytes_ + count)
    if (np.maximum(left, right) >= limit).any():
        return None  # before the merges that make its halves
    joined = _Joined(left, right)
    first_half, second_half = (np.concatenate((np.arange(bytes_), halves)) for halves in (left, right))
    # The steps of `_LiveMerges.stands`: of two neighbours the later one is taken apart, until both are bytes.
    while len(divisible := np.flatnonzero(np.maximum(left, right) >= bytes_)):
        left, right = left[divisible], right[divisible]
        later = left > right
        limit = np.where(later, left, right + 1)
        left, right = np.where(later, second_half[left], left), np.where(later, right, first_half[right])
        if (joined.rank(left, right) < limit).any():
            return None
    return texts


class _Joined:
    """The ranks of pairs, in arrays."""

    def __init__(self, left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> None:
        keys = (left << 32) | right
        self._order = np.argsort(keys)
        self._keys = keys[self._order]

    def rank(self, left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rank that each pair is joined to, or one above all where it is not."""
        wanted = (left << 32) | right
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.where(self._keys[at] == wanted, self._order[at] + len(ALPHABET), np.iinfo(np.int64).max)


def _live_one_by_one(merges: list[str]) -> list[str]:
    ranks = {char: rank for rank, char in enumerate(ALPHABET)}
    live = _LiveMerges()
    late: list[tuple[str, str]] = []
    for left, right in _pairs(merges):
        first, second = ranks.get(left), ranks.get(right)
        if first is None or second is None:
            late.append((left, right))
        elif left + right not in ranks and live.stands(first, second):
            ranks[left + right] = live.add(first, second)
    # A merge of what only later merges make would happen out of its order.
    if any(left in ranks and right in ranks for left, right in late):
        raise Unsupported("a merge comes before the merges that make its halves")
    return list(ranks)


class _LiveMerges:
    """Live merges by rank; the bytes are the first ranks and are made of themselves."""

    def __init__(self) -> None:
        self._halves = [(rank, rank) for rank in range(len(ALPHABET))]
        self._joined: dict[tuple[int, int], int] = {}

    def add(self, left: int, right: int) -> int:
        """Make the pair the latest merge; its rank."""
        self._halves.append((left, right))
        rank = self._joined[left, right] = len(self._halves) - 1
        return rank

    def stands(self, left: int, right: int) -> bool:
        """Whether the text of two tokens is tokenised as these two by the merges so far.

        Takes both apart along their merges, latest first, and asks at each step whether the parts that then touch
        would have been joined sooner (the test for a pair in the `bpe` crate of github/rust-gems; of equal merges the
        left one happens first).
        """
        limit = len(self._halves)
        joined, halves = self._joined, self._halves
        while True:
            if joined.get((left, right), limit) < limit:
                return False
            if left > right:
                limit, left = left, halves[left][1]
                if left == limit:
                    limit, right = right + 1, halves[right][0]
                    if right + 1 == limit:
                        return True
            else:
                limit, right = right + 1, halves[right][0]
                if right + 1 == limit:
                    limit, left = left, halves[left][1]
                    if left == limit:
                        return True


def complete(merges: list[str]) -> list[str]:
    """The texts of merges that name every pair of tokens which is a token, after the 256 bytes.

    Vocabularies made by tiktoken are converted so, and then the pair does not matter: only the order of the texts does.
    """
    ranks = dict.fromkeys(ALPHABET)
    previous = ""
    for left, right in _pairs(merges):
        text = left + right
        if text != previous and text in ranks:
            raise Unsupported("the merges that make one token are not next to each other")
        ranks[text] = None
        previous = text
    named = sum(left in ranks and right in ranks for left, right in set(_pairs(merges)))
    if named != sum(text[:at] in ranks and text[at:] in ranks for text in ranks for at in range(1, len(text))):
        raise Unsupported("two tokens whose texts make a third have no merge")
    return list(ranks)
