"""Administration over HTTP: who may, what it answers, and what callers see of it."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from ocserve import config
from ocserve.accounts.keystore import KeyStore
from ocserve.api.operations import OPERATIONS
from ocserve.api.response_schemas import SCHEMAS, ref
from ocserve.doors import Maintenance
from ocserve.engine.handle import LoadError
from ocserve.http.edge.current import Edge
from ocserve.http.metrics import meter
from ocserve.http.routes import routes
from ocserve.pages.publication import Published
from tests.http.harness import CHAT, Answer, Control, Served, serving, wait_for
from tests.scripted import Script, ScriptedEngine

ADMIN = [(each.method, each.path) for each in OPERATIONS if each.path.startswith("/admin/")]
MODEL = {"model": "tiny"}
JSON = {"Accept": "application/json"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def body(method: str) -> dict[str, Any] | None:
    return {} if method in ("POST", "PUT") else None


def shaped(answer: Answer, name: str) -> Any:
    jsonschema.validate(answer.json, {**ref(name), "components": {"schemas": SCHEMAS}})
    return answer.json


def window(begins_s: float, lasts_s: float) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC)
    starts = now + datetime.timedelta(seconds=begins_s)
    return {"starts": starts.isoformat(), "ends": (starts + datetime.timedelta(seconds=lasts_s)).isoformat()}


@pytest.fixture
def slow() -> Iterator[Served]:
    """A server whose answers take half a minute, unless they are ended."""
    with serving(lambda: ScriptedEngine(Script(("a",) * 600, step_s=0.05))) as server:
        yield server


def test_every_route_of_administration_is_for_administrators(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.json")
    _, user = store.create("user")
    _, owner = store.create("owner", scope="admin")
    with serving(store=store) as server:
        listed = routes(server.service, Edge(config.Server()), meter(server.service), Control(), Published())
        below = {(route.method, route.path): route for route in listed if route.path.startswith("/admin")}
        assert set(below) >= set(ADMIN)
        assert all(route.admin and not route.public for route in below.values())
        for method, path in below:
            path = path.replace("{name}", "user")
            for headers, status, code in (
                (bearer(user), 403, "admin_scope_needed"),
                ({}, 403, "admin_scope_needed"),  # anonymous on loopback beside keys
                (bearer("sk-of-nobody-0123456789"), 401, "invalid_api_key"),
            ):
                answer = server.request(method, path, body(method), headers)
                assert (answer.status, answer.error["code"]) == (status, code), path
        assert server.request("GET", "/admin/state", None, bearer(owner)).status == 200
        assert server.service.doors.open
    with serving(store=store, auth=config.Auth(anonymous=False)) as server:
        assert all(server.request(method, path, body(method)).status == 401 for method, path in ADMIN)


def test_loopback_may_administer_a_server_without_keys(served: Served) -> None:
    state = shaped(served.request("GET", "/admin/state"), "AdminState")
    assert state["ready"] is False or state["models"]["tiny"]["default"] is True
    assert state["settings"] == {"server.port": 0}
    assert state["uptime_s"] >= 0


def test_what_is_not_understood_is_refused_by_name(served: Served) -> None:
    for method, path, given, param in (
        ("POST", "/admin/models/load", {}, "model"),
        ("POST", "/admin/models/load", {**MODEL, "pul": True}, "pul"),
        ("POST", "/admin/models/unload", {**MODEL, "wait_s": -1}, "wait_s"),
        ("POST", "/admin/drain", {"deadline_s": "soon"}, "deadline_s"),
        ("POST", "/admin/resume", {"deadline_s": 1}, "deadline_s"),
        ("PUT", "/admin/maintenance", {"starts": "2999-01-01", "ends": "2999-01-02T00:00:00Z"}, "starts"),
        ("PUT", "/admin/maintenance", {**window(60, -1)}, "ends"),
        ("PUT", "/admin/maintenance", {**window(60, 60), "message": "x" * 501}, "message"),
        ("POST", "/admin/models/load", {"model": "never"}, "model"),
        ("POST", "/admin/models/unload", {"model": "never"}, "model"),
    ):
        answer = served.request(method, path, given)
        assert answer.status in (400, 404), path
        assert answer.error["param"] == param, path
    assert served.request("PUT", "/admin/maintenance", b"starts=now", {"Content-Type": "text/plain"}).status == 415
    assert served.service.doors.announced is None


def test_a_model_is_loaded_and_unloaded_as_asked(served: Served) -> None:
    assert shaped(served.request("POST", "/admin/models/load", {"model": "default"}), "AdminMoved") == {
        "model": "tiny",
        "state": "ready",
    }
    tiny = shaped(served.request("GET", "/admin/state"), "AdminState")["models"]["tiny"]
    assert (tiny["state"], tiny["leases"], tiny["unload_at"]) == ("ready", 0, None)
    assert datetime.datetime.fromisoformat(tiny["last_used"]).tzinfo is not None
    unloaded = served.request("POST", "/admin/models/unload", MODEL)
    assert unloaded.json == {"model": "tiny", "state": "cold"}
    assert not served.engine.loaded
    assert served.chat().status == 200
    assert served.engine.loaded


def test_why_a_model_cannot_be_loaded_is_told_to_its_administrator(served: Served) -> None:
    served.request("POST", "/admin/models/unload", {**MODEL, "wait_s": 5})
    served.engine.load_error = LoadError("the file is cut off")
    try:
        answer = served.request("POST", "/admin/models/load", MODEL)
        assert (answer.status, answer.error["code"]) == (503, "model_load_failed")
        assert "the file is cut off" in answer.error["message"]
        assert b"cut off" not in served.chat().body
    finally:
        served.engine.load_error = None
    assert served.request("POST", "/admin/models/load", MODEL).status == 200  # at once


def test_a_model_in_use_is_not_unloaded(slow: Served) -> None:
    answers: list[Answer] = []
    asking = threading.Thread(target=lambda: answers.append(slow.chat(timeout=30, max_tokens=600)))
    asking.start()
    wait_for(lambda: slow.engine.running == 1)
    refused = slow.request("POST", "/admin/models/unload", MODEL)
    assert (refused.status, refused.error["code"]) == (409, "model_busy")
    assert slow.request("POST", "/admin/models/unload", {**MODEL, "wait_s": 0.05}).status == 409
    assert slow.request("GET", "/admin/state").json["models"]["tiny"]["owed"] == 1
    for run in list(slow.engine.runs):
        slow.engine.cancel(run)
    assert slow.request("POST", "/admin/models/unload", {**MODEL, "wait_s": 5}).status == 200
    asking.join()


def test_a_drain_lets_what_runs_finish_and_takes_nothing_more_until_it_is_resumed() -> None:
    with serving(lambda: ScriptedEngine(Script(("a",) * 10, step_s=0.05))) as server:
        answers: list[Answer] = []
        asking = threading.Thread(target=lambda: answers.append(server.chat()))
        asking.start()
        wait_for(lambda: server.engine.running == 1)
        draining = threading.Thread(target=lambda: answers.append(server.request("POST", "/admin/drain", {})))
        draining.start()
        wait_for(lambda: not server.service.doors.open)
        refused = server.chat()
        assert (refused.status, refused.error["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) > 0
        assert server.request("GET", "/ready").status == 503
        assert server.request("GET", "/v1/models").status == 200
        draining.join()
        asking.join()
        assert [answer.status for answer in answers] == [200, 200]
        assert shaped(answers[1], "AdminDoors") == {"draining": True, "stopping": False, "active": 0}
        assert server.request("POST", "/admin/resume").json["draining"] is False
        assert server.chat().status == 200
        assert server.request("GET", "/ready").status == 200


def test_a_drain_ends_what_outlasts_it_with_an_error(slow: Served) -> None:
    answers: list[Answer] = []
    asking = threading.Thread(target=lambda: answers.append(slow.chat(timeout=30, max_tokens=600)))
    asking.start()
    wait_for(lambda: slow.engine.running == 1)
    assert slow.request("POST", "/admin/drain", {"deadline_s": 0.05}).json["active"] == 0
    asking.join()
    assert (answers[0].status, answers[0].error["code"]) == (503, "draining")


def test_the_deadline_of_a_drain_that_was_taken_back_ends_nothing_of_the_next_one() -> None:
    with serving(lambda: ScriptedEngine(Script(("a",) * 20, step_s=0.05))) as server:
        answers: list[Answer] = []
        drained: list[Answer] = []

        def drain(deadline_s: float) -> None:
            drained.append(server.request("POST", "/admin/drain", {"deadline_s": deadline_s}))

        asking = threading.Thread(target=lambda: answers.append(server.chat()))
        asking.start()
        wait_for(lambda: server.engine.running == 1)
        drains = [threading.Thread(target=drain, args=(seconds,)) for seconds in (0.3, 10)]
        drains[0].start()
        wait_for(lambda: not server.service.doors.open)
        assert server.request("POST", "/admin/resume").status == 200
        drains[1].start()
        for thread in (*drains, asking):
            thread.join()
        assert [answer.status for answer in (*answers, *drained)] == [200, 200, 200]
        assert [answer.json["active"] for answer in drained] == [1, 0]
        assert server.request("GET", "/admin/state").json["draining"] is True


def test_maintenance_is_announced_everywhere_and_refuses_honestly() -> None:
    with serving() as server:
        ahead = window(3600, 7200)
        told = shaped(server.request("PUT", "/admin/maintenance", {**ahead, "message": "<New> disks."}), "Maintenance")
        assert datetime.datetime.fromisoformat(told["starts"]) == datetime.datetime.fromisoformat(ahead["starts"])
        for answer in (server.chat(), server.request("GET", "/nowhere"), server.request("GET", "/health")):
            assert answer.headers["x-maintenance"].count("Z/") == 1
        assert server.request("GET", "/health").json["maintenance"]["message"] == "<New> disks."
        assert shaped(server.request("GET", "/status", headers=JSON), "Status")["maintenance"] == told
        page = server.request("GET", "/status", headers={"Accept": "text/html"})
        assert page.headers["content-type"].startswith("text/html")
        assert b"&lt;New&gt; disks." in page.body
        assert server.request("PUT", "/admin/maintenance", window(-1, 100)).status == 200
        refused = server.chat()
        assert (refused.status, refused.error["code"]) == (503, "maintenance")
        assert 95 <= int(refused.headers["retry-after"]) <= 99
        assert server.request("GET", "/ready").status == 503
        assert server.request("GET", "/v1/models").status == 200
        assert server.request("DELETE", "/admin/maintenance").status == 200
        served = server.chat()
        assert served.status == 200
        assert "x-maintenance" not in served.headers


def test_maintenance_at_the_end_of_time_is_refused_and_an_unreadable_one_still_has_an_answer() -> None:
    far = {"starts": "2030-01-01T00:00:00Z", "ends": "9999-12-31T23:59:59-14:00"}
    with serving() as server:
        refused = server.request("PUT", "/admin/maintenance", far)
        assert (refused.status, refused.error["param"]) == (400, "ends")
        assert server.request("GET", "/health").status == 200
        server.service.doors._announced = msgspec.convert(far, Maintenance)
        failed = server.request("GET", "/health")
        assert (failed.status, failed.error["code"]) == (500, "internal_error")


def test_the_status_page_tells_strangers_no_models_and_everybody_the_availability() -> None:
    crash = Script(("a", "b"), crash_at=1)
    with serving(
        lambda: ScriptedEngine(lambda request: crash if request.max_tokens == 2 else Script()),
        key="sk-test-0123456789abcdef",
        auth=config.Auth(anonymous=False),
    ) as server:
        key = bearer("sk-test-0123456789abcdef")
        assert server.request("GET", "/status", headers=JSON).json["availability"] is None
        for most in (4, 4, 4, 2):
            server.chat(headers=key, max_tokens=most)
        server.request("POST", "/v1/chat/completions", {**CHAT, "max_tokens": -1}, key)  # the client's own fault
        server.chat()  # a stranger's
        status = server.request("GET", "/status", headers=JSON).json
        assert ("models" in status, status["availability"], status["ready"]) == (False, 0.75, True)
        assert server.request("GET", "/status", headers=key | JSON).json["models"] == ["tiny"]


def test_a_reload_says_what_has_changed(served: Served) -> None:
    answer = shaped(served.request("POST", "/admin/reload"), "AdminReloaded")
    assert (answer["more_prices"], answer["notices"]) == (1234, ["a notice"])
    assert answer["changed"]["limits.queue"] == {"before": 64, "after": 8}
    today = {"from": None, "above": 0, "prices": {"prompt": "0.1", "completion": "0.1"}}
    assert answer["prices"]["new"] == {"before": [], "after": [today]}
    assert [(row["from"], row["above"]) for row in answer["prices"]["tiny"]["after"]] == [
        (None, 0),
        ("2999-01-01", 0),
        ("2999-01-01", 1_000_000),
    ]


def test_the_server_ends_when_it_is_asked_to() -> None:
    with serving() as server:
        assert server.chat().status == 200
        answer = server.request("POST", "/admin/stop", {"deadline_s": 5})
        assert answer.status == 202
        assert shaped(answer, "AdminDoors")["stopping"] is True
        assert server.thread is not None
        server.thread.join(10)
        assert not server.thread.is_alive()
