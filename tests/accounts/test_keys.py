"""Who may call: the whole table of key, credential and place, and what a refusal must not tell."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ocserve import config
from ocserve.accounts.keys import KeyRing, lasting_secret
from ocserve.errors import AuthenticationFailed

KEY = "correct-horse-battery"


@pytest.mark.parametrize(
    ("key", "anonymous_allowed", "credential", "loopback", "outcome"),
    [
        (None, True, None, True, "anonymous"),
        (None, True, "anything", True, "anonymous"),
        (None, False, "anything", True, "anonymous"),
        (None, True, None, False, "refused"),
        (None, True, "anything", False, "refused"),
        (KEY, True, KEY, True, "holder"),
        (KEY, True, KEY, False, "holder"),
        (KEY, True, "wrong", True, "refused"),
        (KEY, True, "wrong", False, "refused"),
        (KEY, True, KEY + " ", True, "refused"),
        (KEY, True, None, True, "anonymous"),
        (KEY, True, "", True, "anonymous"),
        (KEY, False, None, True, "refused"),
        (KEY, False, KEY, True, "holder"),
        (KEY, True, None, False, "refused"),
        (KEY, True, "", False, "refused"),
    ],
)
def test_who_may_call(
    key: str | None, anonymous_allowed: bool, credential: str | None, loopback: bool, outcome: str
) -> None:
    ring = KeyRing(key, config.Auth(anonymous=anonymous_allowed))
    try:
        caller = ring.identify(credential, loopback)
    except AuthenticationFailed:
        assert outcome == "refused"
    else:
        assert outcome == ("anonymous" if caller.anonymous else "holder")


@pytest.mark.parametrize("credential", ["CANARY-wrong-key", "CANARY\ud800", "CANARY" * 10_000, "CANARY\x00é"])
def test_a_refusal_never_repeats_the_credential(credential: str) -> None:
    ring = KeyRing(KEY, config.Auth())
    with pytest.raises(AuthenticationFailed) as refusal:
        ring.identify(credential, loopback=True)
    assert "CANARY" not in refusal.value.message
    assert KEY not in refusal.value.message


def test_a_caller_says_nothing_about_its_key() -> None:
    ring = KeyRing(KEY, config.Auth())
    assert KEY not in repr(ring.identify(KEY, loopback=True))
    assert KEY not in repr(vars(ring))


def test_callers_never_share_a_salt() -> None:
    ring, after_restart = KeyRing(KEY, config.Auth()), KeyRing(KEY, config.Auth())
    holder, anonymous = ring.identify(KEY, loopback=True), ring.identify(None, loopback=True)
    assert holder == ring.identify(KEY, loopback=False)
    assert holder.salt != anonymous.salt
    assert holder.salt != after_restart.identify(KEY, loopback=True).salt
    assert holder.key_id == after_restart.identify(KEY, loopback=True).key_id


def test_salts_outlive_the_server_where_its_secret_does() -> None:
    ring, after_restart, other = (KeyRing(KEY, config.Auth(), secret) for secret in (b"one", b"one", b"other"))
    assert ring.identify(KEY, loopback=True) == after_restart.identify(KEY, loopback=True)
    assert ring.identify(None, loopback=True) == after_restart.identify(None, loopback=True)
    assert ring.identify(KEY, loopback=True).salt != other.identify(KEY, loopback=True).salt
    assert (
        ring.identify(KEY, loopback=True).salt
        != KeyRing(KEY + "r", config.Auth(), b"one").identify(KEY + "r", loopback=True).salt
    )


def test_the_secret_lasts_and_is_this_users_alone(tmp_path: Path) -> None:
    secret = lasting_secret(tmp_path / "cache")
    assert lasting_secret(tmp_path / "cache") == secret
    assert len(secret) == 32
    assert lasting_secret(tmp_path / "other") != secret
    (file,) = (tmp_path / "cache").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_all_who_ask_at_once_get_one_secret(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as askers:
        for turn in range(20):
            assert len(set(askers.map(lasting_secret, [tmp_path / str(turn)] * 8))) == 1


def replaced_by_link(file: Path) -> None:
    file.symlink_to(file.rename(file.with_name("elsewhere")))


def replaced_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda file: file.chmod(0o640), "this user's alone"),
        (lambda file: os.truncate(file, 0), "damaged"),
        (lambda file: os.truncate(file, 33), "damaged"),
        (replaced_by_link, "cannot read"),
        (replaced_by_pipe, "damaged"),
    ],
    ids=["readable by others", "empty", "longer", "link", "pipe"],
)
def test_a_secret_that_is_not_as_it_was_made_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None], complaint: str
) -> None:
    secret = lasting_secret(tmp_path)
    spoil(tmp_path / "salt")
    with pytest.raises(config.ConfigError, match=complaint) as refusal:
        lasting_secret(tmp_path)
    assert "cache.disk_bytes" in str(refusal.value.hint)
    assert secret.hex() not in refusal.value.message


def test_where_nothing_can_be_stored_the_secret_is_for_this_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert lasting_secret(tmp_path / "file") != lasting_secret(tmp_path / "file")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
