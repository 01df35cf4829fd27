"""What can go wrong with model files, as one tree.

    CatalogError
    ├── ReferenceInvalid    what was typed is not a reference to a model
    ├── ModelUnknown        a well-formed name that nothing answers to
    ├── NotInstalled        known or not, it is not on this machine
    ├── SourceUnreachable   the hub or the package index did not answer
    ├── SourceRefused       it answered, and what it said cannot be used (missing, gated, unsafe name or redirect)
    ├── ChecksumMismatch    the bytes are not the ones that were announced
    ├── DiskFull            the download would eat into the reserve of free space
    ├── GgufInvalid         the file is not a GGUF file that native code may see
    ├── DoesNotFit          the model needs more memory than there is, as it was asked for
    ├── ModelInUse          a running server serves it, so it cannot be removed
    ├── StoreDamaged        a manifest or a card cannot be read
    └── StoreUnwritable     the operating system refuses to write where models are kept

Every error has a sentence for the user and, where one helps, a hint.
"""

from __future__ import annotations


class CatalogError(Exception):
    """Base of the tree: `message` says what happened, `hint` what the user can do about it."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ReferenceInvalid(CatalogError):
    """What was typed has none of the four forms of a reference."""


class ModelUnknown(CatalogError):
    """The name is well formed, and no model or variant of the catalogue has it."""


class NotInstalled(CatalogError):
    """The model is not on this machine."""


class SourceUnreachable(CatalogError):
    """No usable answer came from the source in time; trying again later may help."""


class SourceRefused(CatalogError):
    """The source answered, and the answer rules the download out; trying again does not help."""


class ChecksumMismatch(CatalogError):
    """The bytes received, or announced, differ from the checksum that was promised."""


class DiskFull(CatalogError):
    """Free space would fall below the reserve. What was downloaded so far is kept for a later pull."""


class GgufInvalid(CatalogError):
    """The file breaks a rule of the GGUF format or a bound that keeps native code safe."""


class DoesNotFit(CatalogError):
    """No plan that keeps what the user set fits this machine's memory, or the model cannot be loaded as asked."""


class ModelInUse(CatalogError):
    """A process holds the model's folder to serve it."""


class StoreDamaged(CatalogError):
    """A manifest of the store or a card of the catalogue exists and cannot be decoded."""


class StoreUnwritable(CatalogError):
    """The operating system refuses a write below the store's directory, for another reason than a full disk."""
