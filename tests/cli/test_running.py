"""The commands that ask a running server: what they print, and what they say where none answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ocserve import cli
from ocserve.accounts.keystore import KeyStore
from tests.http.harness import Control, Served, serving

COMMANDS = (
    ("ps",),
    ("load", "tiny"),
    ("unload", "tiny"),
    ("reload",),
    ("drain",),
    ("drain", "--resume"),
    ("maintenance",),
    ("maintenance", "2999-01-01T00:00Z", "2999-01-01T01:00Z"),
    ("stop",),
)


def ocserve(*arguments: str, **env: str) -> Result:
    return CliRunner().invoke(cli.main, list(arguments), env=env)


@pytest.fixture
def server() -> Iterator[Served]:
    with serving() as served:
        yield served


def asked(server: Served, *arguments: str) -> str:
    result = ocserve(*arguments, "--url", server.url)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_models_are_loaded_listed_and_unloaded(server: Served) -> None:
    assert asked(server, "load", "default") == "tiny is loaded\n"
    header, row = asked(server, "ps").splitlines()
    assert header.split() == ["MODEL", "STATE", "MEMORY", "CONTEXT", "IN", "USE", "UNTIL"]
    assert row.split()[:2] == ["tiny", "ready"]
    assert "0 of 8" in row
    assert json.loads(asked(server, "ps", "--json"))["models"]["tiny"]["state"] == "ready"
    assert asked(server, "unload", "tiny", "--wait", "5") == "tiny is unloaded\n"
    assert asked(server, "ps").splitlines()[1].split()[1] == "cold"
    kept = ocserve("unload", "tiny", "--forget", "--url", server.url)
    assert kept.exit_code == 1
    assert "only a model that was loaded by its path can be forgotten" in kept.stderr


def test_a_model_is_forgotten_only_where_that_is_asked(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[str] = []
    monkeypatch.setattr(Control, "may_forget", lambda self, name: True)
    monkeypatch.setattr(Control, "forget", lambda self, name: forgotten.append(name))
    assert asked(server, "unload", "tiny") == "tiny is unloaded\n"
    assert forgotten == []
    assert asked(server, "unload", "default", "--forget") == "tiny is unloaded and served no more\n"
    assert forgotten == ["tiny"]


def test_drains_and_maintenance_are_asked_for_and_shown(server: Served) -> None:
    assert "drained" in asked(server, "drain", "--deadline", "5")
    assert "takes nothing more" in asked(server, "ps")
    assert asked(server, "drain", "--resume") == "the server takes requests\n"
    told = asked(server, "maintenance", "2999-01-01T00:00Z", "2999-01-01T03:00+02:00", "New disks.")
    assert told == "maintenance is announced from 2999-01-01T00:00:00Z to 2999-01-01T01:00:00Z\n"
    assert "maintenance from 2999-01-01T00:00:00Z to 2999-01-01T01:00:00Z\n" in asked(server, "ps")
    assert asked(server, "maintenance") == told.replace("\n", ": New disks.\n")
    assert json.loads(asked(server, "maintenance", "--json"))["maintenance"]["message"] == "New disks."
    assert asked(server, "maintenance", "--cancel") == "no maintenance is announced\n"
    assert asked(server, "maintenance") == "no maintenance is announced\n"
    assert "maintenance" not in asked(server, "ps")


def test_a_reload_and_the_end_are_told(server: Served) -> None:
    today = "prompt 0.1, completion 0.1"
    later = "from 2999-01-01: prompt 0.2, completion 0.1"
    tier = "from 2999-01-01, above 1,000,000 tokens of a month: prompt 0.2, completion 0.05"
    assert ocserve("reload", "--url", server.url).stderr == "warning: a notice\n"
    assert asked(server, "reload").splitlines() == [
        "limits.queue: 64 -> 8",
        "limits.models: - -> tiny: requests_per_minute 5, tokens_per_day 9; other: nothing",
        f"prices of tiny {later} (new)",
        f"prices of tiny {tier} (new)",
        f"prices of new: {today} (new)",
        "prices of dear: completion 0.1 -> 0.3, request - -> 0.5",
        "prices of gone: no more",
        "prices of 1,234 more models",
    ]
    assert asked(server, "stop", "--deadline", "5") == "the server ends; 0 requests are to finish\n"
    assert server.thread is not None
    server.thread.join(10)
    assert not server.thread.is_alive()


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_where_no_server_answers_each_says_so(arguments: tuple[str, ...]) -> None:
    with serving() as gone:
        pass
    result = ocserve(*arguments, "--url", gone.url)
    assert result.exit_code == 1
    assert f"error: no server answers at {gone.url} (ConnectError)" in result.stderr
    assert "hint: `ocserve run` starts a server" in result.stderr
    assert "server.port" not in result.stderr
    moved = ocserve(*arguments, OCSERVE_SERVER_PORT=str(gone.port))
    assert f"error: no server answers at {gone.url}" in moved.stderr
    assert "the port that it had before server.port was changed" in moved.stderr
    described = ocserve(*arguments, "--url", gone.url, "--json")
    assert gone.url in json.loads(described.stderr)["error"]["message"]


def test_a_refusal_is_told_with_its_reason(server: Served, tmp_path: Path) -> None:
    result = ocserve("load", "never", "--url", server.url)
    assert (result.exit_code, result.stderr) == (1, "error: It is not installed.\n")
    store = KeyStore(tmp_path / "keys.json")
    _, admin = store.create("admin", scope="admin")
    _, user = store.create("user")
    with serving(store=store) as locked:
        result = ocserve("ps", "--url", locked.url, "--key-from", "USER_KEY", USER_KEY=user)
        assert "error: This needs a key with the scope `admin`." in result.stderr
        assert "hint: name the variable that has an admin key, such as --key-from OCSERVE_API_KEY" in result.stderr
        assert ocserve("ps", "--url", locked.url, "--key-from", "ADMIN_KEY", ADMIN_KEY=admin).exit_code == 0


def test_the_key_of_the_settings_goes_to_the_server_of_the_settings_only(tmp_path: Path) -> None:
    key = "sk-of-the-settings-0123456789"
    with serving(key=key) as own:
        environment = {"OCSERVE_API_KEY": key, "OCSERVE_SERVER_PORT": str(own.port)}
        assert ocserve("ps", **environment).exit_code == 0
        elsewhere = ocserve("ps", "--url", own.url.replace("127.0.0.1", "localhost"), **environment)
        assert elsewhere.exit_code == 1
        assert "scope `admin`" in elsewhere.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("maintenance", "2999-01-01"), "name END too"),
        (("maintenance", "soon", "later"), "expected a moment"),
        (("maintenance", "2999-01-01", "2999-01-02", "--cancel"), "leave START and END out"),
        (("drain", "--resume", "--deadline", "1"), "--deadline is for draining"),
    ],
)
def test_what_was_mistyped_is_named(arguments: tuple[str, ...], words: str) -> None:
    result = ocserve(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
