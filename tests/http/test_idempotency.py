"""`Idempotency-Key`: the same answer once, however often and however the same request is sent, and charged once."""

from __future__ import annotations

import asyncio
import datetime
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from starlette.types import Message, Receive, Scope, Send

from ocserve import config
from ocserve.accounts.billing import Billing
from ocserve.accounts.keys import Caller
from ocserve.accounts.ledger import Ledger
from ocserve.doors import Maintenance
from ocserve.http.edge.idempotency import Idempotency
from ocserve.http.exchange import Exchange
from ocserve.http.route_table import Match
from ocserve.trace import Trace
from tests.accounts.books import priced, rows
from tests.http.harness import CHAT, KEY, Answer, Served, serving, wait_for
from tests.scripted import Script, ScriptedEngine

PATH = "/v1/chat/completions"
KEYED = {"Idempotency-Key": "first-1"}
DAY = datetime.timedelta(days=1)
SOME_DAY = datetime.datetime(2999, 1, 1, tzinfo=datetime.UTC)


@contextmanager
def charged(tmp_path: Path, script: Script | None = None) -> Iterator[Served]:
    ledger = Ledger(tmp_path / "ledger.db", retention_days=1)
    try:
        with serving(
            lambda: ScriptedEngine(script or Script()), billing=Billing(config.Billing(), priced(), ledger)
        ) as it:
            yield it
    finally:
        ledger.close()


def runs(served: Served) -> int:
    return len(served.engine.runs)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_repeat_gets_the_same_bytes_and_is_not_charged(tmp_path: Path, stream: bool) -> None:
    with charged(tmp_path) as served:
        first = served.chat(headers=KEYED, stream=stream, user="someone")
        again = served.chat(headers=KEYED, stream=stream, user="someone")
        other = served.chat(headers={"Idempotency-Key": "second"}, stream=stream, user="someone")
        assert first.status == again.status == 200
        assert again.body == first.body != other.body
        assert again.headers["content-type"] == first.headers["content-type"]
        assert again.headers["x-ocserve-ignored"] == first.headers["x-ocserve-ignored"] == "user"
        assert (again.headers["idempotent-replayed"], "idempotent-replayed" in first.headers) == ("true", False)
        assert again.headers["x-request-id"] != first.headers["x-request-id"]
        assert runs(served) == 2
        assert len(rows(tmp_path / "ledger.db")) == 2


def test_a_repeat_says_what_holds_by_then_of_limits_and_maintenance() -> None:
    asked = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]}
    remaining = "anthropic-ratelimit-requests-remaining"
    with serving(limits=config.Limits(requests_per_minute=100)) as served:

        def ask() -> Answer:
            return served.request("POST", "/v1/messages", asked, KEYED)

        served.service.doors.announce(Maintenance(starts=SOME_DAY, ends=SOME_DAY + DAY))
        first = ask()
        assert "x-maintenance" in first.headers
        for _ in range(5):
            served.chat()
        served.service.doors.announce(Maintenance(starts=SOME_DAY, ends=SOME_DAY + 2 * DAY))
        later = ask()
        assert int(later.headers[remaining]) <= int(first.headers[remaining]) - 5
        assert later.headers["x-maintenance"] != first.headers["x-maintenance"]
        served.service.doors.take_back()
        last = ask()
        assert "x-maintenance" not in last.headers
        assert {answer.headers.get("idempotent-replayed") for answer in (later, last)} == {"true"}


def test_repeats_that_come_meanwhile_wait_for_the_first(tmp_path: Path) -> None:
    answers: list[Answer] = []
    with charged(tmp_path, Script(step_s=0.05)) as served:

        def ask() -> None:
            answers.append(served.chat(headers=KEYED))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {answer.body for answer in answers} == {answers[0].body}
        assert [answer.status for answer in answers] == [200] * 6
        assert runs(served) == 1
        assert len(rows(tmp_path / "ledger.db")) == 1


def test_a_request_whose_client_is_lost_is_finished_and_its_repeat_is_not_charged(tmp_path: Path) -> None:
    with charged(tmp_path, Script(step_s=0.03)) as served:
        with served.connect() as peer:
            peer.sendall(served.compose("POST", PATH, {**CHAT, "stream": True}, KEYED))
            wait_for(lambda: served.engine.steps > 0)
        again = served.chat(headers=KEYED, stream=True)
        assert again.events[-1] == "[DONE]"
        assert again.headers["idempotent-replayed"] == "true"
        (row,) = rows(tmp_path / "ledger.db")
        assert (row.outcome, row.completion_tokens) == ("completed", 4)


def test_the_real_client_that_gives_up_waiting_and_tries_again_is_charged_once(tmp_path: Path) -> None:
    with charged(tmp_path, Script(step_s=0.2)) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", timeout=0.5, max_retries=3)
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], extra_headers=KEYED
        )
        assert answer.choices[0].message.content == "Hello, world!"
        assert runs(served) == len(rows(tmp_path / "ledger.db")) == 1


def test_a_key_names_one_request_of_one_caller() -> None:
    with serving(ScriptedEngine, key=KEY) as served:
        assert served.chat(headers=KEYED).status == 200
        for refused in (
            served.chat(headers=KEYED, temperature=0.5),
            served.request("POST", "/v1/responses", {}, KEYED),
        ):
            assert (refused.status, refused.error["code"]) == (422, "idempotency_key_reused")
        holder = served.chat(headers={**KEYED, "Authorization": f"Bearer {KEY}"}, temperature=0.5)
        assert (holder.status, "idempotent-replayed" in holder.headers) == (200, False)
        for wrong in ("", "a b", "x" * 256, "é"):
            refused = served.chat(headers={"Idempotency-Key": wrong})
            assert (refused.status, refused.error["param"]) == (400, "idempotency-key"), wrong
        twice = served.request("POST", PATH, CHAT, [("Idempotency-Key", "a"), ("Idempotency-Key", "a")])
        assert twice.status == 400


def test_what_failed_or_was_refused_may_be_tried_again(tmp_path: Path) -> None:
    scripts = iter([Script(crash_at=2), Script(crash_at=2), Script()])
    with serving(lambda: ScriptedEngine(lambda request: next(scripts))) as served:
        assert served.chat(headers=KEYED, temperature=9).status == 400
        assert served.chat(headers=KEYED).status == 500
        assert "error" in served.chat(headers=KEYED, stream=True).events[-1]
        assert served.chat(headers=KEYED).status == 200


def test_answers_are_kept_for_a_while_and_within_a_bound() -> None:
    with serving(ScriptedEngine, idempotent_answer_s=0.2, idempotent_answer_bytes=1500) as served:
        first = served.chat(headers=KEYED)
        assert served.chat(headers=KEYED).body == first.body
        assert 500 < len(first.body) < 750
        for number in range(2):
            served.chat(headers={"Idempotency-Key": f"more-{number}"})
        assert served.chat(headers=KEYED).body != first.body  # the oldest went
        assert "idempotent-replayed" in served.chat(headers={"Idempotency-Key": "more-1"}).headers
        threading.Event().wait(0.25)
        assert "idempotent-replayed" not in served.chat(headers={"Idempotency-Key": "more-1"}).headers


def test_what_is_being_recorded_counts_too() -> None:
    """Of two answers that do not fit together, the one that would pass the bound is not kept, and the other is."""
    steps: dict[bytes, asyncio.Event] = {}
    computed: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        name = dict(scope["headers"])[b"idempotency-key"]
        computed.append(name)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in range(2):
            await steps[name].wait()
            steps[name].clear()
            await send({"type": "http.response.body", "body": bytes(600 * (1 - piece)), "more_body": piece == 0})

    async def scenario() -> None:
        guard = Idempotency(app, config.Server(idempotent_answer_bytes=1000))
        names = b"one", b"two"
        steps.update({name: asyncio.Event() for name in names})
        asked = [asyncio.create_task(ask(guard, name)) for name in names]
        for name in (*names, *names):
            steps[name].set()
            while steps[name].is_set():
                await asyncio.sleep(0)
            await asyncio.sleep(0)
        await asyncio.gather(*asked)
        await ask(guard, b"one")
        assert computed == [b"one", b"two"]
        again = asyncio.create_task(ask(guard, b"two"))
        steps[b"two"].set()
        while steps[b"two"].is_set():
            await asyncio.sleep(0)
        steps[b"two"].set()
        await again
        assert computed == [b"one", b"two", b"two"]

    asyncio.run(asyncio.wait_for(scenario(), 5))


@pytest.mark.parametrize(("much", "count", "most"), [(300, 20, 1000), (0, 5000, 1_000_000)])
async def test_nobody_pushes_out_what_another_keeps(much: int, count: int, most: int) -> None:
    """Not by bytes, and not by number."""
    computed: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        computed.append(dict(scope["headers"])[b"idempotency-key"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(much)})

    guard = Idempotency(app, config.Server(idempotent_answer_bytes=most))
    await ask(guard, b"mine", "little")
    for number in range(count):
        await ask(guard, b"%d" % number, "much")
    await ask(guard, b"mine", "little")
    await ask(guard, b"%d" % (count - 1), "much")
    assert len(computed) == 1 + count
    await ask(guard, b"0", "much")
    assert len(computed) == 2 + count, "nothing was forgotten"


async def ask(guard: Idempotency, name: bytes, caller: str = "key-1") -> None:
    """A request under that Idempotency-Key."""
    scope: Scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b"", "raw_path": PATH.encode()}
    scope["headers"] = [(b"idempotency-key", name)]
    exchange = Exchange(Trace("r", PATH), Match(), local=True, error_body=lambda _: b"", on_end=lambda _: None)
    exchange.caller = Caller(caller, b"", anonymous=False)
    exchange.bind(scope)
    await guard(scope, forever, swallow)


async def forever() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def swallow(message: Message) -> None:
    """A client that takes everything."""
