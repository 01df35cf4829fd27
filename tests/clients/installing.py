"""Installs a client once, in a folder of its own, for all test runs of this user."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.clients.catalogue import Client
from tests.locked import locked

_TIMEOUT_S = 240
_COMPLETE = ".complete"  # written last: a folder without it is the rest of an installation that was cut off
_UNREACHABLE = re.compile(r"ENOTFOUND|ECONNREFUSED|EAI_AGAIN|ETIMEDOUT|ECONNRESET|NewConnectionError|Temporary failure")


class Missing(Exception):
    """The client is not here and cannot be had now; the message says why."""


def install(client: Client, root: Path, *, fetch_large: bool) -> Path:
    """The folder that `client` is installed in, below `root`. Safe beside other runs that install the same.

    Raises `Missing` for what the machine lacks (Node, a registry) and for a large client that is not to be fetched;
    an installation that fails otherwise is a failure.
    """
    if client.registry == "npm" and not (shutil.which("node") and shutil.which("npm")):
        raise Missing(f"{client.name} needs Node and npm, which are not installed")
    # A virtual environment is bound to its interpreter.
    key = client.lock.read_bytes() + (sys.base_prefix.encode() if client.registry == "pypi" else b"")
    home = root / f"{client.name}-{hashlib.sha256(key).hexdigest()[:12]}"
    with locked(home):
        if not (home / _COMPLETE).exists():
            if client.large and not fetch_large:
                raise Missing(f"{client.name} {client.version} is large and not installed; --full installs it")
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir()
            (_from_npm if client.registry == "npm" else _from_pypi)(client, home)
            (home / _COMPLETE).touch()
    return home


def python(home: Path) -> str:
    """The interpreter that sees a client's packages and no others."""
    return str(home / "bin" / "python")


def _from_npm(client: Client, home: Path) -> None:
    for name in ("package.json", "package-lock.json"):
        shutil.copy(client.lock.with_name(name), home)
    _run(client, ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], home)


def _from_pypi(client: Client, home: Path) -> None:
    _run(client, [sys.executable, "-m", "venv", "--without-pip", str(home)], home)
    options = ["--quiet", "--no-deps", "--no-compile", "--retries", "1", "--requirement", str(client.lock)]
    _run(client, [sys.executable, "-m", "pip", "--python", python(home), "install", *options], home)


def _run(client: Client, command: list[str], home: Path) -> None:
    done = subprocess.run(
        command, cwd=home, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S
    )
    said = done.stdout + done.stderr
    if done.returncode and _UNREACHABLE.search(said):
        raise Missing(f"{client.name} is not installed and its registry cannot be reached")
    assert done.returncode == 0, f"{client.name} {client.version} cannot be installed:\n{said[-2000:]}"
