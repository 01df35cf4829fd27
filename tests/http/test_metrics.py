"""`/metrics`: what it counts is what clients saw, its labels are bounded, and whoever may not call cannot read it."""

from __future__ import annotations

import random
import shutil
import string
import subprocess
from collections import Counter

import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from ocserve import config
from ocserve.generation import GAP_BOUNDS_S, RequestRecord, Usage
from ocserve.telemetry import metrics
from ocserve.telemetry.metrics import Buckets, Meter
from ocserve.telemetry.readings import Reading
from tests.http.harness import CHAT, KEY, Served, serving
from tests.scripted import Script, ScriptedEngine

SEED = 28
Series = tuple[str, tuple[tuple[str, str], ...]]
RECORD = RequestRecord(
    request_id="r",
    route="/x",
    key_id="k",
    model=None,
    status=200,
    stream=False,
    usage=Usage(),
    finish_reason=None,
    error_code=None,
    queue_ms=None,
    ttft_ms=None,
    total_ms=1.0,
)
NOTHING = Reading(version="0", started=0.0, ready=True, active=0, resident_bytes=None, engines=())


def scrape(served: Served) -> dict[Series, float]:
    """Every sample by its name and labels; fails where the format is broken."""
    answer = served.request("GET", "/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }


def one(found: dict[Series, float], name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


def test_counts_are_those_of_the_answers() -> None:
    script = Script(prompt_tokens=9, cached_tokens=4, accepted_draft_tokens=2, rejected_draft_tokens=1)
    with serving(lambda: ScriptedEngine(script)) as served:
        usages = [served.chat().json["usage"] for _ in range(3)]
        served.chat(stream=True)
        served.chat(model="unknown")
        found = scrape(served)
    for kind, tokens in (
        ("prompt", sum(usage["prompt_tokens"] for usage in usages)),
        ("completion", sum(usage["completion_tokens"] for usage in usages)),
        ("cached", sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)),
        ("draft_accepted", 3 * 2),
        ("draft_rejected", 3),
    ):
        assert one(found, "ocserve_tokens_total", model="tiny", kind=kind) * 3 == tokens * 4
    chat = {"route": "/v1/chat/completions"}
    assert one(found, "ocserve_requests_total", **chat, status="2xx", finish_reason="stop") == 4
    assert one(found, "ocserve_requests_total", **chat, status="4xx", finish_reason="none") == 1
    assert one(found, "ocserve_errors_total", code="model_not_found") == 1
    assert one(found, "ocserve_cache_hits_total", model="tiny") == 4
    for name in ("queue", "prefill", "time_to_first_token", "decode", "request_duration"):
        assert one(found, f"ocserve_{name}_seconds_count", model="tiny") == 4
    assert one(found, "ocserve_inter_token_latency_seconds_count", model="tiny") == 4 * 3
    assert one(found, "ocserve_engine_steps_total", model="tiny") == 4 * 4
    assert one(found, "ocserve_model_loaded", model="tiny") == one(found, "ocserve_ready") == 1
    assert one(found, "ocserve_front_resident_memory_bytes") > 10e6


def test_times_are_those_that_passed() -> None:
    script = Script(prefill_s=0.06, step_s=0.03, tokens=("a",) * 6)
    with serving(lambda: ScriptedEngine(script)) as served:
        served.chat(stream=True)
        found = scrape(served)
    # A busy machine may tell of the slot, or of a token, a moment late: what follows is then shorter by it.
    assert 0.06 < one(found, "ocserve_prefill_seconds_sum", model="tiny") < 0.5
    assert 4 * 0.03 <= one(found, "ocserve_inter_token_latency_seconds_sum", model="tiny") < 1
    assert one(found, "ocserve_inter_token_latency_seconds_bucket", model="tiny", le="0.02") == 0
    first = one(found, "ocserve_time_to_first_token_seconds_sum", model="tiny")
    decode = one(found, "ocserve_decode_seconds_sum", model="tiny")
    assert first + decode == pytest.approx(one(found, "ocserve_request_duration_seconds_sum", model="tiny"))


def test_refusals_are_counted_by_the_limit_that_refused() -> None:
    slow = Script(tokens=("x",) * 100, step_s=0.01)
    for limits, name in (
        (config.Limits(requests_per_minute=1), "requests_per_minute"),
        (config.Limits(tokens_per_minute=270), "tokens_per_minute"),
    ):
        with serving(limits=limits) as served:
            assert [served.chat().status for _ in range(2)] == [200, 429]
            assert one(scrape(served), "ocserve_limit_refusals_total", limit=name) == 1
    with serving(lambda: ScriptedEngine(slow), limits=config.Limits(concurrent_requests=1)) as served:
        with served.connect() as peer:
            peer.sendall(served.compose("POST", "/v1/chat/completions", {**CHAT, "stream": True}))
            assert peer.recv(100)
            assert served.chat().status == 429
        assert one(scrape(served), "ocserve_limit_refusals_total", limit="concurrent_requests") == 1
    with serving(lambda: ScriptedEngine(slow), limits=config.Limits(queue=0)) as served:
        with served.connect() as peer:
            peer.sendall(served.compose("POST", "/v1/chat/completions", {**CHAT, "stream": True, "n": 8}))
            assert peer.recv(100)
            assert served.chat().status == 429
        assert one(scrape(served), "ocserve_limit_refusals_total", limit="capacity") == 1


def test_whoever_may_not_call_cannot_read_it() -> None:
    with serving(key=KEY, public_hosts=("models.example",)) as served:
        assert served.request("GET", "/metrics").status == 401
        assert served.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"}).status == 200
    with serving(key=KEY, auth=config.Auth(anonymous=False)) as served:
        assert served.request("GET", "/metrics").status == 401
    with serving(key=KEY) as served:
        assert served.request("GET", "/metrics").status == 200
        assert served.request("GET", "/metrics", headers={"Host": "evil.example"}).status == 421
        assert served.request("GET", "/metrics", headers={"Origin": "https://evil.example"}).status == 403


def test_no_request_can_make_a_series(full: bool) -> None:
    """P28: random routes, models, headers and bodies."""
    dice = random.Random(SEED)
    count = 10_000 if full else 300

    def word() -> str:
        return "".join(dice.choices(string.ascii_letters + string.digits + "-_.:\u00e9", k=dice.randint(1, 40)))

    def send(served: Served) -> int:
        headers = [(f"X-{dice.randrange(10**9)}", word()), ("X-Request-Id", word()), ("User-Agent", word())]
        kind = dice.randrange(4)
        if kind == 0:
            return served.request("GET", f"/{dice.randrange(10**9)}", headers=headers).status
        if kind == 1:
            return served.request("GET", f"/v1/models/{dice.randrange(10**9)}", headers=headers).status
        fields = {"model": word()} if kind == 2 else {word(): word(), "user": word()}
        return served.request("POST", "/v1/chat/completions", {**CHAT, **fields}, headers).status

    with serving() as served:
        served.chat()
        served.chat(n="x")  # a random name may be this one
        for _ in range(60):
            send(served)
        scrape(served)  # which is a request too
        before = scrape(served)
        statuses = Counter(send(served) for _ in range(count))
        after = scrape(served)
    assert set(statuses) <= {200, 400, 404}, statuses
    assert set(after) == set(before)
    requests = sum(value for (name, _), value in after.items() if name == "ocserve_requests_total")
    assert requests == 2 + 60 + 2 + count
    print(f"{count} random requests (seed {SEED}): {len(after)} series before and after")


def test_of_a_model_that_has_gone_nothing_is_left() -> None:
    models = {"tiny", "later"}
    meter = Meter(lambda: NOTHING, routes={"/x"}, models=models)
    for model in ("tiny", "later"):
        meter.observe(replace(RECORD, model=model, usage=Usage(prompt_tokens=1)))

    def labelled() -> set[str]:
        series = (family for family in meter.families() if family.definition.labels[:1] == ("model",))
        return {labels[0] for family in series for labels, _ in family.samples}

    assert labelled() == {"tiny", "later"}
    models.remove("later")
    meter.observe(
        replace(RECORD, model="later", usage=Usage(prompt_tokens=1))
    )  # one that ran to its end after it had gone
    assert labelled() == {"tiny", "other"}


def test_what_is_on_no_list_counts_as_other() -> None:
    meter = Meter(lambda: NOTHING, routes={"/x"}, models={"tiny"})
    for number in range(1000):
        strange = f"strange-{number}"
        meter.observe(
            replace(
                RECORD,
                route=strange,
                model=strange,
                finish_reason=strange,
                error_code=strange,
                limit=strange,
                usage=Usage(prompt_tokens=1, completion_tokens=1),
                queue_ms=1.0,
                ttft_ms=2.0,
                token_gaps=(1,) * (len(GAP_BOUNDS_S) + 1),
                token_gaps_s=1.0,
            )
        )
    samples = {family.definition.name: family.samples for family in meter.families()}
    assert [labels for labels, _ in samples["ocserve_requests"]] == [("other", "2xx", "other")]
    assert len(samples["ocserve_errors"]) == 129
    assert [labels for labels, _ in samples["ocserve_limit_refusals"]] == [("other",)]
    ((labels, buckets),) = samples["ocserve_inter_token_latency_seconds"]
    assert labels == ("other",)
    assert isinstance(buckets, Buckets)
    assert buckets.counts[-1] == 1000 * (len(GAP_BOUNDS_S) + 1)
    assert buckets.total == 1000


def test_the_lists_are_those_of_the_code() -> None:
    limits = {*config.Allowance.__struct_fields__, "capacity", "balance", "spend_cap"}
    assert limits == metrics._LIMITS


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian package prometheus) is not installed")
def test_promtool_finds_nothing_to_say() -> None:
    with serving(limits=config.Limits(requests_per_minute=2)) as served:
        for _ in range(3):
            served.chat()
        body = served.request("GET", "/metrics").body
    checked = subprocess.run(["promtool", "check", "metrics"], input=body, capture_output=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
