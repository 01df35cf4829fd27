"""The dashboard, the alerts and the table of metrics speak of exactly what a live server exports."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from ocserve import config
from ocserve.telemetry.metrics import DEFINITIONS
from tests.http.harness import serving
from tests.scripted import Script, ScriptedEngine

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"
# What Prometheus and Grafana add.
OUTSIDE = {"instance", "job", "le"}
PROMTOOL = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (Debian package prometheus) is not installed"
)


@pytest.fixture(scope="module")
def live() -> dict[str, dict[str, set[str]]]:
    """Of each exported name its labels and their values, from a server on which everything has happened once."""
    judge = """echo '{"allow": true}'"""
    with serving(
        lambda: ScriptedEngine(Script(tokens=("a", "b", "c"))),
        limits=config.Limits(requests_per_minute=2),
        policy=config.Policy(command=("/bin/sh", "-c", judge), timeout_s=60.0),
    ) as server:
        server.chat(stream=True)
        server.chat(model="unknown")
        server.chat(), server.chat()
        text = server.request("GET", "/metrics").body.decode()
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


def dashboard() -> Any:
    return json.loads((PACKAGING / "grafana-dashboard.json").read_text())


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((PACKAGING / "alerts.yml").read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def targets() -> Iterator[tuple[str, str, str]]:
    """(panel, expression, legend)."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"], target["legendFormat"]


def expressions() -> list[tuple[str, str, str]]:
    """(where, expression, text with labels in it)."""
    variables = [each for each in dashboard()["templating"]["list"] if each["type"] == "query"]
    return [
        *targets(),
        *((rule["alert"], rule["expr"], " ".join(rule["annotations"].values())) for rule in alerts()),
        *((each["name"], each["query"]["query"], "") for each in variables),
    ]


def test_every_metric_is_live_and_documented(live: dict[str, dict[str, set[str]]]) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` (\|.*)$", (PACKAGING / "README.md").read_text(), re.MULTILINE))
    assert rows == {
        each.exported: f"| {each.kind} | {', '.join(each.labels) or '–'} | {each.help} |" for each in DEFINITIONS
    }
    suffixes = {"histogram": ("_bucket", "_sum", "_count")}
    exported = {each.exported + suffix: each for each in DEFINITIONS for suffix in suffixes.get(each.kind, ("",))}
    memory = {"ocserve_engine_resident_memory_bytes"}  # a scripted engine has no process
    assert set(live) == set(exported) - memory
    for name, labels in live.items():
        assert set(labels) - {"le"} == set(exported[name].labels), name


@pytest.mark.parametrize(("where", "expression", "text"), expressions())
def test_names_and_labels_exist(live: dict[str, dict[str, set[str]]], where: str, expression: str, text: str) -> None:
    known = {**live, "ocserve_engine_resident_memory_bytes": {"model": {"tiny"}}}
    names = set(re.findall(r"\bocserve_\w+", expression))
    assert names
    assert names <= set(known)
    labels = set.union(*(set(known[name]) for name in names)) | OUTSIDE
    grouped = re.findall(r"\bby \(([^)]*)\)", expression)
    assert {label.strip() for group in grouped for label in group.split(",")} <= labels
    assert set(re.findall(r"\{\{(?:[^}]*\$labels\.)?\s*(\w+)\s*\}\}", text)) <= labels
    for name, selector in re.findall(r"(ocserve_\w+)\{([^}]*)\}", expression):
        for label, operator, value in re.findall(r'(\w+)(=~|!=|=)"([^"]*)"', selector):
            assert label in set(known[name]) | OUTSIDE
            if operator == "=" and label in ("kind", "tier"):
                assert value in known[name][label]


def test_every_metric_is_on_the_dashboard() -> None:
    shown = " ".join(expression for _, expression, _ in targets())
    assert [each.name for each in DEFINITIONS if not re.search(rf"\b{each.name}(_total|_bucket)?\b", shown)] == []


def test_the_dashboard_is_whole() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    taken = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(taken)) == len(taken), "panels overlap"
    assert max(x for x, _ in taken) < 24
    for panel in panels:
        for target in panel.get("targets", ()):
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


@PROMTOOL
def test_promtool_accepts_alerts_and_expressions(tmp_path: Path) -> None:
    shown = [
        expression.replace("$__rate_interval", "5m").replace("$instance", ".*").replace("$model", ".*")
        for _, expression, _ in targets()
    ]
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(shown)]
    panels = tmp_path / "panels.yml"
    panels.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    checked = subprocess.run(
        ["promtool", "check", "rules", str(PACKAGING / "alerts.yml"), str(panels)], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(alerts())} rules found" in checked.stdout
    assert f"{len(rules)} rules found" in checked.stdout


# When each alert fires: series over minutes, and one of its labels.
FIRES = {
    "OcserveNotReady": [('ocserve_ready{instance="a"}', "0x20")],
    "OcserveDown": [],
    "OcserveServerErrors": [
        ('ocserve_requests_total{instance="a",status="5xx"}', "0+2x20"),
        ('ocserve_requests_total{instance="a",status="2xx"}', "0+60x20"),
    ],
    "OcserveBrokenStreams": [('ocserve_requests_total{instance="a",status="2xx",finish_reason="error"}', "0+1x20")],
    "OcserveEngineRestarts": [('ocserve_engine_restarts_total{instance="a",model="m"}', "0x10 1 2 3 3 3 3 3 3 3 3")],
    "OcserveRefusesForWantOfRoom": [
        ('ocserve_limit_refusals_total{instance="a",limit="capacity"}', "0+10x20"),
        ('ocserve_requests_total{instance="a",status="4xx"}', "0+60x20"),
    ],
    "OcserveSlowFirstToken": [
        ('ocserve_time_to_first_token_seconds_bucket{instance="a",model="m",le="10.0"}', "0+1x20"),
        ('ocserve_time_to_first_token_seconds_bucket{instance="a",model="m",le="20.0"}', "0+9x20"),
        ('ocserve_time_to_first_token_seconds_bucket{instance="a",model="m",le="+Inf"}', "0+9x20"),
    ],
    "OcserveSlowTokens": [
        ('ocserve_inter_token_latency_seconds_bucket{instance="a",model="m",le="0.5"}', "0+1x20"),
        ('ocserve_inter_token_latency_seconds_bucket{instance="a",model="m",le="1.0"}', "0+99x20"),
        ('ocserve_inter_token_latency_seconds_bucket{instance="a",model="m",le="+Inf"}', "0+99x20"),
    ],
    "OcservePolicyFailing": [
        ('ocserve_policy_checks_total{instance="a",stage="prompt",verdict="failed"}', "0+1x20"),
        ('ocserve_policy_checks_total{instance="a",stage="prompt",verdict="allowed"}', "0+9x20"),
    ],
    "OcserveLedgerFailing": [('ocserve_ledger_healthy{instance="a"}', "0x20")],
    "OcserveInvalidObjects": [('ocserve_invalid_objects_total{instance="a",model="m"}', "0x10 1x9")],
    "OcservePoolTooSmall": [('ocserve_engine_preemptions_total{instance="a",model="m"}', "0+1x20")],
    "OcserveFrontMemory": [('ocserve_front_resident_memory_bytes{instance="a"}', "2000000000x20")],
}
CALM = [
    ('ocserve_ready{instance="a"}', "1x20"),
    ('ocserve_requests_total{instance="a",status="2xx"}', "0+60x20"),
    ('ocserve_requests_total{instance="a",status="5xx"}', "0x20"),
    ('ocserve_limit_refusals_total{instance="a",limit="requests_per_minute"}', "0+30x20"),
    ('ocserve_policy_checks_total{instance="a",stage="prompt",verdict="failed"}', "0x20"),
    ('ocserve_policy_checks_total{instance="a",stage="prompt",verdict="refused"}', "0+30x20"),
    ('ocserve_engine_restarts_total{instance="a",model="m"}', "0x10 1x9"),
    ('ocserve_front_resident_memory_bytes{instance="a"}', "60000000x20"),
]


@PROMTOOL
def test_each_alert_fires_when_it_should_and_rests_otherwise(tmp_path: Path) -> None:
    """By Prometheus' own unit tests of rules."""
    assert set(FIRES) == {rule["alert"] for rule in alerts()}

    def case(series: list[tuple[str, str]], tests: list[dict[str, Any]]) -> dict[str, Any]:
        given = [{"series": name, "values": values} for name, values in series]
        return {"interval": "1m", "input_series": given, "promql_expr_test": tests}

    def firing(name: str, count: int) -> dict[str, Any]:
        samples = [{"labels": "{}", "value": count}] if count else []
        expression = f'count(ALERTS{{alertname="{name}", alertstate="firing"}})'
        return {"expr": expression, "eval_time": "18m", "exp_samples": samples}

    cases = [case(series, [firing(name, 1)]) for name, series in FIRES.items()]
    cases.append(case(CALM, [firing(name, 0) for name in FIRES]))
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(PACKAGING / "alerts.yml")], "tests": cases}))
    checked = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
