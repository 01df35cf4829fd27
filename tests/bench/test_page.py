"""Reports are well-formed, carry the right numbers and load nothing from elsewhere."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from msgspec.structs import replace

from ocserve.bench import charts, measures, page, session
from ocserve.bench.charts import Series
from ocserve.bench.client import Sample
from ocserve.bench.measures import Objective, Ratio
from ocserve.bench.session import Cell, Report, TargetFacts

SVG = "{http://www.w3.org/2000/svg}"


def cell(target: str, phase: str, concurrency: int, scale: float, error: str | None = None) -> Cell:
    samples = [
        Sample(
            phase=phase,
            group="g<&>",
            began_s=0.1 * at,
            visible_s=tuple(scale * (1 + at / 10 + step / 50) for step in range(20)),
            ended_s=scale * 3,
            prompt_tokens=100,
            cached_tokens=25,
            completion_tokens=20,
            error=error if at == 0 else None,
        )
        for at in range(10)
    ]
    found = measures.summary([samples], phase, "g<&>", objective=Objective(ttft_s=1.05 * scale))
    return Cell(
        target=target,
        phase=phase,
        group="g<&>",
        concurrency=concurrency,
        summary=found,
        ttft_s=tuple(sample.visible_s[0] for sample in samples),
        itl_s=tuple(measures.gaps(samples)),
    )


@pytest.fixture
def report() -> Report:
    ratio = Ratio(name="x1/g<&>", measure="ttft_p50", rounds=(0.4, 0.5), median=0.4512, low=0.4, high=0.5)
    return Report(
        scenario="chat & more",
        about="<b>about</b>",
        created="2030-01-01",
        machine="Linux, 2 cores",
        rounds=2,
        seed="s",
        targets=(TargetFacts("A", "http://a", "m<1>"), TargetFacts("B", "ocserve run x", "m")),
        cells=tuple(
            cell(target, f"x{level}", level, scale, "timeout")
            for target, scale in (("A", 0.5), ("B", 1.0))
            for level in (1, 4)
        ),
        ratios=(ratio,),
        relations=(ratio,),
        same_answers=(3, 4),
    )


def test_the_figure_is_an_svg_document_with_its_numbers(report: Report) -> None:
    root = ElementTree.fromstring(page.svg(report))
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert root.tag == f"{SVG}svg"
    assert "0.451  [0.400, 0.500]" in texts
    assert any("x1/g<&>  TTFT p50" in text for text in texts)
    titles = {"Time to first token", "Inter-token latency", "Output tokens/s over concurrency"}
    assert titles <= set(texts)
    assert {"ocserve bench: chat & more", "A: http://a, model m<1>", "B: ocserve run x, model m"} <= set(texts)
    assert len(root.findall(f".//{SVG}path")) == 4 + 4 + 2


def test_curves_that_are_compared_share_a_colour_and_none_is_left_out_silently(report: Report) -> None:
    many = replace(
        report,
        cells=tuple(cell(target, f"x{level}", level, 0.5) for target in ("A", "B") for level in range(1, 9)),
        ratios=(),
    )
    root = ElementTree.fromstring(page.svg(many))
    curves = [path.get("class") for path in root.findall(f".//{SVG}path")]
    assert curves[:12] == [f"curve s{number}{dash}" for dash in ("", " dashed") for number in range(6)]
    assert any("2 more cells" in "".join(text.itertext()) for text in root.iter(f"{SVG}text"))
    width = float(root.attrib["viewBox"].split()[2])
    for text in root.findall(f".//{SVG}g/{SVG}text"):  # none runs into the panel beside it
        if text.get("text-anchor") is None:
            assert float(text.get("x", "0")) + 6.7 * len("".join(text.itertext())) <= width / 2


def test_the_page_is_well_formed_and_has_every_figure_and_error(report: Report) -> None:
    text = page.html(report)
    root = ElementTree.fromstring(text.removeprefix("<!doctype html>"))
    rows = [["".join(each.itertext()) for each in row] for row in root.iter("tr")]
    assert list(page.HEADINGS) in rows
    first = report.cells[0].summary
    (row,) = [row for row in rows if row[0] == "A  x1/g<&>"]
    assert row[1] == "10"
    assert first.ttft_p50 is not None
    assert row[2] == charts.seconds(first.ttft_p50)
    assert row[9] == f"{first.output_per_s:.1f}"
    assert row[11:] == ["675", "25%", "1"]
    body = "".join(root.itertext())
    assert "A x1/g<&>: 1 × timeout" in body
    assert "3 of 4 answers are the same" in body
    assert not re.search(r"(?:src|href)=|@import|url\(", text)


def test_a_session_without_any_answer_still_has_a_page(report: Report) -> None:
    empty = measures.summary([], "p", "g", objective=Objective())
    cells = (Cell(target="A", phase="p", group="g", concurrency=1, summary=empty, ttft_s=(), itl_s=()),)
    bare = session.Report(
        scenario="s", about="", created="", machine="", rounds=1, seed="", targets=report.targets[:1], cells=cells,
        ratios=(), relations=(),
    )  # fmt: skip
    ElementTree.fromstring(page.html(bare).removeprefix("<!doctype html>"))


def test_a_distribution_passes_through_its_quantiles() -> None:
    drawing, _ = charts.distribution("t", [Series("a", [1.0, 2.0, 3.0, 4.0, 5.0])])
    found = re.search(r' d="M([^"]+)"', drawing)
    assert found
    points = [tuple(map(float, point.split())) for point in found.group(1).split("L")]
    across = charts.axis([1.0, 5.0], charts._LEFT, charts.WIDTH - charts._RIGHT)
    assert points[60][0] == pytest.approx(across(3.0), abs=0.1)
    assert [y for _, y in points] == sorted((y for _, y in points), reverse=True)
    assert (points[0][1], points[-1][1]) == (206.0, 40.0)


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.001, 5.0], [0.0, 0.0], [0.0, 3.0], [7.0]])
def test_axes_hold_their_values_and_have_ticks(values: list[float]) -> None:
    across = charts.axis(values, 0, 100)
    assert all(-0.1 <= across(min(max(value, across.low), across.high)) <= 100.1 for value in values)
    assert 2 <= len(across.ticks()) <= 12
