"""Charts as SVG text: distribution curves, rates over concurrency, and ratios with their intervals. Pure.

No script, no font and no image from elsewhere; colours follow the reader's light or dark scheme. All numbers in labels
are rounded for reading, the exact ones are in the JSON.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias
from xml.sax.saxutils import escape

from ocserve.bench.measures import Ratio, percentile

WIDTH = 420
_LEFT, _RIGHT, _TOP = 48, 16, 40
_FLOOR = 206  # where a plot ends; its axis and legend are below
_LEGEND_ROW, _LETTER = 18, 6.7
_LETTERS = int((2 * WIDTH - 2 * _RIGHT) / _LETTER)
_POINTS = 120
_WIDE = 20.0  # values that lie further apart than this are drawn on a logarithmic axis

_LIGHT = ("#2563eb", "#d9580d", "#0d8f6f", "#8b46d6", "#b3261e", "#5b6b00")
_DARK = ("#6ea2ff", "#ff9a57", "#4fd0ac", "#c397ff", "#ff8a80", "#c6d64a")
COLOURS = len(_LIGHT)

Panel: TypeAlias = tuple[str, int]  # a drawing, and its height in pixels


def _colours(series: Sequence[str], *, ink: str, soft: str, line: str, paper: str) -> str:
    """Rules without variables, which many programs that draw SVG do not know."""
    rules = [f".s{number}{{stroke:{colour}}}.f{number}{{fill:{colour}}}" for number, colour in enumerate(series)]
    return "".join(
        (
            f".paper{{fill:{paper}}}text{{fill:{soft}}}.title{{fill:{ink}}}.grid{{stroke:{line}}}.one{{stroke:{soft}}}",
            *rules,
        )
    )


_ON_WHITE = _colours(_LIGHT, ink="#1c2430", soft="#5d6878", line="#e3e7ed", paper="#fff")
_ON_BLACK = _colours(_DARK, ink="#e8ecf2", soft="#9aa6b6", line="#2c3542", paper="#11161d")
STYLE = f"""
text{{font-family:system-ui,-apple-system,"Segoe UI",sans-serif;font-size:12px}}
.title{{font-size:14px;font-weight:600}}
.grid{{stroke-width:1}}
.curve{{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}}
.dashed{{stroke-dasharray:5 4}}
.whisker{{stroke-width:2;stroke-linecap:round}}
.one{{stroke-width:1;stroke-dasharray:3 3}}
{_ON_WHITE}
@media(prefers-color-scheme:dark){{{_ON_BLACK}}}
"""


@dataclass(frozen=True, slots=True)
class Series:
    """A named curve; `values` are a sample for a distribution and (x, y) points for a line.

    Curves that are to be compared have one `colour`, counted from 0, and the second of them is `dashed`.
    """

    name: str
    values: Sequence[float]
    points: Sequence[tuple[float, float]] = ()
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale from values to pixels, linear from 0 or logarithmic."""

    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Round values on the axis."""
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [base * 10.0**power for power in powers for base in (1, 2, 5)]
            found = [tick for tick in found if self.low <= tick <= self.high]
            return found[:: max(1, len(found) // 5)]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * base for base in (1, 2, 5, 10) if power * base >= rough)
        first = math.ceil(self.low / step)
        return [step * count for count in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis(values: Sequence[float], begin: float, end: float) -> Axis:
    """A scale that shows all values: logarithmic where they lie far apart."""
    high = max(values)
    low = min(value for value in (*values, high) if value > 0) if high > 0 else 0.0
    if low and percentile(values, 99) / max(low, percentile(values, 5)) > _WIDE:
        return Axis(max(low, high / 1e4), high, begin, end, logarithmic=True)
    return Axis(0.0, high * 1.02 or 1.0, begin, end)


def seconds(value: float) -> str:
    """A duration for a label."""
    if value >= 1 or value == 0:
        return f"{value:.3g} s"
    return f"{1000 * value:.3g} ms"


def distribution(title: str, series: Sequence[Series]) -> Panel:
    """Cumulative distributions of durations in seconds: the share of values at most x."""
    pooled = [value for each in series for value in each.values]
    across = axis(pooled, _LEFT, WIDTH - _RIGHT)
    up = Axis(0.0, 1.0, _FLOOR, _TOP)
    parts = [_frame(title, across, up, seconds, lambda share: f"{share:.0%}")]
    for each in series:
        points = []
        for step in range(_POINTS + 1):
            value = min(max(percentile(each.values, 100 * step / _POINTS), across.low), across.high)
            points.append((across(value), up(step / _POINTS)))
        parts.append(_curve(points, each))
    return _with_legend(parts, series)


def lines(title: str, series: Sequence[Series]) -> Panel:
    """Rates over concurrency: one line for each series of (concurrency, rate)."""
    xs = [x for each in series for x, _ in each.points]
    across = Axis(0.0, max(xs) * 1.05, _LEFT, WIDTH - _RIGHT)
    up = Axis(0.0, max(y for each in series for _, y in each.points) * 1.1 or 1.0, _FLOOR, _TOP)
    parts = [_frame(title, across, up, lambda value: f"{value:g}", lambda value: f"{value:g}")]
    for each in series:
        points = [(across(x), up(y)) for x, y in each.points]
        parts.append(_curve(points, each))
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="f{each.colour}"/>' for x, y in points]
    return _with_legend(parts, series)


def whiskers(title: str, ratios: Sequence[tuple[str, Ratio]]) -> Panel:
    """Paired ratios with their intervals on a logarithmic axis around 1."""
    left, width, row = 250, 2 * WIDTH, 24
    values = [value for _, each in ratios for value in (each.median, each.low or each.median, each.high or each.median)]
    reach = max(1.1, *(max(value, 1 / value) for value in values if value > 0)) * 1.05
    across = Axis(1 / reach, reach, left, width - 150, logarithmic=True)
    height = _TOP + row * len(ratios) + 30
    bottom = height - 24
    parts = [_title(title)]
    for tick in sorted({1.0, *(tick for tick in (0.1, 0.2, 0.5, 0.8, 1.25, 2, 5, 10) if 1 / reach < tick < reach)}):
        x = across(tick)
        kind = "one" if tick == 1 else "grid"
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 8}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    for number, (name, each) in enumerate(ratios):
        y = _TOP + row * number + 10
        x = across(max(each.median, 1 / reach))
        parts.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        label = f"{each.median:.3f}"
        if each.low is not None and each.high is not None:
            begin, end = across(max(each.low, 1 / reach)), across(max(each.high, 1 / reach))
            parts.append(f'<line class="whisker s0" x1="{begin:.1f}" x2="{end:.1f}" y1="{y}" y2="{y}"/>')
            label += f"  [{each.low:.3f}, {each.high:.3f}]"
        parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="4.5" class="f0"/>')
        parts.append(f'<text x="{width - 140}" y="{y + 4}">{label}</text>')
    return "".join(parts), height


def heading(title: str, rows: Sequence[str]) -> Panel:
    """What the figure is about."""
    texts = [line for row in rows for line in textwrap.wrap(row, _LETTERS, break_on_hyphens=False)]
    parts = [_title(title)]
    parts += [
        f'<text x="{_LEFT - 32}" y="{42 + 18 * number}">{escape(line)}</text>' for number, line in enumerate(texts)
    ]
    return "".join(parts), 38 + 18 * len(texts)


def sheet(head: Panel, panels: Sequence[Panel], wide: Sequence[Panel] = ()) -> str:
    """One SVG document: panels two beside one another, wide ones below."""
    parts, y = [head[0]], head[1]
    for pair in (panels[at : at + 2] for at in range(0, len(panels), 2)):
        parts += [
            f'<g transform="translate({WIDTH * column},{y})">{panel}</g>' for column, (panel, _) in enumerate(pair)
        ]
        y += max(height for _, height in pair)
    for panel, height in wide:
        parts.append(f'<g transform="translate(0,{y})">{panel}</g>')
        y += height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {y}" role="img">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" class="paper"/>{"".join(parts)}</svg>'
    )


def _title(text: str) -> str:
    return f'<text class="title" x="{_LEFT - 32}" y="20">{escape(text)}</text>'


def _frame(title: str, across: Axis, up: Axis, x_label: Callable[[float], str], y_label: Callable[[float], str]) -> str:
    parts = [_title(title)]
    for tick in up.ticks():
        y = up(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{y_label(tick)}</text>')
    for tick in across.ticks():
        x = across(tick)
        parts.append(f'<text x="{x:.1f}" y="{_FLOOR + 16}" text-anchor="middle">{x_label(tick)}</text>')
    return "".join(parts)


def _curve(points: Sequence[tuple[float, float]], series: Series) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="curve {_stroke(series)}" d="M{path}"/>'


def _stroke(series: Series) -> str:
    return f"s{series.colour} dashed" if series.dashed else f"s{series.colour}"


def _with_legend(parts: Sequence[str], series: Sequence[Series]) -> Panel:
    """A plot with the names of its curves below, in as many rows as they take."""
    legend, x, y = [], float(_LEFT), _FLOOR + 38
    for each in series:
        wide = 30 + _LETTER * len(each.name)
        if x > _LEFT and x + wide > WIDTH - _RIGHT:
            x, y = float(_LEFT), y + _LEGEND_ROW
        legend.append(f'<line class="curve {_stroke(each)}" x1="{x:.0f}" x2="{x + 16:.0f}" y1="{y - 4}" y2="{y - 4}"/>')
        legend.append(f'<text x="{x + 21:.0f}" y="{y}">{escape(each.name)}</text>')
        x += wide
    return "".join([*parts, *legend]), y + 22
