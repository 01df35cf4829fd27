"""`ocserve config show`: every value with its origin, secrets masked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ocserve import config
from ocserve.cli import main


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[server]\nport = 8080\ncors_origins = ["https://a.example"]\n[auth]\nkey_file = "/k"\n')
    monkeypatch.setenv("OCSERVE_CONFIG", str(path))
    monkeypatch.setenv("OCSERVE_API_KEY", "CANARY-CANARY-CANARY")
    monkeypatch.setenv("OCSERVE_LOG_LEVEL", "debug")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)


def test_every_setting_is_shown_with_its_origin() -> None:
    result = CliRunner().invoke(main, ["config", "show"])
    assert result.exit_code == 0
    assert "CANARY" not in result.output
    rows = {line.split()[0]: line.split()[1:] for line in result.output.splitlines() if not line.startswith("#")}
    assert list(rows) == list(config.catalogue())
    assert rows["server.port"] == ["8080", "config.toml"]
    assert rows["server.cors_origins"] == ["https://a.example", "config.toml"]
    assert rows["log.level"] == ["debug", "OCSERVE_LOG_LEVEL"]
    assert rows["auth.api_key"] == ["set", "OCSERVE_API_KEY"]
    assert rows["store.hub_token"] == ["unset", "default"]
    assert rows["engine.context"] == ["-", "default"]
    assert rows["auth.anonymous"] == ["true", "default"]


def test_it_can_be_read_by_programs() -> None:
    result = CliRunner().invoke(main, ["config", "show", "--json"])
    assert "CANARY" not in result.output
    document = json.loads(result.output)
    assert list(document["settings"]) == list(config.catalogue())
    assert document["settings"]["server.port"] == {
        "value": 8080,
        "origin": "config.toml",
        "variable": "OCSERVE_SERVER_PORT",
        "description": "port to listen on; 0 takes any free one",
    }
    assert document["settings"]["auth.api_key"]["value"] == "set"
    assert document["settings"]["auth.key_file"]["value"] == "/k"


def test_wrong_settings_are_an_error_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCSERVE_SERVER_PROT", "1")
    result = CliRunner().invoke(main, ["config", "show"])
    assert result.exit_code == 78
    assert "did you mean `OCSERVE_SERVER_PORT`?" in result.stderr


def test_who_is_shown_content_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "The content of" not in CliRunner().invoke(main, ["config", "show"]).output
    monkeypatch.setenv("OCSERVE_POLICY_COMMAND", "/usr/bin/judge,--strict")
    output = CliRunner().invoke(main, ["config", "show"]).output
    assert output.endswith("# The content of every prompt and answer is shown to /usr/bin/judge --strict\n")


def test_tables_are_shown_with_what_is_set_in_them(tmp_path: Path) -> None:
    with (tmp_path / "config.toml").open("a") as file:
        file.write('[[limits.models]]\nmodel = "tiny"\nrequests_per_minute = 500\ntokens_per_day = 9\n')
        file.write('[[limits.models]]\nmodel = "other"\nconcurrent_requests = 1\n')
    shown = CliRunner().invoke(main, ["config", "show"]).stdout
    assert "  tiny: requests_per_minute 500, tokens_per_day 9; other: concurrent_requests 1  config.toml" in shown


def test_what_each_setting_is_for_is_shown_on_demand() -> None:
    lines = CliRunner().invoke(main, ["config", "show", "--describe"]).stdout.splitlines()
    known = config.catalogue()
    for name in known:
        [at] = [index for index, line in enumerate(lines) if line.split()[0] == name]
        assert lines[at + 1] == f"# {known[name].description}"
    assert set(known["limits.models"].fields) == {"model", *config.Allowance.__struct_fields__}
    for name, text in known["limits.models"].fields.items():
        assert text
        assert f"#   {name}: {text}" in lines
