"""`ocserve usage` and `ocserve privacy purge`: sums are exact, invoices add up, what is purged is gone."""

from __future__ import annotations

import csv
import datetime
import io
import json
import random
from decimal import Decimal
from pathlib import Path

import apsw
import pytest
from click.testing import CliRunner, Result
from msgspec.structs import replace

from ocserve.accounts import balances
from ocserve.accounts.balances import Credit
from ocserve.accounts.keystore import Key, KeyStore
from ocserve.accounts.ledger import Ledger, Row
from ocserve.accounts.pricing import Rates, dollars
from ocserve.cli import main
from ocserve.generation import Usage

CANARY = "canary-key-5f1"


def admitted(day: int, late: bool = False) -> int:
    at = datetime.datetime(2026, 11, day, 23 if late else 0, tzinfo=datetime.UTC)
    return int(at.timestamp()) * 1_000_000


def recorded() -> list[Row]:
    """Rows of three keys, two models, five days and two price lists."""
    chance = random.Random(3)
    rows = []
    for number in range(400):
        day = chance.randrange(1, 6)
        rates = Rates(
            prompt=20_000,
            cached_prompt=5_000,
            cache_write=20_000,
            completion=60_000 if day < 4 else 70_000,
            image=1_000_000,
            request=chance.choice((0, 300)),
        )
        outcome = chance.choice(("completed", "completed", "completed", "cancelled", "failed", "lost"))
        prompt = chance.randrange(1, 5000)
        counts = {
            "prompt_tokens": prompt,
            "cached_tokens": chance.randrange(prompt),
            "completion_tokens": chance.randrange(800),
        }
        images = chance.choice((0, 0, 2))
        charged = outcome in ("completed", "cancelled")
        rows.append(
            Row(
                id=f"id-{number}",
                request_id=f"req-{number}",
                key_id=chance.choice(("anonymous", "key-1", CANARY)),
                model=chance.choice(("tiny", "large")),
                route="/v1/chat/completions",
                admitted_us=admitted(day, chance.random() < 0.5),
                settled_us=admitted(day, late=True),
                outcome=outcome,  # type: ignore[arg-type]
                images=images,
                cost=rates.cost(Usage(**counts), images) if charged else 0,
                **counts,
                **{f"price_{name}": getattr(rates, name) for name in rates.__struct_fields__},
            )
        )
    return rows


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    monkeypatch.setenv("OCSERVE_LEDGER_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("OCSERVE_CACHE_DIRECTORY", str(tmp_path / "cache"))
    monkeypatch.setenv("OCSERVE_AUTH_KEYS_FILE", str(tmp_path / "keys.json"))
    ledger = Ledger(tmp_path / "ledger.db", retention_days=10_000)
    made = recorded()
    assert all(each.result() for each in [ledger.settle(row) for row in made])
    ledger.close()
    return made


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_sums_are_those_of_the_rows(rows: list[Row]) -> None:
    found = json.loads(run("usage", "--by", "key", "--by", "model", "--json").stdout)["usage"]
    assert len(found) == 6
    for each in found:
        own = [row for row in rows if (row.key_id, row.model) == (each["key"], each["model"])]
        assert each["requests"] == len(own)
        assert each["cost"] == sum(row.cost for row in own)
        assert each["prompt_tokens"] == sum(row.prompt_tokens for row in own)
        assert each["completed"] == sum(row.outcome == "completed" for row in own)
        assert each["lost"] == sum(row.outcome == "lost" for row in own)
    assert sum(each["cost"] for each in found) == sum(row.cost for row in rows)


def test_a_day_is_from_midnight_to_midnight_in_utc(rows: list[Row]) -> None:
    text = run("usage", "--since", "2026-11-02", "--until", "2026-11-03", "--key", "key-1", "--csv").stdout
    found = list(csv.DictReader(io.StringIO(text)))
    assert [each["day"] for each in found] == ["2026-11-02", "2026-11-03"]
    for day, each in zip((2, 3), found, strict=True):
        own = [row for row in rows if row.key_id == "key-1" and row.admitted_us in (admitted(day), admitted(day, True))]
        assert int(each["requests"]) == len(own) > 10
        assert each["cost_usd"] == dollars(sum(row.cost for row in own))


def test_the_table_has_bars_and_a_total(rows: list[Row]) -> None:
    lines = run("usage").stdout.splitlines()
    assert lines[0].split() == ["DAY", "TOKENS", "REQUESTS", "CUT", "SHORT", "INPUT", "CACHED", "OUTPUT", "US$"]
    assert [line.split()[0] for line in lines[1:]] == [*(f"2026-11-0{day}" for day in range(1, 6)), "total"]
    assert max(line.count("█") for line in lines) == 24
    assert lines[-1].split()[1] == f"{len(rows):,}"
    assert lines[-1].split()[-1] == dollars(sum(row.cost for row in rows))


def test_an_invoice_adds_up_to_what_was_charged(rows: list[Row]) -> None:
    text = run("usage", "--invoice", "--key", CANARY, "--since", "2026-11-01", "--until", "2026-11-30").stdout
    assert f"Key: {CANARY}" in text
    assert "Period: 2026-11-01 to 2026-11-30" in text
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    items = [each for each in cells if each[0] in ("tiny", "large")]
    for _, _, quantity, price, amount in items:
        assert Decimal(quantity.replace(",", "")) * Decimal(price) == Decimal(amount)
    charged = sum(row.cost for row in rows if row.key_id == CANARY)
    assert sum(Decimal(each[-1]) for each in items) * 10**12 == charged
    assert f"**{dollars(charged)}**" in text
    assert {"0.00000006", "0.00000007"} <= {each[3] for each in items if each[1] == "output tokens"}


def test_credits_balances_and_tiers_are_shown(rows: list[Row], tmp_path: Path) -> None:
    at = admitted(3)
    file = tmp_path / "ledger.db"
    for note, amount in (("invoice | 7", 10**13), ("again", -(10**12))):
        made = Credit(key_id="key-1", amount=amount, note=note, correction=amount < 0, made_by="me", credited_us=at)
        balances.add_credit(file, made)
    running = Ledger(file, retention_days=10_000)
    large = replace(rows[0], id="tiered", key_id="key-1", tier=1_000_000, outcome="completed", cost=0, price_request=0)
    assert running.settle(large).result()
    running.close()
    charged = sum(row.cost for row in rows if row.key_id == "key-1")
    found = json.loads(run("usage", "--month", "2026-11", "--by", "tier", "--json").stdout)
    assert [each["tier"] for each in found["usage"]] == ["0", "1000000"]
    assert [each["amount"] for each in found["credits"]] == [10**13, -(10**12)]
    assert "month_tokens" not in found["balances"][0], "they are of one model"
    assert {each["key"]: each["balance"] for each in found["balances"]}["key-1"] == 9 * 10**12 - charged
    assert json.loads(run("usage", "--month", "2026-10", "--json").stdout)["credits"] == []
    assert dollars(9 * 10**12 - charged) in run("usage").stdout.splitlines()[-1]
    text = run("usage", "--invoice", "--month", "2026-11").stdout
    assert "Period: 2026-11-01 to 2026-11-30" in text
    assert "| 2026-11-03 | key-1 | invoice \\| 7 | 10.00 |" in text
    assert "**9.00**" in text
    assert f": {dollars(9 * 10**12 - charged)}" in text
    assert run("usage", "--month", "2026-11", "--since", "2026-11-01").exit_code == 2


def test_an_invoice_of_rows_that_do_not_add_up_is_refused(rows: list[Row], tmp_path: Path) -> None:
    connection = apsw.Connection(str(tmp_path / "ledger.db"))
    connection.execute("UPDATE requests SET cost = cost + 1 WHERE id = (SELECT id FROM requests WHERE cost > 0)")
    connection.close()
    result = run("usage", "--invoice")
    assert result.exit_code == 1
    assert "does not add up" in result.stderr


def test_without_a_ledger_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCSERVE_LEDGER_DIRECTORY", str(tmp_path / "none"))
    result = run("usage")
    assert result.exit_code == 1
    assert "nothing has been recorded yet" in result.stderr
    assert run("privacy", "purge", "--yes").stdout.startswith("deleted: 0 rows")


def test_what_is_purged_is_in_no_file_any_more_and_the_rest_is(rows: list[Row], tmp_path: Path) -> None:
    prefix = tmp_path / "cache" / "prefixes" / "ab" / "block"
    prefix.parent.mkdir(parents=True)
    prefix.write_bytes(b"state")
    assert any(CANARY.encode() in file.read_bytes() for file in tmp_path.glob("ledger.db*"))
    running = Ledger(tmp_path / "ledger.db", retention_days=10_000)  # a server that goes on
    running.open(replace(rows[0], id="running", key_id="key-1", outcome="open", settled_us=None, cost=0))
    assert running.settle(replace(rows[0], id="more", key_id="key-1")).result()
    assert run("privacy", "purge", "--key", CANARY).exit_code == 1  # nobody said yes
    own = sum(row.key_id == CANARY for row in rows)
    purged = json.loads(run("privacy", "purge", "--key", CANARY, "--yes", "--json").stdout)
    assert purged == {"event": "purged", "rows": own, "prefixes": 0, "prefixes_left": 1}
    assert not any(CANARY.encode() in file.read_bytes() for file in tmp_path.glob("ledger.db*"))
    assert prefix.exists()
    left = json.loads(run("usage", "--by", "key", "--json").stdout)["usage"]
    assert {each["key"] for each in left} == {"anonymous", "key-1"}
    told = run("privacy", "purge", "--key", "key-1", "--until", "2026-11-01", "--yes").stdout
    assert "left: 1 file of stored prefixes, which are not kept by key" in told
    assert run("privacy", "purge", "--yes").stdout.endswith("1 file of stored prefixes\n")
    assert not prefix.exists()
    assert running.settle(replace(rows[0], id="running", key_id="key-1")).result()
    running.close()
    assert json.loads(run("usage", "--by", "key", "--json").stdout)["usage"][0]["requests"] == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--invoice", "--json"), ("--json", "--invoice")),
        (("--csv", "--invoice"), ("--csv", "--invoice")),
        (("--csv", "--json"), ("--json", "--csv")),
        (("--invoice", "--by", "model"), ("--by", "--invoice")),
    ],
)
def test_two_forms_at_once_are_refused_by_name(
    rows: list[Row], options: tuple[str, ...], named: tuple[str, ...]
) -> None:
    refused = run("usage", *options)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert all(name in refused.stderr for name in named)


@pytest.fixture
def acme(rows: list[Row], tmp_path: Path) -> Key:
    """A key with a name, one request and a credit."""
    made, _ = KeyStore(tmp_path / "keys.json").create("acme")
    ledger = Ledger(tmp_path / "ledger.db", retention_days=10_000)
    assert ledger.settle(replace(rows[0], id="own", key_id=made.id)).result()
    ledger.close()
    balances.add_credit(tmp_path / "ledger.db", Credit(key_id=made.id, amount=10**13, note="first", made_by="me"))
    return made


def test_a_key_is_meant_by_its_name_or_its_id_and_shown_with_both(acme: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCSERVE_OPERATOR_NAME", "Acme | Sons")
    monkeypatch.setenv("OCSERVE_OPERATOR_EMAIL", "bills@acme.example")
    both = f"acme ({acme.id})"
    for called in ("acme", acme.id):
        found = json.loads(run("usage", "--by", "key", "--key", called, "--json").stdout)
        for part in ("usage", "credits", "balances"):
            assert [(each["key"], each["key_name"]) for each in found[part]] == [(acme.id, "acme")]
        assert found["usage"][0]["requests"] == 1
        text = run("usage", "--invoice", "--key", called).stdout
        assert f"From: Acme \\| Sons, bills@acme.example  \nKey: {both}  \n" in text
        assert f"| {both} | first | 10.00 |" in text
        assert f"Balance of {both} on" in text
    table = run("usage", "--by", "key").stdout
    assert table.splitlines()[0].split()[:4] == ["KEY", "KEY", "NAME", "TOKENS"]
    assert any(line.split()[:2] == [acme.id, "acme"] for line in table.splitlines())
    assert any(line.startswith(both) for line in table.splitlines())
    listed = list(csv.DictReader(io.StringIO(run("usage", "--by", "key", "--by", "model", "--csv").stdout)))
    assert {each["key"]: each["key_name"] for each in listed} == {
        acme.id: "acme", "anonymous": "", "key-1": "", CANARY: "",
    }  # fmt: skip


def test_what_is_neither_a_key_nor_in_the_ledger_is_refused(acme: Key) -> None:
    for command in (("usage",), ("usage", "--invoice"), ("privacy", "purge", "--yes")):
        result = run(*command, "--key", "pre")
        assert (result.exit_code, result.stdout) == (78, "")
        assert "there is no key called pre" in result.stderr
        assert "hint: `ocserve keys list`" in result.stderr
    assert run("privacy", "purge", "--yes", "--key", "acme").stdout.startswith("deleted: 1 row of")
    assert run("usage", "--key", "acme").stdout.startswith("nothing is recorded")  # a key, if an idle one
