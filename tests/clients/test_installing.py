"""What a client's installation promises to the tests that ask for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients import installing
from tests.clients.catalogue import CLIENTS, LOCKS, Client
from tests.clients.installing import Missing, install


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The clients for which a command was run; none really is."""
    found: list[str] = []
    monkeypatch.setattr(installing, "_run", lambda client, command, home: found.append(client.name))
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    return found


def test_every_lock_has_its_client() -> None:
    assert {path.stem for path in LOCKS.iterdir()} == set(CLIENTS)
    assert all(client.version for client in CLIENTS.values())


def test_a_client_is_installed_once_and_again_when_that_was_cut_off(tmp_path: Path, runs: list[str]) -> None:
    client = CLIENTS["openai-node"]
    home = install(client, tmp_path, fetch_large=False)
    assert install(client, tmp_path, fetch_large=False) == home
    assert runs == ["openai-node"]
    (home / ".complete").unlink()
    (home / "half").touch()
    install(client, tmp_path, fetch_large=False)
    assert runs == ["openai-node"] * 2
    assert not (home / "half").exists()


def test_a_large_client_is_fetched_only_when_asked_for(tmp_path: Path, runs: list[str]) -> None:
    client = CLIENTS["claude-code"]
    with pytest.raises(Missing, match=f"claude-code {client.version} is large and not installed; --full installs it"):
        install(client, tmp_path, fetch_large=False)
    home = install(client, tmp_path, fetch_large=True)
    assert install(client, tmp_path, fetch_large=False) == home


def test_a_machine_without_node_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(Missing, match="codex needs Node and npm"):
        install(CLIENTS["codex"], tmp_path, fetch_large=True)


@pytest.mark.parametrize(
    ("words", "error"), [("npm error code ENOTFOUND", Missing), ("npm error code ETARGET", AssertionError)]
)
def test_only_a_registry_out_of_reach_is_an_excuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, error: type[Exception]
) -> None:
    program = tmp_path / "npm"
    program.write_text(f"#!/bin/sh\necho {words} >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(program))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    client: Client = CLIENTS["openai-node"]
    with pytest.raises(error, match="openai-node"):
        install(client, tmp_path / "root", fetch_large=False)
