"""`ocserve check`: from the command line to the table, the JSON, the page and the exit status."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner, Result

from ocserve import cli
from ocserve.audit.probes import PROBES
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


def test_a_probe_that_passes_is_enough(provider: tuple[Provider, str]) -> None:
    served, url = provider
    served.fault = Fault()
    result = check(url, "--probe", "models-list")  # no item rests on this one alone
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"{MODEL} at {url}: 1 probe, 1 pass, 0 fail, 0 not_provable, 0 operator\n")


def test_probes_are_listed_with_what_they_do() -> None:
    lines = check("--list").stdout.splitlines()
    assert len(lines) == len(PROBES)
    assert lines[0].split(maxsplit=1) == ["models-list", PROBES["models-list"].about]


def test_a_server_may_be_named_without_its_version(provider: tuple[Provider, str]) -> None:
    served, url = provider
    served.fault = Fault()
    for bare in (url.removesuffix("/v1"), url.removesuffix("v1")):
        report = json.loads(check(bare, "--probe", "chat-whole", "--json").stdout)
        assert report["url"] == url


def test_a_server_that_wants_a_key_is_said_to_and_how_it_is_given(provider: tuple[Provider, str]) -> None:
    served, url = provider
    served.fault = Fault()
    environment = {"OCSERVE_API_KEY": KEY, "WRONG_KEY": "sk-wrong-0123456789abcdef"}
    for arguments, why in (
        ((url.removesuffix("/v1"),), f"{url}/models answers with status 401: it needs a key, and none was sent"),
        ((url, "--model", MODEL, "--key-from", "WRONG_KEY"), "it does not accept the key that was sent"),
    ):
        result = CliRunner().invoke(cli.main, ["check", "--probe", "chat-whole", *arguments], env=environment)
        assert result.exit_code == 1
        assert why in result.stderr
        assert "--key-from NAME" in result.stderr


def test_the_address_of_the_settings_gets_their_key_however_it_is_written(provider: tuple[Provider, str]) -> None:
    served, url = provider
    served.fault = Fault()
    environment = {"OCSERVE_API_KEY": KEY, "OCSERVE_SERVER_PORT": str(urlsplit(url).port)}
    for own in (url, url.removesuffix("/v1")):
        result = CliRunner().invoke(cli.main, ["check", own, "--probe", "chat-whole"], env=environment)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("http://127.0.0.1:9/v1",), "cannot be audited"),
        (("--probe", "zzzzz"), "there is no probe `zzzzz`; `ocserve check --list` shows all"),
        (("--probe", "chat-hole"), "did you mean `chat-whole`"),
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
