"""`ocserve keys`: shown once, changed by name, and nothing of a key in any output after."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ocserve import config
from ocserve.accounts.keystore import KEY_PATTERN
from ocserve.catalog.store import Store
from ocserve.cli import main
from ocserve.modelcard import KINDS
from tests.serving.models import install


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCSERVE_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("OCSERVE_AUTH_KEYS_FILE", str(tmp_path / "keys.json"))
    monkeypatch.setenv("OCSERVE_LEDGER_DIRECTORY", str(tmp_path / "data"))
    monkeypatch.setenv("OCSERVE_STORE_DIRECTORY", str(tmp_path / "store"))
    (tmp_path / "config.toml").write_text("")


def keys(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["keys", *arguments])
    assert result.exit_code == code, result.output
    return result


def as_json(*arguments: str) -> Any:
    return json.loads(keys(*arguments, "--json").stdout)


def test_a_key_is_shown_once_and_then_only_described() -> None:
    made = as_json(
        "create", "--name", "acme", "--rpm", "5", "--tpd", "0", "--model", "tiny", "--price", "prompt=0.1",
        "--expires", "90d",
    )  # fmt: skip
    assert KEY_PATTERN.fullmatch(made["key"])
    described = as_json("show", "acme")
    assert described == {**{name: value for name, value in made.items() if name != "key"}, "balance": None}
    assert described["limits"] == {"requests_per_minute": 5, "tokens_per_day": 0}
    assert (described["models"], described["price"]) == (["tiny"], {"prompt": "0.1"})
    later = [keys("list"), keys("show", "acme"), keys("list", "--json"), keys("limits", "acme", "--rpm", "7")]
    assert not any(made["key"][4:12] in result.output for result in later)
    assert "7 requests per minute, unlimited tokens per day" in later[3].output


def test_a_key_alone_is_on_stdout() -> None:
    result = keys("create", "--name", "acme")
    assert KEY_PATTERN.fullmatch(result.stdout.strip())
    assert "cannot be shown again" in result.stderr


def test_the_first_key_that_may_not_administer_warns_of_what_nobody_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    warned = keys("create", "--name", "acme", "--json")
    assert "`ocserve keys create --name admin --admin` makes one that may" in warned.stderr
    assert json.loads(warned.stdout)["name"] == "acme"
    assert "warning" not in keys("create", "--name", "admin", "--admin").stderr
    assert "warning" not in keys("create", "--name", "other").stderr
    keys("revoke", "admin")
    assert "none may administer" in keys("create", "--name", "late").stderr
    monkeypatch.setenv("OCSERVE_API_KEY", "sk-of-the-settings-0123456789")  # may do everything
    assert "warning" not in keys("create", "--name", "last").stderr


def test_a_model_that_is_not_here_is_told_at_once(tmp_path: Path, tiny_model: Path) -> None:
    install(Store(config.Store(directory=tmp_path / "store")), "other", tiny_model)
    given = ("--model", "other", "--model", "default", "--model", "nonexist:1b")
    made = keys("create", "--name", "acme", "--admin", *given, "--json")
    assert json.loads(made.stdout)["models"] == ["other", "default", "nonexist:1b"]
    assert made.stderr == ("warning: no model called nonexist:1b is installed here; the key may use it once it is\n")


def test_the_life_of_a_key() -> None:
    first = as_json("create", "--name", "acme", "--admin", "--concurrent", "2")
    second = as_json("rotate", "acme", "--overlap", "1h")
    assert (first["id"], first["scope"]) == (second["id"], "admin")
    assert as_json("show", first["id"])["name"] == "acme"
    assert "there is a key called" in keys("create", "--name", first["id"], code=78).stderr
    assert first["key"] != second["key"]
    (until,) = second["replaced_secrets_valid_until"]
    header, row = keys("list").stdout.splitlines()
    assert header.split() == ["NAME", "ID", "STATE", "SCOPE", "CREATED", "EXPIRES", "MODELS", "TERMS"]
    assert f"active, old until {until[5:10]} {until[11:16]}Z  admin" in row
    assert row.endswith("all     concurrent 2")
    assert as_json("limits", "acme", "--concurrent", "default", "--tpm", "100")["limits"] == {"tokens_per_minute": 100}
    assert as_json("revoke", "acme")["state"] == "revoked"
    assert [key["state"] for key in as_json("list")["keys"]] == ["revoked"]


def test_the_list_tells_what_sets_a_key_apart_on_lines_that_fit() -> None:
    keys("create", "--name", "acme-production", "--model", "smollm2:135m", "--price", "prompt=0.1", "--rpm", "600")
    keys("create", "--name", "other", "--model", "a", "--model", "b", "--prepaid", "--spend-cap", "25.00")
    keys("create", "--name", "plain")
    lines = keys("list").stdout.splitlines()
    cells = [re.split(r"  +", line)[6:] for line in lines]
    assert cells == [
        ["MODELS", "TERMS"],
        ["smollm2:135m", "rpm 600, own prices"],
        ["2 models", "cap 25.00, prepaid"],
        ["all", "the settings'"],
    ]
    assert max(map(len, lines)) <= 120, lines


def test_the_help_names_every_kind_of_price() -> None:
    text = " ".join(keys("create", "--help").output.split())
    assert [kind for kind in KINDS if not re.search(rf"\b{kind}\b", text)] == []


def test_a_prepaid_key_is_credited_and_shown_with_its_balance() -> None:
    made = as_json("create", "--name", "acme", "--prepaid", "--spend-cap", "25.00")
    assert (made["prepaid"], made["spend_cap"]) == (True, "25.00")
    first = as_json("credit", "acme", "10.00", "--note", "invoice 7", "--idempotency-key", "a")
    assert as_json("credit", "acme", "10.00", "--note", "invoice 7", "--idempotency-key", "a") == first
    assert keys("credit", "acme", "-2.5", "--correct").output == "acme: -2.50 US dollars, the balance is 7.50\n"
    assert "at most 7.50 can be taken back" in keys("credit", "acme", "-8", "--correct", code=1).stderr
    assert "correction" in keys("credit", "acme", "-1", code=1).stderr
    keys("create", "--name", "gone")
    keys("revoke", "gone")
    warnings = keys("credit", "gone", "1").stderr
    assert "gone is revoked" in warnings
    assert "gone is not prepaid" in warnings
    assert "used for another credit" in keys("credit", "acme", "1", "--idempotency-key", "a", code=1).stderr
    assert as_json("show", "acme")["balance"]["balance"] == "7.50"
    assert "balance=7.50" in keys("show", "acme").output
    assert "30 US dollars per month, prepaid" in keys("limits", "acme", "--spend-cap", "30").output
    assert as_json("limits", "acme", "--spend-cap", "none")["spend_cap"] is None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("create", "--name", "a b"), "a key's name"),
        (("create", "--name", "x", "--rpm", "many"), "whole number"),
        (("create", "--name", "x", "--expires", "soon"), "a day such as 2027-01-31, or a duration such as 90s"),
        (("create", "--name", "x", "--expires", "0d"), "the key would have expired already"),
        (("create", "--name", "x", "--expires", "2020-01-31"), "the key would have expired already"),
        (("rotate", "x", "--overlap", "2027-01-31"), "expected a duration such as 90s"),
        (("create", "--name", "x", "--price", "prompt"), "KIND=AMOUNT"),
        (("limits", "nobody", "--rpm", "1"), "no key called nobody"),
        (("limits", "nobody"), "at least one limit"),
        (("show", "nobody"), "no key called nobody"),
        (("create", "--name", "x", "--spend-cap", "much"), "US dollars such as 25.00"),
        (("create", "--name", "x", "--spend-cap", "-1"), "expected 0 or more US dollars"),
        (("credit", "nobody", "1"), "no key called nobody"),
        (("credit", "nobody", "1e9"), "US dollars such as 25.00"),
    ],
)
def test_mistakes_are_refused_with_a_hint(arguments: tuple[str, ...], complaint: str) -> None:
    result = CliRunner().invoke(main, ["keys", *arguments])
    assert result.exit_code in (2, 78)
    assert complaint in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [("create", "--name", "other"), ("rotate", "acme"), ("revoke", "acme"), ("limits", "acme", "--rpm", "5")],
    ids=lambda arguments: arguments[0],
)
def test_where_nothing_can_be_written_a_command_says_so(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    keys("create", "--name", "acme")
    (tmp_path / "keys.json.lock").unlink()
    (tmp_path / "keys.json.lock").mkdir()
    refused = keys(*arguments, code=78)
    assert refused.stderr.startswith(f"error: cannot write in {tmp_path}: ")


def test_a_credit_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    keys("create", "--name", "acme", "--prepaid")
    (tmp_path / "data").write_bytes(b"")
    assert keys("credit", "acme", "5", code=1).stderr.startswith("error: the ledger ")


def test_a_correction_takes_back_and_never_adds() -> None:
    keys("create", "--name", "acme", "--prepaid")
    keys("credit", "acme", "20")
    for amount in ("20", "0"):
        refused = keys("credit", "acme", amount, "--correct", code=2)
        assert "--correct" in refused.stderr
    assert as_json("credit", "acme", "-5", "--correct")["balance"] == "15.00"
