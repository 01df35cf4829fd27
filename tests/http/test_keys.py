"""Keys of several users over HTTP: what each may do, at once and on every route, and what refusals tell."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import fields, replace

from ocserve import config
from ocserve.accounts.keystore import KeyStore, OwnLimits, new_text
from tests.http.harness import CHAT, MODEL, Answer, Served, serving
from tests.http.test_guards import BODIES, MESSAGE, walk
from tests.http.test_websocket import create, events, opened
from tests.scripted import Script, ScriptedEngine

ADMIN = "/admin/state"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> KeyStore:
    return KeyStore(tmp_path_factory.mktemp("data") / "keys.json")


@pytest.fixture(scope="module")
def served(store: KeyStore) -> Iterator[Served]:
    """A server with nothing but keys of several users."""
    does_everything = replace(MODEL, capabilities=("chat", "completion", "embedding", "rerank"))
    store.create("first")
    limits = config.Limits(requests_per_minute=600)
    auth = config.Auth(anonymous=False)
    with serving(store=store, auth=auth, model=does_everything, limits=limits) as server:
        yield server


def ask(served: Served, key: str | None, method: str = "POST", path: str = "/v1/chat/completions") -> Answer:
    body = BODIES.get(path, CHAT) if method == "POST" else None
    return served.request(method, path, body, {} if key is None else {"x-api-key": key})


def test_a_key_works_from_the_moment_it_is_made_to_the_moment_it_is_revoked(served: Served, store: KeyStore) -> None:
    _, text = store.create("acme")
    for _ in range(20):
        assert ask(served, text).status == 200
    store.revoke("acme")
    for _ in range(20):
        refused = ask(served, text)
        assert (refused.status, refused.error["code"]) == (401, "api_key_revoked")


def test_no_route_answers_a_key_that_is_not_good(served: Served, store: KeyStore) -> None:
    _, expired = store.create("expired", expires=1)
    _, revoked = store.create("gone")
    _, replaced = store.create("replaced")
    store.revoke("gone")
    store.rotate("replaced", 0)
    bad = {
        expired: "api_key_expired",
        revoked: "api_key_revoked",
        replaced: "api_key_revoked",
        replaced[:-1]: "invalid_api_key",
        new_text(): "invalid_api_key",
    }
    before = len(served.engine.runs)
    for route, path in walk(served):
        if route.public:
            continue
        for key, code in bad.items():
            answer = served.request(route.method, path, BODIES.get(route.path), {"Authorization": f"Bearer {key}"})
            assert (answer.status, answer.code) == (401, code), path
            assert key[8:] not in answer.raw.decode()
    assert len(served.engine.runs) == before


def test_figures_of_all_keys_are_for_administrators_and_this_machine(served: Served, store: KeyStore) -> None:
    _, key = store.create("reader")
    _, admin = store.create("scraper", scope="admin")
    assert [ask(served, each, "GET", "/metrics").status for each in (key, admin)] == [403, 200]


def test_what_is_for_administrators_needs_their_scope(served: Served, store: KeyStore) -> None:
    _, user = store.create("user")
    _, admin = store.create("root", scope="admin")
    refused = ask(served, user, "GET", ADMIN)
    assert (refused.status, refused.error["code"]) == (403, "admin_scope_needed")
    assert ask(served, None, "GET", ADMIN).status == 401
    assert ask(served, admin, "GET", ADMIN).status == 200


def test_a_model_that_a_key_may_not_use_is_nowhere(served: Served, store: KeyStore) -> None:
    _, text = store.create("elsewhere", models=("another",))
    _, allowed = store.create("here", models=("org/tiny:135m",))
    for route, path in walk(served):
        if route.public or route.admin or "{id}" in route.path or "responses" in route.path or route.path == "/metrics":
            continue
        answer = served.request(route.method, path, BODIES.get(route.path), {"x-api-key": text})
        assert "tiny" not in answer.raw.decode().replace(path, ""), path
        assert answer.status in (200, 404), path
        assert answer.status == 404 or route.method == "GET", path
    assert ask(served, text, path="/v1/responses").status == 404
    assert served.request("GET", "/v1/models", None, {"x-api-key": text}).json["data"] == []
    assert [each["id"] for each in served.request("GET", "/v1/models", None, {"x-api-key": allowed}).json["data"]] == [
        "tiny"
    ]
    assert ask(served, allowed).status == 200


def test_a_key_is_charged_and_shown_its_own_prices(served: Served, store: KeyStore) -> None:
    _, usual = store.create("usual")
    _, dear = store.create("dear", price={"prompt": "0.01", "completion": "0.5"})
    assert "cost" not in ask(served, usual).json["usage"]
    usage = ask(served, dear).json["usage"]
    assert usage["cost"] == pytest.approx(0.01 * usage["prompt_tokens"] + 0.5 * usage["completion_tokens"])
    [listed] = ask(served, dear, "GET", "/v1/models").json["data"]
    assert (listed["pricing"]["prompt"], listed["pricing"]["completion"]) == ("0.01", "0.5")


def test_a_keys_own_limits_hold_and_change_at_once(served: Served, store: KeyStore) -> None:
    _, text = store.create("small", limits={"requests_per_minute": 2, "tokens_per_day": 10_000})
    first = ask(served, text)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-limit-tokens"] == "10000"
    assert [ask(served, text).status for _ in range(2)] == [200, 429]
    store.limit("small", requests_per_minute=4)
    raised = ask(served, text)
    assert (raised.status, raised.headers["x-ratelimit-limit-requests"]) == (200, "4")
    store.limit("small", requests_per_minute=0)
    assert "x-ratelimit-limit-requests" not in ask(served, text).headers
    _, other = store.create("other")
    assert ask(served, other).headers["x-ratelimit-limit-requests"] == "600"


def test_a_days_limit_is_refused_with_the_time_that_it_takes(served: Served, store: KeyStore) -> None:
    _, text = store.create("daily", limits={"requests_per_day": 2})
    assert [ask(served, text).status for _ in range(2)] == [200, 200]
    refused = ask(served, text)
    assert (refused.status, "2 requests per day" in refused.error["message"]) == (429, True)
    assert 43_100 < int(refused.headers["retry-after"]) <= 43_201
    assert refused.headers["x-ratelimit-reset-requests"].startswith("23h59m")


def test_every_answer_to_a_caller_says_what_is_left(served: Served, store: KeyStore) -> None:
    _, text = store.create("curious")
    for route, path in walk(served):
        answer = served.request(route.method, path, BODIES.get(route.path), {"x-api-key": text})
        assert answer.headers["x-ratelimit-limit-requests"] == "600", path
        anthropic = "anthropic-ratelimit-requests-limit" in answer.headers
        assert anthropic is (route.path.startswith("/v1/messages")), path
    made = served.request("POST", "/v1/messages", MESSAGE, {"x-api-key": text})
    assert made.headers["anthropic-ratelimit-requests-reset"].endswith("Z")
    assert int(made.headers["anthropic-ratelimit-requests-remaining"]) < 600
    assert "x-ratelimit-limit-requests" not in ask(served, "wrong").headers


def test_the_published_limits_are_those_that_hold() -> None:
    own = config.ModelLimits(model="tiny", requests_per_minute=2)
    limits = config.Limits(requests_per_minute=60, tokens_per_day=1_000_000, queue=7, models=(own,))
    with serving(key="a-key-of-sixteen", auth=config.Auth(anonymous=False), limits=limits) as served:
        page = served.request("GET", "/limits").body.decode()
        assert "<td>Requests per minute</td><td>60</td></tr>" in page
        assert "<td>Tokens per day (prompt and answer)</td><td>1,000,000</td>" in page
        assert "Ask help@acme.example" in page
        assert "tiny" not in page
        page = served.request("GET", "/limits", None, {"x-api-key": "a-key-of-sixteen"}).body.decode()
        assert "<td>Requests per minute</td><td>60</td><td>2</td></tr>" in page
        assert "8 answers at a time, 7 more may wait" in page
        asked = {"accept": "application/json"}
        told = served.request("GET", "/limits", None, asked).json
        assert (told["of"], told["models"]) == ("each key", [])
        assert told["limits"] == {
            **dict.fromkeys(told["limits"]),
            "requests_per_minute": 60,
            "tokens_per_day": 1_000_000,
        }
        assert set(told["limits"]) == {field.name for field in fields(config.Allowance)}
        told = served.request("GET", "/limits", None, {**asked, "x-api-key": "a-key-of-sixteen"}).json
        [model] = told["models"]
        assert (model["id"], model["parallel"], model["queue"]) == ("tiny", 8, 7)
        assert model["limits"]["requests_per_minute"] == 2
        answers = [ask(served, "a-key-of-sixteen") for _ in range(3)]
        assert [each.status for each in answers] == [200, 200, 429]
        assert answers[0].headers["x-ratelimit-limit-requests"] == "2"


def test_a_key_finds_its_own_limits_published(served: Served, store: KeyStore) -> None:
    _, text = store.create("bounded", limits=OwnLimits(requests_per_minute=3, tokens_per_minute=0))
    asked = {"accept": "application/json", "x-api-key": text}
    told = served.request("GET", "/limits", None, asked).json
    assert (told["of"], told["limits"]["requests_per_minute"]) == ("this key", 3)
    assert told["limits"]["tokens_per_minute"] is None
    page = served.request("GET", "/limits", None, {"x-api-key": text}).body.decode()
    assert "<th>This key</th>" in page
    assert "<td>Requests per minute</td><td>3</td>" in page


def test_a_connection_that_lasts_ends_its_service_with_its_key(served: Served, store: KeyStore) -> None:
    _, text = store.create("socket")
    with opened(served, Authorization=f"Bearer {text}") as peer:
        create(peer)
        assert events(peer)[-1]["type"] == "response.completed"
        store.revoke("socket")
        create(peer)
        (refused,) = events(peer)
        assert (refused["status"], refused["error"]["code"]) == (401, "api_key_revoked")


def test_a_rotation_under_load_loses_no_request(tmp_path: Path) -> None:
    """Clients change over one by one while both keys are good; the old one ends when it was said to, and not before."""
    now = [1_790_000_000.0]
    store = KeyStore(tmp_path / "keys.json", lambda: now[0])
    keys = [store.create("acme")[1]]
    statuses: list[int] = []
    stop = threading.Event()

    def client(number: int) -> None:
        while not stop.is_set():
            key = keys[0] if len(keys) == 1 or number % 2 else keys[1]
            statuses.append(ask(served, key).status)

    with serving(lambda: ScriptedEngine(Script(step_s=0.002)), store=KeyStore(store.path, lambda: now[0])) as served:
        clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for each in clients:
            each.start()
        time.sleep(0.4)
        keys.append(store.rotate("acme", 60.0)[1])
        time.sleep(0.6)
        stop.set()
        for each in clients:
            each.join()
        assert set(statuses) == {200}
        assert len(statuses) > 50
        now[0] += 59
        assert ask(served, keys[0]).status == 200
        now[0] += 1
        assert [ask(served, key).status for key in keys] == [401, 200]


def test_the_key_of_the_settings_works_while_the_file_cannot_be_read(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.json")
    _, text = store.create("acme", prepaid=True)
    with serving(store=store, key="of-the-settings-alone") as served:
        store.path.write_bytes(b"{")
        assert ask(served, "of-the-settings-alone").status == 200
        assert ask(served, "of-the-settings-alone", "GET", ADMIN).status == 200
        refused = [ask(served, text), ask(served, "of-the-settings-alone", "GET", "/admin/keys/acme/balance")]
        assert [(each.status, each.code) for each in refused] == [(503, "keys_unavailable")] * 2
