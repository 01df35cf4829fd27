"""What a setting's value may be, and what a section of settings is."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Port = Annotated[int, Meta(ge=0, le=65535)]
Positive = Annotated[int, Meta(ge=1)]
# These cross into C as 32-bit integers; llama.cpp takes at most 256 sequences and 512 threads.
Tokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
BatchTokens = Annotated[int, Meta(ge=1, le=65_536)]
Sequences = Annotated[int, Meta(ge=1, le=254)]  # llama.cpp has 256 ids; one is for copying, one for a frozen state
Threads = Annotated[int, Meta(ge=1, le=512)]
Natural = Annotated[int, Meta(ge=0)]
# An engine is told no more in one message; what exceeds that after all is refused as too large.
BodyBytes = Annotated[int, Meta(ge=1, le=64 * 1024 * 1024)]
Seconds = Annotated[float, Meta(gt=0)]
Ratio = Annotated[float, Meta(ge=0, le=1)]
Text = Annotated[str, Meta(min_length=1)]
Country = Annotated[str, Meta(pattern=r"^[A-Z]{2}$")]

SECRETS = frozenset({"auth.api_key", "store.hub_token", "policy.token"})


def masked(name: str, value: object) -> object:
    """`value` as it may be shown: of a secret only whether it is set."""
    if name not in SECRETS:
        return value
    return "unset" if value is None else "set"


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A branch of the tree."""

    def __repr__(self) -> str:
        """Like a struct's own, without secrets."""
        section = type(self).__name__.lower()
        shown = (f"{name}={masked(f'{section}.{name}', getattr(self, name))!r}" for name in self.__struct_fields__)
        return f"{type(self).__name__}({', '.join(shown)})"
