"""Every error of the tree is rendered by every dialect."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from ocserve import errors
from ocserve.api import openai_chat, openai_completions
from ocserve.api.dialect import Reply
from ocserve.errors import ApiError
from ocserve.generation import Failed


def leaves(cls: type[ApiError] = ApiError) -> Iterator[type[ApiError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from leaves(child)


def example(cls: type[ApiError]) -> ApiError:
    if cls is errors.ContextLengthExceeded:
        return errors.ContextLengthExceeded(limit=10, prompt_tokens=11, param="messages")
    if cls is errors.InputTooLong:
        return errors.InputTooLong(limit=10, tokens=11, param="input")
    return cls("Something is wrong.", param="x", retry_after_s=1.5)


@pytest.mark.parametrize("dialect", [openai_chat, openai_completions], ids=["chat", "completions"])
@pytest.mark.parametrize("cls", sorted(set(leaves()), key=lambda cls: cls.__name__))
def test_every_error_has_openais_four_keys_and_its_status(cls: type[ApiError], dialect: object) -> None:
    info = example(cls).info
    assert 400 <= info.status < 600
    error = json.loads(openai_chat.error_body(info))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert isinstance(error["type"], str)
    assert isinstance(error["code"], str)
    assert isinstance(dialect, type(openai_chat))
    encoder = dialect.encoder(Reply(id="x", model="m", created=1))
    (frame,) = encoder.event(Failed(error=info))
    assert json.loads(frame.data)["error"] == error
