"""Each probe passes on a provider that does everything right and fails on one with the fault it looks for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from ocserve.audit import session
from ocserve.audit.probes import PROBES, edges
from ocserve.audit.probes.documents import PAGES
from ocserve.audit.session import Order
from ocserve.audit.verdict import Verdict
from tests.audit.faults import (
    FAULTS,
    VISION_FAULTS,
    body,
    both,
    chat,
    entry,
    header,
    hidden,
    put,
    status,
)
from tests.audit.provider import KEY, MODEL, Fault, Provider, running

# What one server cannot show: TLS on loopback, a server error without a fault, a remote image.
NEVER_HERE = {"https", "error-server", "image-url"}
# Of two things that may be published the provider publishes the other one.
OTHERWISE = {"trains-on-prompts", "trains-on-answers", "spares-cancelled", "charges-failed"}
# Their faults show only after another probe has met them.
AFTER = {"error-none-of-ours": ("error-json",), "error-server": ("error-json",)}


@pytest.fixture(scope="module")
def provider() -> Iterator[tuple[Provider, str]]:
    served = Provider()
    with running(served) as url:
        yield served, url


def audited(url: str, *only: str, quick: bool = False, named: bool = False) -> dict[str, Verdict]:
    """The verdicts; `named`: the operator's pages lie elsewhere, and their address is given."""
    order = Order(
        url=url,
        key=KEY,
        model=MODEL,
        only=only,
        quick=quick,
        pages={kind: url.removesuffix("/v1") + "/page" for kind in PAGES} if named else {},
    )
    report = asyncio.run(session.audit(order, lambda subject, verdicts: {}, lambda verdict: None))
    return {verdict.probe: verdict for verdict in report.probes}


def use(provider: Provider, fault: Fault, *, vision: bool = False, remaining: int = 100_000) -> None:
    provider.fault, provider.vision, provider.remaining, provider.limit = fault, vision, remaining, remaining
    provider.tokens, provider.used, provider.concurrent, provider.refused = 1_000_000, 0, None, False


def test_a_right_provider_passes_every_probe(provider: tuple[Provider, str]) -> None:
    served, url = provider
    use(served, Fault())
    verdicts = audited(url)
    expected = {**dict.fromkeys(VISION_FAULTS, "not_provable"), **dict.fromkeys(NEVER_HERE, "not_provable")}
    expected["limit-enforced"] = "not_provable"  # its limit is too large to reach
    expected |= dict.fromkeys(OTHERWISE, "operator")
    wrong = {name: each for name, each in verdicts.items() if each.status != expected.get(name, "pass")}
    assert wrong == {}
    assert all(verdict.evidence for verdict in verdicts.values())
    assert all(verdict.requests for name, verdict in verdicts.items() if name in {"chat-whole", "seed", "overload"})


def test_a_right_provider_of_images_passes_theirs(provider: tuple[Provider, str]) -> None:
    served, url = provider
    use(served, Fault(), vision=True)
    verdicts = audited(url, *VISION_FAULTS, "error-images")
    statuses = {name: verdicts[name].status for name in (*VISION_FAULTS, "error-images")}
    expected = {**dict.fromkeys(VISION_FAULTS, "pass"), "image-url": "not_provable", "error-images": "not_provable"}
    assert statuses == expected


def test_a_limit_that_can_be_reached_is_reached(provider: tuple[Provider, str]) -> None:
    served, url = provider
    use(served, Fault(), remaining=20)
    assert audited(url, "limit-enforced")["limit-enforced"].status == "pass"
    use(served, Fault(words=frozenset({"never again"})), remaining=20)
    verdict = audited(url, "limit-enforced")["limit-enforced"]
    assert (verdict.status, "refused again" in verdict.evidence) == ("fail", True)
    use(served, Fault(words=frozenset({"no limit"})), remaining=20)
    assert audited(url, "limit-enforced")["limit-enforced"].status == "fail"
    served.limit = 60_000_000  # so many a minute that none is ever missing
    verdict = audited(url, "limit-enforced")["limit-enforced"]
    assert (verdict.status, "refills faster" in verdict.evidence) == ("not_provable", True)


def test_a_named_page_is_read_in_place_of_ours(provider: tuple[Provider, str]) -> None:
    served, url = provider
    use(served, Fault())
    kinds = [f"page-{kind}" for kind in PAGES]
    verdicts = audited(url, *kinds, named=True)
    assert [verdicts[kind].status for kind in kinds] == ["pass"] * len(kinds)
    assert all("/page is there" in verdicts[kind].evidence for kind in kinds)


def test_a_limit_on_requests_at_once_is_held_to_what_is_published(provider: tuple[Provider, str]) -> None:
    served, url = provider
    for most, word, expected, evidence in (
        (3, "", "pass", "others refused"),
        (3, "no queue limit", "fail", "10 were served"),
        (1000, "", "not_provable", "more than this audit sends"),
        (None, "", "pass", "unlimited"),
    ):
        use(served, Fault(words=frozenset({word})))
        served.concurrent = most
        verdict = audited(url, "concurrent-limit")["concurrent-limit"]
        assert (verdict.status, evidence in verdict.evidence) == (expected, True), verdict
    use(served, hidden("/limits"))
    assert audited(url, "concurrent-limit")["concurrent-limit"].status == "operator"


def test_a_request_beyond_the_limit_on_tokens_is_refused(provider: tuple[Provider, str]) -> None:
    served, url = provider
    for word, expected in (("", "pass"), ("no limit", "fail")):
        use(served, Fault(words=frozenset({word})))
        served.tokens = 5000
        verdict = audited(url, "token-limit-enforced")["token-limit-enforced"]
        assert verdict.status == expected, verdict
    use(served, header("x-ratelimit-remaining-tokens", "1000000"))
    verdict = audited(url, "token-limit-enforced")["token-limit-enforced"]
    assert (verdict.status, "refill faster" in verdict.evidence) == ("not_provable", True)
    use(served, both(header("x-ratelimit-limit-tokens", ""), hidden("/limits")))
    assert audited(url, "token-limit-enforced")["token-limit-enforced"].status == "not_provable"


def test_of_two_policies_the_published_one_is_ticked(provider: tuple[Provider, str]) -> None:
    served, url = provider
    use(
        served,
        both(
            body("/privacy", put("training_on_prompts", value=True)),
            body("/privacy", put("training_on_completions", value=True)),
            body("/pricing", put("policy", value={"cancelled": "free", "failed": "used"})),
        ),
    )
    verdicts = audited(url, *OTHERWISE)
    assert {name: verdicts[name].status for name in OTHERWISE} == dict.fromkeys(OTHERWISE, "pass")


def test_what_nobody_asked_for_is_no_fault(provider: tuple[Provider, str]) -> None:
    """A server without figures for this key, without Idempotency-Key and without prices is none the worse."""
    served, url = provider
    anew = iter(range(10**6))
    use(
        served,
        both(
            Fault(answer=lambda path, fields, given: (given[0], {}, given[2])),
            chat(put("id", value=lambda old: f"{old}-{next(anew)}")),
            hidden("/metrics"),
            entry(put("pricing", value={"prompt": "0", "completion": "0"})),
        ),
    )
    verdicts = audited(url, "metrics", "idempotency", "cost-exact")
    found = {name: verdicts[name].status for name in ("metrics", "idempotency", "cost-exact")}
    assert found == {"metrics": "not_provable", "idempotency": "pass", "cost-exact": "not_provable"}


CASES = [
    pytest.param(name, fault, vision, id=f"{name}-{number}")
    for table, vision in ((FAULTS, False), (VISION_FAULTS, True))
    for name, faults in table.items()
    for number, fault in enumerate(faults)
]


@pytest.mark.parametrize(("name", "fault", "vision"), CASES)
def test_the_fault_is_found(
    provider: tuple[Provider, str], name: str, fault: Fault, vision: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, url = provider
    monkeypatch.setattr(edges, "_LONG", 1000)  # a right provider shows the whole figures
    monkeypatch.setattr(edges, "_LEFT_BEHIND", 1024)
    use(served, fault, vision=vision)
    if name == "error-server":  # a server that fails, and says so in a form of its own
        inner = fault.answer
        served.fault = Fault(
            answer=lambda path, fields, given: inner(path, fields, (500, *given[1:]) if given[0] == 400 else given)
        )
    verdict = audited(url, *AFTER.get(name, ()), name, named=name.startswith("page-"))[name]
    assert verdict.status in ("fail", "operator"), verdict
    assert verdict.evidence


def test_the_long_stream_of_a_model_without_conversations_is_a_completion(provider: tuple[Provider, str]) -> None:
    served, url = provider
    use(served, status(200, 400, "/chat/completions"))
    verdict = audited(url, "long-stream")["long-stream"]
    assert (verdict.status, verdict.evidence.startswith("10000 tokens")) == ("pass", True), verdict


def test_limits_that_are_met_and_not_announced_are_found(provider: tuple[Provider, str]) -> None:
    served, url = provider
    hidden = Fault(
        answer=lambda path, fields, given: (
            given[0],
            {name: value for name, value in given[1].items() if "ratelimit" not in name},
            given[2],
        )
    )
    use(served, hidden)
    assert audited(url, "limit-headers")["limit-headers"].status == "not_provable"
    use(served, hidden, remaining=100)
    assert audited(url, "overload", "limit-headers")["limit-headers"].status == "fail"


def test_every_probe_has_a_fault_that_it_must_find() -> None:
    elsewhere = {"limit-enforced", "concurrent-limit", "https", "versioning"}  # in tests of their own
    assert PROBES.keys() - FAULTS.keys() - VISION_FAULTS.keys() == elsewhere
