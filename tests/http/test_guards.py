"""P26: no route escapes a guard. Every route of the list, and paths that are none, against every attack."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from ocserve import config
from ocserve.accounts.keystore import KeyStore, new_text
from ocserve.api.operations import OPERATIONS
from ocserve.http.edge.current import Edge
from ocserve.http.metrics import meter
from ocserve.http.route_table import SOCKET, Route
from ocserve.http.routes import routes
from ocserve.pages.publication import Published
from tests.http.harness import CHAT, COMPLETION, KEY, MODEL, Answer, Control, Served, serving

# Reviewed: nothing else answers without a caller. Of the reference, names of models are for callers only.
PUBLIC = {("GET", path) for path in ("/health", "/ready", "/openapi.json", "/docs", "/limits", "/status")} | {
    ("GET", path)
    for path in ("/api/version", "/pricing", "/privacy", "/policy", "/support")  # the last: what the operator publishes
}
MESSAGE = {**CHAT, "max_tokens": 5}
RANKING = {"model": "tiny", "query": "Hi", "documents": ["Ho"]}
BODIES = {
    "/admin/models/load": {"model": "tiny"},
    "/admin/models/unload": {"model": "tiny"},
    "/admin/maintenance": {"starts": "2999-01-01T00:00:00Z", "ends": "2999-01-01T01:00:00Z"},
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/messages": MESSAGE,
    "/v1/messages/count_tokens": CHAT,
    "/v1/embeddings": {"model": "tiny", "input": "Hi"},
    "/v1/rerank": RANKING,
    "/v2/rerank": RANKING,
    **{each.path: each.example for each in OPERATIONS if each.tag == "Google" and each.method == "POST"},
    "/v1/responses": {"model": "tiny", "input": "Hi"},
    "/v1/responses/{id}/cancel": {},
    "/admin/keys/{name}/credit": {"amount": "1"},
    "/api/chat": CHAT,
    "/api/generate": COMPLETION,
    "/api/embed": {"model": "tiny", "input": "Hi"},
    "/api/show": {"model": "tiny"},
    "/api/v0/chat/completions": CHAT,
    "/api/v0/completions": COMPLETION,
    "/api/v0/embeddings": {"model": "tiny", "input": "Hi"},
    "/completion": {"prompt": "Hi"},
    "/infill": {"input_prefix": "Hi"},
    "/tokenize": {"content": "Hi"},
    "/detokenize": {"tokens": [72]},
    "/apply-template": CHAT,
    "/v1/responses/input_tokens": {"model": "tiny", "input": "Hi"},
}


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    """A server with a key, and no anonymous callers."""
    does_everything = replace(MODEL, capabilities=("chat", "completion", "embedding", "rerank"))
    with serving(key=KEY, auth=config.Auth(anonymous=False), model=does_everything, max_body_bytes=10_000) as server:
        yield server


def walk(served: Served) -> list[tuple[Route, str]]:
    """Every route with a concrete path, in every spelling that clients make of base URLs."""
    found = []
    for route in routes(served.service, Edge(config.Server()), meter(served.service), Control(), Published()):
        if route.method == SOCKET:  # tests/http/test_websocket.py
            continue
        path = route.path.replace("{id:path}", "tiny").replace("{model:path}", "tiny")
        path = path.replace("{id}", "resp_never").replace("{name}", "nobody")
        bare = path.removeprefix("/v1") if path.startswith("/v1/") else path
        for spelling in {path, f"{path}/", bare, f"/{path}", path.replace("/", "//") + "//", f"///{bare}"}:
            found.append((route, spelling))
    return found


def ask(served: Served, route: Route, path: str, **headers: str) -> Answer:
    given = {"Authorization": f"Bearer {KEY}", **{name.replace("_", "-"): value for name, value in headers.items()}}
    body = None if route.method == "DELETE" else BODIES.get(route.path)
    return served.request(route.method, path, body, given)


def test_the_public_routes_are_the_reviewed_ones(locked: Served) -> None:
    listed = routes(locked.service, Edge(config.Server()), meter(locked.service), Control(), Published())
    assert {(route.method, route.path) for route in listed if route.public} == PUBLIC


def test_every_route_answers_an_honest_caller(locked: Served) -> None:
    for route, path in walk(locked):
        if route.path != "/admin/stop":  # tests/http/test_admin.py
            assert ask(locked, route, path).status == (
                404 if "{id}" in route.path or "{name}" in route.path else 200
            ), path


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "localhost.evil.example:80"}, 421),
        ({"Host": ""}, 400),
        ({"Host": "a/..;/x?"}, 400),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
    ],
)
def test_no_route_answers_a_rebound_name_or_a_foreign_page(
    locked: Served, headers: dict[str, str], status: int
) -> None:
    before = len(locked.engine.runs)
    for route, path in walk(locked):
        answer = ask(locked, route, path, **headers)
        assert (answer.status, bool(answer.code)) == (status, True), path
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert len(locked.engine.runs) == before


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "Bearer wrong")],
        [("Authorization", f"Basic {KEY}")],
        [("x-api-key", "wrong")],
        [("Authorization", f"Bearer {KEY}"), ("x-api-key", "wrong")],
        [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")],
        [("x-goog-api-key", KEY), ("x-goog-api-key", "wrong")],
    ],
    ids=["none", "wrong", "basic", "x-api-key", "conflict", "twice", "twice google"],
)
def test_no_route_answers_without_a_valid_key(locked: Served, headers: list[tuple[str, str]]) -> None:
    for route, path in [*walk(locked), (Route("GET", "/nope", walk(locked)[0][0].endpoint), "/nope")]:
        if route.public:
            continue
        body = b'{"model": "wrong", broken' if route.method == "POST" else None
        answer = locked.request(route.method, path, body, headers)
        assert answer.status == 401, path
        assert answer.code == "invalid_api_key"
        assert "www-authenticate" in answer.headers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Authorization", f"Bearer {KEY}"),
        ("authorization", f"bearer {KEY}"),
        ("Authorization", f"Bearer  {KEY} "),
        ("x-api-key", KEY),
        ("X-Goog-Api-Key", KEY),
    ],
)
def test_a_key_is_found_wherever_a_client_puts_it(locked: Served, name: str, value: str) -> None:
    assert locked.request("GET", "/v1/models", None, {name: value}).status == 200


def test_health_shows_figures_to_callers_only(locked: Served) -> None:
    assert locked.request("GET", "/health").json == {"status": "ok"}
    assert locked.request("GET", "/health", None, {"x-api-key": KEY}).json["engine"]["description"] == "scripted"


def test_what_names_no_model_waits_for_no_store() -> None:
    with serving() as served:

        async def fails() -> None:
            raise OSError("the disk does not answer")

        served.service.look = fails
        assert {served.request("GET", path).status for path in ("/health", "/ready", "/metrics", "/privacy")} == {200}
        for path in ("drain", "resume", "reload"):
            assert served.request("POST", f"/admin/{path}").status == 200
        assert served.request("GET", "/v1/models").status == 500


def test_health_shows_no_figures_of_models_that_its_caller_may_not_use(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.json")
    _, other = store.create("other", models=("other",))
    with serving(store=store) as served:
        told = served.request("GET", "/health", None, {"x-api-key": other}).json
        assert set(told) == {"status", "ready", "active", "ledger", "models"}
        assert told["models"] == {}


@pytest.mark.parametrize("path", ["/status", "/limits", "/docs", "/openapi.json", "/health"])
def test_no_cache_gives_strangers_what_callers_are_told(locked: Served, path: str) -> None:
    stranger, caller = locked.request("GET", path), locked.request("GET", path, None, {"x-api-key": KEY})
    for answer in (stranger, caller):
        assert {"authorization", "x-api-key", "x-goog-api-key"} <= set(answer.headers["vary"].split(", "))
    assert "cache-control" not in stranger.headers
    assert "no-store" in caller.headers["cache-control"]


def test_no_body_passes_its_limits(locked: Served) -> None:
    for route, path in walk(locked):
        if route.method != "POST":
            continue
        for body, headers, status in [
            (b"x" * 10_001, {}, 413),
            (b"{}", {"Content-Length": "10001"}, 413),
            (b"2800\r\n" + b"x" * 0x2800 + b"\r\n0\r\n\r\n", {"Transfer-Encoding": "chunked"}, 413),
            (b"[" * 65 + b"]" * 65, {}, 400),
            (b"{}", {"Content-Type": "text/plain"}, 415),
            (b"{}", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
            (b"{}", {"Content-Type": "multipart/form-data; boundary=x"}, 415),
            (b"{}", {"Content-Type": "application/json; charset=utf-16"}, 415),
            (b"{}", {"Content-Type": "(none)"}, 415),
            (b"{}", {"Content-Encoding": "gzip"}, 415),
        ]:
            answer = locked.request("POST", path, body, {"x-api-key": KEY, **headers})
            assert answer.status == status, (path, headers, answer)
            assert answer.code


def test_json_with_a_charset_is_json(served: Served) -> None:
    body = json.dumps(CHAT).encode()
    for kind in ("application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"'):
        assert served.request("POST", "/v1/chat/completions", body, {"Content-Type": kind}).status == 200


def test_unknown_routes_methods_and_options(served: Served) -> None:
    assert served.request("GET", "/nope").error["code"] == "not_found"
    assert served.request("POST", "/v1/nope", {}).status == 404
    assert served.request("GET", "/v1/models/no/such/model").error["code"] == "model_not_found"
    wrong = served.request("DELETE", "/v1/chat/completions")
    assert (wrong.status, wrong.error["code"], wrong.headers["allow"]) == (405, "method_not_allowed", "POST, OPTIONS")
    assert served.request("GET", "/v1/completions").status == 405
    assert served.request("BREW", "/health").status == 405
    options = served.request("OPTIONS", "/v1/models")
    assert (options.status, options.headers["allow"], options.body) == (204, "GET, HEAD, OPTIONS", b"")
    head = served.request("HEAD", "/v1/models")
    assert (head.status, head.body) == (200, b"")
    assert int(head.headers["content-length"]) > 100
    for path in ("/v1beta/models/a/b:countTokens", "/v1/responses/input_tokens"):  # not a model's or a response's name
        assert served.request("GET", path).status == 405
        assert served.request("OPTIONS", path).headers["allow"] == "POST, OPTIONS"


def test_ids_with_slashes_and_aliases_find_the_model(served: Served) -> None:
    for spelling in ("tiny", "default", "org/tiny:135m", "org%2Ftiny:135m"):
        assert served.request("GET", f"/v1/models/{spelling}").json["id"] == "tiny"
    assert served.chat(model="default").json["model"] == "tiny"
    unknown = served.chat(model="gpt-5")
    assert (unknown.status, unknown.error["code"], unknown.error["param"]) == (404, "model_not_found", "model")


def test_the_model_list_has_what_listings_ask_for(served: Served) -> None:
    (model,) = served.request("GET", "/v1/models").json["data"]
    assert model["object"] == "model"
    assert (model["context_length"], model["max_output_tokens"], model["quantization"]) == (8192, 4096, "int4")
    assert model["defaults"] == {
        "temperature": 0.2,
        "top_p": 1.0,
        "top_k": 40,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 256,
        "wall_clock_s": 60.0,
    }
    assert "temperature" in model["supported_sampling_parameters"]


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("abc-1._Z", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("a\tb", False), ("é", False)],
)
def test_every_answer_has_a_request_id(served: Served, sent: str, kept: bool) -> None:
    for path in ("/v1/models", "/nope"):
        given = served.request("GET", path, None, {"X-Request-Id": sent}).headers["x-request-id"]
        assert (given == sent) is kept
    two = served.request("GET", "/nope", None, [("X-Request-Id", "a"), ("X-Request-Id", "b")])
    assert two.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("place", ["Authorization", "scheme", "x-api-key", "x-goog-api-key", "query"])
@pytest.mark.parametrize("around", ["", "a-"])
def test_a_request_id_that_reveals_the_key_is_not_taken(served: Served, place: str, around: str) -> None:
    authorization = {"Authorization": f"Bearer {KEY}", "scheme": f"Token {KEY}"}.get(place)
    carried = {"Authorization": authorization} if authorization else {place: KEY}
    for path in ("/v1/models", "/v1beta/models", "/nope"):
        path, headers = (f"{path}?key={KEY}", {}) if place == "query" else (path, carried)
        given = served.request("GET", path, None, {**headers, "X-Request-Id": around + KEY + around})
        assert re.fullmatch(r"req_[0-9a-f]{32}", given.headers["x-request-id"])
    for mine in (f"id-of-{KEY[:10]}", "x-1"):
        assert served.request("GET", "/nope", None, {**carried, "X-Request-Id": mine}).headers["x-request-id"] == mine


def test_a_request_id_that_reveals_a_key_which_the_request_does_not_carry_is_not_taken(served: Served) -> None:
    for key in (new_text(), new_text()):
        headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": f"job.{key}.1"}
        assert served.request("GET", "/v1/models", None, headers).headers["x-request-id"].startswith("req_")
    assert served.request("GET", "/nope", None, {"X-Request-Id": "ocs-1"}).headers["x-request-id"] == "ocs-1"
    for dummy in ("x", "none"):  # what an open server is sent in place of a key
        for mine, kept in ((f"{dummy}-1", True), (dummy, False)):
            headers = {"Authorization": f"Bearer {dummy}", "X-Request-Id": mine}
            assert (served.request("GET", "/nope", None, headers).headers["x-request-id"] == mine) is kept


def test_answers_do_not_name_the_server_software(served: Served) -> None:
    answer = served.request("GET", "/health")
    assert "server" not in answer.headers
    assert "access-control-allow-origin" not in answer.headers


def test_a_proxy_without_a_key_is_noticed(served: Served) -> None:
    for name in ("Forwarded", "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "Via", "X-Real-IP"):
        answer = served.request("GET", "/v1/models", None, {name: "for=1.2.3.4"})
        assert (answer.status, answer.error["code"]) == (403, "proxy_without_key")
        assert "(OCSERVE_API_KEY or" in answer.error["message"]


def test_a_forwarded_request_is_never_the_anonymous_one() -> None:
    with serving(key=KEY) as served:
        assert served.request("GET", "/v1/models").status == 200  # loopback may be anonymous
        for name in ("Forwarded", "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "Via", "X-Real-IP"):
            assert served.request("GET", "/v1/models", None, {name: "127.0.0.1"}).status == 401
            assert served.request("GET", "/v1/models", None, {name: "127.0.0.1", "x-api-key": KEY}).status == 200


@pytest.mark.parametrize(
    "behind",
    [{"public_hosts": ("api.example",)}, {"trusted_proxies": ("127.0.0.1",)}, {"trusted_proxies": ("10.0.0.1",)}],
    ids=str,
)
def test_behind_a_proxy_that_adds_no_header_nobody_is_anonymous(behind: dict[str, tuple[str, ...]]) -> None:
    """The default of a reverse proxy on this machine: a loopback peer, no forwarding header, a Host of any name."""
    hosts = ["127.0.0.1", "localhost", "[::1]:80", *behind.get("public_hosts", ())]
    with serving(key=KEY, **behind) as served:
        for host in hosts:
            assert served.request("GET", "/v1/models", None, {"Host": host}).status == 401, host
            assert served.request("GET", "/v1/models", None, {"Host": host, "x-api-key": KEY}).status == 200, host


@pytest.mark.parametrize(
    ("proxies", "trusted"),
    [
        (("127.0.0.1",), True),
        (("10.0.0.1", "127.0.0.0/8"), True),
        (("10.0.0.1", "::1"), False),
        (("10.0.0.0/8",), False),
    ],
)
def test_only_the_trusted_proxies_may_forward(proxies: tuple[str, ...], trusted: bool) -> None:
    with serving(key=KEY, trusted_proxies=proxies) as served:
        for name in ("Forwarded", "X-Forwarded-For", "Via"):
            anonymous = served.request("GET", "/v1/models", None, {name: "127.0.0.1"})
            honest = served.request("GET", "/v1/models", None, {name: "127.0.0.1", "x-api-key": KEY})
            assert (anonymous.status, honest.status) == ((401, 200) if trusted else (403, 403)), name
            assert trusted or honest.error["code"] == "untrusted_proxy"


def test_without_a_key_any_credential_is_anonymous(served: Served) -> None:
    for value in ("Bearer sk-whatever", "Bearer", "Basic xyz", "nonsense"):
        assert served.request("GET", "/v1/models", None, {"Authorization": value}).status == 200


def test_listed_origins_may_call_and_others_may_not() -> None:
    with serving(cors_origins=("https://app.example", "vscode-webview://abc", "*", "null")) as served:
        ask = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        preflight = served.request("OPTIONS", "/v1/chat/completions", None, ask)
        assert preflight.status == 204
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        allowed = set(preflight.headers["access-control-allow-methods"].split(", "))
        assert {route.method for route, _ in walk(served)} <= allowed
        sent = preflight.headers["access-control-allow-headers"].split(", ")
        assert {"authorization", "x-goog-api-client", "anthropic-version", "anthropic-beta",
                "anthropic-dangerous-direct-browser-access"} <= set(sent)  # fmt: skip
        assert "access-control-allow-credentials" not in preflight.headers
        assert "access-control-allow-private-network" not in preflight.headers
        assert preflight.headers["x-request-id"]
        for origin in ("https://app.example", "vscode-webview://abc"):
            for answer in (
                served.chat(headers={"Origin": origin, "Sec-Fetch-Site": "cross-site"}),
                served.chat(headers={"Origin": origin}, temperature=9),
            ):
                assert answer.headers["access-control-allow-origin"] == origin
                exposed = answer.headers["access-control-expose-headers"].split(", ")
                assert {"x-request-id", "request-id"} <= set(exposed)
        hostile = ("https://app.example.evil", "http://app.example", "https://app.example:444", "null", "*", "",
                   "http://localhost.evil", "http://localhost:3000", "file://", "https://APP.example@evil")  # fmt: skip
        for origin in hostile:
            for method in ("OPTIONS", "POST"):
                answer = served.request(method, "/v1/chat/completions", CHAT, {**ask, "Origin": origin})
                assert answer.status == 403, origin
                assert "access-control-allow-origin" not in answer.headers


def test_the_servers_own_pages_may_call(served: Served) -> None:
    own = {"Origin": f"http://127.0.0.1:{served.port}", "Sec-Fetch-Site": "same-origin"}
    assert served.chat(headers=own).status == 200
