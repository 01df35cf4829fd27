"""One server for the tests that need nothing special."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.http.harness import Served, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server
