"""What the real engine exports, and the real Prometheus that scrapes it with the shipped rules and dashboard."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.daemon import RunningDaemon, wait_until
from tests.e2e.test_proxies import free_port

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"
MODEL = "smollm2:135m"


def scrape(server: RunningDaemon) -> dict[tuple[str, str], float]:
    """Sums over all other labels, by name and `kind`."""
    with urllib.request.urlopen(f"{server.root}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, sample.labels.get("kind", ""))
            found[key] = found.get(key, 0) + sample.value
    return found


def ask(client: openai.OpenAI) -> Any:
    messages: Any = [{"role": "user", "content": "Count to ten."}]
    return client.chat.completions.create(model=MODEL, messages=messages, max_tokens=24).usage


def test_the_engines_figures_are_there(server: RunningDaemon, client: openai.OpenAI) -> None:
    time.sleep(1.0)  # an idle engine tells its counts within half a second: those of the requests before are in
    before = scrape(server)
    usage = ask(client)
    wait_until(lambda: scrape(server)["ocserve_engine_steps_total", ""] > before["ocserve_engine_steps_total", ""])
    wait_until(lambda: scrape(server)["ocserve_sequences_running", ""] == 0)
    after = scrape(server)

    def grown(name: str, kind: str = "") -> float:
        return after[name, kind] - before.get((name, kind), 0)

    assert grown("ocserve_tokens_total", "prompt") == usage.prompt_tokens
    assert grown("ocserve_tokens_total", "completion") == usage.completion_tokens
    computed = grown("ocserve_engine_tokens_total", "prefill") + grown("ocserve_engine_cached_tokens_total")
    assert computed >= usage.prompt_tokens
    assert 0 < grown("ocserve_engine_steps_total") <= 2 * usage.completion_tokens
    assert 0 < grown("ocserve_inter_token_latency_seconds_count") < usage.completion_tokens
    assert grown("ocserve_time_to_first_token_seconds_count") == 1
    assert after["ocserve_engine_resident_memory_bytes", ""] > 100e6
    assert 20e6 < after["ocserve_front_resident_memory_bytes", ""] < 200e6
    assert 0 <= after["ocserve_kv_cells_used", ""] <= after["ocserve_kv_cells", ""]
    assert after["ocserve_kv_cells", ""] >= 2048
    assert after["ocserve_ready", ""] == after["ocserve_model_loaded", ""] == 1


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[str]:
    """A Prometheus that scrapes `target` and has our rules; its address."""
    settings = {
        "global": {"scrape_interval": "250ms", "scrape_timeout": "250ms", "evaluation_interval": "500ms"},
        "rule_files": [str(PACKAGING / "alerts.yml")],
        "scrape_configs": [{"job_name": "ocserve", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    address = f"127.0.0.1:{free_port()}"
    files = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["prometheus", *files, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        yield f"http://{address}/api/v1"
    finally:
        process.terminate()
        process.wait(20)


def get(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)["data"]
    except OSError:
        return None


@pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus (the Debian package) is not installed")
def test_a_real_prometheus_scrapes_it_and_fills_the_dashboard(
    server: RunningDaemon, client: openai.OpenAI, tmp_path: Path
) -> None:
    target = server.root.removeprefix("http://")
    with prometheus(target, tmp_path) as api:

        def query(expression: str) -> list[Any]:
            found = get(f"{api}/query?{urllib.parse.urlencode({'query': expression})}")
            return found["result"] if found else []

        wait_until(lambda: query("count_over_time(ocserve_ready[1m]) > 1"))
        for _ in range(2):
            ask(client)
        wait_until(lambda: query('increase(ocserve_tokens_total{kind="completion"}[1m]) > 0'))
        assert query("up")[0]["value"][1] == "1"
        empty = []
        for panel in json.loads((PACKAGING / "grafana-dashboard.json").read_text())["panels"]:
            for each in panel.get("targets", ()):
                expression = each["expr"].replace("$__rate_interval", "1m")
                if not query(expression.replace("$instance", ".*").replace("$model", ".*")):
                    empty.append(each["expr"])
        # What has not happened here: no request was refused, and nothing judged, so there is nothing to draw.
        absent = ("_errors_", "_refusals_", "_policy_")
        assert [each for each in empty if not any(name in each for name in absent)] == []
        rules = get(f"{api}/rules")["groups"][0]["rules"]
        wait_until(lambda: all(rule["health"] == "ok" for rule in get(f"{api}/rules")["groups"][0]["rules"]))
        assert len(rules) == (PACKAGING / "alerts.yml").read_text().count("- alert:")
        assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []
