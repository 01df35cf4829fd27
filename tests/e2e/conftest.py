"""One real server on SmolLM2 for all tests that only ask it questions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.daemon import RunningDaemon, daemon


@pytest.fixture(scope="session")
def server(smollm2: Path, model_cache: Path) -> Iterator[RunningDaemon]:
    with daemon("smollm2:135m", store=model_cache) as running:
        yield running


@pytest.fixture
def client(server: RunningDaemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base_url, api_key="anything", max_retries=0) as made:
        yield made
