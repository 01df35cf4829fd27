"""KV memory: who holds which cells, what is kept when a sequence ends, and where it goes when cells are needed.

Sequence ids of llama.cpp's context are *holders*. A running sequence is a holder; when it ends, its holder stays and
keeps the computed prefix until the cells or the id are needed. The prefix tree knows the tokens behind every holder's
cells, so a new sequence takes its longest known prefix from any holder of its tenant by sharing cells. What is given
up goes to the tiers in blocks, and comes back from there.

Two kinds of memory differ in what may be taken from a holder (`Reuse`): plain attention gives any prefix; sliding
windows and recurrent states can only be continued where they end, so their prefixes are frozen in holders of their
own at chosen lengths (`freeze`) and stored whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum

from ocserve.engine.context import Context
from ocserve.engine.prefixes import PrefixTree, Tokens, common_prefix
from ocserve.engine.retention import Kept, Retention
from ocserve.engine.slots import Parked, Sequence
from ocserve.engine.storage import STORED_AT_ONCE, Hits, Storage
from ocserve.engine.tiers.blocks import BLOCK_TOKENS
from ocserve.engine.tiers.tiers import Tiers

# Shorter prefixes are not worth an id, a wait or a stop.
LEAST_SHARED = 16
# Blocks that are restored before anything is computed again, and others' streams wait for: milliseconds each.
RESTORED_AT_ONCE = 32


class Reuse(Enum):
    """What a new sequence may take from a holder."""

    ANY_PREFIX = "any prefix"
    WHOLE_STATE = "the whole state"


class KvMemory:
    """The cells of one context. Belongs to the loop's thread."""

    def __init__(
        self,
        context: Context,
        *,
        reuse: Reuse,
        capacity: int,
        tiers: Tiers | None = None,
        identity: bytes = b"",
        recompute_s: Callable[[int, int], float],
        window: int = 0,
        sharing: bool = True,
        most_idle: Callable[[bool], int] | None = None,
    ) -> None:
        """`capacity` is cells (tokens); `recompute_s` predicts the seconds to compute tokens behind a position.

        `most_idle` is how many cells kept prefixes may hold beside running sequences where the tiers have them too
        (None: any number): on a CPU every row of a step passes over every cell, also those that are not its own. It is
        told whether a first sequence is about to begin, whose cells would lie above those that stay.
        `window` is how many positions the model's sliding layers attend, 0 if it has none; `identity` names everything
        that a stored state is valid for, apart from the tenant.
        """
        self._context = context
        self._reuse = reuse
        self._capacity = capacity
        self._window = window
        self._sharing = sharing
        self._most_idle = most_idle
        self._tree = PrefixTree()
        self._retention = Retention(recompute_s)
        self._free_ids = list(range(context.sequences - 2, -1, -1))
        self._running: dict[int, Sequence] = {}
        self._kept: set[int] = set()
        self._salts: dict[int, bytes] = {}
        self._idle_cells: int | None = None  # that `shed` found, 0 if none can go, until the sharing of cells changes
        self.hits = Hits()
        self.evictions = 0
        self._storage = None
        if tiers is not None:
            self._storage = Storage(
                context,
                self._tree,
                tiers,
                self.hits,
                identity=identity,
                whole=reuse is Reuse.WHOLE_STATE,
                scratch=context.sequences - 1,  # the last id is never held for long
                make_room=self.make_room,
            )

    # --- room -------------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def cells(self) -> int:
        """Distinct cells that anybody holds."""
        return self._tree.cells

    @property
    def cells_kept(self) -> int:
        """Distinct cells that only kept prefixes hold."""
        return self._tree.cells - self._tree.held(self._running)

    @property
    def unsaved(self) -> bool:
        """Whether there is work for `save_some`."""
        return self._storage is not None and self._storage.unsaved

    def room(self, wanted: int) -> int:
        """Cells that no running sequence holds; exact where fewer than `wanted` are free of kept prefixes too."""
        free = self._capacity - self._tree.cells
        return free if free >= wanted else self._capacity - self._tree.held(self._running)

    def freed_without(self, sequence: Sequence) -> int:
        """Cells that no running sequence would hold any more if this one gave up its own."""
        if sequence.slot is None:
            return 0
        others = {holder for holder in self._running if holder != sequence.slot}
        return self._tree.held(self._running) - self._tree.held(others)

    def make_room(self, cells: int) -> bool:
        """Give up kept prefixes until this many cells are free; False if there are not enough of them."""
        while self._capacity - self._tree.cells < cells:
            if not self.evict():
                return False
        return True

    def evict(self, *, for_id: bool = False) -> bool:
        """Give up the least valuable kept prefix; False if none frees a cell (or, `for_id`, if there is none)."""
        kept = self._candidates(self._kept)
        victim = self._retention.give_up(kept)
        if victim is None and for_id and kept:
            victim = min(kept, key=lambda each: each.cells).holder
        if victim is None:
            return False
        if self._storage is not None:
            self._storage.save_beginning(victim)
        self._drop(victim)
        self.evictions += 1
        return True

    def shed(self, *, at_once: bool = False) -> bool:
        """Leave to the tiers what they have of kept prefixes, the least valuable first, down to `most_idle` cells.

        Once in each step. What they do not have yet is stored, some of it each time: every step is slower while it
        stays. `at_once`, besides, stores more of it, for when nobody waits for a step: cells that are computed then lie
        below those that go, and llama.cpp looks at all up to the highest in use. Returns whether the next step should.
        """
        storage = self._storage
        if storage is None:
            return False
        if not at_once:
            storage.begin_step()
        if self._most_idle is None or self._reuse is Reuse.WHOLE_STATE:
            return False  # a whole state that does not end with a block is in no tier
        if self._idle_cells is None:
            self._idle_cells = self.cells_kept
        excess = self._idle_cells - max(LEAST_SHARED, self._most_idle(at_once))
        left = storage.step_bytes if at_once else STORED_AT_ONCE
        held = storage.held() if excess > 0 else []
        while excess > 0:
            victim = self._retention.give_up(self._candidates(held))
            if victim is not None:
                held.remove(victim)
                excess -= self._tree.private_cells(victim)
                self._drop(victim)
                self.evictions += 1
            elif not storage.unsaved:
                self._idle_cells = excess = 0
            elif left <= 0:
                return True
            else:
                left -= storage.save_some(left)
                held = storage.held()
        return False

    def _candidates(self, holders: Iterable[int]) -> list[Kept]:
        return [Kept(holder, self._tree.length(holder), self._tree.private_cells(holder)) for holder in holders]

    def drop_kept(self) -> None:
        """Give up every kept prefix."""
        for holder in list(self._kept):
            self._drop(holder)
            self.evictions += 1

    def _drop(self, holder: int) -> None:
        """Free a kept holder's cells and id."""
        self._kept.discard(holder)
        self._retention.forget(holder)
        if self._storage is not None:
            self._storage.forget(holder)
        self._close(holder)

    def _close(self, holder: int) -> None:
        self._idle_cells = None
        self._context.forget(holder)
        self._tree.close(holder)
        self._salts.pop(holder, None)
        self._free_ids.append(holder)

    def _open(self, salt: bytes) -> int:
        """A fresh id; the least valuable kept prefix makes way if all are taken."""
        if not self._free_ids and not self.evict(for_id=True):
            raise RuntimeError("more sequences than ids")
        holder = self._free_ids.pop()
        self._tree.open(holder, salt)
        self._salts[holder] = salt
        return holder

    # --- running sequences ------------------------------------------------------------------------------------------

    def enter(self, sequence: Sequence) -> None:
        """Give an admitted sequence its id."""
        sequence.slot = self._open(sequence.tenant)
        self._running[sequence.slot] = sequence

    def expect(self, sequence: Sequence, others: Iterable[Sequence]) -> None:
        """Estimate how much of its tokens it will share, with what is resident and with what `others` compute."""
        if not self._shares(sequence) or sequence.parked is not None:
            sequence.expected = 0
            return
        tokens = sequence.tokens(0, sequence.length)
        match = self._tree.match(sequence.tenant, tokens[:-1], self._held_by_running)
        known = match.length if match is not None else 0
        for other in others:
            if other.tenant == sequence.tenant and other is not sequence:
                shared = common_prefix(tokens, other.prompt_ids)
                if self._reuse is Reuse.ANY_PREFIX or other.computed < shared:
                    known = max(known, shared)
        sequence.expected = sequence.outside(min(known, sequence.length - 1))

    def _shares(self, sequence: Sequence) -> bool:
        """Whether it may take what others computed: not while a distribution is wanted for each of its tokens."""
        return self._sharing and not sequence.unscored

    def _held_by_running(self, holder: int, matched: int) -> int:
        """What a sequence would share with running ones: kept cells count as free until somebody takes them."""
        if holder not in self._running:
            return 0
        return matched if self._reuse is Reuse.ANY_PREFIX else self._whole(holder, matched)

    def awaits(self, sequence: Sequence, ahead: Iterable[Sequence]) -> bool:
        """Whether somebody `ahead` is about to compute a prefix that this sequence would otherwise compute again."""
        if sequence.index and sequence.group.members[0].unscored:
            return True  # what is asked of the prompt comes before any text
        if not self._shares(sequence) or sequence.parked is not None:
            return False
        match = self._match(sequence, sequence.tokens(0, sequence.length))
        resident = match[1] if match else 0
        for other in ahead:
            if other.tenant != sequence.tenant:
                continue
            shared = min(common_prefix(sequence.prompt_ids, other.prompt_ids), len(sequence.prompt) - 1)
            shared = sequence.outside(shared)
            if shared >= LEAST_SHARED and shared > max(resident, other.computed):
                if self._reuse is Reuse.WHOLE_STATE:
                    _add_stop(other, shared)
                return True
        return False

    def attach(self, sequence: Sequence) -> None:
        """Take what memory holds of the sequence's tokens; sets `computed`, and `restoring` if the tiers have more."""
        assert sequence.slot is not None
        sequence.attached = True
        sequence.expected = 0
        if sequence.parked is not None and self._unpark(sequence, sequence.parked):
            return
        if not self._shares(sequence):
            return
        tokens = sequence.tokens(0, sequence.length)
        resident = self._take_resident(sequence, tokens)
        sequence.computed = resident
        if self._storage is not None:
            sequence.restoring = self._storage.find(sequence.tenant, tokens[:-1], resident + LEAST_SHARED)
        if sequence.restoring is None or self._reuse is Reuse.ANY_PREFIX:
            self.hits.resident += resident
        self._choose_stops(sequence)

    def restore_some(self, sequence: Sequence, *, wait: bool) -> None:
        """Bring back some blocks of a sequence that is `restoring`; what a failed restore leaves is computed.

        Unless it may `wait`, blocks that are still being read from disk are left for the next time.
        """
        assert self._storage is not None
        assert sequence.restoring is not None
        assert sequence.slot is not None
        if not self._storage.restore(sequence, sequence.restoring, RESTORED_AT_ONCE, wait=wait):
            sequence.restoring = None
            self._leave_image(sequence.slot, sequence.outside(self._tree.length(sequence.slot)))
        sequence.computed = self._tree.length(sequence.slot)
        self._choose_stops(sequence)

    def _leave_image(self, holder: int, length: int) -> None:
        """Of what was restored keep `length` tokens: what ends inside an image cannot be continued."""
        if length < self._tree.length(holder):
            self._context.truncate(holder, length)
            self._tree.truncate(holder, length)

    def _match(self, sequence: Sequence, tokens: Tokens) -> tuple[int, int] | None:
        """The holder with the longest usable prefix of `tokens`, and its length. The last token is always computed."""
        usable = self._whole if self._reuse is Reuse.WHOLE_STATE else None
        match = self._tree.match(sequence.tenant, tokens[:-1], usable)
        return (match.donor, match.length) if match is not None and match.length >= LEAST_SHARED else None

    def _whole(self, holder: int, matched: int) -> int:
        """What may be taken of a state that can only be continued where it ends, or where its window still reaches.

        llama.cpp reuses the cells that have left a window even where it has room for all of them.
        """
        if matched == self._tree.length(holder):
            return matched
        reaches = self._window and self._context.positions(holder).start <= max(0, matched - self._window)
        return matched if reaches else 0

    def _take_resident(self, sequence: Sequence, tokens: Tokens) -> int:
        match = self._match(sequence, tokens)
        if match is None:
            return 0
        donor, length = match[0], sequence.outside(match[1])
        if self._reuse is Reuse.WHOLE_STATE and length != match[1]:
            return 0
        assert sequence.slot is not None
        self._context.share(donor, sequence.slot, 0, length)
        self._tree.adopt(sequence.slot, donor, length)
        self._idle_cells = None
        self._retention.hit(donor)
        return length

    def append(self, sequence: Sequence, tokens: Tokens) -> None:
        """These tokens, the next of the sequence, have been computed."""
        assert sequence.slot is not None
        self._tree.append(sequence.slot, tokens)
        sequence.computed += len(tokens)
        if sequence.computed in sequence.stops:
            self._freeze(sequence)
        sequence.stops = [stop for stop in sequence.stops if stop > sequence.computed]

    def cut(self, sequence: Sequence) -> bool:
        """Free the cells behind the sequence's computed tokens: drafts that were not confirmed, or half an image.

        False where this memory cannot: the sequence cannot go on.
        """
        assert sequence.slot is not None
        return self._context.truncate(sequence.slot, sequence.computed)

    # --- lengths at which states are frozen ---------------------------------------------------------------------------

    def _choose_stops(self, sequence: Sequence) -> None:
        """Where to keep the state of this prompt, once all that is known of it is there.

        Where it parts from what is known, at its last whole block, and before its last token, so that the same prompt
        can be asked again.
        """
        sequence.stops = [stop for stop in sequence.stops if stop > sequence.computed]
        if self._reuse is Reuse.ANY_PREFIX or sequence.restoring is not None:
            return
        tokens = sequence.tokens(0, sequence.length)
        last = len(tokens) - 1
        known = self._tree.match(sequence.tenant, tokens[:-1])
        for stop in (known.length if known else 0, last // BLOCK_TOKENS * BLOCK_TOKENS, last):
            if sequence.outside(stop) >= LEAST_SHARED:
                _add_stop(sequence, sequence.outside(stop))

    def _freeze(self, sequence: Sequence) -> None:
        """Keep the state that the sequence has now in a holder of its own."""
        assert sequence.slot is not None
        holder = self._open(sequence.tenant)
        self._context.share(sequence.slot, holder, 0, sequence.computed)
        self._tree.adopt(holder, sequence.slot, sequence.computed)
        self._retain(holder)

    # --- what is kept -----------------------------------------------------------------------------------------------

    def leave(self, sequence: Sequence) -> None:
        """The sequence gives up its id; what it computed is kept if that is of use to anyone."""
        if sequence.slot is None:
            return
        holder = sequence.slot
        # Drafts of a step that ended before they were judged; a state that cannot be taken back is of no use.
        whole = self._context.truncate(holder, self._tree.length(holder))
        del self._running[holder]
        if whole and self._sharing and self._tree.length(holder) >= LEAST_SHARED and not self._superfluous(holder):
            self._retain(holder)
        else:
            self._close(holder)

    def _superfluous(self, holder: int) -> bool:
        """Whether everything that could be taken from this holder can be taken from another."""
        if self._reuse is Reuse.ANY_PREFIX:
            return self._tree.covered_by(holder) is not None
        length = self._tree.length(holder)
        return any(self._tree.length(other) == length for other in self._tree.beginnings(holder))

    def _retain(self, holder: int) -> None:
        """Keep a holder that no sequence runs on any more. It takes the place of the earlier turns it grew from."""
        hits = 0
        if self._reuse is Reuse.ANY_PREFIX:
            for earlier in self._tree.beginnings(holder):
                if earlier in self._kept:
                    hits += self._retention.hits(earlier)
                    self._drop(earlier)
        self._idle_cells = None
        self._kept.add(holder)
        self._retention.keep(holder, hits)
        if self._storage is not None:
            self._storage.keep(holder, self._salts[holder])

    def park(self, sequence: Sequence, budget_bytes: int) -> Parked | None:
        """Take a running sequence's cells away; returns what it had computed, None if that exceeds the budget."""
        assert sequence.slot is not None
        parked = None
        if sequence.computed and 0 < self._context.state_bytes(sequence.slot) <= budget_bytes:
            parked = Parked(self._context.save(sequence.slot), sequence.computed)
        del self._running[sequence.slot]
        self._close(sequence.slot)
        return parked

    def _unpark(self, sequence: Sequence, parked: Parked) -> bool:
        """Put a parked state back; a prefix that others hold is shared with them again."""
        assert sequence.slot is not None
        sequence.parked = None
        if not self.make_room(parked.length) or not self._context.restore(sequence.slot, parked.state):
            return False
        tokens = sequence.tokens(0, parked.length)
        match = self._tree.match(sequence.tenant, tokens) if self._reuse is Reuse.ANY_PREFIX and self._sharing else None
        shared = match.length if match is not None else 0
        if match is not None:
            self._context.forget_range(sequence.slot, 0, shared)
            self._context.share(match.donor, sequence.slot, 0, shared)
            self._tree.adopt(sequence.slot, match.donor, shared)
            self._idle_cells = None
        self._tree.append(sequence.slot, tokens[shared:])
        sequence.computed = parked.length
        return True

    def save_some(self) -> bool:
        """Copy a few blocks of a kept prefix to the tiers; False if there are none. For times without work."""
        if not self.unsaved or self._storage is None:
            return False
        self._storage.save_some()
        self._storage.begin_step()
        return True


def _add_stop(sequence: Sequence, stop: int) -> None:
    if sequence.computed < stop < sequence.length and stop not in sequence.stops:
        sequence.stops = sorted([*sequence.stops, stop])
