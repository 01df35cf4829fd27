"""The tree of shared cells against a naive model that keeps every cell as an object."""

from __future__ import annotations

import time
from array import array

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ocserve.engine.prefixes import Match, PrefixTree, common_prefix

SALTS = (b"one", b"two")


class Cell:
    """A physical cell: two cells with one token are still two."""

    def __init__(self, token: int) -> None:
        self.token = token


class CellsOfHolders(RuleBasedStateMachine):
    """Every operation on the tree, and on lists of cells that holders have."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = PrefixTree()
        self.held: dict[int, list[Cell]] = {}
        self.salts: dict[int, bytes] = {}

    def pick(self, data: st.DataObject, holders: list[int] | None = None) -> int:
        holder: int = data.draw(st.sampled_from(sorted(self.held if holders is None else holders)))
        return holder

    def distinct(self) -> int:
        return len({id(cell) for cells in self.held.values() for cell in cells})

    def tokens(self, holder: int) -> list[int]:
        return [cell.token for cell in self.held[holder]]

    def boundaries(self, holder: int) -> list[int]:
        """The lengths at which another holder stops to share the cells of this one, and its whole length."""
        others = [{id(cell) for cell in cells} for other, cells in self.held.items() if other != holder]
        return [sum(id(cell) in ids for cell in self.held[holder]) for ids in others] + [len(self.held[holder])]

    def common(self, holder: int, prompt: list[int]) -> int:
        pairs = list(zip(self.tokens(holder), prompt, strict=False))
        return next((index for index, (one, other) in enumerate(pairs) if one != other), len(pairs))

    @initialize()
    def first(self) -> None:
        self.open(0, SALTS[0])

    @precondition(lambda self: len(self.held) < 7)
    @rule(holder=st.integers(0, 7), salt=st.sampled_from(SALTS))
    def open(self, holder: int, salt: bytes) -> None:
        if holder not in self.held:
            self.tree.open(holder, salt)
            self.held[holder], self.salts[holder] = [], salt

    @precondition(lambda self: self.held)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 2), max_size=6), as_array=st.booleans())
    def append(self, data: st.DataObject, tokens: list[int], as_array: bool) -> None:
        holder = self.pick(data)
        given = array("i", tokens) if as_array else tokens
        self.tree.append(holder, given)
        self.held[holder] += [Cell(token) for token in tokens]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        donor = self.pick(data)
        empty = [h for h, cells in self.held.items() if not cells and self.salts[h] == self.salts[donor] and h != donor]
        if empty:
            holder, length = self.pick(data, empty), data.draw(st.integers(0, len(self.held[donor])))
            self.tree.adopt(holder, donor, length)
            self.held[holder] = self.held[donor][:length]

    @precondition(lambda self: 0 < len(self.held) < 7)
    @rule(data=st.data(), whole=st.booleans())
    def fork(self, data: st.DataObject, whole: bool) -> None:
        donor, holder = self.pick(data), max(self.held) + 1
        length = data.draw(st.sampled_from(self.boundaries(donor))) if whole else len(self.held[donor]) // 2
        self.tree.open(holder, self.salts[donor])
        self.tree.adopt(holder, donor, length)
        self.held[holder], self.salts[holder] = self.held[donor][:length], self.salts[donor]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        holder = self.pick(data)
        length = data.draw(st.integers(0, len(self.held[holder])))
        before = self.distinct()
        freed = self.tree.truncate(holder, length)
        del self.held[holder][length:]
        assert freed == before - self.distinct()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        holder = self.pick(data)
        before = self.distinct()
        freed = self.tree.close(holder)
        del self.held[holder], self.salts[holder]
        assert freed == before - self.distinct()

    @rule(data=st.data(), salt=st.sampled_from((*SALTS, b"nobody's")), tokens=st.lists(st.integers(0, 2), max_size=12))
    def match(self, data: st.DataObject, salt: bytes, tokens: list[int]) -> None:
        if self.held and salt in SALTS:
            tokens = self.tokens(self.pick(data)) + tokens
        matches = {h: self.common(h, tokens) for h in self.held if self.salts[h] == salt}
        found = self.tree.match(salt, tokens)
        longest = max(matches.values(), default=0)
        assert (found.length if found else 0) == longest
        assert found is None or matches[found.donor] == longest

    @rule(data=st.data(), salt=st.sampled_from(SALTS), tokens=st.lists(st.integers(0, 2), max_size=12))
    def match_what_is_usable(self, data: st.DataObject, salt: bytes, tokens: list[int]) -> None:
        whole = {h: len(cells) for h, cells in self.held.items() if self.salts[h] == salt}
        matches = {h: self.common(h, tokens) for h in whole}
        asked: dict[int, int] = {}

        def only_whole(holder: int, matched: int) -> int:
            assert holder not in asked
            asked[holder] = matched
            return matched if matched == whole[holder] else 0

        found = self.tree.match(salt, tokens, only_whole)
        assert asked == {h: matched for h, matched in matches.items() if matched}
        exact = {h: matched for h, matched in matches.items() if matched == whole[h] and matched}
        assert found == (
            Match(min(h for h in exact if exact[h] == max(exact.values())), max(exact.values())) if exact else None
        )

    @invariant()
    def cells_are_exact(self) -> None:
        assert self.tree.cells == self.distinct()

    @invariant()
    def holders_are_exact(self) -> None:
        for holder, cells in self.held.items():
            others = {id(cell) for other, cells in self.held.items() if other != holder for cell in cells}
            assert self.tree.length(holder) == len(cells)
            assert self.tree.tokens(holder).tolist() == self.tokens(holder)
            assert self.tree.private_cells(holder) == sum(id(cell) not in others for cell in cells)
            covering = [
                other
                for other in self.held
                if other != holder
                and self.salts[other] == self.salts[holder]
                and self.common(other, self.tokens(holder)) == len(cells)
            ]
            covered_by = self.tree.covered_by(holder)
            assert covered_by in covering if covering else covered_by is None

    @invariant()
    def paths_stay_short(self) -> None:
        for holder in self.held:
            path = list(self.tree._tails[holder].path())
            sizes = [len(node.holders) for node in path]
            assert sizes == sorted(set(sizes))


def test_the_tree_agrees_with_cells_as_objects(full: bool) -> None:
    CellsOfHolders.TestCase.settings = settings(
        max_examples=2000 if full else 70,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    case = CellsOfHolders.TestCase()
    case.runTest()


def test_no_tenant_matches_another() -> None:
    tree = PrefixTree()
    tree.open(1, b"one")
    tree.append(1, [5, 6, 7])
    assert tree.match(b"one", [5, 6, 7]) == Match(1, 3)
    assert tree.match(b"two", [5, 6, 7]) is None
    tree.open(2, b"two")
    assert tree.match(b"two", [5, 6, 7]) is None
    with pytest.raises(AssertionError):
        tree.adopt(2, 1, 3)


def test_the_callers_array_is_not_kept() -> None:
    tree, given = PrefixTree(), array("i", [1, 2])
    tree.open(1, b"")
    tree.append(1, given)
    given[0] = 9
    tree.append(1, [3])
    assert tree.tokens(1).tolist() == [1, 2, 3]
    assert given.tolist() == [9, 2]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [([], [1], 0), ([1], [2], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2), ([1, 2, 3], [1, 2, 4, 5], 2)],
)
def test_a_common_prefix_of_any_sequences(one: list[int], other: list[int], expected: int) -> None:
    assert common_prefix(one, other) == common_prefix(array("i", other), tuple(one)) == expected


def test_long_sequences_cost_no_more_for_each_token() -> None:
    def seconds(tokens: int) -> float:
        """Adopt, decode token by token, roll back and match, with `tokens` tokens before."""
        tree, prompt = PrefixTree(), array("i", range(tokens))
        tree.open(0, b"")
        tree.append(0, prompt)
        tree.open(1, b"")
        tree.adopt(1, 0, tokens)
        started = time.process_time()
        for token in range(5000):
            tree.append(1, [token, token])
            tree.truncate(1, tokens + token + 1)
        return time.process_time() - started

    # A copy of the prompt for each token would be a factor of 50 or more.
    assert min(seconds(128_000) for _ in range(3)) < 5 * min(seconds(1_000) for _ in range(3)) + 0.05
