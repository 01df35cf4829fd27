"""What `ocserve doctor` says of the files and folders that the settings name. Nothing is changed by it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from ocserve import config, files

_TEXTS = ("privacy_text", "payment_text", "sla_text", "incident_text")


class Verdict(msgspec.Struct, frozen=True):
    """What one check found."""

    check: str
    verdict: Literal["ok", "warn", "fail"]
    message: str
    hint: str | None = None


def check_files(settings: config.Config) -> list[Verdict]:
    """Whether the files that the settings name can be used: texts to publish, the price list, the policy's program."""
    from ocserve.accounts import pricing
    from ocserve.pages import publication

    verdicts = []
    texts = {f"operator.{name}": getattr(settings.operator, name) for name in _TEXTS} | {
        "policy.text": settings.policy.text
    }
    for name, file in texts.items():
        if file is not None:
            verdicts.append(_read(name, file, partial(publication.read_text, name, file)))
    if (prices := settings.billing.prices) is not None:
        verdicts.append(_read("billing.prices", prices, partial(pricing.load, prices)))
    if settings.policy.command:
        program = settings.policy.command[0]
        found = shutil.which(program, path=config.bare_environment()["PATH"])
        missing = Verdict("policy.command", "fail", f"{program} is no program that can be started")
        verdicts.append(Verdict("policy.command", "ok", f"{found} can be started") if found else missing)
    return verdicts


def check_log(log: config.Log) -> list[Verdict]:
    """Whether lines can go to the file that is to take them; a server makes it and no folder for it."""
    if log.file is None:
        return []
    if os.path.isdir(log.file):
        reason: str | None = "it is a folder"
    elif not os.path.isdir(log.file.parent):
        reason = f"{log.file.parent} is no folder"
    else:
        reason = files.obstacle_to(log.file)
    if reason is not None:
        hint = "make the folder, or name another file with log.file"
        return [Verdict("log.file", "fail", f"cannot write {log.file}: {reason}", hint)]
    return [Verdict("log.file", "ok", f"{log.file} can be written")]


def check_keys(auth: config.Auth) -> list[Verdict]:
    """Whether the file of keys can be read, which a server needs beside a key of the settings too, and changed."""
    from ocserve.accounts.keystore import KeyStore

    file = config.keys_file(auth)
    try:
        count = sum(key.revoked is None for key in KeyStore(file).listed())
    except config.ConfigError as error:
        return [Verdict("keys", "fail", error.message, error.hint or "restore it from a copy, or move it away")]
    text = f"{file}, {count or 'no'} {'key' if count == 1 else 'keys'}"
    if reason := files.obstacle_in(file.parent):
        return [Verdict("keys", "warn", f"{text}; {reason}", "`ocserve keys` can change nothing there as this user")]
    return [Verdict("keys", "ok", text)]


def check_ledger(settings: config.Config) -> Verdict:
    """Whether requests can be recorded, by the rules of a start."""
    from ocserve import app
    from ocserve.accounts import ledger_schema

    if settings.ledger.use == "off":
        return Verdict("ledger", "ok", "requests are not recorded: ledger.use is off")
    file = config.ledger_file(settings.ledger)
    try:
        ledger_schema.check(file)
    except ledger_schema.LedgerError as error:
        try:
            needed = settings.ledger.use == "on" or settings.billing.prices is not None or app.has_key(settings.auth)
        except config.ConfigError:  # which the access says
            needed = True
        hint = "name another folder with ledger.directory, or set ledger.use to off"
        return Verdict("ledger", "fail" if needed else "warn", str(error), hint)
    return Verdict("ledger", "ok", f"{file} can be used" if file.exists() else f"{file} can be made")


def check_cache(settings: config.Config) -> Verdict:
    """Whether computed prefixes can be kept on disk, where they are to be; a server goes on without."""
    from ocserve.accounts import keys

    directory = config.cache_directory(settings.cache)
    if not (settings.engine.prefix_cache and settings.cache.disk_bytes):
        return Verdict("cache", "ok", "prefixes are not stored on disk")
    try:
        keys.check_secret(directory)
    except config.ConfigError as error:
        return Verdict("cache", "fail", error.message, error.hint)
    if reason := files.obstacle_in(directory):
        return Verdict("cache", "warn", f"prefixes: {reason}", "set cache.directory, or cache.disk_bytes to 0")
    return Verdict("cache", "ok", f"{directory} can hold prefixes")


def _read(setting: str, file: Path, read: Callable[[], object]) -> Verdict:
    try:
        read()
    except config.ConfigError as error:
        return Verdict(setting, "fail", error.message, error.hint)
    return Verdict(setting, "ok", f"{file} can be read")
