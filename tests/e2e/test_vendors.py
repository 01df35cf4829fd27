"""A real model behind a real server, asked by the real clients of Anthropic and Google."""

from __future__ import annotations

from typing import Any

import anthropic
import openai
import pytest
from google import genai
from google.genai import types

from tests.e2e.alike import alike
from tests.e2e.daemon import RunningDaemon

QUESTION = "Name three colours."
SYSTEM = "You answer in one short sentence."


@pytest.fixture(scope="module")
def expected(server: RunningDaemon) -> tuple[str, int]:
    """The greedy answer and the prompt's length, as OpenAI's client gets them."""
    with openai.OpenAI(base_url=server.base_url, api_key="any", max_retries=0) as client:
        answer = client.chat.completions.create(
            model="default",
            messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}],
            max_tokens=24,
            temperature=0,
        )
    assert answer.usage is not None
    return answer.choices[0].message.content or "", answer.usage.prompt_tokens


def root(server: RunningDaemon) -> str:
    return server.base_url.removesuffix("/v1")


def test_anthropics_client_gets_the_same_answer(server: RunningDaemon, expected: tuple[str, int]) -> None:
    asked: dict[str, Any] = {
        "model": "claude-opus-4-8",
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=a1b2c;"},
            {"type": "text", "text": SYSTEM},
        ],
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 24,
        "extra_body": {"temperature": 0},
    }
    with anthropic.Anthropic(base_url=root(server), api_key="any", max_retries=0) as client:
        with client.messages.stream(**asked) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        # A nonce that differs finds the prefix that the one before left.
        asked["system"][0]["text"] = "x-anthropic-billing-header: cc_version=2.1; cch=fffff;"
        whole: Any = client.messages.create(**asked)
    assert alike(text, expected[0])
    assert alike(whole.content[0].text, expected[0])
    usage = final.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == expected[1]
    assert (whole.usage.cache_read_input_tokens or 0) > 0
    assert final.model != "claude-opus-4-8"


def test_googles_client_gets_the_same_answer(server: RunningDaemon, expected: tuple[str, int]) -> None:
    config = types.GenerateContentConfig(system_instruction=SYSTEM, temperature=0, max_output_tokens=24)
    with genai.Client(api_key="any", http_options=types.HttpOptions(base_url=root(server))) as client:
        whole = client.models.generate_content(model="default", contents=QUESTION, config=config)
        chunks = list(client.models.generate_content_stream(model="default", contents=QUESTION, config=config))
    assert alike(whole.text or "", expected[0])
    assert alike("".join(chunk.text or "" for chunk in chunks), expected[0])
    assert whole.usage_metadata is not None
    assert whole.usage_metadata.prompt_token_count == expected[1]


def test_an_answer_in_googles_schema(server: RunningDaemon) -> None:
    schema = types.Schema(
        type=types.Type.OBJECT,
        properties={
            "colour": types.Schema(type=types.Type.STRING, enum=["red", "blue"]),
            "count": types.Schema(type=types.Type.INTEGER, minimum=1, maximum=9),
        },
        required=["colour", "count"],
        property_ordering=["count", "colour"],
    )
    config = types.GenerateContentConfig(
        response_mime_type="application/json", response_schema=schema, temperature=0, max_output_tokens=60
    )
    with genai.Client(api_key="any", http_options=types.HttpOptions(base_url=root(server))) as client:
        answer = client.models.generate_content(model="default", contents="Choose a colour and a count.", config=config)
    parsed: Any = answer.parsed
    assert list(parsed) == ["count", "colour"]
    assert parsed["colour"] in ("red", "blue")
    assert 1 <= parsed["count"] <= 9
