"""Tables on stdout, a bar on stderr for commands that take minutes, and counts in sentences."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click


@contextmanager
def progress(length: int, label: str) -> Iterator[Callable[[], None]]:
    """A bar on stderr if that is a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    with click.progressbar(length=length, label=label, file=sys.stderr, show_pos=True) as bar:
        yield lambda: bar.update(1)


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], left: int = 1) -> None:
    """Columns on stdout: the first `left` to the left, figures to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = (
            text.ljust(width) if column < left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        click.echo("  ".join(cells).rstrip())


def counted(count: int, one: str) -> str:
    """So many of what is called `one`, whose plural ends in s: `1 row`, `2 rows`."""
    return f"{count:,} {one}{'' if count == 1 else 's'}"
