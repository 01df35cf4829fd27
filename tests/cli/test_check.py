"""`ocserve check`: from the command line to the table, the JSON, the page and the exit status."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ocserve import cli
from tests.audit.faults import chat, without
from tests.audit.provider import KEY, MODEL, Fault, Provider, running

STATUSES = {"pass", "fail", "operator", "not_provable"}


@pytest.fixture(scope="module")
def provider() -> Iterator[tuple[Provider, str]]:
    served = Provider()
    with running(served) as url:
        yield served, url


def check(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["check", "--key-from", "PROVIDER_KEY", *arguments], env={"PROVIDER_KEY": KEY})


def test_json_has_every_item(provider: tuple[Provider, str], tmp_path: Path) -> None:
    served, url = provider
    served.fault = Fault()
    page = tmp_path / "audit.md"
    result = check(url, "--probe", "chat-whole", "--probe", "models-list", "--json", "--markdown", str(page))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["model"] == MODEL
    assert all(item.keys() == {"id", "status", "evidence"} for item in report["items"])
    assert {item["status"] for item in report["items"]} <= STATUSES
    assert KEY not in result.output
    assert page.read_text().startswith("# Audit")


def test_a_failure_is_shown_and_is_the_exit_status(provider: tuple[Provider, str]) -> None:
    served, url = provider
    served.fault = chat(without("id"))
    result = check(url, "--probe", "chat-whole")
    assert result.exit_code == 1
    assert "`id` is missing" in result.output
    assert "fail: integration.chat-whole" in result.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("http://127.0.0.1:9/v1",), "cannot be audited"),
        (("--probe", "nonsense"), "there is no probe"),
        (("--page", "nonsense=x"), "KIND=URL"),
        (("--suppress", "x"), "token ids"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments: tuple[str, ...], text: str) -> None:
    result = check(*arguments)
    assert result.exit_code != 0
    assert text in result.output


def test_a_key_that_is_not_set_is_refused() -> None:
    result = CliRunner().invoke(cli.main, ["check", "--key-from", "NO_SUCH_VARIABLE"])
    assert result.exit_code == 78
    assert "NO_SUCH_VARIABLE" in result.output
