"""Who may call: the whole table of key, credential and place, and what a refusal must not tell."""

from __future__ import annotations

import pytest

from ocserve import config
from ocserve.accounts.keys import KeyRing
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
