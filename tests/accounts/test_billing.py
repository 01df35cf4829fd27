"""P5: what a request is charged that completed, was cancelled or failed, at each of its phases, is what is printed."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw
import pytest
from msgspec.structs import replace

from ocserve import config
from ocserve.accounts.billing import Billing
from ocserve.accounts.keystore import KeyStore
from ocserve.accounts.ledger import Ledger, Row
from ocserve.accounts.past import Past
from ocserve.accounts.pricing import PICODOLLARS
from ocserve.errors import InvalidRequest
from tests.accounts.books import CACHED, COMPLETION, PRICES, PROMPT, REQUEST, TODAY, priced, rows
from tests.accounts.disks import disk
from tests.accounts.test_ledger import Failing
from tests.http.harness import CHAT, MODEL, Served, parse, read_all, serving, wait_for
from tests.scripted import Script, ScriptedEngine

WORDS = tuple(f"w{number} " for number in range(40))
PROMPT_COST = REQUEST + 4 * PROMPT + 3 * CACHED


def book(tmp_path: Path, **policy: str) -> Billing:
    ledger = Ledger(tmp_path / "ledger.db", retention_days=30)
    return Billing(config.Billing(**policy), priced(), ledger, today=lambda: TODAY)  # type: ignore[arg-type]


@contextmanager
def billed(billing: Billing, **script: object) -> Iterator[Served]:
    """A server that charges; a prompt has seven tokens, three of them cached."""
    engine = ScriptedEngine(Script(**{"tokens": WORDS, "cached_tokens": 3, **script}), parallel=1)  # type: ignore[arg-type]
    try:
        with serving(lambda: engine, billing=billing) as served:
            yield served
    finally:
        assert billing.ledger is not None
        billing.ledger.close()


def only(tmp_path: Path) -> Row:
    (row,) = rows(tmp_path / "ledger.db")
    return row


def test_a_model_without_a_price_is_refused_where_the_operator_wants_it(tmp_path: Path) -> None:
    """Not where nothing has a price, and not for a key that has prices of its own. The list then says no price."""
    store = KeyStore(tmp_path / "keys.json")
    keys = [store.create("listed")[1], store.create("own", price={"prompt": "0.1"})[1]]
    statuses, listed = [], []
    for unpriced, tariff in (("refuse", priced("tinny")), ("serve", priced("tinny")), ("refuse", None)):
        billing = Billing(config.Billing(unpriced=unpriced), tariff, today=lambda: TODAY)  # type: ignore[arg-type]
        with serving(ScriptedEngine, billing=billing, store=store) as served:
            answers = [served.chat(headers={"x-api-key": key}) for key in keys]
            statuses.append([answer.status for answer in answers])
            lists = [served.request("GET", "/v1/models", headers={"x-api-key": key}).json["data"] for key in keys]
            listed.append(["pricing" in entry for (entry,) in lists])
            if statuses == [[404, 200]]:
                error = answers[0].error
                assert (error["code"], error["param"]) == ("model_not_priced", "model")
                assert "The model tiny has no price" in error["message"]
    assert statuses == [[404, 200], [200, 200], [200, 200]]
    assert listed == [[False, True], [True, True], [True, True]]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_the_cost_is_in_the_answer_and_the_same_in_the_ledger(tmp_path: Path, stream: bool) -> None:
    with billed(book(tmp_path)) as served:
        answer = served.chat(stream=stream, headers={"X-Request-Id": "mine"})
        usage = json.loads(answer.events[-2])["usage"] if stream else answer.json["usage"]
        row = only(tmp_path)  # it is there as soon as the answer is
    assert row.cost == PROMPT_COST + 40 * COMPLETION
    assert usage["cost"] == row.cost / PICODOLLARS == 3.495e-06
    assert (row.request_id, row.key_id, row.model, row.route) == ("mine", "anonymous", "tiny", "/v1/chat/completions")
    assert (row.outcome, row.prompt_tokens, row.cached_tokens, row.completion_tokens) == ("completed", 7, 3, 40)
    assert (row.price_prompt, row.price_cached_prompt, row.price_completion) == (PROMPT, CACHED, COMPLETION)
    assert row.settled_us is not None
    assert row.settled_us >= row.admitted_us


# Routes with a request, and how a stream of theirs says that it has ended.
ROUTES = [
    ("/v1/chat/completions", {**CHAT, "stream": True}, b"[DONE]"),
    ("/v1/completions", {"model": "tiny", "prompt": "Hi", "stream": True}, b"[DONE]"),
    ("/v1/responses", {"model": "tiny", "input": "Hi", "stream": True}, b"response.completed"),
    (
        "/v1/messages",
        {"model": "tiny", "max_tokens": 50, "messages": CHAT["messages"], "stream": True},
        b"message_stop",
    ),
    ("/v1beta/models/tiny:streamGenerateContent", {"contents": [{"parts": [{"text": "Hi"}]}]}, b"STOP"),
    ("/api/chat", {"model": "tiny", "messages": CHAT["messages"]}, b'"done":true'),
    ("/completion", {"prompt": "Hi", "stream": True}, b'"stop":true'),
    ("/v1/chat/completions", CHAT, b"finish_reason"),
    ("/v1/messages", {"model": "tiny", "max_tokens": 50, "messages": CHAT["messages"]}, b"end_turn"),
    ("/v1beta/models/tiny:generateContent", {"contents": [{"parts": [{"text": "Hi"}]}]}, b"STOP"),
]


@pytest.mark.parametrize(("path", "body", "end"), ROUTES, ids=lambda value: value if isinstance(value, str) else "")
def test_nobody_is_told_of_an_end_before_the_row_is_on_disk(
    tmp_path: Path, path: str, body: dict[str, object], end: bytes
) -> None:
    """The disk is held while it syncs: text arrives meanwhile, the end does not."""
    free = threading.Event()
    free.set()
    with disk(lambda op: None if op.kind != "sync" else free.wait(10) and None) as vfs:
        ledger = Ledger(tmp_path / "ledger.db", retention_days=1, vfs=vfs)
        with billed(Billing(ledger=ledger)) as served, served.connect() as peer:
            free.clear()
            peer.sendall(served.compose("POST", path, body))
            wait_for(lambda: any(run.phase == "done" for run in served.engine.runs.values()))
            peer.settimeout(0.2)
            early = read_all(peer)
            free.set()
            peer.settimeout(5)
            late = read_all(peer)
            found = rows(tmp_path / "ledger.db")
    assert (b"w39" in early) == (b"stream" in json.dumps(body).encode() or "stream" in path or "/api/" in path)
    assert end not in early
    assert end in late
    assert [row.outcome for row in found] == ["completed"]


def told_costs(body: bytes) -> list[float]:
    return [float(each) for each in re.findall(r'"cost":([0-9.e-]+)', body.decode())]


def test_every_vendors_clients_are_told_the_cost_once_it_is_known(tmp_path: Path) -> None:
    with billed(book(tmp_path)) as served, serving() as free:
        for number, (path, body, _) in enumerate(ROUTES):
            answer = served.request("POST", path, body)
            cost = rows(tmp_path / "ledger.db")[number].cost
            assert answer.status == 200
            assert told_costs(answer.body) == [cost / PICODOLLARS] != [0.0], path
            assert b'"cost"' not in free.request("POST", path, body).body


def test_so_are_those_who_ask_for_vectors_and_rankings(tmp_path: Path) -> None:
    model = replace(MODEL, capabilities=("embedding", "rerank"), dimensions=2)
    ledger = Ledger(tmp_path / "ledger.db", retention_days=30)
    questions: dict[str, dict[str, object]] = {
        "/v1/embeddings": {"model": "tiny", "input": "Hi"},
        "/api/embed": {"model": "tiny", "input": "Hi"},
        "/v1beta/models/tiny:embedContent": {"content": {"parts": [{"text": "Hi"}]}},
        "/v2/rerank": {"model": "tiny", "query": "which", "documents": ["Hi"]},
    }
    with serving(model=model, billing=Billing(tariff=priced(), ledger=ledger)) as served:
        for path, body in questions.items():
            answer = served.request("POST", path, body)
            assert [told * PICODOLLARS for told in told_costs(answer.body)] == [REQUEST + 2 * PROMPT], path
    ledger.close()
    assert {row.cost for row in rows(tmp_path / "ledger.db")} == {REQUEST + 2 * PROMPT}


@pytest.mark.parametrize("policy", ["used", "free"])
@pytest.mark.parametrize("phase", ["prepare", "queue", "prefill", "decode"])
def test_p5_a_request_whose_client_goes_is_charged_by_the_policy(tmp_path: Path, phase: str, policy: str) -> None:
    script = {"prepare": {"prepare_s": 5.0}, "prefill": {"prefill_s": 5.0}, "decode": {"step_s": 0.01}}.get(phase, {})
    if phase == "queue":
        script = {"step_s": 0.01}
    with billed(book(tmp_path, cancelled=policy), **script) as served:
        before = served.connect()
        if phase == "queue":  # one that holds the only slot
            before.sendall(served.compose("POST", "/v1/chat/completions", {**CHAT, "max_tokens": 39, "stream": True}))
            wait_for(lambda: served.engine.running == 1)
        peer = served.connect()
        peer.sendall(served.compose("POST", "/v1/chat/completions", {**CHAT, "stream": True}))
        runs = served.engine.runs
        wanted = {"prepare": "preparing", "queue": "queued"}.get(phase, phase)
        wait_for(lambda: bool(runs) and list(runs.values())[-1].phase == wanted)
        run = list(runs.values())[-1]
        if phase == "decode":
            wait_for(lambda: run.steps >= 5)
        peer.close()
        wait_for(lambda: run.cancelled)
        before.close()
        wait_for(lambda: not served.service.active)
        served.service.billing.ledger.close()  # type: ignore[union-attr]
        found = [row for row in rows(tmp_path / "ledger.db") if row.outcome == "cancelled"][-1:]
    if phase == "prepare":
        assert found == []  # not admitted yet
        return
    (row,) = found
    began = phase != "queue"
    assert (row.prompt_tokens, row.completion_tokens) == (7 * began, run.steps * began)
    assert (row.completion_tokens > 4) == (phase == "decode")
    charged = began and policy == "used"
    assert row.cost == (PROMPT_COST + run.steps * COMPLETION) * charged


@pytest.mark.parametrize("policy", ["free", "used"])
@pytest.mark.parametrize("at", [0, 6])
def test_p5_a_request_that_fails_by_our_fault_is_charged_by_the_policy(tmp_path: Path, at: int, policy: str) -> None:
    with billed(book(tmp_path, failed=policy), crash_at=at) as served:
        answer = served.chat(stream=True)
        assert "error" in answer.events[-1]
        row = only(tmp_path)
    assert (row.outcome, row.prompt_tokens, row.completion_tokens) == ("failed", 7, at)
    assert row.cost == (PROMPT_COST + at * COMPLETION) * (policy == "used")


def test_a_request_is_charged_the_prices_and_by_the_policy_of_its_admission(tmp_path: Path) -> None:
    """A reload while it runs or waits is for those that come after it."""
    billing = book(tmp_path, cancelled="free")
    with billed(billing, step_s=0.01, tokens=WORDS * 100) as served:

        def begun(name: str, phase: str, most: int = 4000) -> socket.socket:
            peer = served.connect()
            body = {**CHAT, "stream": True, "max_tokens": most}
            peer.sendall(served.compose("POST", "/v1/chat/completions", body, {"X-Request-Id": name}))
            wait_for(lambda: bool(served.engine.runs) and list(served.engine.runs.values())[-1].phase == phase)
            return peer

        def gone(peer: socket.socket) -> None:
            wait_for(lambda: list(served.engine.runs.values())[-1].steps > 4)
            peer.close()
            wait_for(lambda: not served.service.active)

        with begun("left-before", "decode"):
            whole = begun("before", "queued", 40)
            wait_for(lambda: served.engine.steps > 4)
            billing.reset(config.Billing(cancelled="used"), priced(text=PRICES.replace("0.00000006", "0.0000006")))
        with whole:
            end = parse(read_all(whole))
        assert json.loads(end.events[-2])["usage"]["cost"] * PICODOLLARS == PROMPT_COST + 40 * COMPLETION
        gone(begun("left-after", "decode"))
        answer = served.chat(headers={"X-Request-Id": "after"}, max_tokens=40)
        assert answer.json["usage"]["cost"] * PICODOLLARS == PROMPT_COST + 400 * COMPLETION
        found = {row.request_id: row for row in rows(tmp_path / "ledger.db")}
    assert (found["left-before"].outcome, found["left-before"].cost) == ("cancelled", 0)
    assert found["left-before"].completion_tokens > 0
    assert found["before"].cost == PROMPT_COST + 40 * COMPLETION
    assert found["left-after"].cost == PROMPT_COST + found["left-after"].completion_tokens * 10 * COMPLETION
    assert [found[name].price_completion for name in ("before", "after")] == [COMPLETION, 10 * COMPLETION]


def test_vectors_are_charged_by_their_prompts(tmp_path: Path) -> None:
    model = replace(MODEL, capabilities=("embedding",))
    ledger = Ledger(tmp_path / "ledger.db", retention_days=30)
    with serving(model=model, billing=Billing(tariff=priced(), ledger=ledger)) as served:
        answer = served.request("POST", "/v1/embeddings", {"model": "tiny", "input": ["four", "seven!!"]})
    ledger.close()
    row = only(tmp_path)
    assert answer.json["usage"]["cost"] == row.cost / PICODOLLARS
    assert (row.outcome, row.prompt_tokens, row.cost) == ("completed", 11, REQUEST + 11 * PROMPT)


@pytest.mark.parametrize("crashes", [False, True])
def test_a_days_limits_go_on_after_a_restart(tmp_path: Path, crashes: bool) -> None:
    """Eight requests a day: two answered, one running at the end, one refused by the engine, one that only counts."""
    limits = config.Limits(requests_per_day=8, tokens_per_day=10_000)
    no = InvalidRequest("No.", param="messages")
    engine = ScriptedEngine(
        lambda request: Script(tokens=WORDS, refuse=no if request.max_tokens == 1 else None, step_s=0.01)
    )
    ledger = Ledger(tmp_path / "ledger.db", retention_days=30)
    with serving(lambda: engine, billing=Billing(tariff=priced(), ledger=ledger), limits=limits) as served:
        assert [served.chat(max_tokens=tokens).status for tokens in (2, 3, 1)] == [200, 200, 400]
        assert served.request("POST", "/tokenize", {"content": "Hi"}).status == 200
        with served.connect() as peer:
            peer.sendall(served.compose("POST", "/v1/chat/completions", {**CHAT, "max_tokens": 40, "stream": True}))
            wait_for(lambda: served.engine.running == 1)
            if not crashes:
                read_all(peer)
            told = served.request("GET", "/v1/models").headers
            past = Past(ledger.recent())
    ledger.close()
    with serving(limits=limits, past=past) as served:
        after = served.request("GET", "/v1/models").headers
    assert told["x-ratelimit-remaining-requests"] == after["x-ratelimit-remaining-requests"] == "3"
    # What runs has reserved its prompt and all that it may answer, and nobody will know what it used.
    left = 10_000 - 9 - 10 - 47
    assert (
        left - 1 <= int(after["x-ratelimit-remaining-tokens"]) <= int(told["x-ratelimit-remaining-tokens"]) <= left + 1
    )


def test_p5_what_is_refused_is_in_no_ledger(tmp_path: Path) -> None:
    with billed(book(tmp_path), refuse=InvalidRequest("No.", param="messages")) as served:
        assert served.chat().status == 400
        assert served.chat(temperature=9).status == 400
        assert served.chat(model="other").status == 404
        assert served.request("POST", "/tokenize", {"content": "Hi"}).status == 200
    assert rows(tmp_path / "ledger.db") == []


def test_a_failing_ledger_ends_admission_and_not_what_runs_and_then_everything_is_written(tmp_path: Path) -> None:
    failing = Failing(1, apsw.FullError, lasting=True)
    failing.mended = True
    with disk(failing) as vfs:
        ledger = Ledger(tmp_path / "ledger.db", retention_days=1, vfs=vfs)
        with billed(Billing(tariff=priced(), ledger=ledger), step_s=0.01) as served:
            with served.connect() as peer:
                peer.sendall(served.compose("POST", "/v1/chat/completions", {**CHAT, "stream": True}))
                wait_for(lambda: served.engine.steps > 3)
                failing.mended = False
                assert b"[DONE]" in read_all(peer)
            refused = served.chat()
            assert (refused.status, refused.error["code"]) == (503, "ledger_unavailable")
            assert refused.headers["retry-after"] == "5"
            not_ready = served.request("GET", "/ready")
            assert (not_ready.status, not_ready.error["code"]) == (503, "ledger_unavailable")
            assert served.request("GET", "/health").json["ledger"] == "failing"
            failing.mended = True
            wait_for(lambda: ledger.healthy)
            assert served.request("GET", "/ready").status == 200
            assert served.chat().status == 200
    assert [row.outcome for row in rows(tmp_path / "ledger.db")] == ["completed", "completed"]


def test_the_policy_is_published_as_it_is_applied(tmp_path: Path) -> None:
    with billed(book(tmp_path, cancelled="free")) as served:
        document = served.request("GET", "/openapi.json").json["info"]["description"]
        page = served.request("GET", "/docs").body.decode()
        listed = served.request("GET", "/v1/models").json["data"][0]["pricing"]
    for text in (document, page):
        assert "whose client goes away before its end is not charged" in text
        assert "fails by our fault is not charged" in text
    assert (listed["prompt"], listed["request"], listed["input_cache_read"]) == (
        "0.00000002",
        "0.000001",
        "0.000000005",
    )
    with serving() as free:
        assert (
            "Nothing is charged, except to keys with prices of their own. Of these: "
            in free.request("GET", "/openapi.json").json["info"]["description"]
        )
        assert "cost" not in free.chat().json["usage"]
