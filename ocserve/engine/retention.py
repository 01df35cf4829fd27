"""Which kept prefix to give up when the KV pool needs cells: GreedyDual-Size-Frequency over idle holders.

Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Laboratories report
HPL-98-69R.1 (1998): an object is worth clock + frequency x cost / size, the least valuable goes, and the clock rises to
its worth, so that what is not used again ages out however dear it was. Here the cost is the time to compute the
holder's private cells again and the size is their number: what giving it up frees. Pure: cells and costs come in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kept:
    """An idle holder as the policy sees it: `cells` in all, the last `private` of which only it has."""

    holder: int
    cells: int
    private: int


class Retention:
    """The worth of each kept holder.

    `recompute_s(tokens, position)` are the seconds to compute `tokens` cells that begin at `position`. A holder is
    valued when it is asked for, since sharing changes: a shared run of cells counts for none of its holders.
    """

    def __init__(self, recompute_s: Callable[[int, int], float]) -> None:
        self._recompute_s = recompute_s
        self._clock_s = 0.0  # seconds per cell, the unit of all values
        self._uses: dict[int, _Uses] = {}

    def keep(self, holder: int, hits: int = 0) -> None:
        """`holder` is idle from now on. `hits` are those of the prefixes that it grew from or stands in for."""
        self._uses[holder] = _Uses(1 + hits, self._clock_s)

    def hit(self, holder: int) -> None:
        """Another request took cells of `holder`; one that is not kept is nobody's concern."""
        if uses := self._uses.get(holder):
            self._uses[holder] = _Uses(uses.count + 1, self._clock_s)

    def hits(self, holder: int) -> int:
        """How often cells of `holder` were taken since it is kept, with those it was kept with."""
        return self._uses[holder].count - 1

    def forget(self, holder: int) -> None:
        """`holder` is no longer kept: it is in use again, or was closed for another reason than its value."""
        self._uses.pop(holder, None)

    def value(self, kept: Kept) -> float:
        """The worth of `kept` in seconds per cell, on the scale of the clock; infinite if it frees no cell."""
        if not kept.private:
            return float("inf")
        uses = self._uses[kept.holder]
        seconds = self._recompute_s(kept.private, kept.cells - kept.private)
        return uses.clock_s + uses.count * seconds / kept.private

    def give_up(self, candidates: Collection[Kept], protected: Collection[int] = ()) -> int | None:
        """Forget and return the least valuable kept holder of `candidates`, or None if none of them frees a cell.

        Never one in `protected`. Of equally valuable ones the one with most private cells goes. O(len(candidates)).
        """
        frees = [kept for kept in candidates if kept.private and kept.holder not in protected]
        if not frees:
            return None
        values = {kept.holder: self.value(kept) for kept in frees}
        least = min(frees, key=lambda kept: (values[kept.holder], -kept.private, kept.holder))
        self._clock_s = max(self._clock_s, values[least.holder])
        del self._uses[least.holder]
        return least.holder


@dataclass(frozen=True, slots=True)
class _Uses:
    count: int
    clock_s: float  # when it was last used
