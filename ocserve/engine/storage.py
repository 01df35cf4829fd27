"""Prefixes on their way between KV cells and the tiers below, a few blocks at a time.

Blocks are copied out and in through one sequence id that holds nothing for long. Models whose memory gives any prefix
are stored block by block; the others as whole states (`whole`), which can only be continued where they end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ocserve.engine.context import Context
from ocserve.engine.prefixes import PrefixTree, Tokens
from ocserve.engine.slots import Restoration, Sequence
from ocserve.engine.tiers.blocks import BLOCK_TOKENS, block_keys, root_key
from ocserve.engine.tiers.tiers import Tiers

# Bytes that are copied to the tiers before messages are looked at again: some milliseconds.
STORED_AT_ONCE = 16 << 20
# Of what is given up or has to leave at once in one step, for which a request waits: a tenth of a second.
STORED_IN_A_STEP = 192 << 20
# A prefix whose blocks had to leave the tiers again is not copied there more often than this.
_MOST_STORED = 2


@dataclass(slots=True)
class Hits:
    """Tokens that were not computed because they were found, by where; counters since load."""

    resident: int = 0
    host: int = 0
    disk: int = 0


@dataclass(slots=True)
class _Kept:
    """A kept prefix: the keys of its whole blocks, once they are needed, and how many of the first are to be stored."""

    salt: bytes
    left: int
    keys: list[bytes] = field(default_factory=list)
    stored: int = 0  # times


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
        self._step_bytes = STORED_IN_A_STEP
        self._unsaved: dict[int, _Kept] = {}  # by holder, the oldest first
        self._saved: dict[int, _Kept] = {}  # what was stored and found room there

    @property
    def unsaved(self) -> bool:
        """Whether there is work for `save_some`."""
        return bool(self._unsaved)

    def begin_step(self) -> None:
        """Another step may store `STORED_IN_A_STEP`."""
        self._step_bytes = STORED_IN_A_STEP

    @property
    def step_bytes(self) -> int:
        """What this step may still store."""
        return self._step_bytes

    def held(self) -> list[int]:
        """Kept prefixes whose whole blocks the tiers hold. What lies behind the last of them is computed again.

        One whose blocks had to leave the tiers is to be stored again; had they to leave a second time, it counts as
        held: its beginning is all that there is room for. O(blocks of all kept prefixes).
        """
        gone = [holder for holder, kept in self._saved.items() if kept.stored < _MOST_STORED and not self._has(kept)]
        for holder in gone:
            kept = self._saved.pop(holder)
            kept.left = len(kept.keys)
            self._unsaved[holder] = kept
        return list(self._saved)

    def _has(self, kept: _Kept) -> bool:
        return all(key in self._tiers for key in kept.keys)

    # --- out --------------------------------------------------------------------------------------------------------

    def keep(self, holder: int, salt: bytes) -> None:
        """This kept prefix is to be stored when there is time."""
        self._unsaved[holder] = _Kept(salt, self._tree.length(holder) // BLOCK_TOKENS)

    def forget(self, holder: int) -> None:
        """The holder's cells are given up."""
        self._unsaved.pop(holder, None)
        self._saved.pop(holder, None)

    def save_beginning(self, holder: int) -> None:
        """Store the beginning of a prefix that is about to be given up, unless it is: a step waits for this."""
        kept = self._unsaved.get(holder)
        if kept is None:
            return
        self._name(holder, kept)
        for index in range(1 if self._whole else len(kept.keys)):
            if self._step_bytes <= 0:
                return
            if self._whole:
                self._store_whole(holder, kept)
            else:
                self._store(holder, kept, index)

    def save_some(self, most_bytes: int = STORED_AT_ONCE) -> int:
        """Store blocks of the oldest kept prefix, about `most_bytes` of them, at least one; returns the bytes copied.

        Its last blocks come first: what was stored last is given up last, and a prefix is worth its beginning. Each is
        tried once, whatever becomes of those before it. A prefix for whose first block no tier has room stays where it
        is and is not tried again.
        """
        holder, kept = next(iter(self._unsaved.items()))
        self._name(holder, kept)
        copied = 0
        if self._whole:
            copied, kept.left = self._store_whole(holder, kept), 0
        while kept.left and copied < most_bytes:
            kept.left -= 1
            copied += self._store(holder, kept, kept.left)
        if not kept.left:
            del self._unsaved[holder]
            kept.stored += 1
            self._tiers.touch(kept.keys)
            if not kept.keys or kept.keys[0] in self._tiers:
                self._saved[holder] = kept
        return copied

    def _name(self, holder: int, kept: _Kept) -> None:
        if not kept.keys:
            kept.keys = self._keys(kept.salt, self._tree.tokens(holder))
            kept.left = min(kept.left, len(kept.keys))

    def _keys(self, salt: bytes, tokens: Tokens) -> list[bytes]:
        return block_keys(root_key(self._identity, salt), tokens)

    def _store(self, holder: int, kept: _Kept, index: int) -> int:
        """Copy a block of a kept prefix to the tiers unless they have it; returns its bytes."""
        if kept.keys[index] in self._tiers:
            return 0
        self._context.share(holder, self._scratch, index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
        state = self._context.save(self._scratch).data
        self._context.forget(self._scratch)
        return self._put(kept.keys[index], state)

    def _store_whole(self, holder: int, kept: _Kept) -> int:
        """Copy the state of a prefix that ends with a block to the tiers unless they have it; returns its bytes."""
        if self._tree.length(holder) % BLOCK_TOKENS or not kept.keys or kept.keys[-1] in self._tiers:
            return 0
        return self._put(kept.keys[-1], self._context.save(holder).data)

    def _put(self, key: bytes, state: memoryview) -> int:
        self._tiers.put(key, state)
        self._step_bytes -= state.nbytes
        return state.nbytes

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
