"""A session as an SVG figure and as an HTML page of its own. Pure; nothing is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ocserve.bench import charts
from ocserve.bench.charts import Series, seconds
from ocserve.bench.measures import COMPARED, Ratio
from ocserve.bench.session import Cell, Report

_STYLE = """
:root{color-scheme:light dark}
body{margin:0 auto;max-width:920px;padding:40px 24px;font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;
background:#fff;color:#1c2430}
h1{font-size:26px;letter-spacing:-.01em;margin:0 0 4px}p{margin:4px 0;color:#5d6878}code{font-size:13px}
table{border-collapse:collapse;width:100%;margin:28px 0;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:6px 8px;text-align:right;border-bottom:1px solid #e3e7ed}th{font-weight:600;color:#5d6878}
th:first-child,td:first-child{text-align:left}svg{width:100%;height:auto;margin-top:24px}.bad{color:#b3261e}
@media(prefers-color-scheme:dark){body{background:#11161d;color:#e8ecf2}p,th{color:#9aa6b6}
th,td{border-color:#2c3542}.bad{color:#ff8a80}}
"""

HEADINGS = ("cell", "requests", "TTFT p50", "p95", "p99", "ITL p50", "p95", "p99", "e2e p50", "out tok/s", "good",
            "prefill", "cached", "errors")  # fmt: skip


def row(cell: Cell, *, with_target: bool) -> tuple[str, ...]:
    """The figures of a cell as texts, in the order of `HEADINGS`; a dash is for what could not be measured."""
    figures = cell.summary
    durations = (
        *(figures.ttft_p50, figures.ttft_p95, figures.ttft_p99),
        *(figures.itl_p50, figures.itl_p95, figures.itl_p99, figures.e2e_p50),
    )
    good = "–"
    if figures.good_share is not None and figures.goodput_per_s is not None:
        good = f"{figures.good_share:.0%}, {figures.goodput_per_s:.2f}/s"
    return (
        f"{cell.target}  {cell.name}" if with_target else cell.name,
        str(figures.requests),
        *("–" if value is None else seconds(value) for value in durations),
        f"{figures.output_per_s:.1f}",
        good,
        "–" if figures.prefill_tokens is None else str(figures.prefill_tokens),
        "–" if figures.cached_share is None else f"{figures.cached_share:.0%}",
        str(sum(figures.errors.values())),
    )


def ratio_text(ratio: Ratio) -> str:
    """A ratio with its interval, and over how many rounds."""
    count = f"{len(ratio.rounds)} {'round' if len(ratio.rounds) == 1 else 'rounds'}"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.median:.3f}  ({count})"
    return f"{ratio.median:.3f}  [{ratio.low:.3f}, {ratio.high:.3f}]  ({count})"


def svg(report: Report) -> str:
    """The figure: what was measured, latency distributions, throughput over concurrency where it varies, ratios."""
    panels = []
    for title, field in (("Time to first token", "ttft_s"), ("Inter-token latency", "itl_s")):
        if series := _distributions(report, field):
            panels.append(charts.distribution(title, series))
    if curves := _throughput(report):
        panels.append(charts.lines("Output tokens/s over concurrency", curves))
    wide = []
    if report.ratios:
        names = [(f"{each.name}  {COMPARED[each.measure]}", each) for each in report.ratios]
        one, other = (target.label for target in report.targets)
        wide.append(charts.whiskers(f"{one} / {other}, paired by round, with 95 % intervals", names))
    about = [f"{each.label}: {each.what}, model {each.model}" for each in report.targets]
    return charts.sheet(charts.heading(_title(report), [*about, _facts(report)]), panels, wide)


def _title(report: Report) -> str:
    return f"ocserve bench: {report.scenario}"


def _facts(report: Report) -> str:
    rounds = f"{report.rounds} {'round' if report.rounds == 1 else 'rounds'}"
    facts = f"{rounds} · {report.machine} · {report.created} · seed {report.seed}"
    missing = len(_names(report)) - charts.COLOURS
    return f"{facts} · {missing} more cells are in the table and the JSON" if missing > 0 else facts


def _names(report: Report) -> list[str]:
    """What the cells of each target are called, in their order."""
    return list(dict.fromkeys(each.name for each in report.cells))


def _distributions(report: Report, field: str) -> list[Series]:
    """The curves of the first cells, as many as there are colours, the same cell's in one colour."""
    colours = {name: number for number, name in enumerate(_names(report)[: charts.COLOURS])}
    labels = [target.label for target in report.targets]
    return [
        Series(
            f"{each.target} {each.name}" if len(labels) > 1 else each.name,
            getattr(each, field),
            colour=colours[each.name],
            dashed=each.target != labels[0],
        )
        for each in report.cells
        if each.name in colours and getattr(each, field)
    ]


def _throughput(report: Report) -> list[Series]:
    found: list[Series] = []
    for target in report.targets:
        points = [
            (float(each.concurrency), each.summary.output_per_s)
            for each in report.cells
            if each.target == target.label and each.concurrency is not None
        ]
        if len({x for x, _ in points}) == len(points) > 1:
            found.append(Series(target.label, (), sorted(points), colour=len(found), dashed=bool(found)))
    return found


def html(report: Report) -> str:
    """The whole page."""
    several = len(report.targets) > 1
    targets = "".join(
        f"<p><b>{escape(each.label)}</b> <code>{escape(each.what)}</code>, model {escape(each.model)}</p>"
        for each in report.targets
    )
    parts = [
        f"<h1>{escape(report.scenario)}</h1><p>{escape(report.about)}</p>{targets}<p>{escape(_facts(report))}</p>",
        svg(report),
        _table(HEADINGS, [row(each, with_target=several) for each in report.cells]),
        "".join(f'<p class="bad">{escape(line)}</p>' for line in errors(report)),
    ]
    if report.relations:
        parts.append(_table(("ratio", ""), [(each.name, ratio_text(each)) for each in report.relations]))
    if report.same_answers is not None:
        parts.append("<p>{} of {} answers are the same</p>".format(*report.same_answers))
    title = escape(_title(report))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"/><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"/><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>"
    )


def errors(report: Report) -> list[str]:
    """A line for each kind of failure in each cell, and for answers without usage."""
    found = []
    for cell in report.cells:
        where = f"{cell.target} {cell.name}"
        found += [f"{where}: {count} × {kind}" for kind, count in sorted(cell.summary.errors.items())]
        if cell.summary.uncounted:
            found.append(f"{where}: {cell.summary.uncounted} answers without usage; their tokens are counted by delta")
    return found


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(each)}</td>" for each in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
