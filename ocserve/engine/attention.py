"""How many cells the rows of a batch attend, in sum: what attention costs grows with it.

With flash attention llama.cpp's rows compute with the cells of their own sequences, and pass over those of others at a
small price. Without it (`dense`) every row computes a score for every cell up to the last one in use, whosever it is,
and then masks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

# llama.cpp rounds the cells that a batch looks at up to it.
CELL_STEP = 256


class Span(NamedTuple):
    """`rows` of a batch that go on with a sequence of which `computed` tokens have cells."""

    computed: int
    rows: int


@dataclass(frozen=True, slots=True)
class Attention:
    """`in_use` counts the cells that any sequence holds; None where rows attend only their own (flash attention)."""

    in_use: Callable[[], int] | None = None

    @property
    def dense(self) -> bool:
        return self.in_use is not None

    def cells(self, spans: Iterable[Span], absent: int = 0) -> int:
        """Cells that the rows of one batch attend in sum, or would if so many cells of others were not there."""
        if self.in_use is None:
            return sum(rows * computed + rows * (rows + 1) // 2 for computed, rows in spans)
        rows = sum(span.rows for span in spans)
        return scores(rows, max(0, self.in_use() - absent) + rows)

    def cells_per_row(self, computed: int) -> int:
        """Cells that a row attends behind `computed` tokens of its sequence."""
        return computed if self.in_use is None else scores(1, self.in_use() + 1)


def scores(rows: int, in_use: int) -> int:
    """Scores that so many rows compute with `in_use` cells, their own among them, without flash attention."""
    return rows * -(-in_use // CELL_STEP) * CELL_STEP
