"""What settings name and is no regular file is refused by name, at once, whoever reads it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ocserve import config
from ocserve.accounts import pricing
from ocserve.accounts.keys import KeyRing
from ocserve.accounts.keystore import KeyStore
from ocserve.cli import places
from ocserve.errors import KeysUnavailable
from ocserve.files import obstacle_in, obstacle_to, only_regular
from ocserve.pages.publication import Publication
from ocserve.telemetry import logs
from tests.http.harness import KEY

pytestmark = pytest.mark.skipif(os.name != "posix", reason="no FIFOs")


def doctored(file: Path) -> None:
    """What `ocserve doctor` says of a price list and a text, as the error that each would be."""
    tree = config.Config(billing=config.Billing(prices=file), operator=config.Operator(sla_text=file))
    verdicts = places.check_files(tree)
    assert [each.verdict for each in verdicts] == ["fail", "fail"]
    raise config.ConfigError(" ".join(each.message for each in verdicts))


READERS: dict[str, Callable[[Path], object]] = {
    "settings": lambda file: config.load({}, environ={}, path=file),
    "auth.key_file": lambda file: config.resolve_key(config.Auth(key_file=file)),
    "auth.keys_file": lambda file: KeyStore(file).listed(),
    "billing.prices": pricing.load,
    "policy.text": lambda file: Publication.of(config.Config(policy=config.Policy(text=file))),
    "operator.payment_text": lambda file: Publication.of(config.Config(operator=config.Operator(payment_text=file))),
    "log.file": lambda file: logs.configure(config.Log(file=file)),
    "doctor": doctored,
}


def outcome(read: Callable[[Path], object], file: Path) -> BaseException:
    """What `read` raises; a test that failed would otherwise never end."""
    found: list[BaseException] = []

    def attempt() -> None:
        try:
            read(file)
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "it waits for somebody to write"
    assert found, "it was read"
    return found[0]


@pytest.mark.parametrize("name", READERS)
def test_a_fifo_is_refused_by_name(tmp_path: Path, name: str) -> None:
    file, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(file, 0o600)
    link.symlink_to(file)
    for path in (file, link):
        error = outcome(READERS[name], path)
        assert isinstance(error, config.ConfigError)
        assert str(path) in error.message


def test_one_that_somebody_writes_into_is_refused_too(tmp_path: Path) -> None:
    file = tmp_path / "fifo"
    os.mkfifo(file)
    writer = os.open(file, os.O_RDWR)
    try:
        for name, read in READERS.items():
            assert "no regular file" in str(outcome(read, file)), name
    finally:
        os.close(writer)


def test_a_device_and_a_folder_are_no_files_and_a_link_to_one_is(tmp_path: Path) -> None:
    for path in (Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match=str(path)):
            open(path, "rb", opener=only_regular)  # noqa: SIM115 - it does not open
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    with open(tmp_path / "link", "rb", opener=only_regular) as file:
        assert file.read() == b"x"


def test_keys_that_are_a_fifo_let_nobody_in_and_stop_nobody(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.json")
    _, text = store.create("acme")
    ring = KeyRing(KEY, config.Auth(), store=store)
    store.path.unlink()
    os.mkfifo(store.path, 0o600)
    assert isinstance(outcome(lambda _: ring.identify(text, loopback=True), store.path), KeysUnavailable)


@pytest.mark.parametrize("unnamed", [True, False], ids=["unnamed files", "named ones"])
def test_what_can_be_made_is_not(tmp_path: Path, unnamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not unnamed:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    assert obstacle_in(tmp_path / "a" / "b") is None
    assert obstacle_to(tmp_path / "a" / "b") is None
    assert obstacle_in(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_made_or_written_is_said(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    assert obstacle_to(file) is None
    assert file.read_bytes() == b"content"
    assert obstacle_to(file / "a" / "b") == obstacle_in(file) == f"{file} is not a folder"
    assert obstacle_to(tmp_path) == f"{tmp_path} cannot be written: Is a directory"
    assert not Path("/proc/self").exists() or obstacle_to(Path("/proc/foo/ledger.db"))
