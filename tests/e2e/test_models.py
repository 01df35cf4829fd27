"""Several models in one real server: loaded on demand, unloaded when idle or when another needs the room."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests import tiny
from tests.e2e.daemon import RunningDaemon, daemon, wait_until

LONG: dict[str, Any] = {"extra_body": {"logit_bias": {"0": -100, "2": -100}}}  # never the end-of-text token


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    return [str(tiny.write(folder / f"{name}.gguf")) for name in ("one", "two", "three")]


def engines(server: RunningDaemon) -> set[int]:
    return {child.pid for child in psutil.Process(server.process.pid).children()}


def states(server: RunningDaemon) -> dict[str, str]:
    return {name: model["state"] for name, model in server.health()["models"].items()}


def client(server: RunningDaemon) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url, api_key="any", max_retries=0)


def ask(server: RunningDaemon, model: str, tokens: int = 3) -> int:
    with client(server) as made:
        usage = made.completions.create(model=model, prompt="abc", max_tokens=tokens, **LONG).usage
    assert usage is not None
    return usage.completion_tokens


def test_models_are_loaded_on_demand_and_the_least_recently_used_makes_room(files: list[str]) -> None:
    with daemon(*files, env={"OCSERVE_MODEL_MOST_LOADED": "2"}) as server:
        listed = server.get("/v1/models")
        assert [model["id"] for model in listed["data"]] == ["one", "two", "three"]
        assert states(server) == {"one": "ready", "two": "cold", "three": "cold"}
        assert len(engines(server)) == 1
        assert ask(server, "two") == 3
        assert states(server) == {"one": "ready", "two": "ready", "three": "cold"}
        assert ask(server, "default") == 3  # `one` is now the more recently used
        before = engines(server)
        assert ask(server, "three") == 3
        assert states(server) == {"one": "ready", "two": "cold", "three": "ready"}
        assert len(before & engines(server)) == 1  # the process of `two` is gone, and its memory with it
        assert server.get("/v1/models") == listed  # loaded or not, a model is described the same
        assert ask(server, "two") == 3


def test_streams_of_one_model_go_on_while_another_is_loaded_and_when_it_crashes(files: list[str]) -> None:
    with daemon(*files[:2]) as server:
        (mine,) = engines(server)
        arrived: list[float] = []
        stop = threading.Event()

        def stream() -> None:
            with client(server) as made:
                while not stop.is_set():
                    chunks = made.completions.create(model="one", prompt="abc", max_tokens=200, stream=True, **LONG)
                    arrived.extend(time.monotonic() for _ in chunks)  # an error in the stream would be raised

        streaming = threading.Thread(target=stream)
        streaming.start()
        try:
            begun = time.monotonic()
            assert ask(server, "two") == 3
            loaded = time.monotonic()
            (other,) = engines(server) - {mine}
            psutil.Process(other).kill()
            assert ask(server, "two") == 3
        finally:
            stop.set()
            streaming.join()
        assert sum(begun < at < loaded for at in arrived) > 10
        restarts = {name: model["restarts"] for name, model in server.health()["models"].items()}
        assert restarts == {"one": 0, "two": 1}
        assert mine in engines(server)


def test_a_file_that_cannot_be_loaded_is_an_error_of_that_model_only(files: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(Path(files[0]).read_bytes())
    with daemon(files[0], str(broken)) as server, client(server) as made:
        broken.unlink()
        with pytest.raises(openai.InternalServerError) as refusal:
            made.completions.create(model="broken", prompt="abc", max_tokens=1)
        assert refusal.value.code == "model_load_failed"
        assert int(refusal.value.response.headers["retry-after"]) >= 1
        assert str(tmp_path) not in refusal.value.message
        assert ask(server, "one") == 3


def test_an_idle_model_gives_its_memory_back_and_the_server_stays_ready(files: list[str]) -> None:
    with daemon(*files[:2], env={"OCSERVE_MODEL_IDLE_UNLOAD_S": "1.5"}) as server:
        (engine,) = engines(server)
        wait_until(lambda: not engines(server))
        assert not psutil.pid_exists(engine)
        assert states(server) == {"one": "cold", "two": "cold"}
        assert server.get("/ready") == {"status": "ready"}
        results: list[int] = []
        askers = [threading.Thread(target=lambda: results.append(ask(server, "one"))) for _ in range(6)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        assert results == [3] * 6
        log = server.log.read_text()
        assert log.count('"model_loaded"') == 2
        assert log.count('"model_unloaded"') == 1
