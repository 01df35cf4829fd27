"""Prepaid keys and spend caps over HTTP: what is credited, what is refused and how, and that nothing is overspent."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import ollama
import openai
import pytest
from google import genai
from google.genai import types
from msgspec.structs import replace

from ocserve import config
from ocserve.accounts.balances import month_end, month_of
from ocserve.accounts.billing import Billing
from ocserve.accounts.keystore import KeyStore
from ocserve.accounts.ledger import Ledger
from ocserve.accounts.ledger_schema import now_us
from ocserve.accounts.pricing import PICODOLLARS, Tariff, amount, dollars
from ocserve.modelcard import ServedModel
from tests.accounts.books import COMPLETION, PROMPT, REQUEST, TODAY, priced, rows
from tests.http.harness import CHAT, MODEL, Answer, Served, serving, wait_for
from tests.scripted import Script, ScriptedEngine

WORDS = tuple(f"w{number} " for number in range(40))
# A request for so many tokens costs at most this much; prompts have seven tokens.
FIXED = REQUEST + 7 * PROMPT
MOST_OF_TEN = FIXED + 10 * COMPLETION


@dataclass
class Shop:
    """A server that charges, with the keys of an administrator and of two customers."""

    served: Served
    store: KeyStore
    file: Path
    admin: str
    prepaid: str
    capped: str

    def credit(self, name: str, body: Any, **headers: str) -> Answer:
        given = {"x-api-key": self.admin, **{key.replace("_", "-"): value for key, value in headers.items()}}
        return self.served.request("POST", f"/admin/keys/{name}/credit", body, given)

    def balance(self, name: str) -> Any:
        return self.served.request("GET", f"/admin/keys/{name}/balance", None, {"x-api-key": self.admin}).json

    def chat(self, key: str, **fields: Any) -> Answer:
        return self.served.chat(headers={"x-api-key": key}, **fields)


@contextmanager
def shop(
    folder: Path, script: Script | None = None, *, tariff: Tariff | None = None, model: ServedModel = MODEL
) -> Iterator[Shop]:
    store = KeyStore(folder / "keys.json")
    made = {"admin": "", "prepaid": "", "capped": ""}
    known = {key.name for key in store.listed()}
    for name, facts in (
        ("admin", {"scope": "admin"}),
        ("prepaid", {"prepaid": True}),
        ("capped", {"spend_cap": dollars(2 * MOST_OF_TEN)}),
    ):
        made[name] = (store.rotate(name, 0) if name in known else store.create(name, **facts))[1]
    ledger = Ledger(folder / "ledger.db", retention_days=30)
    billing = Billing(config.Billing(), tariff or priced(), ledger, today=lambda: TODAY, keys=store)
    engine = ScriptedEngine(script or Script(tokens=WORDS))
    limits = config.Limits(requests_per_minute=1000, tokens_per_minute=100_000)
    try:
        with serving(lambda: engine, store=store, billing=billing, limits=limits, model=model) as served:
            yield Shop(served, store, folder / "ledger.db", **made)
    finally:
        ledger.close()


def test_what_is_credited_may_be_spent_and_no_more(tmp_path: Path) -> None:
    with shop(tmp_path) as open_shop:
        refused = open_shop.chat(open_shop.prepaid, max_tokens=10)
        assert (refused.status, refused.error["type"], refused.error["code"]) == (
            429,
            "insufficient_quota",
            "insufficient_quota",
        )
        assert refused.headers["x-should-retry"] == "false"
        assert "retry-after" not in refused.headers
        assert "balance is 0.00 US dollars" in refused.error["message"]
        assert "so 0.00 is left" in refused.error["message"]
        least = dollars(REQUEST + PROMPT + COMPLETION)
        assert f"one token in and one out may cost {least} US dollars" in refused.error["message"]
        assert "can credit the key" in refused.error["message"]
        assert open_shop.served.engine.runs == {}, "nothing is computed for a key that has nothing"
        made = open_shop.credit("prepaid", {"amount": dollars(MOST_OF_TEN + 1), "note": "invoice 7"})
        assert made.status == 200, made.body
        assert (made.json["balance"], made.json["note"]) == (dollars(MOST_OF_TEN + 1), "invoice 7")
        listed = open_shop.served.request("GET", "/v1/models", None, {"x-api-key": open_shop.prepaid})
        assert listed.headers["x-balance-remaining"] == dollars(MOST_OF_TEN + 1)
        answer = open_shop.chat(open_shop.prepaid, max_tokens=10)
        assert answer.status == 200
        assert answer.headers["x-balance-remaining"] == "0.000000000001"  # the rest is held while it runs
        assert answer.json["usage"]["cost"] == MOST_OF_TEN / PICODOLLARS
        late = open_shop.chat(open_shop.prepaid, max_tokens=10)
        assert late.status == 429
        assert "balance is 0.000000000001 US dollars" in late.error["message"]
        found = open_shop.balance("prepaid")
        assert (found["balance"], found["held"], found["charged"]) == ("0.000000000001", "0.00", dollars(MOST_OF_TEN))
        assert found["month"]["charged"] == dollars(MOST_OF_TEN)
        assert [row.outcome for row in rows(open_shop.file)] == ["completed"], "what is refused is in no ledger"
        assert "x-balance-remaining" not in open_shop.chat(open_shop.capped, max_tokens=1).headers


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_left_is_told_after_the_cost_that_a_whole_answer_states(tmp_path: Path, stream: bool) -> None:
    """A stream's headers leave before it is known; then the most that it can cost is held."""
    with shop(tmp_path) as open_shop:
        open_shop.credit("prepaid", {"amount": "1"})
        answer = open_shop.chat(open_shop.prepaid, max_tokens=3000, stream=stream)
        left = amount("1") - FIXED - (3000 if stream else 40) * COMPLETION
        assert answer.headers["x-balance-remaining"] == dollars(left)
        if not stream:
            assert answer.json["usage"]["cost"] == (amount("1") - left) / PICODOLLARS
            assert open_shop.balance("prepaid")["balance"] == dollars(left)


def test_a_key_that_is_not_prepaid_has_no_balance(tmp_path: Path) -> None:
    with shop(tmp_path) as open_shop:
        assert open_shop.chat(open_shop.capped, max_tokens=10).status == 200
        found = open_shop.balance("capped")
        assert (found["balance"], found["available"], found["charged"]) == (None, None, dollars(MOST_OF_TEN))


def test_a_refusal_says_with_how_many_tokens_it_would_pass(tmp_path: Path) -> None:
    with shop(tmp_path) as open_shop:
        open_shop.credit("prepaid", {"amount": dollars(FIXED + 25 * COMPLETION)})
        refused = open_shop.chat(open_shop.prepaid, max_tokens=30)
        assert f"may cost up to {dollars(FIXED + 30 * COMPLETION)}" in refused.error["message"]
        assert "With at most 25 tokens in each answer" in refused.error["message"]
        assert refused.error["param"] == "max_tokens"
        both = open_shop.chat(open_shop.prepaid, max_tokens=30, n=2)
        assert "With at most 12 tokens in each answer" in both.error["message"]
        assert open_shop.chat(open_shop.prepaid, max_tokens=25).status == 200


def test_a_refusal_takes_nothing_of_any_limit(tmp_path: Path) -> None:
    model = replace(MODEL, capabilities=("chat", "embedding"))
    with shop(tmp_path, model=model) as open_shop:
        open_shop.credit("prepaid", {"amount": dollars(FIXED)})
        refused = [
            open_shop.chat(open_shop.prepaid, max_tokens=10),
            open_shop.served.request(
                "POST", "/v1/embeddings", {"model": "tiny", "input": "long " * 9}, {"x-api-key": open_shop.prepaid}
            ),
        ]
        for answer in refused:
            assert answer.error["code"] == "insufficient_quota"
            assert answer.headers["x-ratelimit-remaining-requests"] == "1000"
            assert answer.headers["x-ratelimit-remaining-tokens"] == "100000"


def test_an_answer_that_is_given_again_says_what_is_left_now(tmp_path: Path) -> None:
    with shop(tmp_path) as open_shop:
        open_shop.credit("prepaid", {"amount": "1"})
        given = {"x-api-key": open_shop.prepaid, "Idempotency-Key": "again"}
        first = open_shop.served.chat(headers=given, max_tokens=10)
        assert open_shop.chat(open_shop.prepaid, max_tokens=20).status == 200
        again = open_shop.served.chat(headers=given, max_tokens=10)
        assert again.headers["idempotent-replayed"] == "true"
        left = PICODOLLARS - MOST_OF_TEN
        assert first.headers["x-balance-remaining"] == dollars(left)
        assert again.headers["x-balance-remaining"] == dollars(left - FIXED - 20 * COMPLETION)


def test_a_cap_is_of_a_month_and_can_be_changed(tmp_path: Path) -> None:
    with shop(tmp_path) as open_shop:
        assert [open_shop.chat(open_shop.capped, max_tokens=10).status for _ in range(3)] == [200, 200, 429]
        refused = open_shop.chat(open_shop.capped, max_tokens=10)
        ends = f"{month_end(month_of(now_us())):%Y-%m-%dT%H:%M:%SZ}"
        assert f"{dollars(2 * MOST_OF_TEN)} US dollars in a calendar month" in refused.error["message"]
        assert f"The month ends at {ends}" in refused.error["message"]
        open_shop.store.cap("capped", "25.00")
        assert open_shop.chat(open_shop.capped, max_tokens=10).status == 200
        assert open_shop.balance("capped")["spend_cap"] == "25.00"
        open_shop.store.cap("capped", None)
        assert open_shop.chat(open_shop.capped, max_tokens=10).status == 200


def test_nothing_is_overspent_however_many_ask_at_once(tmp_path: Path) -> None:
    """Forty requests at once, some of which stop early or are given up, for a balance and a cap of a few of them."""
    scripts = Script(tokens=WORDS[:20], step_s=0.001)
    with shop(tmp_path, scripts) as open_shop:
        open_shop.credit("prepaid", {"amount": dollars(7 * (FIXED + 30 * COMPLETION))})
        open_shop.store.cap("prepaid", dollars(6 * (FIXED + 30 * COMPLETION)))
        answers: list[Answer] = []

        def ask(number: int) -> None:
            given = {"max_tokens": 30, "stream": number % 2 == 0}
            if number % 5 == 0:  # somebody who leaves
                with open_shop.served.connect() as peer:
                    body = {**CHAT, **given, "stream": True}
                    request = open_shop.served.compose(
                        "POST", "/v1/chat/completions", body, {"x-api-key": open_shop.prepaid}
                    )
                    peer.sendall(request)
                    peer.recv(300)
                return
            answers.append(open_shop.chat(open_shop.prepaid, **given))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            now = open_shop.balance("prepaid")
            assert amount(now["available"]) >= 0
            assert amount(now["month"]["charged"]) + amount(now["month"]["held"]) <= amount(now["spend_cap"])
        wait_for(lambda: not open_shop.served.service.active)
        statuses = {answer.status for answer in answers}
        assert statuses == {200, 429}
        assert all(a.error["code"] == "insufficient_quota" for a in answers if a.status == 429)
        now = open_shop.balance("prepaid")
        charged = sum(row.cost for row in rows(open_shop.file))
    assert (amount(now["charged"]), now["held"]) == (charged, "0.00")
    assert amount(now["balance"]) == 7 * (FIXED + 30 * COMPLETION) - charged >= 0


def test_what_fails_or_is_given_up_holds_nothing(tmp_path: Path) -> None:
    with shop(tmp_path, Script(tokens=WORDS, crash_at=3)) as open_shop:
        open_shop.credit("prepaid", {"amount": "1"})
        assert open_shop.chat(open_shop.prepaid, max_tokens=10).status == 500
        found = open_shop.balance("prepaid")
        assert (found["balance"], found["held"]) == ("1.00", "0.00")
        assert open_shop.chat(open_shop.prepaid, max_tokens=10, temperature=9).status == 400
        assert open_shop.balance("prepaid") == found


def test_a_credit_is_made_once_even_after_a_restart(tmp_path: Path) -> None:
    body = {"amount": "10.00", "note": "invoice 7"}
    with shop(tmp_path) as open_shop:
        made = open_shop.credit("prepaid", body, Idempotency_Key="a")
        assert made.json["balance"] == "10.00"
        assert open_shop.credit("prepaid", body, Idempotency_Key="a").json == made.json
    with shop(tmp_path) as open_shop:
        again = open_shop.credit("prepaid", body, Idempotency_Key="a")
        assert "idempotent-replayed" not in again.headers  # this server has not seen it
        assert again.json == made.json
        other = open_shop.credit("prepaid", {**body, "amount": "11"}, Idempotency_Key="b")
        assert other.json["balance"] == "21.00"
        reused = open_shop.credit("capped", {**body}, Idempotency_Key="b")
        assert (reused.status, reused.error["code"]) == (422, "idempotency_key_reused")
    with shop(tmp_path) as open_shop:
        reused = open_shop.credit("prepaid", {**body, "amount": "12"}, Idempotency_Key="b")
        assert (reused.status, reused.error["code"]) == (422, "idempotency_key_reused")
        assert open_shop.balance("prepaid")["balance"] == "21.00"


def test_credits_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    senseless: list[tuple[Any, str]] = [
        ({"amount": 10}, "string"),
        ({"amount": "ten"}, "US dollars"),
        ({"amount": "0.0000000000001"}, "twelve decimals"),
        ({"amount": "0"}, "nothing"),
        ({"amount": "-1"}, "correction"),
        ({"amount": "1", "correction": True}, "less than nothing"),
        ({"amount": "-1", "correction": True}, "at most 0.00 can be taken back"),
        ({}, "amount"),
        ({"amount": "1", "currency": "EUR"}, "currency"),
    ]
    with shop(tmp_path) as open_shop:
        for body, word in senseless:
            refused = open_shop.credit("prepaid", body)
            assert refused.status == 400
            assert word in refused.error["message"], body
        assert open_shop.balance("prepaid")["credited"] == "0.00"


def test_only_administrators_see_and_change_balances(tmp_path: Path) -> None:
    with shop(tmp_path) as open_shop:
        given = {"x-api-key": open_shop.prepaid}
        mine = open_shop.served.request("POST", "/admin/keys/prepaid/credit", {"amount": "5"}, given)
        assert (mine.status, mine.error["code"]) == (403, "admin_scope_needed")
        assert open_shop.served.request("GET", "/admin/keys/prepaid/balance", None, given).status == 403
        unknown = open_shop.credit("nobody", {"amount": "5"})
        assert (unknown.status, unknown.error["code"]) == (404, "key_not_found")
        corrected = (
            open_shop.credit("prepaid", {"amount": "5"}).status,
            open_shop.credit("prepaid", {"amount": "-2.5", "correction": True}).json["balance"],
        )
        assert corrected == (200, "2.50")


def test_without_a_ledger_a_bounded_key_is_refused_and_not_trusted(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.json")
    _, text = store.create("prepaid", prepaid=True)
    with serving(store=store, billing=Billing(tariff=priced(), keys=store)) as served:
        refused = served.chat(headers={"x-api-key": text})
    assert (refused.status, refused.error["code"]) == (503, "ledger_unavailable")
    assert "keeps no ledger" in refused.error["message"]


def test_the_usual_clients_do_not_try_again(tmp_path: Path) -> None:
    with shop(tmp_path) as open_shop:
        url, key = open_shop.served.url, open_shop.prepaid
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=3) as ours,
            pytest.raises(openai.RateLimitError) as refused,
        ):
            ours.chat.completions.create(model="tiny", messages=CHAT["messages"])
        assert refused.value.code == "insufficient_quota"
        with (
            anthropic.Anthropic(base_url=url, api_key=key, max_retries=3) as theirs,
            pytest.raises(anthropic.RateLimitError) as billing,
        ):
            theirs.messages.create(model="tiny", max_tokens=5, messages=CHAT["messages"])
        assert json.loads(billing.value.response.content)["error"]["type"] == "billing_error"
        for error in (refused.value, billing.value):
            assert error.request.headers["x-stainless-retry-count"] == "0"


def test_vectors_and_rankings_hold_what_their_bytes_may_cost(tmp_path: Path) -> None:
    model = replace(MODEL, capabilities=("chat", "embedding", "rerank"), context_length=100)
    with shop(tmp_path, model=model) as open_shop:
        open_shop.credit("prepaid", {"amount": dollars(REQUEST + 32 * PROMPT)})
        given = {"x-api-key": open_shop.prepaid}
        long = open_shop.served.request("POST", "/v1/embeddings", {"model": "tiny", "input": "four "}, given)
        assert long.status == 429
        assert "would pass" not in long.error["message"]
        answer = open_shop.served.request("POST", "/v1/embeddings", {"model": "tiny", "input": "four"}, given)
        left = dollars(28 * PROMPT)  # 32 were held
        assert (answer.status, answer.headers["x-balance-remaining"]) == (200, left)
        open_shop.credit("prepaid", {"amount": "1"})
        ranking = {"model": "tiny", "query": "q", "documents": ["a", "bc"]}
        ranked = open_shop.served.request("POST", "/v1/rerank", ranking, given)
        assert ranked.json["usage"]["cost"] == (REQUEST + 3 * PROMPT) / PICODOLLARS


def test_the_usual_clients_read_answers_that_say_their_cost(tmp_path: Path) -> None:
    with shop(tmp_path) as open_shop, ExitStack() as open_clients:
        url, key = open_shop.served.url, open_shop.admin
        ours = open_clients.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key=key))
        made = ours.responses.create(model="tiny", input="Hi", max_output_tokens=16)
        assert made.usage is not None
        assert (made.usage.model_extra or {})["cost"] == (FIXED + 16 * COMPLETION) / PICODOLLARS
        theirs = open_clients.enter_context(anthropic.Anthropic(base_url=url, api_key=key))
        message = theirs.messages.create(model="tiny", max_tokens=5, messages=CHAT["messages"])
        assert (message.usage.model_extra or {})["cost"] == (FIXED + 5 * COMPLETION) / PICODOLLARS
        third = open_clients.enter_context(
            closing(genai.Client(api_key=key, http_options=types.HttpOptions(base_url=url)))
        )
        short = types.GenerateContentConfig(max_output_tokens=5)
        told = third.models.generate_content(model="tiny", contents="Hi", config=short)
        *_, last = third.models.generate_content_stream(model="tiny", contents="Hi", config=short)
        for counted in (told.usage_metadata, last.usage_metadata):
            assert counted is not None
            assert counted.candidates_token_count == 5
        local = ollama.Client(url, headers={"x-api-key": key})
        open_clients.enter_context(closing(local._client))
        assert local.generate("tiny", "Hi", options={"num_predict": 5}).eval_count == 5


TIERS = """
[[price]]
model = "tiny"
prompt = "0.00000002"
completion = "0.00000006"
request = "0.000001"

[[price.tier]]
above = 34
completion = "0.00000003"

[[price.tier]]
above = 51
prompt = "0.00000001"
"""


def test_whoever_uses_much_in_a_month_pays_less(tmp_path: Path) -> None:
    """Each request has 7 tokens of prompt and 10 of completion: the third is the first of the first tier."""
    with shop(tmp_path, tariff=priced(text=TIERS)) as open_shop:
        for _ in range(4):
            assert open_shop.chat(open_shop.admin, max_tokens=10).status == 200
    with shop(tmp_path, tariff=priced(text=TIERS)) as open_shop:  # it is known after a restart
        assert open_shop.chat(open_shop.admin, max_tokens=10).status == 200
        assert open_shop.chat(open_shop.capped, max_tokens=10).status == 200  # of this key
        model = open_shop.served.request("GET", "/v1/models", None, {"x-api-key": open_shop.admin}).json["data"][0]
        policy = open_shop.served.request("GET", "/openapi.json").json["info"]["description"]
        found = rows(open_shop.file)
    assert [(row.tier, row.price_prompt, row.price_completion) for row in found] == [
        (0, 20_000, 60_000),
        (0, 20_000, 60_000),
        (34, 20_000, 30_000),
        (51, 10_000, 30_000),
        (51, 10_000, 30_000),
        (0, 20_000, 60_000),
    ]
    assert [row.cost for row in found][2:4] == [REQUEST + 7 * 20_000 + 10 * 30_000, REQUEST + 7 * 10_000 + 10 * 30_000]
    assert model["pricing"]["completion"] == "0.00000006"
    tiers = [(each["above"], each["pricing"]) for each in model["pricing_tiers"]]
    assert [(above, prices["prompt"], prices["completion"]) for above, prices in tiers] == [
        (34, "0.00000002", "0.00000003"),
        (51, "0.00000001", "0.00000003"),
    ]
    assert "Where a model has tiers" in policy
