"""Which cells of the KV pool hold which tokens, and for whom: a radix tree of physical cells for each tenant salt.

A holder is a sequence id of llama.cpp's unified pool. The tree mirrors what `llama_memory_seq_cp` and
`llama_memory_seq_rm` do to the pool's metadata: cells are made where tokens are computed, shared by adoption, and live
while any holder has them. It knows nothing of llama.cpp, of time or of policy; all work is done on one thread.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Tokens = Sequence[int]


@dataclass(frozen=True, slots=True)
class Match:
    """The first `length` (> 0) tokens of a prompt are in cells that `donor` holds."""

    donor: int
    length: int


class PrefixTree:
    """The cells of all holders. Holders of different salts never share and never match.

    Invariants: a node is the longest run of cells that the same holders have, so `holders` shrinks strictly from a node
    to its child, no holder is in two children of a node, and a node with a single holder is the end of that holder's
    path. The depth is therefore at most the number of holders. Two children may begin with the same token, even hold
    the same tokens: cells that were computed twice.
    """

    def __init__(self) -> None:
        self._roots: dict[bytes, _Node] = {}
        self._tails: dict[int, _Node] = {}
        self._salts: dict[int, bytes] = {}
        self._cells = 0

    @property
    def cells(self) -> int:
        """Distinct physical cells that all holders have together."""
        return self._cells

    def __contains__(self, holder: int) -> bool:
        return holder in self._tails

    def open(self, holder: int, salt: bytes) -> None:
        """A new holder without cells."""
        assert holder not in self._tails
        root = self._roots.setdefault(salt, _Node(None, 0, array("i"), set()))
        root.holders.add(holder)
        self._tails[holder] = root
        self._salts[holder] = salt

    def close(self, holder: int) -> int:
        """Forget a holder. Returns how many cells nobody holds any more."""
        freed = self.truncate(holder, 0)
        root = self._tails.pop(holder)
        root.holders.remove(holder)
        salt = self._salts.pop(holder)
        if not root.holders:
            del self._roots[salt]
        return freed

    def append(self, holder: int, tokens: Tokens) -> None:
        """`holder` computed new cells for `tokens` after those it has; O(len(tokens)) amortised."""
        if not len(tokens):
            return
        tail = self._tails[holder]
        if tail.parent is not None and len(tail.holders) == 1:
            tail.tokens.extend(tokens)
        else:
            leaf = _Node(tail, tail.end, array("i", tokens), {holder})
            tail.attach(leaf)
            self._tails[holder] = leaf
        self._cells += len(tokens)

    def adopt(self, holder: int, donor: int, length: int) -> None:
        """`holder`, which has no cells, now shares the first `length` cells of `donor`, of the same salt."""
        assert self.length(holder) == 0
        assert holder != donor
        assert self._salts[holder] == self._salts[donor]
        assert 0 <= length <= self.length(donor)
        if not length:
            return
        node = self._tails[donor]
        while node.start >= length:
            node = node.above
        if node.end > length:
            node = node.split(length)
        self._tails[holder] = node
        for shared in node.path():
            shared.holders.add(holder)

    def truncate(self, holder: int, length: int) -> int:
        """Keep the first `length` cells of `holder`. Returns how many cells nobody holds any more."""
        assert 0 <= length <= self.length(holder)
        freed = 0
        left: list[_Node] = []  # nodes that others still hold
        node = self._tails[holder]
        while node.parent is not None and node.start >= length:
            node.holders.remove(holder)
            if node.holders:
                left.append(node)
            else:
                freed += len(node.tokens)
                node.parent.detach(node)
            node = node.parent
        if node.end > length and len(node.holders) == 1:
            freed += node.end - length
            del node.tokens[length - node.start :]
        elif node.end > length:
            upper = node.split(length)
            node.holders.remove(holder)
            left.append(node)
            node = upper
        self._tails[holder] = node
        for other in left:
            other.join()
        self._cells -= freed
        return freed

    def match(self, salt: bytes, tokens: Tokens, usable: Callable[[int, int], int] | None = None) -> Match | None:
        """The longest beginning of `tokens` that a holder of `salt` has, or None when no holder has its first token.

        `usable(holder, matched)`, asked once for each holder with its longest match, returns how many of these tokens
        may be taken from it (0: none); the match is then the one with most usable tokens.
        """
        held = self._matches(salt, _array(tokens))
        if usable is not None:
            held = {holder: usable(holder, matched) for holder, matched in held.items()}
        donor = max(held, key=lambda holder: (held[holder], -holder), default=None)
        return Match(donor, held[donor]) if donor is not None and held[donor] > 0 else None

    def length(self, holder: int) -> int:
        """How many cells `holder` has."""
        return self._tails[holder].end

    def tokens(self, holder: int) -> array[int]:
        """The tokens of all cells of `holder`, in order."""
        whole = array("i")
        for node in reversed(list(self._tails[holder].path())):
            whole.extend(node.tokens)
        return whole

    def private_cells(self, holder: int) -> int:
        """How many cells only `holder` has: what closing it would free."""
        tail = self._tails[holder]
        return len(tail.tokens) if len(tail.holders) == 1 else 0

    def held(self, holders: Collection[int]) -> int:
        """Distinct cells that these holders have together, O(nodes they have)."""
        wanted = set(holders)
        cells = 0
        pending = list(self._roots.values())
        while pending:
            node = pending.pop()
            if not wanted.isdisjoint(node.holders):
                cells += len(node.tokens)
                for siblings in node.children.values():
                    pending += siblings
        return cells

    def beginnings(self, holder: int) -> list[int]:
        """The other holders of the same salt whose tokens are all a beginning of this one's."""
        held = self._matches(self._salts[holder], self.tokens(holder))
        return [other for other, matched in held.items() if other != holder and matched == self.length(other)]

    def covered_by(self, holder: int) -> int | None:
        """Another holder of the same salt whose tokens begin with all tokens of `holder`, if there is one."""
        sharing = self._tails[holder].holders - {holder}
        if sharing:
            return min(sharing)
        held = self._matches(self._salts[holder], self.tokens(holder))
        length = self.length(holder)
        return min((other for other, matched in held.items() if matched == length and other != holder), default=None)

    def _matches(self, salt: bytes, tokens: array[int]) -> dict[int, int]:
        """How many tokens each holder of `salt` has in common with `tokens`, of those that have any."""
        held: dict[int, int] = {}
        root = self._roots.get(salt)
        pending = root.continued_by(tokens) if root is not None else []
        while pending:
            node = pending.pop()
            common = common_prefix(node.tokens, tokens[node.start : node.end])
            # A child is visited after its parent, so each holder ends with its longest match.
            held.update(dict.fromkeys(node.holders, node.start + common))
            if common == len(node.tokens):
                pending += node.continued_by(tokens)
        return held


def common_prefix(a: Tokens, b: Tokens) -> int:
    """How many tokens `a` and `b` begin with alike. Fast when both are `array("i")`: no token becomes an object."""
    length = min(len(a), len(b))
    if not length:
        return 0
    differing = np.frombuffer(_array(a), np.intc, length) != np.frombuffer(_array(b), np.intc, length)
    first = int(differing.argmax())
    return first if differing[first] else length


class _Node:
    """A run of cells, at positions `start` to `end`, that the same holders have. The root is an empty run."""

    __slots__ = ("children", "holders", "parent", "start", "tokens")

    def __init__(self, parent: _Node | None, start: int, tokens: array[int], holders: set[int]) -> None:
        self.parent = parent
        self.start = start
        self.tokens = tokens
        self.holders = holders
        self.children: dict[int, list[_Node]] = {}  # by first token

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def above(self) -> _Node:
        assert self.parent is not None
        return self.parent

    def path(self) -> Iterator[_Node]:
        """This node and those above it, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent

    def continued_by(self, tokens: array[int]) -> list[_Node]:
        """The children that begin with the token of `tokens` at their position."""
        return list(self.children.get(tokens[self.end], ())) if self.end < len(tokens) else []

    def attach(self, child: _Node) -> None:
        self.children.setdefault(child.tokens[0], []).append(child)
        child.parent = self

    def detach(self, child: _Node) -> None:
        siblings = self.children[child.tokens[0]]
        siblings.remove(child)
        if not siblings:
            del self.children[child.tokens[0]]

    def split(self, position: int) -> _Node:
        """Put the cells before `position` in a node of their own, above this one, and return that."""
        parent, kept = self.above, position - self.start
        parent.detach(self)
        upper = _Node(parent, self.start, self.tokens[:kept], set(self.holders))
        parent.attach(upper)
        # The lower part stays the same object: holders end there.
        self.start, self.tokens = position, self.tokens[kept:]
        upper.attach(self)
        return upper

    def join(self) -> None:
        """Become one with the child below if the same holders have it: none of them ends here."""
        child = next((child for siblings in self.children.values() for child in siblings), None)
        if child is None or len(child.holders) < len(self.holders):
            return
        parent = self.above
        parent.detach(self)
        child.start, child.tokens = self.start, self.tokens + child.tokens
        parent.attach(child)


def _array(tokens: Tokens) -> array[int]:
    return tokens if isinstance(tokens, array) and tokens.typecode == "i" else array("i", tokens)
