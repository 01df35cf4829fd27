"""What is said of items follows from what was found of probes; nothing is skipped silently."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Literal

import pytest

from ocserve import config
from ocserve.audit import checklist, page, session
from ocserve.audit.drafts import draft
from ocserve.audit.probes import PROBES, documents
from ocserve.audit.server import Server
from ocserve.audit.session import Order, Report
from ocserve.audit.subject import Subject
from ocserve.audit.verdict import Fault as Failed
from ocserve.audit.verdict import Status, Unproven, Verdict
from tests.audit.faults import body, both, chat, entry, hidden, put, status, without, words
from tests.audit.provider import KEY, MODEL, Fault, Provider, running


@pytest.fixture(scope="module")
def provider() -> Iterator[tuple[Provider, str]]:
    served = Provider()
    with running(served) as url:
        yield served, url


def report(url: str, *only: str, settings: config.Config | None = None, key: str | None = KEY) -> Report:
    order = Order(url=url, key=key, only=only)
    return asyncio.run(
        session.audit(order, lambda subject, verdicts: draft(subject, verdicts, settings), lambda verdict: None)
    )


def test_every_item_has_a_status_and_evidence(provider: tuple[Provider, str]) -> None:
    served, url = provider
    served.fault = Fault()
    found = report(url, "chat-whole", "stream-sse")
    assert [item.id for item in found.items] == [item.id for item in checklist.items()]
    assert all(item.evidence for item in found.items)
    assert {verdict.probe for verdict in found.probes} == PROBES.keys()
    statuses = {item.id: item.status for item in found.items}
    assert statuses["integration.chat-whole"] == "pass"
    assert statuses["integration.chat-format"] == "not_provable"  # two of its probes were left out
    assert statuses["integration.apart-models"] == "operator"
    assert found.passed


def test_evidence_names_the_request_and_the_time(provider: tuple[Provider, str]) -> None:
    served, url = provider
    served.fault = Fault()
    [item] = [item for item in report(url, "chat-whole").items if item.id == "integration.test-chat"]
    assert "req_" in item.evidence
    assert item.evidence.endswith("Z]")


def test_one_fault_fails_the_items_that_rest_on_it(provider: tuple[Provider, str]) -> None:
    served, url = provider
    served.fault = chat(without("id"))
    found = report(url, "chat-whole")
    failed = {item.id for item in found.items if item.status == "fail"}
    assert failed == {item.id for item in checklist.items() if "chat-whole" in item.probes}
    assert not found.passed


def test_the_model_is_the_first_that_generates_text(provider: tuple[Provider, str]) -> None:
    served, url = provider
    served.fault = Fault()
    assert report(url, "models-id").model == MODEL


def test_a_server_that_cannot_be_audited_is_said_to_be_so(provider: tuple[Provider, str]) -> None:
    served, url = provider
    served.fault = Fault()
    with pytest.raises(session.Unusable, match="status 401"):
        report(url, key="wrong")
    with pytest.raises(session.Unusable, match="cannot be audited"):
        report("http://user:secret@127.0.0.1:9/v1")
    served.fault = status(200, 404, "/models")
    with pytest.raises(session.Unusable, match="--model"):
        report(url)


def test_an_answer_of_any_form_fails_a_probe_and_not_the_audit(provider: tuple[Provider, str]) -> None:
    served, url = provider
    for wrong in (5, "x", [], [5], {"message": []}, [{"index": "0", "message": {"tool_calls": 5}}]):
        served.fault = chat(put("choices", value=wrong))
        found = report(url, "chat-whole", "tools-required", "logprobs", "schema-flat", "stop", "top-a", "seed")
        assert {each.status for each in found.probes if each.evidence != "left out by --probe"} <= {
            "fail",
            "not_provable",
        }


PUBLISHED = (
    "/pricing",
    "/privacy",
    "/policy",
    "/status",
    "/support",
    "/limits",
    "/metrics",
    "/docs",
    "/openrouter/models",
)


def test_pages_of_any_form_or_none_fail_probes_and_not_the_audit(provider: tuple[Provider, str]) -> None:
    served, url = provider
    probes = [
        name
        for name in PROBES
        if name.startswith(("says-", "page-", "price", "limits-", "spares-", "charges-", "trains-", "metrics"))
        or name in ("cost-exact", "concurrent-limit", "token-limit-enforced")
    ]
    contents = (5, [5], {"models": 5, "policy": 5, "limits": 5}, {"models": [5, {"id": MODEL}]})
    for fault in (hidden(*PUBLISHED), *(_pages(each) for each in contents)):
        served.fault = fault
        found = {each.probe: each for each in report(url, *probes).probes if each.probe in probes}
        wrong = {name: each.evidence for name, each in found.items() if "unexpected form" in each.evidence}
        assert wrong == {}
        assert all(each.evidence for each in found.values())


def test_limits_that_are_all_absent_are_published_as_unlimited(provider: tuple[Provider, str]) -> None:
    served, url = provider
    open_to_all = {
        "limits": dict.fromkeys(("requests_per_minute", "requests_per_day", "tokens_per_minute")),
        "models": [],
    }
    served.fault = both(
        body("/limits", lambda old: {**open_to_all, "raise": "Ask for a limit."}),
        Fault(answer=lambda path, fields, given: (given[0], {}, given[2])),
    )
    statuses = {each.probe: each.status for each in report(url, "page-limits", "limits-published").probes}
    assert (statuses["page-limits"], statuses["limits-published"]) == ("pass", "fail")
    open_to_all["limits"] = {**open_to_all["limits"], "concurrent_requests": None}
    [verdict] = [each for each in report(url, "limits-published").probes if each.probe == "limits-published"]
    assert (verdict.status, verdict.evidence.count("unlimited")) == ("pass", 4)


def _pages(content: object) -> Fault:
    """Every published page is this."""
    return Fault(
        answer=lambda path, fields, given: (
            (200, {}, content) if path.endswith(PUBLISHED) and path != "/metrics" else given
        )
    )


def test_what_a_server_says_cannot_change_the_page_or_the_terminal(provider: tuple[Provider, str]) -> None:
    served, url = provider
    served.fault = entry(put("name", value="\x1b[31m<script>alert(1)</script> [x](http://x)"))
    found = report(url, "states-name")
    [verdict] = [each for each in found.probes if each.probe == "states-name"]
    assert "\x1b" not in verdict.evidence
    text = page.markdown(found)
    assert "<script>" not in text
    assert "[x](" not in text


def test_the_page_has_every_item_and_every_draft(provider: tuple[Provider, str]) -> None:
    served, url = provider
    served.fault = words("ours")
    settings = config.Config(limits=config.Limits(requests_per_minute=77))
    text = page.markdown(report(url, "latency", "sustained", "chat-whole", settings=settings))
    assert all(f"`{item.id}`" in text for item in checklist.items())
    assert "requests per minute 77" in text
    assert "tok/s for one stream" in text
    assert text.count("- [x]") >= 5


def test_a_foreign_server_gets_no_drafts_from_our_settings(provider: tuple[Provider, str]) -> None:
    served, url = provider
    served.fault = Fault()
    by_id = {item.id: item for item in report(url, "chat-whole").items}
    assert by_id["integration.apart-architecture"].evidence == "for the operator to state"
    assert "llama.cpp" not in by_id["integration.apart-infrastructure"].evidence


def test_what_is_known_of_our_servers_is_drafted_without_settings(provider: tuple[Provider, str]) -> None:
    served, url = provider
    served.fault = words("ours")
    by_id = {item.id: item for item in report(url, "chat-whole").items}
    assert "no finish reasons of our own" in by_id["integration.errors-special"].evidence
    assert by_id["integration.apart-architecture"].evidence == "for the operator to state"


def test_drafts_quote_what_is_published_and_measured(provider: tuple[Provider, str]) -> None:
    served, url = provider
    served.fault = words("ours")
    probes = ("says-training", "prices-published", "cost-exact", "metrics", "limits-published", "says-tiers")
    by_id = {item.id: item.evidence for item in report(url, *probes).items}
    assert "training_on_prompts: False" in by_id["integration.training-prompts-yes"]
    assert "completion 0.06" in by_id["integration.price-parts"]
    assert "tokens cost 0.0000" in by_id["integration.price-parts"]
    assert "toy_ttft_seconds" in by_id["submission.dashboard"]
    assert "requests_per_minute 100000" in by_id["listing.rate-requests"] + by_id["submission.limits-enforced"]
    assert "no tiers for 1 models" in by_id["integration.apart-discounts"] + by_id["integration.discount-details"]


@pytest.mark.parametrize(("kind", "status"), [("request", "fail"), ("inspection", "operator")])
def test_what_is_published_nowhere_is_the_operators_unless_a_request_has_to_prove_it(
    kind: Literal["request", "inspection"], status: str
) -> None:
    item = checklist.Item(id="x.y", kind=kind, says="It is said.", probes=("one", "two"))
    statuses: dict[str, Status] = {"one": "operator", "two": "not_provable"}
    verdicts = {
        name: Verdict(probe=name, status=found, evidence=f"{name} told", at="now", took_s=0.0)
        for name, found in statuses.items()
    }
    found = session._found(item, verdicts, {})
    assert found.status == status
    assert "one told" in found.evidence


def test_a_text_of_which_a_fact_is_missing_is_not_drafted(provider: tuple[Provider, str]) -> None:
    served, url = provider
    served.fault = Fault()
    by_id = {item.id: item for item in report(url, "chat-whole").items}
    assert by_id["integration.apart-latency"].evidence == "for the operator to state"  # nothing was measured


@pytest.mark.parametrize(
    ("url", "outcome"),
    [
        ("https://api.example.com/v1", None),
        ("http://api.example.com/v1", Failed),
        ("http://127.0.0.1:8000/v1", Unproven),
    ],
)
def test_tls_is_asked_for_everywhere_but_on_this_machine(url: str, outcome: type[Exception] | None) -> None:
    subject = Subject(Server(url, None, 1.0), "m", {})
    if outcome is None:
        assert asyncio.run(documents.https(subject))
        return
    with pytest.raises(outcome):
        asyncio.run(documents.https(subject))


def test_an_address_without_a_version_is_found() -> None:
    with pytest.raises(Failed):
        asyncio.run(documents.versioning(Subject(Server("https://api.example.com", None, 1.0), "m", {})))
