"""Prefixes on their way between KV cells and the tiers below, a few blocks at a time.

Blocks are copied out and in through one sequence id that holds nothing for long. Models whose memory gives any prefix
are stored block by block; the others as whole states (`whole`), which can only be continued where they end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ocserve.engine.context import Context
from ocserve.engine.prefixes import PrefixTree, Tokens
from ocserve.engine.slots import Restoration, Sequence
from ocserve.engine.tiers.blocks import BLOCK_TOKENS, block_keys, root_key
from ocserve.engine.tiers.tiers import Tiers

# Blocks that are copied to the tiers before messages are looked at again: milliseconds each.
_STORED_AT_ONCE = 4
_STORED_ON_EVICTION = 16


@dataclass(slots=True)
class Hits:
    """Tokens that were not computed because they were found, by where; counters since load."""

    resident: int = 0
    host: int = 0
    disk: int = 0


class Storage:
    """What the tiers hold of one context's prefixes. Belongs to the loop's thread."""

    def __init__(
        self,
        context: Context,
        tree: PrefixTree,
        tiers: Tiers,
        hits: Hits,
        *,
        identity: bytes,
        whole: bool,
        scratch: int,
        make_room: Callable[[int], bool],
    ) -> None:
        """`scratch` is the sequence id for copying; `make_room` frees so many cells, or says that it cannot."""
        self._context = context
        self._tree = tree
        self._tiers = tiers
        self._hits = hits
        self._identity = identity
        self._whole = whole
        self._scratch = scratch
        self._make_room = make_room
        # Kept holders, oldest first: their tenants' salts and how many of their first blocks are to be stored.
        self._unsaved: dict[int, tuple[bytes, int]] = {}
        self._saved: dict[int, list[bytes]] = {}  # kept holders that were stored, and the keys of their blocks

    @property
    def unsaved(self) -> bool:
        """Whether there is work for `save_some`."""
        return bool(self._unsaved)

    def has(self, holder: int) -> bool:
        """Whether the tiers hold the whole blocks of a kept prefix."""
        keys = self._saved.get(holder)
        return keys is not None and all(key in self._tiers for key in keys)

    # --- out --------------------------------------------------------------------------------------------------------

    def keep(self, holder: int, salt: bytes) -> None:
        """This kept prefix is to be stored when there is time."""
        self._unsaved[holder] = salt, self._tree.length(holder) // BLOCK_TOKENS

    def forget(self, holder: int) -> None:
        """The holder's cells are given up."""
        self._unsaved.pop(holder, None)
        self._saved.pop(holder, None)

    def save_beginning(self, holder: int) -> None:
        """Store the beginning of a prefix that is about to be given up, unless it is: a step waits for this."""
        if holder in self._unsaved:
            salt, _ = self._unsaved[holder]
            keys = self._keys(salt, self._tree.tokens(holder))
            self._store(holder, keys, range(min(_STORED_ON_EVICTION, len(keys))))

    def save_some(self) -> bool:
        """Store some blocks of the oldest kept prefix; False if there are none. For times without work.

        Its last blocks come first: what was stored last is given up last, and a prefix is worth its beginning. Each is
        tried once, whatever becomes of those before it.
        """
        holder = next(iter(self._unsaved), None)
        if holder is None:
            return False
        salt, count = self._unsaved[holder]
        keys = self._keys(salt, self._tree.tokens(holder))
        end = min(count, len(keys))
        begin = max(0, end - _STORED_AT_ONCE)
        self._store(holder, keys, range(end - 1, begin - 1, -1))
        if begin:
            self._unsaved[holder] = salt, begin
        else:
            del self._unsaved[holder]
            self._saved[holder] = keys
            self._tiers.touch(keys)
        return True

    def _keys(self, salt: bytes, tokens: Tokens) -> list[bytes]:
        return block_keys(root_key(self._identity, salt), tokens)

    def _store(self, holder: int, keys: list[bytes], blocks: Iterable[int]) -> None:
        """Copy to the tiers what they do not have of these blocks of a kept prefix, or its whole state."""
        if self._whole:
            if self._tree.length(holder) % BLOCK_TOKENS == 0 and keys and keys[-1] not in self._tiers:
                self._tiers.put(keys[-1], self._context.save(holder).data)
            return
        for index in blocks:
            if keys[index] not in self._tiers:
                self._context.share(holder, self._scratch, index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
                self._tiers.put(keys[index], self._context.save(self._scratch).data)
                self._context.forget(self._scratch)

    # --- in ---------------------------------------------------------------------------------------------------------

    def find(self, salt: bytes, tokens: Tokens, more_than: int) -> Restoration | None:
        """What can be had of a prompt's blocks, if that reaches further than `more_than` tokens."""
        keys = self._keys(salt, tokens)
        blocks = self._tiers.longest(keys, whole=self._whole)
        return Restoration(keys[:blocks]) if blocks * BLOCK_TOKENS >= more_than else None

    def restore(self, sequence: Sequence, restoration: Restoration, most: int, *, wait: bool) -> bool:
        """Go on with a prompt's first blocks, `most` of them at once; False when no more are to come.

        A whole state comes at once. What is missing or finds no room ends it where it is. `wait` for the disk, or else
        come back later.
        """
        keys = restoration.keys
        if self._whole:
            self._tiers.prefetch(keys[-1:])
            if not wait and not self._tiers.ready(keys[-1]):
                return True
            self._restore_whole(sequence, restoration)
            return False
        assert sequence.slot is not None
        reached = self._tree.length(sequence.slot)
        for index in range(reached // BLOCK_TOKENS, len(keys)):
            self._tiers.prefetch(keys[index:])
            if not most or (not wait and not self._tiers.ready(keys[index])):
                return True
            most -= 1
            found = self._tiers.get(keys[index])
            if found is None or not self._make_room(BLOCK_TOKENS) or not self._context.restore(self._scratch, found[0]):
                return False
            end = (index + 1) * BLOCK_TOKENS
            self._context.share(self._scratch, sequence.slot, reached, end)
            self._context.forget(self._scratch)
            self._tree.append(sequence.slot, sequence.tokens(reached, end))
            self._count(found[1], end - reached)
            reached = end
        return False

    def _restore_whole(self, sequence: Sequence, restoration: Restoration) -> None:
        assert sequence.slot is not None
        length = len(restoration.keys) * BLOCK_TOKENS
        found = self._tiers.get(restoration.keys[-1])
        if found is None or not self._make_room(length):
            return
        self._context.forget(sequence.slot)
        self._tree.truncate(sequence.slot, 0)
        if self._context.restore(sequence.slot, found[0]):
            self._tree.append(sequence.slot, sequence.tokens(0, length))
            self._count(found[1], length)

    def _count(self, tier: str, tokens: int) -> None:
        if tier == "host":
            self._hits.host += tokens
        else:
            self._hits.disk += tokens
