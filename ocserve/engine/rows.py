"""From what is to be computed to the rows of a batch."""

from __future__ import annotations

from collections.abc import Iterable

from ocserve.engine.composer import Chunk
from ocserve.engine.context import Row


def rows_of(chunks: Iterable[Chunk]) -> tuple[list[Row], list[int], list[int | None]]:
    """The batch, and for each chunk its first row and that of its newest token, None if that is not among them."""
    rows: list[Row] = []
    starts: list[int] = []
    newest: list[int | None] = []
    for chunk in chunks:
        sequence = chunk.sequence
        assert sequence.slot is not None
        begin, end = sequence.computed, sequence.computed + chunk.count
        starts.append(len(rows))
        for position, token in enumerate(sequence.tokens(begin, end), start=begin):
            rows.append(Row(token, position, sequence.slot, position + 1 == sequence.length or sequence.unscored))
        newest.append(len(rows) - 1 if end == sequence.length else None)
        rows += [Row(token, end + index, sequence.slot, True) for index, token in enumerate(chunk.drafts)]
    return rows, starts, newest
