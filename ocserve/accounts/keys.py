"""Who is calling: a credential becomes a `Caller`, or the request is refused.

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
from dataclasses import dataclass
from pathlib import Path

from ocserve import config
from ocserve.errors import AuthenticationFailed

ANONYMOUS = "anonymous"

# Stands in where no key exists, so that hit, miss and absence take the same path. No text has this digest.
_NO_DIGEST = bytes(hashlib.sha256().digest_size)

_SECRET_BYTES = 32
_FILE_NAME = "salt"
# On Windows files are kept from other users by their folder, and these do not exist.
_OPEN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True, slots=True)
class Caller:
    """Someone who may call. `salt` follows from the key and the server's secret, and tells nothing of either."""

    key_id: str
    salt: bytes
    anonymous: bool


class KeyRing:
    """The keys that are accepted, and whether loopback may call without one.

    1. No key exists: loopback is anonymous whatever credential it sends, since editors insist on sending one.
    2. A key exists and a credential was sent: it must be the key, from anywhere.
    3. A key exists and none was sent: anonymous on loopback unless `auth.anonymous` is false, refused elsewhere.
    """

    def __init__(self, key: str | None, auth: config.Auth, secret: bytes | None = None) -> None:
        """`secret` is what salts are made from; without one they are random for each run."""
        self._digest = _digest(key) if key is not None else _NO_DIGEST
        self._anonymous_allowed = auth.anonymous
        self.has_key = key is not None
        secret = secret or secrets.token_bytes(_SECRET_BYTES)
        self._anonymous = Caller(ANONYMOUS, _salt(secret, b""), anonymous=True)
        self._holder = Caller(f"key-{self._digest.hex()[:8]}", _salt(secret, self._digest), anonymous=False)

    def identify(self, credential: str | None, loopback: bool) -> Caller:
        """The caller who sent `credential` (an empty one counts as none); raises `AuthenticationFailed`."""
        valid = hmac.compare_digest(_digest(credential or ""), self._digest)
        if not self.has_key:  # 1
            if loopback:
                return self._anonymous
            raise AuthenticationFailed("This server has no API key and answers to this machine only.")
        if credential:  # 2
            if valid:
                return self._holder
            raise AuthenticationFailed("Incorrect API key provided.")
        if loopback and self._anonymous_allowed:  # 3
            return self._anonymous
        raise AuthenticationFailed("An API key is needed: send it as `Authorization: Bearer <key>`.")


def _digest(text: str) -> bytes:
    # Headers are decoded as latin-1, and surrogates must not raise here.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


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
