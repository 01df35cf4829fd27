"""A real server while it is administered: models come and go, settings change, maintenance, and the end."""

from __future__ import annotations

import signal
import urllib.request
from pathlib import Path
from typing import Any

import openai
from click.testing import CliRunner, Result

from ocserve import cli, config
from ocserve.catalog.store import Store
from tests import tiny
from tests.e2e.daemon import RunningDaemon, daemon, wait_until
from tests.serving.models import install

WITHIN_S = 1.0


def models(server: RunningDaemon) -> list[list[str]]:
    """What each vendor's list of models has."""
    return [
        [model["id"] for model in server.get("/v1/models")["data"]],
        [model["id"] for model in server.get("/openrouter/models")["data"]],
        [model["name"] for model in server.get("/api/tags")["models"]],
        [model["id"] for model in server.get("/api/v0/models")["data"]],
        [model["name"].removeprefix("models/") for model in server.get("/v1beta/models")["models"]],
    ]


def listed(server: RunningDaemon, *names: str) -> None:
    """Within a second every list has these."""
    wait_until(lambda: models(server) == [list(names)] * 5, WITHIN_S)


def ask(server: RunningDaemon, model: str) -> str:
    """What becomes of a request."""
    with openai.OpenAI(base_url=server.base_url, api_key="any", max_retries=0) as client:
        try:
            client.completions.create(model=model, prompt="abc", max_tokens=2)
        except openai.APIStatusError as error:
            return str(error.code)
    return "answered"


def test_a_server_is_administered_while_it_runs(tmp_path: Path, tiny_model: Path) -> None:
    store = Store(config.Store(directory=tmp_path / "store"))
    settings = tmp_path / "config.toml"
    settings.write_text("")
    env = {
        "OCSERVE_MODEL_SERVE_INSTALLED": "true",
        "OCSERVE_CONFIG": str(settings),
        "OCSERVE_AUTH_KEYS_FILE": str(tmp_path / "keys.json"),
    }

    with daemon(str(tiny_model), env=env, store=store.directory) as server:

        def ocserve(*arguments: str) -> Result:
            everything = {**env, "OCSERVE_STORE_DIRECTORY": str(store.directory)}
            return CliRunner().invoke(cli.main, list(arguments), env=everything)

        def asked(*arguments: str) -> str:
            found = ocserve(*arguments, "--url", server.root)
            assert found.exit_code == 0, found.stderr
            return found.stdout

        _models_come_and_go(server, store, tiny_model, ocserve, asked)
        settings.write_text("[limits]\nqueue = 7\n")
        assert asked("reload") == "limits.queue: 64 -> 7\n"
        settings.write_text("[limits]\nqueue = 9\n")
        server.process.send_signal(signal.SIGHUP)
        page = "9 more may wait"
        wait_until(lambda: page in _text(server, "/limits"))
        settings.write_text("[limits]\nqeue = 8\n")
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "did you mean `limits.queue`" in server.log.read_text())
        assert page in _text(server, "/limits")
        settings.write_text("")
        asked("maintenance", "2020-01-01T00:00Z", "2999-01-01T00:00Z", "New disks.")
        assert ask(server, "tiny") == "maintenance"
        asked("stop")
        assert server.process.wait(20) == 0
    with daemon(str(tiny_model), env=env, store=store.directory) as server:  # it has not been forgotten
        assert ask(server, "tiny") == "maintenance"
        asked("maintenance", "--cancel")
        assert ask(server, "tiny") == "answered"


def _models_come_and_go(server: RunningDaemon, store: Store, file: Path, ocserve: Any, asked: Any) -> None:
    listed(server, "tiny")
    for _ in range(2):
        install(store, "later", file)
        listed(server, "tiny", "later")
        assert ask(server, "later") == "answered"
        refused = ocserve("rm", "later")
        assert "`ocserve unload later`" in refused.stderr
        assert asked("unload", "later", "--wait", "10") == "later is unloaded\n"
        assert ocserve("rm", "later").exit_code == 0
        listed(server, "tiny")
        assert ask(server, "later") == "model_not_found"
    mine = tiny.write(store.directory.parent / "mine.gguf")
    assert asked("load", str(mine)) == "mine is loaded\n"
    listed(server, "tiny", "mine")
    assert "mine   ready" in asked("ps")


def _text(server: RunningDaemon, path: str) -> str:
    with urllib.request.urlopen(server.root + path, timeout=30) as answer:
        return str(answer.read().decode())
