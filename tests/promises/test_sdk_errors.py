"""P33: every status that this server answers with is the exception that OpenAI's client documents for it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from ocserve import config, errors
from ocserve.errors import (
    ApiError,
    Conflict,
    EngineFailed,
    EngineUnavailable,
    LedgerUnavailable,
    Overloaded,
    UnderMaintenance,
)
from tests.http.harness import KEY, serving
from tests.scripted import Script, ScriptedEngine

HI: Any = [{"role": "user", "content": "Hi"}]
CHAT: dict[str, Any] = {"model": "tiny", "messages": HI}
LENGTH = {"Content-Length": "2", "Content-Type": "application/json"}
Post = Callable[..., Any]

# How a client meets a status.
ASKED: dict[int, dict[str, Any]] = {
    400: {"body": {**CHAT, "temperature": 9}},
    401: {"options": {"headers": {"Authorization": "Bearer wrong-key-0123456789"}}},
    403: {"options": {"headers": {"Origin": "https://elsewhere.example"}}},
    404: {"body": {**CHAT, "model": "nobody"}},
    413: {"body": {**CHAT, "messages": [{"role": "user", "content": "x" * 5_000_000}]}},
    415: {"options": {"headers": {"Content-Type": "text/plain"}}},
    421: {"options": {"headers": {"Host": "elsewhere.example"}}},
    431: {"options": {"headers": {"X-Long": "x" * 40_000}}},
}
# What it has to raise; without a class for a status it is the general one.
OPENAI: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    503: openai.InternalServerError,
}
ENGINE: tuple[ApiError, ...] = (
    EngineFailed("It failed."),
    EngineUnavailable("It restarts.", retry_after_s=1),
    LedgerUnavailable("It is full.", retry_after_s=1),
    UnderMaintenance("Until noon.", retry_after_s=1),
    Conflict("It is in use."),
    Overloaded("Too many.", retry_after_s=1),
)


def documented() -> set[int]:
    """The statuses of all errors that there are."""
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, ApiError)]
    return {kind.status for kind in kinds}


def raised(
    post: Post, path: str, body: dict[str, Any] | None = CHAT, options: dict[str, Any] | None = None, **more: Any
) -> Any:
    with pytest.raises(openai.APIStatusError) as caught:
        post(path, body=body, options=options or {}, cast_to=object, **more)
    return caught.value


def hesitating() -> Iterator[bytes]:
    """A body that is not sent in time."""
    yield b"{"
    time.sleep(0.6)
    yield b"}"


def test_p33_each_status_is_the_exception_that_openais_client_documents() -> None:
    met: dict[int, openai.APIStatusError] = {}
    with (
        serving(key=KEY, auth=config.Auth(anonymous=False), body_timeout_s=0.3) as served,
        openai.OpenAI(base_url=served.url + "/v1", api_key=KEY, max_retries=0) as client,
    ):
        for status, asked in ASKED.items():
            met[status] = raised(client.post, "/chat/completions", **asked)
        with pytest.raises(openai.APIStatusError) as caught:
            client.delete("/models", cast_to=object)
        met[405] = caught.value
        met[408] = raised(client.post, "/chat/completions", None, {"headers": LENGTH}, content=hesitating())
        again = {"headers": {"Idempotency-Key": "one"}}
        client.post("/chat/completions", body=CHAT, options=again, cast_to=object)  # type: ignore[arg-type]
        met[422] = raised(client.post, "/chat/completions", {**CHAT, "max_tokens": 3}, again)
    for error in ENGINE:
        script = Script(refuse=error)
        with (
            serving(lambda script=script: ScriptedEngine(script)) as served,  # type: ignore[misc]
            openai.OpenAI(base_url=served.url + "/v1", api_key="x", max_retries=0) as client,
        ):
            met[error.status] = raised(client.post, "/chat/completions")
    assert set(met) == documented()
    for status, found in met.items():
        assert found.status_code == status
        assert type(found) is OPENAI.get(status, openai.APIStatusError), (status, type(found))
        assert found.code
        assert found.request_id
        assert isinstance(found.body, dict)
