"""Images in every dialect, with the vendors' own clients, on a tiny model with a tiny projector."""

from __future__ import annotations

import base64
import contextlib
import io
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import ollama
import openai
import pytest
from google import genai
from google.genai import types
from PIL import Image

from tests import tiny, tiny_projector
from tests.e2e.daemon import RunningDaemon, daemon
from tests.e2e.pictures import data_url, hostile, picture

pytestmark = pytest.mark.beside

ASK = "What is this?"
TOKENS = tiny_projector.TOKENS["causal"]
KINDS = {"PNG": "image/png", "JPEG": "image/jpeg", "GIF": "image/gif", "WEBP": "image/webp"}


@pytest.fixture(scope="module")
def origin() -> Iterator[ThreadingHTTPServer]:
    """A server of one image."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "image/png")
            self.end_headers()
            self.wfile.write(picture(seed=71))

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory, origin: ThreadingHTTPServer) -> Iterator[RunningDaemon]:
    """A model whose projector lies beside it."""
    folder = tmp_path_factory.mktemp("seeing")
    tiny.write(folder / "tiny.gguf", context=2048)
    tiny_projector.write(folder / "mmproj-tiny.gguf")
    limits = {"OCSERVE_IMAGES_MAX_COUNT": "3", "OCSERVE_IMAGES_MAX_PIXELS": "1000000"}
    hosts = {"OCSERVE_IMAGES_FETCH_HOSTS": f"127.0.0.1:{origin.server_address[1]}"}
    with daemon(str(folder / "tiny.gguf"), "--ctx", "1024", env=limits | hosts) as running:
        yield running


@pytest.fixture
def client(seeing: RunningDaemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=seeing.base_url, api_key="any", max_retries=0) as made:
        yield made


def parts(*images: bytes, text: str = ASK) -> list[Any]:
    urls = ({"type": "image_url", "image_url": {"url": data_url(data)}} for data in images)
    return [*urls, {"type": "text", "text": text}]


def chat(client: openai.OpenAI, *images: bytes, text: str = ASK, **rest: Any) -> Any:
    asked: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "logprobs": True, **rest}
    return client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": parts(*images, text=text)}], **asked
    )


def first_chances(answer: Any) -> float:
    return float(answer.choices[0].logprobs.content[0].logprob)


def test_every_format_is_read_and_counts_exactly(client: openai.OpenAI) -> None:
    bare = chat(client).usage.prompt_tokens
    for kind in KINDS:
        usage = chat(client, picture(kind)).usage
        assert usage.prompt_tokens == bare + TOKENS, kind
        assert usage.prompt_tokens_details.model_dump()["image_tokens"] == TOKENS
    both = chat(client, picture(seed=1), picture(seed=2)).usage
    assert both.prompt_tokens == bare + 2 * TOKENS
    assert both.prompt_tokens_details.model_dump()["image_tokens"] == 2 * TOKENS


def test_another_image_is_another_prompt_and_the_same_one_is_found_again(client: openai.OpenAI) -> None:
    # One after the other: on a processor a prompt of less than a block leaves its cells when another one begins.
    first, again, other = (chat(client, picture(seed=seed), text="Look at this one.") for seed in (11, 11, 12))
    assert first_chances(first) == pytest.approx(first_chances(again), abs=1e-3)
    assert first_chances(first) != pytest.approx(first_chances(other), abs=1e-3)
    assert other.usage.prompt_tokens_details.cached_tokens < TOKENS
    assert again.usage.prompt_tokens_details.cached_tokens > TOKENS


def test_an_image_stands_where_it_stands(client: openai.OpenAI) -> None:
    image, text = parts(picture(seed=21), text="This is it.")
    asked: dict[str, Any] = {"model": "default", "max_tokens": 4, "temperature": 0, "logprobs": True}
    before = client.chat.completions.create(messages=[{"role": "user", "content": [image, text]}], **asked)
    behind = client.chat.completions.create(messages=[{"role": "user", "content": [text, image]}], **asked)
    assert before.usage is not None
    assert behind.usage is not None
    assert before.usage.prompt_tokens == behind.usage.prompt_tokens
    assert first_chances(before) != pytest.approx(first_chances(behind), abs=1e-3)


def test_every_dialect_sees_the_same(seeing: RunningDaemon, client: openai.OpenAI) -> None:
    data = picture(seed=31)
    expected = chat(client, data)
    text, count = expected.choices[0].message.content, expected.usage.prompt_tokens
    answer = client.responses.create(
        model="default",
        input=[
            {
                "role": "user",
                "content": [
                    {"type": "input_image", "image_url": data_url(data), "detail": "auto"},
                    {"type": "input_text", "text": ASK},
                ],
            }
        ],
        max_output_tokens=8,
        temperature=0,
    )
    assert answer.usage is not None
    assert (answer.output_text, answer.usage.input_tokens) == (text, count)
    with anthropic.Anthropic(base_url=seeing.root, api_key="any", max_retries=0) as other:
        source: Any = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(data).decode()}
        content: Any = [{"type": "image", "source": source}, {"type": "text", "text": ASK}]
        turns: Any = [{"role": "user", "content": content}]
        message: Any = other.messages.create(
            model="default", max_tokens=8, messages=turns, extra_body={"temperature": 0}
        )
        assert message.content[0].text == text
        assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == count
        assert other.messages.count_tokens(model="default", messages=turns).input_tokens == count
    with genai.Client(api_key="any", http_options=types.HttpOptions(base_url=seeing.root)) as google:
        given: Any = [types.Part.from_bytes(data=data, mime_type="image/png"), types.Part.from_text(text=ASK)]
        found = google.models.generate_content(
            model="default", contents=given, config=types.GenerateContentConfig(temperature=0, max_output_tokens=8)
        )
        assert found.usage_metadata is not None
        assert (found.text, found.usage_metadata.prompt_token_count) == (text, count)
        details = {each.modality: each.token_count for each in found.usage_metadata.prompt_tokens_details or []}
        assert details == {types.MediaModality.TEXT: count - TOKENS, types.MediaModality.IMAGE: TOKENS}
    theirs = ollama.Client(seeing.root)
    reply = theirs.chat(
        "default",
        [{"role": "user", "content": ASK, "images": [data]}],
        options={"temperature": 0, "num_predict": 8},
    )
    theirs._client.close()
    assert (reply.message.content, reply.prompt_eval_count) == (text, count)


def test_the_projector_shows_wherever_models_are_described(seeing: RunningDaemon) -> None:
    [entry] = seeing.get("/v1/models")["data"]
    assert entry["input_modalities"] == ["text", "image"]
    assert seeing.get("/props")["modalities"]["vision"] is True
    assert seeing.get("/api/v0/models")["data"][0]["type"] == "vlm"
    with httpx2.Client(base_url=seeing.root) as http:
        assert "vision" in http.post("/api/show", json={"model": "default"}).json()["capabilities"]


@pytest.mark.parametrize("wrong", hostile())
def test_what_is_no_good_image_is_a_400_that_names_it(client: openai.OpenAI, wrong: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, picture(), hostile()[wrong])
    assert caught.value.param == "messages[0].content[1].image_url.url"


def test_limits_hold_and_the_engine_lives(seeing: RunningDaemon, client: openai.OpenAI) -> None:
    engine = seeing.engine_pid()
    for images in ((picture(),) * 4, (picture(size=(1001, 1000)),)):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, *images)
        assert str(caught.value.param).endswith(".image_url.url")
    asked: list[Any] = [{"role": "user", "content": parts(picture())}, {"role": "assistant", "content": "Well"}]
    for media_type in ("text/html", "image/svg+xml", "application/octet-stream"):
        url = data_url(picture(), media_type)
        asked[0]["content"][0]["image_url"]["url"] = url
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="default", messages=asked)
        assert caught.value.param == "messages[0].content[0].image_url.url"
    assert chat(client, picture()).choices
    assert seeing.engine_pid() == engine


def test_usual_photographs_fit_into_a_request(client: openai.OpenAI) -> None:
    noise = Image.frombytes("RGB", (800, 700), random.Random(1).randbytes(3 * 800 * 700))
    file = io.BytesIO()
    noise.save(file, "PNG")
    photographs = [file.getvalue() + bytes(5_000_000 - len(file.getvalue()) + index) for index in range(3)]
    assert chat(client, *photographs).usage.prompt_tokens_details.model_dump()["image_tokens"] == 3 * TOKENS


def test_an_image_is_fetched_from_where_the_operator_says_and_nowhere_else(
    client: openai.OpenAI, origin: ThreadingHTTPServer
) -> None:
    def ask(url: str) -> Any:
        content: Any = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": ASK}]
        return client.chat.completions.create(
            model="default", messages=[{"role": "user", "content": content}], max_tokens=4, temperature=0
        )

    port = origin.server_address[1]
    here, given = ask(f"http://127.0.0.1:{port}/a.png"), chat(client, picture(seed=71), max_tokens=4)
    assert here.usage.prompt_tokens == given.usage.prompt_tokens
    assert here.choices[0].message.content == given.choices[0].message.content
    for url in (f"http://localhost:{port}/a.png", "http://127.0.0.1:1/a.png", "https://10.0.0.1/a.png"):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(url)
        assert caught.value.param == "messages[0].content[0].image_url.url"


def test_many_at_once_answer_as_one(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        return str(chat(client, picture(seed=seed), text="All together.").choices[0].message.content)

    seeds = [40, 41, 42, 43, 44, 45]
    alone = [ask(seed) for seed in seeds]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, seeds * 2)) == alone * 2


def test_a_stream_with_an_image_is_the_same(client: openai.OpenAI) -> None:
    whole = chat(client, picture(seed=51))
    chunks = list(chat(client, picture(seed=51), stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.prompt_tokens_details.model_dump()["image_tokens"] == TOKENS


def test_no_picture_is_logged(seeing: RunningDaemon, client: openai.OpenAI) -> None:
    data = base64.b64encode(picture(seed=61)).decode()
    for url in (f"data:image/png;base64,{data}", f"data:image/png;base64,{data[: len(data) // 8 * 4]}"):
        content: Any = [{"type": "image_url", "image_url": {"url": url}}]
        with contextlib.suppress(openai.BadRequestError):
            client.chat.completions.create(model="default", messages=[{"role": "user", "content": content}])
    assert data[40:80].encode() not in seeing.log.read_bytes()


def test_a_flag_names_a_projector_whose_images_attend_in_both_directions(tmp_path: Path) -> None:
    model = tiny.write(tmp_path / "tiny.gguf", "sliding", context=1024)
    eyes = tiny_projector.write(tmp_path / "eyes.gguf", "whole")
    with (
        daemon(str(model), "--projector", str(eyes)) as running,
        openai.OpenAI(base_url=running.base_url, api_key="any", max_retries=0) as made,
    ):
        bare, seen = chat(made).usage, chat(made, picture()).usage
        # The texts around an image are tokens too, of which this vocabulary makes many.
        assert seen.prompt_tokens - bare.prompt_tokens > tiny_projector.TOKENS["whole"]
        assert seen.prompt_tokens_details.model_dump()["image_tokens"] == tiny_projector.TOKENS["whole"]
