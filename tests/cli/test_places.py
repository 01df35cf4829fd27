"""What `ocserve doctor` says of files and folders: what a start would refuse fails, and looking changes nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import apsw
import pytest
from msgspec.structs import replace

from ocserve import config
from ocserve.accounts.keystore import KeyStore
from ocserve.accounts.ledger import Ledger
from ocserve.cli import places
from ocserve.telemetry import logs


def test_files_that_the_settings_name_are_looked_at(tmp_path: Path) -> None:
    text, prices, program = tmp_path / "text.md", tmp_path / "prices.toml", tmp_path / "judge"
    tree = config.Config(
        operator=config.Operator(sla_text=text, privacy_text=text),
        policy=config.Policy(text=text, command=(str(program), "--strict")),
        billing=config.Billing(prices=prices),
    )
    assert places.check_files(config.Config()) == []
    names = ["operator.privacy_text", "operator.sla_text", "policy.text", "billing.prices", "policy.command"]
    missing = places.check_files(tree)
    assert [(each.check, each.verdict) for each in missing] == [(name, "fail") for name in names]
    assert str(text) in missing[0].message
    text.write_text("We promise.")
    prices.write_text('[[price]]\nmodel = "tiny"\nprompt = "0.1"\ncompletion = "much"\n')
    program.write_text("#!/bin/sh\ntouch " + str(tmp_path / "ran"))
    assert [each.verdict for each in places.check_files(tree)] == ["ok", "ok", "ok", "fail", "fail"]
    prices.write_text('[[price]]\nmodel = "tiny"\nprompt = "0.1"\ncompletion = "0.2"\n')
    program.chmod(0o755)
    assert [each.verdict for each in places.check_files(tree)] == ["ok"] * 5
    assert not (tmp_path / "ran").exists()
    assert [each.verdict for each in places.check_files(config.Config(policy=config.Policy(command=("sh",))))] == ["ok"]


def test_a_ledger_that_cannot_be_used_is_a_warning_where_a_server_would_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCSERVE_LEDGER_DIRECTORY", str(tmp_path / "ledger"))
    monkeypatch.setenv("OCSERVE_AUTH_KEYS_FILE", str(tmp_path / "keys.json"))

    def found(**billing: Any) -> tuple[str, str]:
        use = billing.pop("use", "auto")
        settings = config.load({"ledger.use": use}, environ=dict(os.environ)).config
        verdict = places.check_ledger(replace(settings, billing=config.Billing(**billing)))
        return verdict.verdict, verdict.message

    file = tmp_path / "ledger" / "ledger.db"
    assert found() == ("ok", f"{file} can be made")
    assert not file.parent.exists()
    Ledger(file, retention_days=1).close()
    assert found() == ("ok", f"{file} can be used")
    connection = apsw.Connection(str(file))
    connection.pragma("user_version", 1)
    assert found()[0] == "ok", "a server brings it to its version"
    connection.pragma("user_version", 99)
    connection.close()
    assert found() == ("warn", f"the ledger {file} cannot be used: it was written by a newer version of ocserve")
    assert found(use="on")[0] == found(prices=tmp_path / "prices.toml")[0] == "fail"
    assert found(use="off")[0] == "ok"
    KeyStore(tmp_path / "keys.json").create("acme")
    assert found()[0] == "fail"


@pytest.fixture
def blocked(tmp_path: Path) -> Path:
    """A folder that cannot be made, by root neither."""
    (tmp_path / "file").write_bytes(b"")
    return tmp_path / "file" / "folder"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that takes nothing although rights say so")
def test_a_ledger_can_be_made_where_files_can() -> None:
    settings = config.Config(ledger=config.Ledger(use="on", directory=Path("/proc/foo")))
    assert places.check_ledger(settings).verdict == "fail"


def test_a_log_is_written_to_what_a_server_could_open(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.log").write_bytes(b"a line\n")
    for name, verdict in [("new.log", "ok"), ("old.log", "ok"), ("folder", "fail"), ("none/new.log", "fail")]:
        log = config.Log(file=tmp_path / name)
        before = sorted(tmp_path.rglob("*"))
        [found] = places.check_log(log)
        assert (found.verdict, sorted(tmp_path.rglob("*"))) == (verdict, before)
        if verdict == "fail":
            with pytest.raises(config.ConfigError):
                logs.configure(log)
    assert (tmp_path / "old.log").read_bytes() == b"a line\n"
    assert places.check_log(config.Log()) == []


def test_the_keys_are_read_whether_or_not_the_settings_have_one(tmp_path: Path, blocked: Path) -> None:
    def found(file: Path) -> tuple[str, str]:
        [verdict] = places.check_keys(config.Auth(api_key="k" * 20, keys_file=file))
        return verdict.verdict, verdict.message

    file = tmp_path / "keys.json"
    assert found(file) == ("ok", f"{file}, no keys")
    KeyStore(file).create("acme")
    assert found(file) == ("ok", f"{file}, 1 key")
    file.write_bytes(b"{")
    assert found(file)[0] == "fail"
    assert found(blocked / "keys.json")[0] == "fail"


def test_keys_that_cannot_be_changed_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places.files, "obstacle_in", lambda path: f"{path} cannot be written: Read-only file system")
    [verdict] = places.check_keys(config.Auth(keys_file=tmp_path / "keys.json"))
    assert (verdict.verdict, "Read-only" in verdict.message) == ("warn", True)


def test_the_cache_is_looked_at_where_prefixes_go_there(tmp_path: Path, blocked: Path) -> None:
    def found(directory: Path, disk_bytes: int = 1) -> str:
        return places.check_cache(config.Config(cache=config.Cache(directory=directory, disk_bytes=disk_bytes))).verdict

    fresh = tmp_path / "cache"
    assert (found(fresh), fresh.exists()) == ("ok", False)
    assert (found(blocked), found(blocked, 0)) == ("warn", "ok")
    fresh.mkdir()
    (fresh / "salt").write_bytes(b"short")
    assert found(fresh) == "fail"
