"""Keys of several users: what is kept of them, who sees a change and when, and what a guess learns."""

from __future__ import annotations

import ast
import inspect
import json
import math
import os
import random
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ocserve import config
from ocserve.accounts import keys as keys_module
from ocserve.accounts import keystore
from ocserve.accounts.keys import KeyRing
from ocserve.accounts.keystore import KEY_PATTERN, KeyStore, OwnLimits, digest_of, is_mistyped, new_text
from ocserve.errors import AuthenticationFailed, KeyExpired, KeyRevoked, KeysUnavailable

SETTINGS_KEY = "correct-horse-battery"


class Clock:
    def __init__(self) -> None:
        self.now = 1_790_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> KeyStore:
    return KeyStore(tmp_path / "data" / "keys.json", clock)


def ring(store: KeyStore, key: str | None = None, secret: bytes = b"secret") -> KeyRing:
    return KeyRing(key, config.Auth(), secret, store)


def test_keys_can_be_recognised_and_do_not_repeat() -> None:
    made = {new_text() for _ in range(1000)}
    assert len(made) == 1000
    assert all(KEY_PATTERN.fullmatch(text) for text in made)
    assert not any(map(is_mistyped, made))


def test_every_mistyped_character_is_noticed() -> None:
    text = new_text()
    source = random.Random(1)
    for place in range(len("ocs-"), len(text)):
        other = source.choice([each for each in "0aZ9qX" if each != text[place]])
        assert is_mistyped(text[:place] + other + text[place + 1 :])
    assert is_mistyped(text[:-1])
    assert is_mistyped(text + "x")
    assert not is_mistyped("sk-of-somebody-else")


def test_nothing_that_is_kept_is_a_usable_key(store: KeyStore) -> None:
    made = [store.create(f"user-{number}") for number in range(20)]
    made += [store.rotate("user-3", 60.0)]
    folder = store.path.parent
    kept = b"".join(file.read_bytes() for file in folder.iterdir()).decode()
    for key, text in made:
        assert text not in kept
        assert text[4:20] not in kept
        assert text[-6:] not in kept
        assert text not in repr(key) + repr(vars(store))
    everybody = ring(store)
    for digest in (secret["digest"] for key in json.loads(store.path.read_text())["keys"] for secret in key["secrets"]):
        with pytest.raises(AuthenticationFailed):  # a copy of the file lets nobody in
            everybody.identify(digest, loopback=True)
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_key_is_its_facts(store: KeyStore, clock: Clock) -> None:
    key, text = store.create(
        "acme",
        scope="admin",
        models=("tiny",),
        limits={"requests_per_minute": 5, "tokens_per_day": 0},
        price={"prompt": "0.0000002"},
        expires=int(clock.now) + 60,
    )
    caller = ring(store).identify(text, loopback=False)
    assert (caller.key_id, caller.name, caller.admin, caller.anonymous) == (key.id, "acme", True, False)
    assert (caller.models, caller.price) == (("tiny",), {"prompt": "0.0000002"})
    defaults = config.Limits(requests_per_minute=60, tokens_per_day=1000, concurrent_requests=3)
    assert caller.limits.over(defaults) == config.Allowance(requests_per_minute=5, concurrent_requests=3)
    assert KeyStore(store.path).listed() == (key,)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("acme", {}),
        ("", {}),
        ("-x", {}),
        ("a b", {}),
        ("anonymous", {}),
        ("x" * 65, {}),
        ("new", {"price": {"prompt": "free"}}),
        ("new", {"price": {"prompt": "2"}}),
        ("new", {"price": {"prompt": "0.0000000000001"}}),
        ("new", {"price": {"tokens": "0.1"}}),
        ("new", {"limits": {"requests_per_minute": -1}}),
        ("new", {"limits": {"rpm": 1}}),
        ("new", {"scope": "root"}),
        ("new", {"model": "tiny"}),
    ],
)
def test_what_cannot_be_kept_is_refused_and_changes_nothing(
    store: KeyStore, name: str, facts: dict[str, object]
) -> None:
    store.create("acme")
    before = store.path.read_bytes()
    with pytest.raises(config.ConfigError):
        store.create(name, **facts)
    assert store.path.read_bytes() == before


def test_a_server_without_keys_is_its_owners(store: KeyStore) -> None:
    everybody = ring(store)
    assert everybody.identify("anything", loopback=True).admin
    assert not everybody.has_key
    _, text = store.create("first")
    assert not everybody.identify(None, loopback=True).admin
    assert everybody.identify(text, loopback=False).name == "first"
    with pytest.raises(AuthenticationFailed):
        everybody.identify("anything", loopback=True)


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_server_that_has_had_keys_never_becomes_one_without(store: KeyStore, forgotten: bool) -> None:
    everybody = ring(store)
    _, text = store.create("only")
    assert everybody.identify(text, loopback=True).name == "only"
    if forgotten:
        store.path.unlink()
    else:
        store.revoke("only")
    for credential in (text, "anything"):
        with pytest.raises(AuthenticationFailed):
            everybody.identify(credential, loopback=True)
    assert everybody.has_key
    assert not everybody.identify(None, loopback=True).admin


def test_holders_are_told_what_strangers_are_not(store: KeyStore, clock: Clock) -> None:
    everybody = ring(store, SETTINGS_KEY)
    _, expiring = store.create("expiring", expires=int(clock.now) + 10)
    _, revoked = store.create("revoked")
    _, replaced = store.create("replaced")
    store.revoke("revoked")
    store.rotate("replaced", 5)
    assert everybody.identify(expiring, loopback=False).name == "expiring"
    assert everybody.identify(replaced, loopback=False).name == "replaced"
    clock.now += 10
    for text, error in ((expiring, KeyExpired), (revoked, KeyRevoked), (replaced, KeyRevoked)):
        with pytest.raises(error) as refusal:
            everybody.identify(text, loopback=True)
        assert refusal.value.status == 401
        near = text[:10] + ("a" if text[10] != "a" else "b") + text[11:]
        for guess in (near, text + "x", new_text(), "sk-nothing"):
            with pytest.raises(AuthenticationFailed) as stranger:
                everybody.identify(guess, loopback=True)
            assert stranger.value.code == "invalid_api_key"
            assert guess[4:] not in stranger.value.message
    assert everybody.identify(SETTINGS_KEY, loopback=False).admin


def test_a_replaced_key_is_the_same_caller(store: KeyStore, clock: Clock) -> None:
    everybody = ring(store)
    key, before = store.create("acme", limits={"requests_per_minute": 5})
    same, after = store.rotate("acme", 60)
    assert same.id == key.id
    assert everybody.identify(before, loopback=False) == everybody.identify(after, loopback=False)
    _, third = store.rotate("acme", 0)
    for text in (before, after):
        with pytest.raises(KeyRevoked):
            everybody.identify(text, loopback=False)
    assert everybody.identify(third, loopback=False).key_id == key.id
    other, _ = store.create("other")
    salts = {everybody.identify(text, True).salt for text in (third, store.rotate("other", 0)[1], None)}
    assert len(salts) == 3
    assert other.id != key.id


def test_limits_change_one_by_one(store: KeyStore) -> None:
    store.create("acme", limits={"requests_per_minute": 5, "tokens_per_day": 100})
    assert store.limit("acme", requests_per_minute=None, concurrent_requests=2).limits == OwnLimits(
        tokens_per_day=100, concurrent_requests=2
    )
    with pytest.raises(config.ConfigError, match="no key called nobody"):
        store.limit("nobody", requests_per_minute=1)


def test_every_change_is_seen_at_once_by_whoever_reads(store: KeyStore) -> None:
    """Also changes within one tick of the file system's clock, which leave its size and even its inode the same."""
    reader = KeyStore(store.path)
    for number in range(200):
        _, text = store.create(f"user-{number:03}")
        assert reader.find(digest_of(text)) is not None
        store.revoke(f"user-{number:03}")
        assert reader.listed()[-1].revoked is not None


def test_commands_of_several_processes_lose_nothing(store: KeyStore) -> None:
    code = (
        "import sys; from pathlib import Path; from ocserve.accounts.keystore import KeyStore\n"
        "store = KeyStore(Path(sys.argv[1]))\n"
        "for number in range(15): store.create(f'{sys.argv[2]}-{number}')"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, str(store.path), name]) for name in ("a", "b", "c")]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    assert sorted(key.name for key in store.listed()) == sorted(
        f"{name}-{number}" for name in "abc" for number in range(15)
    )


def test_a_command_that_is_killed_leaves_the_old_file_or_the_new_one(store: KeyStore) -> None:
    store.create("acme")
    (store.path.parent / "keys.json.tmp").write_bytes(b"half a fi")
    store.create("other")
    assert [key.name for key in store.listed()] == ["acme", "other"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(b"{"),
        lambda file: file.write_bytes(b'{"version": 2, "keys": []}'),
        lambda file: file.write_bytes(b'{"version": 1, "keys": [{"name": "x"}]}'),
        lambda file: file.chmod(0o644),
        lambda file: (file.unlink(), file.mkdir()),
    ],
    ids=["cut", "version", "not keys", "readable by others", "folder"],
)
def test_where_it_cannot_be_known_who_calls_nobody_is_let_in(store: KeyStore, spoil: Callable[[Path], object]) -> None:
    everybody, without = ring(store, SETTINGS_KEY), ring(store, None)
    _, text = store.create("acme")
    everybody.identify(text, loopback=True)
    without.identify(text, loopback=True)
    spoil(store.path)
    for keys, credential in ((everybody, text), (everybody, "x" * 40), (without, text), (without, None)):
        with pytest.raises(KeysUnavailable) as refusal:
            keys.identify(credential, loopback=True)
        assert str(store.path) not in refusal.value.message
    # Of these two the settings alone say who they are.
    assert everybody.identify(SETTINGS_KEY, loopback=False).admin
    assert everybody.identify(None, loopback=True).anonymous
    with pytest.raises(AuthenticationFailed):
        everybody.identify(None, loopback=False)
    with pytest.raises(config.ConfigError):
        store.create("next")


# ---------------------------------------------------------------------------------------------------------------------
# P27: what the time of an answer tells.


def test_credentials_are_compared_in_constant_time_only() -> None:
    """No `==` or `in` on what somebody sent or on what is kept of a key: digests go through one dictionary."""
    for module in (keys_module, keystore):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Compare):
                sides = " ".join(ast.unparse(side) for side in (node.left, *node.comparators))
                secret = {"credential", "digest", "text", "check", "known"} & set(sides.replace(".", " ").split())
                assert not secret or all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops), ast.unparse(node)


def welch_t(one: list[int], other: list[int]) -> float:
    def mean_and_error(values: list[int]) -> tuple[float, float]:
        mean = sum(values) / len(values)
        return mean, sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)

    (mean, error), (other_mean, other_error) = mean_and_error(one), mean_and_error(other)
    return (mean - other_mean) / math.sqrt(error + other_error)


@pytest.mark.alone
def test_the_time_of_a_refusal_says_nothing_of_how_near_the_guess_was(store: KeyStore, full: bool) -> None:
    """Guesses that share all but a few characters with a key against guesses that share none, in random order."""
    samples = 100_000 if full else 20_000
    texts = [store.create(f"user-{number}")[1] for number in range(50)]
    everybody = ring(store, SETTINGS_KEY)
    source = random.Random(7)
    near = [text[:-8] + new_text()[-8:] for text in texts for _ in range(20)]
    far = [new_text()[:-6] + "000000" for _ in near]
    assert all(map(is_mistyped, (*near, *far)))
    times: dict[bool, list[int]] = {True: [], False: []}
    for index in range(2 * samples):
        is_near = source.random() < 0.5
        guess = (near if is_near else far)[index % len(near)]
        begun = time.perf_counter_ns()
        try:
            everybody.identify(guess, True)
        except AuthenticationFailed:
            times[is_near].append(time.perf_counter_ns() - begun)
    # Interruptions are not part of the path: the slowest hundredth goes, by one bound for both.
    bound = sorted(times[True] + times[False])[int(0.99 * 2 * samples)]
    kept = [[value for value in times[is_near] if value < bound] for is_near in (True, False)]
    t = welch_t(*kept)
    print(f"|t| = {abs(t):.2f} over {sum(map(len, kept))} refusals")
    assert abs(t) < 4.5


def test_the_file_of_another_user_is_refused(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create("acme")
    monkeypatch.setattr(os, "geteuid", lambda: store.path.stat().st_uid + 1)
    with pytest.raises(config.ConfigError, match="not this user's alone"):
        KeyStore(store.path).listed()


def test_each_former_secret_is_accepted_as_long_as_was_said(store: KeyStore) -> None:
    key, text = store.create("acme")
    texts = [text, *(store.rotate("acme", 3600)[1] for _ in range(6))]
    everybody = ring(store)
    assert {everybody.identify(each, loopback=False).key_id for each in texts} == {key.id}
