"""Who is calling: a credential becomes a `Caller`, or the request is refused.

Only digests of keys are kept. A caller's `key_id` is a name for logs and limits that says nothing about the key, its
`salt` separates callers in everything the engine shares, so that no tenant can observe another through cache timing.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from ocserve import config
from ocserve.errors import AuthenticationFailed

ANONYMOUS = "anonymous"

# Stands in where no key exists, so that hit, miss and absence take the same path. No text has this digest.
_NO_DIGEST = bytes(hashlib.sha256().digest_size)


@dataclass(frozen=True, slots=True)
class Caller:
    """Someone who may call. `salt` is random for each run of the server and constant within it."""

    key_id: str
    salt: bytes
    anonymous: bool


class KeyRing:
    """The keys that are accepted, and whether loopback may call without one.

    1. No key exists: loopback is anonymous whatever credential it sends, since editors insist on sending one.
    2. A key exists and a credential was sent: it must be the key, from anywhere.
    3. A key exists and none was sent: anonymous on loopback unless `auth.anonymous` is false, refused elsewhere.
    """

    def __init__(self, key: str | None, auth: config.Auth) -> None:
        self._digest = _digest(key) if key is not None else _NO_DIGEST
        self._anonymous_allowed = auth.anonymous
        self.has_key = key is not None
        secret = secrets.token_bytes(32)
        self._anonymous = _caller(ANONYMOUS, secret, anonymous=True)
        self._holder = _caller(f"key-{self._digest.hex()[:8]}", secret, anonymous=False)

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


def _caller(key_id: str, secret: bytes, *, anonymous: bool) -> Caller:
    salt = hmac.digest(secret, key_id.encode(), "sha256")[:16]
    return Caller(key_id, salt, anonymous)
