"""Which key a command means, by its name or its id, and what the keys of the ledger are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ocserve.config import Config


def key_id(called: str, settings: Config) -> str:
    """The id of the key of this name or id, or `called` itself if the ledger has it as the id of one.

    Raises `ConfigError` for what is neither, and `LedgerError`.
    """
    from ocserve import config
    from ocserve.accounts import usage
    from ocserve.accounts.keystore import KeyStore

    known = next((key.id for key in KeyStore(config.keys_file(settings.auth)).listed() if key.is_called(called)), None)
    if known is not None:
        return known
    file = config.ledger_file(settings.ledger)
    if file.exists() and usage.has_key(file, called):
        return called
    raise config.ConfigError(
        f"there is no key called {called}, and the ledger has nothing of one",
        "`ocserve keys list` and `ocserve usage --by key` show them",
    )


def names(settings: Config) -> Mapping[str, str]:
    """The names of the keys by their ids. Raises `ConfigError`."""
    from ocserve import config
    from ocserve.accounts.keystore import KeyStore

    return {key.id: key.name for key in KeyStore(config.keys_file(settings.auth)).listed()}


def shown(key: str, named: Mapping[str, str]) -> str:
    """A key for people: its name, if it has one, beside its id."""
    return f"{named[key]} ({key})" if key in named else key
