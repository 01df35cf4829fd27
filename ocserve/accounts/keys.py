"""Who is calling, and what they may do: a credential becomes a `Caller`, or the request is refused.

Only digests of keys are kept. A caller's `key_id` is a name for logs and limits that says nothing about the key, its
`salt` separates callers in everything the engine shares, so that no tenant can observe another through cache timing.
Salts come from a secret: one for each run, or one in a file where stored prefixes are to be found after a restart.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ocserve import config
from ocserve.accounts import pricing
from ocserve.accounts.balances import UNBOUNDED, Account
from ocserve.accounts.keystore import ANONYMOUS, AS_SETTINGS, Key, KeyStore, OwnLimits, Secret, digest_of, is_mistyped
from ocserve.errors import AuthenticationFailed, Forbidden, KeyExpired, KeyRevoked, KeysUnavailable
from ocserve.modelcard import ServedModel

# Stands in where the settings have no key, so that hit, miss and absence take the same path. No text has this digest.
_NO_DIGEST = bytes(hashlib.sha256().digest_size)
_SECRET_BYTES = 32
_FILE_NAME = "salt"
# On Windows files are kept from other users by their folder, and these do not exist.
_OPEN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True, slots=True)
class Caller:
    """Someone who may call, and the one place that says what they may do.

    `salt` follows from the server's secret and what is known of the key, and tells nothing of either. No `models` are
    all. `among_others` is whether there are further keys. `limits` and `price` are the key's own, where it has any, and
    `account` bounds what it may spend.
    """

    key_id: str
    salt: bytes
    anonymous: bool
    name: str = ""
    admin: bool = False
    among_others: bool = False
    models: tuple[str, ...] = ()
    limits: OwnLimits = AS_SETTINGS
    price: Mapping[str, str] = field(default_factory=dict, hash=False)
    account: Account = UNBOUNDED

    def may_use(self, model: ServedModel) -> bool:
        """Whether requests for this model are answered; to others it does not exist."""
        return not self.models or any(map(model.answers_to, self.models))

    def check_admin(self) -> None:
        """Raise `Forbidden` for whoever may not administer the server."""
        if not self.admin:
            raise Forbidden("This needs a key with the scope `admin`.", code="admin_scope_needed")


class KeyRing:
    """The keys that are accepted, and whether loopback may call without one.

    1. No key exists: loopback is anonymous whatever credential it sends, since editors insist on sending one, and may
       do everything: it is the user's own machine.
    2. A key exists and a credential was sent: it must be a key, from anywhere.
    3. A key exists and none was sent: anonymous on loopback unless `auth.anonymous` is false, refused elsewhere.

    The key of the settings may do everything. Those of the `store` are looked at anew for each request; where its file
    cannot be read, who sends another credential than the settings' key is not known.
    """

    def __init__(
        self, key: str | None, auth: config.Auth, secret: bytes | None = None, store: KeyStore | None = None
    ) -> None:
        """`secret` is what salts are made from; without one they are random for each run."""
        self._store = store
        self._digest = digest_of(key) if key is not None else None
        self._anonymous_allowed = auth.anonymous
        self._secret = secret or secrets.token_bytes(_SECRET_BYTES)
        anonymous = Caller(ANONYMOUS, _salt(self._secret, b""), anonymous=True, name=ANONYMOUS)
        self._anonymous, self._owner = anonymous, replace(anonymous, admin=True)
        if self._digest is not None:
            key_id, salt = f"key-{self._digest.hex()[:8]}", _salt(self._secret, self._digest)
            self._holder = Caller(key_id, salt, anonymous=False, name=key_id, admin=True)

    @property
    def has_key(self) -> bool:
        """Whether there is any key, or was one since the server started. Raises `KeysUnavailable`."""
        with _readable():
            return self._digest is not None or (self._store is not None and self._store.has_keys)

    def check(self) -> None:
        """Raise `KeysUnavailable` where it cannot be known who calls."""
        with _readable():
            if self._store is not None:
                self._store.listed()

    @property
    def ready(self) -> bool:
        """Whether it can be known who calls."""
        try:
            self.check()
        except KeysUnavailable:
            return False
        return True

    def identify(self, credential: str | None, loopback: bool) -> Caller:
        """The caller who sent `credential` (an empty one counts as none).

        Raises `AuthenticationFailed`, and `KeysUnavailable` where that cannot be known.
        """
        digest = digest_of(credential or "")
        holds = hmac.compare_digest(digest, self._digest or _NO_DIGEST)
        found = None
        try:
            with _readable():
                found = self._store.find(digest) if self._store is not None else None
        except KeysUnavailable:
            if credential and not holds:
                raise
        if not self.has_key:  # 1
            if loopback:
                return self._owner
            raise AuthenticationFailed("This server has no API key and answers to this machine only.")
        if credential:  # 2
            if holds:
                return replace(self._holder, among_others=self._several)
            if found is not None:
                return self._caller(*found)
            raise AuthenticationFailed(
                "Incorrect API key provided: it was not copied whole, its checksum is wrong."
                if is_mistyped(credential)
                else "Incorrect API key provided."
            )
        if loopback and self._anonymous_allowed:  # 3
            return replace(self._anonymous, among_others=True)
        raise AuthenticationFailed("An API key is needed: send it as `Authorization: Bearer <key>`.")

    @property
    def _several(self) -> bool:
        kept = self._store.accepted if self._store is not None else 0
        return kept + (self._digest is not None) > 1

    def _caller(self, key: Key, secret: Secret) -> Caller:
        """The holder of a key in the store, which must be good still: who presents it whole is no stranger."""
        assert self._store is not None
        now = self._store.clock()
        if key.revoked is not None:
            raise KeyRevoked("This API key was revoked.")
        if key.expires is not None and key.expires <= now:
            raise KeyExpired("This API key has expired.")
        if secret.until is not None and secret.until <= now:
            raise KeyRevoked("This API key was replaced by another one.")
        return Caller(
            key.id,
            _salt(self._secret, key.id.encode()),
            anonymous=False,
            name=key.name,
            admin=key.scope == "admin",
            among_others=self._several,
            models=key.models,
            limits=key.limits,
            price=key.price,
            account=account_of(key),
        )


def account_of(key: Key) -> Account:
    """What bounds a key's spending."""
    cap = None if key.spend_cap is None else pricing.amount(key.spend_cap)
    return Account(prepaid=key.prepaid, spend_cap=cap)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """While a request is served: a file of keys that cannot be used is nobody's fault who calls."""
    try:
        yield
    except config.ConfigError:
        raise KeysUnavailable(
            "The file of keys cannot be read. Its operator finds out more with `ocserve keys list`."
        ) from None


def _salt(secret: bytes, key_digest: bytes) -> bytes:
    return hmac.digest(secret, key_digest, "sha256")[:16]


def lasting_secret(directory: Path) -> bytes:
    """The secret in `directory`, made there by the first that asks: 32 random bytes in a file of mode 0600.

    Raises `ConfigError` for a file that others may read or that is no such secret: to go on with another one would
    quietly lose every stored prefix, to use it would let its reader tell tenants' prefixes by name. Where no file can
    be made nothing can be stored either, and the secret is random for this run.
    """
    file = directory / _FILE_NAME
    if not os.path.lexists(file):
        fresh = secrets.token_bytes(_SECRET_BYTES)
        try:
            _make_secret(file, fresh)
        except OSError:
            return fresh
    return _read_secret(file)


def check_secret(directory: Path) -> None:
    """Raise `ConfigError` for a secret in `directory` that would be refused; none is made."""
    if os.path.lexists(file := directory / _FILE_NAME):
        _read_secret(file)


def _make_secret(file: Path, secret: bytes) -> None:
    """Make `file` whole or not at all, and never in place of one that is there."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN, 0o600), "wb") as output:
            output.write(secret)
            output.flush()
            os.fsync(output.fileno())  # it is made once, and an empty file after a power cut would be refused
        with contextlib.suppress(FileExistsError):  # another process was first: its secret is the one
            os.link(temporary, file)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _read_secret(file: Path) -> bytes:
    hint = f"remove {file} (stored prefixes will be computed again), or set cache.disk_bytes to 0"
    try:
        with open(os.open(file, os.O_RDONLY | _OPEN), "rb") as source:
            found = os.fstat(source.fileno())
            secret = source.read(_SECRET_BYTES + 1) if stat.S_ISREG(found.st_mode) else b""
    except OSError as error:
        raise config.ConfigError(f"cannot read the secret for stored prefixes: {error.strerror}", hint) from None
    if os.name == "posix" and (found.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or found.st_uid != os.geteuid()):
        raise config.ConfigError("the secret for stored prefixes is not this user's alone", hint)
    if len(secret) != _SECRET_BYTES:
        raise config.ConfigError("the secret for stored prefixes is damaged", hint)
    return secret
