"""What can be read of a server: the models, in every client's words."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

from httpx2 import ASGITransport, AsyncClient

from ocserve import config
from ocserve.accounts.keys import KeyRing
from ocserve.accounts.keystore import KeyStore
from ocserve.engine.connection import Connection
from ocserve.engine.handle import EngineHandle, Supervision
from ocserve.engine.wire import EngineFacts
from ocserve.http.application import build
from ocserve.http.edge.current import Edge
from ocserve.pages.publication import Published
from tests.http.harness import COMPLETION, MODEL, Control, Served, serving
from tests.scripted import SCRIPT, SPEC, alone


def test_models_are_found_by_id_and_by_alias_with_slashes(served: Served) -> None:
    listing: dict[str, Any] = served.request("GET", "/v1/models").json
    assert listing["object"] == "list"
    assert [each["id"] for each in listing["data"]] == ["tiny"]
    for path in ("/v1/models/tiny", "/models/tiny", "/v1/models/org/tiny:135m", "/v1/models/org%2Ftiny:135m"):
        assert served.request("GET", path).json == listing["data"][0], path
    missing = served.request("GET", "/v1/models/org/none")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")


def test_the_feed_is_on_an_address_of_its_own(served: Served) -> None:
    answer = served.request("GET", "/openrouter/models")
    assert answer.status == 200
    assert [each["id"] for each in answer.json["data"]] == ["tiny"]


def test_not_ready_says_why() -> None:
    with serving() as served:
        assert served.chat().status == 200
        assert served.request("GET", "/ready").status == 200
        served.engine.ready = False
        answer = served.request("GET", "/ready")
        assert (answer.status, answer.error["code"]) == (503, "not_ready")
        assert "its restart takes long" in answer.error["message"]
        served.engine.facts_known = False
        assert "loaded for the first time" in served.request("GET", "/ready").error["message"]


async def test_while_an_engine_restarts_a_server_is_ready_for_as_long_as_a_request_would_wait() -> None:
    goes_on = asyncio.Event()

    class Restarting(EngineHandle):
        async def _launch(self) -> tuple[Connection, EngineFacts]:
            if self.restarts:
                await goes_on.wait()
            return await super()._launch()

    engine = Restarting(SPEC, dict(os.environ), Supervision(restart_wait_s=600.0), SCRIPT)
    service, edge = alone(engine, MODEL, config.Limits()), Edge(config.Server())
    app = build(service, KeyRing(None, config.Auth()), edge, Control(), Published())
    async with AsyncClient(transport=ASGITransport(app), base_url="http://localhost") as client:

        async def ready(words: str) -> int:
            answer = await client.get("/ready")
            assert words in answer.text
            public = await client.get("/status", headers={"Accept": "application/json"})
            assert public.json()["ready"] is (answer.status_code == 200)
            return answer.status_code

        async def asked() -> int:
            return (await client.post("/v1/completions", json={**COMPLETION, "prompt": "emit 1"})).status_code

        assert await ready("loaded for the first time") == 503
        assert await asked() == 200
        assert await ready("ready") == 200
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        while engine.ready:
            await asyncio.sleep(0.01)
        waits = asyncio.create_task(asked())
        assert await ready("ready") == 200
        assert engine._died is not None
        engine._died -= 600.0
        assert await ready("its restart takes long") == 503
        goes_on.set()
        assert await waits == 200
        assert await ready("ready") == 200
        assert engine.restarts == 1
    await service.fleet.close()


def test_a_server_that_cannot_read_its_keys_is_not_ready(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.json")
    store.create("acme")
    whole = store.path.read_bytes()
    with serving(store=store) as served:
        assert served.chat().status == 200
        assert served.request("GET", "/ready").status == 200
        store.path.write_bytes(b"{")
        answer = served.request("GET", "/ready")
        assert (answer.status, answer.error["code"]) == (503, "keys_unavailable")
        assert served.request("GET", "/status", None, {"Accept": "application/json"}).json["ready"] is False
        store.path.write_bytes(whole)
        assert served.request("GET", "/ready").status == 200
