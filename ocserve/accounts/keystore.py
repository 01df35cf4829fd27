"""The keys of several users: one file, written by `ocserve keys` and read by every server that uses it.

A key is shown once, when it is made. The file has its SHA-256, which is enough: a key has 190 random bits, so there is
nothing to guess. Keys look like `ocs-` and 38 letters and digits, the last six of which are a checksum: scanners for
secrets find them, and a mistyped one is known for what it is without a look at any key.

Why a file and not the ledger's database: keys are few and change rarely, a server must know them although the ledger
cannot be read, and an operator can copy, read and restore them with the usual tools. A change is written beside the
file and renamed over it while a lock is held, and every version has a later time stamp than the one before, so whoever
reads compares one `stat` and never misses a change: what a command has done holds from the moment it returns.

Revoked keys stay in the file: their names are in the ledger, and a server that has had keys does not become one
without.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import os
import re
import secrets
import stat
import string
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from ocserve import config, locks
from ocserve.accounts import pricing
from ocserve.decoding import resolved
from ocserve.files import only_regular

PREFIX = "ocs-"
KEY_PATTERN = re.compile(r"ocs-[0-9A-Za-z]{38}")  # what scanners for secrets look for
_DIGITS = string.digits + string.ascii_letters
_RANDOM_LENGTH = 32
_CHECK_LENGTH = 6  # 62**6 is more than 2**32
ANONYMOUS = "anonymous"  # the name and the id of who calls without a key
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
# Stands in where no key is found, so that hit and miss take the same path. No text has this digest.
_NOBODY = (bytes(hashlib.sha256().digest_size), None)
_REMEMBERED_SECRETS = 3  # of those that a key had before

Count = Annotated[int, Meta(ge=0)]


class OwnLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A key's limits in place of the settings': None is theirs, 0 is unlimited."""

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    requests_per_day: Count | None = None
    tokens_per_day: Count | None = None
    concurrent_requests: Count | None = None

    def over(self, defaults: config.Allowance) -> config.Allowance:
        """What holds for the key."""
        found = {}
        for name in self.__struct_fields__:
            own = getattr(self, name)
            found[name] = getattr(defaults, name) if own is None else own or None
        return config.Allowance(**found)


# A key without limits of its own.
AS_SETTINGS = OwnLimits()


class Secret(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One of a key's secrets: the hexadecimal SHA-256 of the text that callers send, and until when it is accepted."""

    digest: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    until: int | None = None


@resolved
class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A key, whatever its secret is. Times are seconds since 1970; no `models` are all.

    `id` names it in logs, limits and the ledger and does not follow from a secret. `price` has decimal strings, to be
    charged in place of the models' own. One that is `prepaid` may spend what it was credited, and no key more than its
    `spend_cap`, US dollars, in a calendar month.
    """

    id: str
    name: str
    created: int
    secrets: tuple[Secret, ...]
    expires: int | None = None
    revoked: int | None = None
    scope: Literal["use", "admin"] = "use"
    models: tuple[str, ...] = ()
    limits: OwnLimits = AS_SETTINGS
    price: dict[str, str] = {}
    prepaid: bool = False
    spend_cap: Annotated[str, Meta(pattern=r"^[0-9]{1,7}(\.[0-9]{1,12})?$")] | None = None

    def is_called(self, name: str) -> bool:
        """Whether this is its name or its id; no two keys share one."""
        return name in (self.name, self.id)

    def state(self, now: float) -> Literal["active", "expired", "revoked"]:
        """Whether it is accepted."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "active"


@resolved
class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Literal[1] = 1
    keys: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True)
class _Version:
    """The file as it was read. `stamp` tells it from every other version."""

    keys: tuple[Key, ...] = ()
    accepted: int = 0
    stamp: tuple[int, ...] = ()
    by_digest: dict[bytes, tuple[bytes, tuple[Key, Secret] | None]] = field(default_factory=dict, repr=False)


def new_text() -> str:
    """A fresh key."""
    drawn = "".join(secrets.choice(_DIGITS) for _ in range(_RANDOM_LENGTH))
    return PREFIX + drawn + _checksum(drawn)


def is_mistyped(text: str) -> bool:
    """Whether `text` means to be a key of this kind and cannot be one."""
    if not text.startswith(PREFIX):
        return False
    drawn, check = text[len(PREFIX) : -_CHECK_LENGTH], text[-_CHECK_LENGTH:]
    return KEY_PATTERN.fullmatch(text) is None or not hmac.compare_digest(check, _checksum(drawn))


def _checksum(drawn: str) -> str:
    number, digits = binascii.crc32(drawn.encode()), ""
    for _ in range(_CHECK_LENGTH):
        number, digit = divmod(number, len(_DIGITS))
        digits = _DIGITS[digit] + digits
    return digits


class KeyStore:
    """The keys in one file, which need not exist. Reading is for one thread; changes may come from any process."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """`clock` tells seconds since 1970."""
        self.path = path
        self.clock = clock
        self._version = _Version()
        self._had_keys = False

    @property
    def has_keys(self) -> bool:
        """Whether there is a key, or was one since the server started. Raises `ConfigError` for a file that is none."""
        self._had_keys = bool(self.listed()) or self._had_keys
        return self._had_keys

    @property
    def accepted(self) -> int:
        """How many keys the last version read has that were not revoked."""
        return self._version.accepted

    def listed(self) -> tuple[Key, ...]:
        """Every key, revoked ones included, in the order of their making. Raises `ConfigError`."""
        return self._current().keys

    def find(self, digest: bytes) -> tuple[Key, Secret] | None:
        """The key that has a secret of this digest, whatever its state. Raises `ConfigError`.

        The time that it takes says nothing of how near to a key a guess was.
        """
        known, found = self._current().by_digest.get(digest, _NOBODY)
        return found if hmac.compare_digest(digest, known) else None

    def create(self, name: str, **facts: object) -> tuple[Key, str]:
        """Make a key called `name` with these fields, and the text that callers send, which is not kept."""
        if not _NAME.fullmatch(name):
            raise config.ConfigError(
                "a key's name has 1 to 64 letters, digits, dots, hyphens, underscores and @, and begins with one of the"
                " first two"
            )
        if name == ANONYMOUS:
            raise config.ConfigError(f"a key cannot be called {ANONYMOUS}: that is who calls without one")
        text, now = new_text(), int(self.clock())
        with self._editing() as keys:
            if any(key.is_called(name) for key in keys):
                raise config.ConfigError(f"there is a key called {name}", "`ocserve keys rotate` gives it a new secret")
            taken = {called for key in keys for called in (key.id, key.name)}
            key_id = next(made for made in iter(lambda: f"key-{secrets.token_hex(6)}", "") if made not in taken)
            described = {"id": key_id, "name": name, "created": now, "secrets": (_secret(text),), **facts}
            try:
                key = msgspec.convert(described, Key)
            except msgspec.ValidationError as error:
                raise config.ConfigError(f"this cannot be kept of a key: {error}") from None
            _check_price(key.price)
            _check_cap(key.spend_cap)
            keys.append(key)
        return key, text

    def rotate(self, name: str, overlap_s: float) -> tuple[Key, str]:
        """Give a key a new secret; the one before is accepted for `overlap_s` more seconds."""
        text, now = new_text(), self.clock()

        def rotated(key: Key) -> Key:
            until = int(now + overlap_s)
            kept = [
                replace(each, until=until if each.until is None else min(each.until, until)) for each in key.secrets
            ]
            # What has been replaced is remembered, so that its holder can be told; a few are enough.
            ended = [each for each in kept if each.until is not None and each.until <= now]
            forgotten = ended[:-_REMEMBERED_SECRETS]
            return replace(key, secrets=(*(each for each in kept if each not in forgotten), _secret(text)))

        return self._change(name, rotated), text

    def revoke(self, name: str) -> Key:
        """Accept a key no longer, with any of its secrets."""
        now = int(self.clock())
        return self._change(name, lambda key: key if key.revoked is not None else replace(key, revoked=now))

    def limit(self, name: str, **changed: int | None) -> Key:
        """Change some of a key's own limits."""
        return self._change(name, lambda key: replace(key, limits=replace(key.limits, **changed)))

    def cap(self, name: str, spend_cap: str | None) -> Key:
        """Change what a key may spend in a month, US dollars; None: anything."""
        _check_cap(spend_cap)
        return self._change(name, lambda key: replace(key, spend_cap=spend_cap))

    def named(self, name: str) -> Key:
        """The key of this name or id; raises `ConfigError`."""
        return next((key for key in self.listed() if key.is_called(name)), None) or _no_such(name)

    def _change(self, name: str, changed: Callable[[Key], Key]) -> Key:
        with self._editing() as keys:
            for index, key in enumerate(keys):
                if key.is_called(name):
                    keys[index] = changed(key)
                    return keys[index]
            return _no_such(name)

    @contextmanager
    def _editing(self) -> Iterator[list[Key]]:
        """The keys as they are now, to be changed: what is left in the list is written when the block ends well."""
        with self._alone():
            before = self._current()
            keys = list(before.keys)
            yield keys
            if tuple(keys) != before.keys:
                self._write(_Document(keys=tuple(keys)))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other process changes the file."""
        with ExitStack() as held:
            try:
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                held.enter_context(locks.exclusive(self.path.with_name(f"{self.path.name}.lock"), lambda: None))
            except OSError as error:
                raise config.ConfigError(f"cannot write in {self.path.parent}: {error.strerror}") from None
            yield

    def _write(self, document: _Document) -> None:
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        content = msgspec.json.format(msgspec.json.encode(document)) + b"\n"
        try:
            with suppress(FileNotFoundError):
                temporary.unlink()  # of a command that was killed; the lock is ours
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            later = max([time.time_ns(), *(stamp + 1_000_000 for stamp in self._version.stamp[:1])])
            os.utime(temporary, ns=(later, later))
            os.replace(temporary, self.path)
            _sync_directory(self.path.parent)
        except OSError as error:
            raise config.ConfigError(f"cannot write {self.path}: {error.strerror}") from None

    def _current(self) -> _Version:
        """The file as it is now: read again if it is another than before."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            self._version = _Version()
            return self._version
        except OSError as error:
            raise config.ConfigError(f"cannot read {self.path}: {error.strerror}") from None
        if _stamp(found) != self._version.stamp:
            self._version = self._read()
        return self._version

    def _read(self) -> _Version:
        try:
            with open(self.path, "rb", opener=only_regular) as file:
                found = os.fstat(file.fileno())
                content = file.read()
        except OSError as error:
            raise config.ConfigError(f"cannot read {self.path}: {error.strerror}") from None
        if os.name == "posix" and (found.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or found.st_uid != os.geteuid()):
            raise config.ConfigError(
                f"the file of keys, {self.path}, is not this user's alone", f"chmod 600 {self.path}"
            )
        try:
            keys = msgspec.json.decode(content, type=_Document).keys
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise config.ConfigError(f"{self.path} is no file of keys: {error}") from None
        entries = [(bytes.fromhex(secret.digest), (key, secret)) for key in keys for secret in key.secrets]
        return _Version(
            keys,
            sum(key.revoked is None for key in keys),
            _stamp(found),
            {digest: (digest, found) for digest, found in entries},
        )


def digest_of(text: str) -> bytes:
    """What is kept of a key."""
    # Headers are decoded as latin-1, and surrogates must not raise here.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _secret(text: str) -> Secret:
    return Secret(digest_of(text).hex())


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode, found.st_uid


def _check_price(price: dict[str, str]) -> None:
    try:
        pricing.check_own(price)
    except ValueError as error:
        raise config.ConfigError(str(error), "prices are US dollars, as `billing.prices` has them") from None


def _check_cap(spend_cap: str | None) -> None:
    try:
        least = 0 if spend_cap is None else pricing.amount(spend_cap)
    except ValueError as error:
        raise config.ConfigError(f"a spend cap: {error}") from None
    if least < 0:
        raise config.ConfigError("a spend cap cannot be less than nothing")


def _no_such(name: str) -> Key:
    raise config.ConfigError(f"there is no key called {name}", "`ocserve keys list` shows them")


def _sync_directory(directory: Path) -> None:
    """Make a rename durable. Windows has no such call and needs none."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
