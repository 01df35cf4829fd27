"""`ocserve bench`: from the command line to the table, the JSON and the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ocserve import cli
from ocserve.bench import scenario
from ocserve.generation import ChatPrompt, GenerateRequest
from tests import tiny
from tests.http.harness import serving
from tests.scripted import Script, ScriptedEngine

FAST = {"OCSERVE_ENGINE_THREADS_DECODE": "1", "OCSERVE_ENGINE_THREADS_PREFILL": "1", "OCSERVE_LOG_LEVEL": "error"}


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["bench", *arguments])


def engine() -> ScriptedEngine:
    def of(request: GenerateRequest) -> Script:
        assert isinstance(request.prompt, ChatPrompt)
        words = sum(len(message.content.split()) for message in request.prompt.messages)
        return Script(prompt_tokens=words + 5, prefill_s=0.01, step_s=0.002)

    return ScriptedEngine(of)


def test_list_names_every_scenario() -> None:
    lines = bench("list").output.splitlines()
    assert [line.split()[0] for line in lines] == scenario.names()


def test_a_curve_over_concurrency_is_measured_and_written(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("out.json", "page.html", "figure.svg")]
    with serving(engine) as served:
        result = bench(
            *("chat", "--url", f"{served.url}/v1", "--concurrency", "1,2", "--requests", "4", "--slo-ttft-ms", "5000"),
            *("--json", str(files[0]), "--report", str(files[1]), "--svg", str(files[2])),
        )
    assert result.exit_code == 0, result.output
    report = json.loads(files[0].read_text())
    assert [each["summary"]["requests"] for each in report["cells"]] == [4, 4]
    assert [each["summary"]["good_share"] for each in report["cells"]] == [1.0, 1.0]
    assert "x2/chat" in result.output
    assert files[1].read_text().startswith("<!doctype html>")
    assert files[2].read_text().startswith("<svg")


def test_a_trace_and_a_second_server(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"offset_s":0,"prompt_tokens":9,"output_tokens":2}\n' * 3)
    with serving(engine) as served, serving(engine) as other:
        result = bench("--trace", str(trace), "--url", f"{served.url}/v1", "--against", f"{other.url}/v1")
    assert result.exit_code == 0, result.output
    assert "TTFT p50" in result.output
    assert "3 of 3 answers are the same" in result.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("nonsense",), "there is no scenario"),
        (("chat", "--url", "http://127.0.0.1:9/v1"), "does not answer"),
        (("chat", "--rate", "1", "--concurrency", "2"), "exclude"),
        (("chat", "--url", "x", "--serve", "y"), "not both"),
        (("restart", "--url", "http://127.0.0.1:9/v1"), "--restart-command"),
        (("chat", "--concurrency", "0"), "above 0"),
        (("chat", "--key-from", "NO_SUCH_VARIABLE"), "NO_SUCH_VARIABLE"),
        (("chat", "--serve", "/no/such/model.gguf"), "did not become ready"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments: tuple[str, ...], text: str) -> None:
    result = bench(*arguments)
    assert result.exit_code != 0
    assert text in result.output


def test_an_own_server_is_started_restarted_and_stopped(tmp_path: Path) -> None:
    model = tiny.write(tmp_path / "long.gguf", context=32_768)
    settings = " ".join(f"{name}={value}" for name, value in FAST.items())
    out = tmp_path / "out.json"
    result = bench("restart", "--serve", f"{settings} {model} --ctx 32768", "--json", str(out))
    assert result.exit_code == 0, result.output
    assert "after a restart" in result.output
    cells = json.loads(out.read_text())["cells"]
    assert [(each["phase"], each["summary"]["requests"]) for each in cells] == [
        ("before", 3),
        ("after", 1),
        ("cold", 1),
    ]
    assert all(each["summary"]["errors"] == {} for each in cells), cells
