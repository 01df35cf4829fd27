"""What can be read of a server: the models, in every client's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ocserve.accounts.keystore import KeyStore
from tests.http.harness import Served, serving


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
