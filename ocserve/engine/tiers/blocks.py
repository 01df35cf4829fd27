"""Names for stored prefixes: chained keys of blocks of tokens, so that equal keys mean equal tokens from the start.

A key stands for everything that a stored state depends on: the model and how it is run, the tenant, and all tokens
up to the end of its block. Where memory can be cut by position the value under a key is the state of that block alone;
elsewhere it is the state of the whole sequence at exactly that many tokens.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence

BLOCK_TOKENS = 128
KEY_BYTES = 32

# Set apart from any other use of BLAKE2b (RFC 7693); `person` may have 16 bytes.
_ROOT, _BLOCK = b"ocserve root 1", b"ocserve block 1"


def root_key(identity: bytes, salt: bytes) -> bytes:
    """The key of an empty prefix. `identity` names the model's content, llama.cpp's build and state version, the types
    of the KV cache and the memory policy; `salt` the tenant."""
    # The length keeps two pairs with the same concatenation apart.
    framed = len(identity).to_bytes(8, "little") + identity + salt
    return hashlib.blake2b(framed, digest_size=KEY_BYTES, person=_ROOT).digest()


def extend_keys(keys: list[bytes], root: bytes, tokens: Sequence[int]) -> None:
    """Append to `keys`, those of the first blocks of `tokens`, the keys of all further whole blocks.

    key[i] = BLAKE2b-256(key[i-1] ‖ tokens of block i, each as 32 bits little-endian), with `root` before the first.
    """
    assert len(keys) <= len(tokens) // BLOCK_TOKENS
    for start in range(len(keys) * BLOCK_TOKENS, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = array("i", tokens[start : start + BLOCK_TOKENS])
        if sys.byteorder == "big":
            block.byteswap()
        digest = hashlib.blake2b(keys[-1] if keys else root, digest_size=KEY_BYTES, person=_BLOCK)
        digest.update(block)
        keys.append(digest.digest())


def block_keys(root: bytes, tokens: Sequence[int]) -> list[bytes]:
    """The keys of all whole blocks of `tokens`, in order; see `extend_keys`."""
    keys: list[bytes] = []
    extend_keys(keys, root, tokens)
    return keys
