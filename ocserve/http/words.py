"""The engine's refusals in the words of the client whose request it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ocserve.errors import ApiError


@contextmanager
def in_clients_words(paths: Mapping[str, str]) -> Iterator[None]:
    """Give what is refused inside the name that the client used: `paths` are the engine's names, and the client's."""
    try:
        yield
    except ApiError as error:
        for ours, theirs in paths.items():
            if error.param and ours in error.param:
                error.param = error.param.replace(ours, theirs)
                error.message = error.message.replace(ours, theirs)
        raise
