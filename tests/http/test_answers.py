"""What an error says in headers: whoever would wait in vain, or longer than anybody waits, gives up at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import openai
import pytest

from ocserve import config
from ocserve.errors import ApiError, EngineUnavailable, InvalidRequest, Overloaded, RateLimited, UnderMaintenance
from ocserve.generation import GenerateRequest
from ocserve.http.answers import error_headers
from tests.http.harness import CHAT, Served, serving
from tests.scripted import Script, ScriptedEngine

HI: Any = [{"role": "user", "content": "Hi"}]
# The same refusal on every surface.
ROUTES: dict[str, Any] = {
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"model": "tiny", "input": "Hi"},
    "/v1/messages": {"model": "tiny", "max_tokens": 9, "messages": HI},
    "/v1beta/models/tiny:generateContent": {"contents": [{"parts": [{"text": "Hi"}]}]},
    "/api/chat": {"model": "tiny", "messages": HI},
}


@contextmanager
def refusing(error: ApiError) -> Iterator[tuple[Served, list[GenerateRequest]]]:
    """A server that refuses whatever reaches it, and what has."""
    asked: list[GenerateRequest] = []

    def script(request: GenerateRequest) -> Script:
        asked.append(request)
        return Script(refuse=error)

    with serving(lambda: ScriptedEngine(script)) as served:
        yield served, asked


@pytest.mark.parametrize(
    "error",
    [Overloaded("Full.", retry_after_s=121), UnderMaintenance("Until noon.", retry_after_s=7200)],
    ids=["429", "503"],
)
def test_the_usual_clients_give_up_at_once_where_the_wait_is_longer_than_any_promise(error: ApiError) -> None:
    async def ask(url: str) -> list[BaseException | object]:
        """Both with the two retries that they make by default."""
        async with (
            openai.AsyncOpenAI(base_url=url + "/v1", api_key="x") as first,
            anthropic.AsyncAnthropic(base_url=url, api_key="x") as second,
            asyncio.timeout(20),
        ):
            return await asyncio.gather(
                first.chat.completions.create(model="tiny", messages=HI),
                second.messages.create(model="tiny", max_tokens=9, messages=HI),
                return_exceptions=True,
            )

    with refusing(error) as (served, asked):
        found = asyncio.run(ask(served.url))
        assert len(asked) == 2, "neither tried again"
    for refusal in found:
        assert isinstance(refusal, openai.APIStatusError | anthropic.APIStatusError)
        assert refusal.status_code == error.status
        assert refusal.response.headers["x-should-retry"] == "false"
        assert int(refusal.response.headers["retry-after"]) == error.retry_after_s


@pytest.mark.parametrize("path", ROUTES)
def test_every_surface_says_so(path: str) -> None:
    with refusing(Overloaded("Full.", retry_after_s=121)) as (served, _):
        answer = served.request("POST", path, ROUTES[path])
        assert (answer.status, answer.headers["x-should-retry"]) == (429, "false"), answer.body


def test_a_keys_own_limit_for_which_no_ticket_is_given_says_so() -> None:
    with serving(limits=config.Limits(requests_per_day=1)) as served:
        assert served.chat().status == 200
        refused = served.chat()
        assert int(refused.headers["retry-after"]) > 86_000
        assert refused.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "error",
    [
        RateLimited("Slow.", retry_after_s=119.001),
        Overloaded("Full.", retry_after_s=1),
        EngineUnavailable("It restarts.", retry_after_s=120),
        EngineUnavailable("It restarts."),
        InvalidRequest("No."),
    ],
)
def test_whoever_is_told_to_come_back_may(error: ApiError) -> None:
    assert b"x-should-retry" not in dict(error_headers(error.info))
