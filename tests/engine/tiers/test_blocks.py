"""Keys of blocks: equal exactly when everything that a stored state depends on is equal."""

from __future__ import annotations

import hashlib
import struct
from array import array

from hypothesis import given
from hypothesis import strategies as st

from ocserve.engine.tiers.blocks import BLOCK_TOKENS, block_keys, extend_keys, root_key

ROOT = root_key(b"model", b"salt")
# Few distinct tokens and whole blocks, so that prefixes are often shared.
BLOCKS = st.lists(st.sampled_from([1, 2, 2**31 - 1]).map(lambda token: [token] * BLOCK_TOKENS), max_size=4)


def joined(blocks: list[list[int]]) -> list[int]:
    return [token for block in blocks for token in block]


def test_a_key_is_what_its_description_says() -> None:
    tokens = list(range(2 * BLOCK_TOKENS))
    first = hashlib.blake2b(ROOT + struct.pack("<128I", *tokens[:128]), digest_size=32, person=b"ocserve block 1")
    second = hashlib.blake2b(
        first.digest() + struct.pack("<128I", *tokens[128:]), digest_size=32, person=b"ocserve block 1"
    )
    assert block_keys(ROOT, tokens) == [first.digest(), second.digest()]
    assert block_keys(ROOT, array("i", tokens)) == [first.digest(), second.digest()]


@given(BLOCKS, BLOCKS, st.integers(0, BLOCK_TOKENS - 1))
def test_keys_are_equal_as_far_as_tokens_are(one: list[list[int]], other: list[list[int]], rest: int) -> None:
    keys, other_keys = (block_keys(ROOT, joined(blocks) + [1] * rest) for blocks in (one, other))
    assert len(keys) == len(one)
    for count in range(1, min(len(one), len(other)) + 1):
        assert (keys[count - 1] == other_keys[count - 1]) == (one[:count] == other[:count])


@given(BLOCKS, st.integers(0, 4))
def test_keys_can_be_extended(blocks: list[list[int]], known: int) -> None:
    tokens = joined(blocks)
    keys = block_keys(ROOT, tokens[: known * BLOCK_TOKENS])
    extend_keys(keys, ROOT, tokens)
    assert keys == block_keys(ROOT, tokens)


def test_another_model_or_tenant_has_other_keys() -> None:
    roots = {root_key(b"model", b"salt"), root_key(b"models", b"alt"), root_key(b"model", b"other"), root_key(b"", b"")}
    assert len({block_keys(root, [0] * BLOCK_TOKENS)[0] for root in roots}) == 4
