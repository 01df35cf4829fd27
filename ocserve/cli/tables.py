"""Tables on stdout, a bar on stderr for commands that take minutes, and counts in sentences."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click
import msgspec


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


def readable(value: object) -> str:
    """A setting's value, also as JSON has it: of a table what is set, after the model that it is for; `-` for none."""
    match value:
        case None:
            return "-"
        case bool():
            return str(value).lower()
        case msgspec.Struct():
            return readable(msgspec.to_builtins(value))
        case dict():
            named = {name: each for name, each in value.items() if each is not None}
            model = named.pop("model", None)
            shown = ", ".join(f"{name} {readable(each)}" for name, each in named.items()) or "nothing"
            return shown if model is None else f"{model}: {shown}"
        case list() | tuple():
            tables = any(isinstance(each, dict | msgspec.Struct) for each in value)
            return ("; " if tables else ", ").join(map(readable, value)) or "-"
        case _:
            return str(value)


def counted(count: int, one: str) -> str:
    """So many of what is called `one`, whose plural ends in s: `1 row`, `2 rows`."""
    return f"{count:,} {one}{'' if count == 1 else 's'}"
