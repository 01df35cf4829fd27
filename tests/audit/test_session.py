"""What is said of items follows from what was found of probes; nothing is skipped silently."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from ocserve import config
from ocserve.audit import checklist, page, session
from ocserve.audit.drafts import draft
from ocserve.audit.probes import PROBES, documents
from ocserve.audit.server import Server
from ocserve.audit.session import Order, Report
from ocserve.audit.subject import Subject
from ocserve.audit.verdict import Fault as Failed
from ocserve.audit.verdict import Unproven
from tests.audit.faults import chat, entry, put, status, without, words
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
    assert statuses["integration.company-name"] == "operator"
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
    assert by_id["integration.limits-tokens-minute"].evidence == "for the operator to state"
    assert "llama.cpp" not in by_id["integration.apart-infrastructure"].evidence


def test_what_is_known_of_our_servers_is_drafted_without_settings(provider: tuple[Provider, str]) -> None:
    served, url = provider
    served.fault = words("ours")
    by_id = {item.id: item for item in report(url, "chat-whole").items}
    assert "no finish reasons of our own" in by_id["integration.errors-special"].evidence
    assert by_id["integration.limits-tokens-minute"].evidence == "for the operator to state"


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
