"""Streams and whole answers over the wire, the real SDK, and what a vanishing client costs."""

from __future__ import annotations

import json
import re
import socket
import struct
import time
from collections.abc import Callable

import openai
import pytest

from ocserve import config
from ocserve.errors import InvalidRequest
from tests.http.harness import CHAT, COMPLETION, Served, parse, serving, wait_for
from tests.scripted import Run, Script, ScriptedEngine

USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 4,
    "total_tokens": 11,
    "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0, "image_tokens": 0},
    "completion_tokens_details": {
        "reasoning_tokens": 0,
        "audio_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    },
}


def test_a_stream_ends_with_usage_and_done(served: Served) -> None:
    answer = served.chat(stream=True)
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert re.fullmatch(rb"(data: [^\n]+\n\n)+", answer.body)
    *chunks, done = answer.events
    assert done == "[DONE]"
    first, *_, last = map(json.loads, chunks)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert (last["choices"], last["usage"]) == ([], USAGE)


def test_the_first_chunk_leaves_before_the_first_token() -> None:
    with serving(lambda: ScriptedEngine(Script(prefill_s=2))) as served, served.connect() as peer:
        begun = time.monotonic()
        peer.sendall(served.compose("POST", "/v1/chat/completions", {**CHAT, "stream": True}))
        data = b""
        while b'"role":"assistant"' not in data:
            data += peer.recv(4096)
        assert time.monotonic() - begun < 1


def test_silence_is_filled_with_comments() -> None:
    with serving(lambda: ScriptedEngine(Script(prefill_s=0.5)), stream_heartbeat_s=0.1) as served:
        answer = served.chat(stream=True)
        assert 3 <= answer.body.count(b": keep-alive\n\n") <= 6
        assert answer.events[-1] == "[DONE]"


def test_streaming_and_whole_answers_agree(served: Served) -> None:
    for path, base, pick in (
        ("/v1/chat/completions", CHAT, lambda c: (c.get("delta") or c["message"]).get("content", "")),
        ("/v1/completions", COMPLETION, lambda c: c["text"]),
    ):
        whole = served.request("POST", path, base).json
        events = served.request("POST", path, {**base, "stream": True}).events[:-1]
        chunks = [choice for event in events for choice in json.loads(event)["choices"]]
        streamed = "".join(pick(choice) if choice.get("delta") != {} else "" for choice in chunks)
        assert streamed == pick(whole["choices"][0]) == "Hello, world!"
        assert whole["usage"] == json.loads(events[-1])["usage"] == USAGE


def test_max_tokens_ends_with_length(served: Served) -> None:
    answer = served.chat(max_tokens=2).json
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 2


def test_ignored_parameters_are_named_in_a_header(served: Served) -> None:
    assert served.chat(user="u", metadata={}).headers["x-ocserve-ignored"] == "user, metadata"
    assert "x-ocserve-ignored" not in served.chat().headers


def test_a_refusal_before_the_start_is_a_real_status() -> None:
    def script(request: object) -> Script:
        return Script(refuse=InvalidRequest("No.", param="messages[0]"))

    with serving(lambda: ScriptedEngine(script)) as served:
        for stream in (False, True):
            answer = served.chat(stream=stream)
            assert (answer.status, answer.error["param"]) == (400, "messages[0]")


def test_a_prompt_that_does_not_fit_is_refused_with_both_counts() -> None:
    with serving(lambda: ScriptedEngine(Script(prompt_tokens=9000))) as served:
        error = served.chat(stream=True).error
        assert error["code"] == "context_length_exceeded"
        assert re.search(r"maximum context length is (\d+) tokens", error["message"])
        assert "9000" in error["message"]


def test_an_engine_crash_is_a_status_before_and_an_event_after_the_start() -> None:
    with serving(lambda: ScriptedEngine(Script(crash_at=2))) as served:
        whole = served.chat()
        assert (whole.status, whole.error["code"]) == (500, "engine_crashed")
        stream = served.chat(stream=True)
        assert stream.status == 200
        assert json.loads(stream.events[-1])["error"]["code"] == "engine_crashed"
        assert "[DONE]" not in stream.events


def test_limits_answer_in_headers_and_429() -> None:
    limits = config.Limits(requests_per_minute=2, tokens_per_minute=1_000_000)
    with serving(limits=limits) as served:
        first = served.chat()
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-tokens"].isdigit()
        served.chat(stream=True)
        refused = served.chat()
        assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        seconds, milliseconds = int(refused.headers["retry-after"]), int(refused.headers["retry-after-ms"])
        assert (seconds - 1) * 1000 <= milliseconds <= seconds * 1000


def test_the_real_client_understands_every_answer(served: Served) -> None:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="any", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        messages = [{"role": "user", "content": "Hi"}]
        whole = client.chat.completions.create(model="tiny", messages=messages)  # type: ignore[arg-type]
        assert whole.choices[0].message.content == "Hello, world!"
        assert whole._request_id
        stream = client.chat.completions.create(model="tiny", messages=messages, stream=True)  # type: ignore[call-overload]
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello, world!"
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 0
        with client.chat.completions.stream(model="tiny", messages=messages) as events:  # type: ignore[arg-type]
            final = events.get_final_completion()
        assert final.choices[0].message.role == "assistant"
        assert final.usage is not None
        assert client.completions.create(model="tiny", prompt="x").choices[0].text == "Hello, world!"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="nope", messages=messages)  # type: ignore[arg-type]
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=messages, temperature=3)  # type: ignore[arg-type]
        assert caught.value.param == "temperature"


# Three answers of different lengths; one of them ends at the limit.
CHOICES = Script(
    tokens=("a", "b"), others=(("c",), ("d", "e", "f", "g")), accepted_draft_tokens=1, rejected_draft_tokens=2
)


def test_the_real_client_gets_every_choice_whole_and_streamed() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with (
        serving(lambda: ScriptedEngine(CHOICES)) as served,
        openai.OpenAI(base_url=served.url + "/v1", api_key="any", max_retries=0) as client,
    ):
        whole = client.chat.completions.create(model="tiny", messages=messages, n=3, max_tokens=3)  # type: ignore[arg-type]
        found = [(choice.index, choice.message.content, choice.finish_reason) for choice in whole.choices]
        assert found == [(0, "ab", "stop"), (1, "c", "stop"), (2, "def", "length")]
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (7, 6, 13)
        details = whole.usage.completion_tokens_details
        assert details is not None
        assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (3, 6)
        with client.chat.completions.stream(model="tiny", messages=messages, n=3, max_tokens=3) as events:  # type: ignore[arg-type]
            final = events.until_done().current_completion_snapshot  # the final one would refuse a `length`
        assert [(c.index, c.message.role, c.message.content, c.finish_reason) for c in final.choices] == [
            (index, "assistant", text, reason) for index, text, reason in found
        ]
        assert final.usage == whole.usage
        text = client.completions.create(model="tiny", prompt="x", n=3, max_tokens=3)
        assert [(choice.index, choice.text, choice.finish_reason) for choice in text.choices] == found
        *chunks, last = client.completions.create(model="tiny", prompt="x", n=3, max_tokens=3, stream=True)
        for index, text_, reason in found:
            mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
            assert "".join(choice.text for choice in mine) == text_
            assert [choice.finish_reason for choice in mine if choice.finish_reason] == [reason]
        assert (last.choices, last.usage) == ([], text.usage)


def test_the_real_client_raises_on_an_error_in_the_stream() -> None:
    with (
        serving(lambda: ScriptedEngine(Script(crash_at=1))) as served,
        openai.OpenAI(base_url=served.url, api_key="any", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}], stream=True)
        with pytest.raises(openai.APIError, match="died"):
            list(stream)


PHASES: dict[str, Script] = {
    "preparing": Script(prepare_s=30),
    "queued": Script(),
    "prefill": Script(prefill_s=30),
    "decode": Script(tokens=("x",) * 4000, step_s=0.01),
}


def vanish_fin(peer: socket.socket) -> None:
    peer.close()


def vanish_reset(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("vanish", [vanish_fin, vanish_reset], ids=["FIN", "RST"])
@pytest.mark.parametrize("phase", list(PHASES))
def test_a_client_that_vanishes_frees_its_sequence(
    phase: str, vanish: Callable[[socket.socket], None], stream: bool, full: bool
) -> None:
    """P9: at most one further step after the client has gone, whatever the phase."""
    parallel = 1 if phase == "queued" else 8
    blocker = Script(tokens=("y",) * 4000, step_s=0.01)
    scripts = iter([blocker]) if phase == "queued" else iter([])

    def script(_: object) -> Script:
        return next(scripts, PHASES[phase])

    with serving(lambda: ScriptedEngine(script, parallel=parallel)) as served:
        holder = None
        if phase == "queued":
            holder = served.connect()
            holder.sendall(served.compose("POST", "/v1/chat/completions", {**CHAT, "stream": True}))
            wait_for(lambda: served.engine.running == 1)
        delays = []
        for _ in range(120 if full else 4):
            known = set(served.engine.runs)
            peer = served.connect()
            peer.sendall(served.compose("POST", "/v1/chat/completions", {**CHAT, "stream": stream, "max_tokens": 4000}))

            def newest(known: set[str] = known) -> Run | None:
                return next((run for name, run in list(served.engine.runs.items()) if name not in known), None)

            wait_for(lambda: (run := newest()) is not None and run.phase == phase)
            run = newest()
            assert run is not None
            gone_at = time.monotonic()
            vanish(peer)
            wait_for(lambda run=run: run.phase in ("done", "gone"), 2)  # type: ignore[misc]
            delays.append(time.monotonic() - gone_at)
            assert run.cancelled
            if run.steps_at_cancel is not None:
                assert run.steps - run.steps_at_cancel <= 1
        if holder is not None:
            holder.close()
        wait_for(lambda: served.service.active == 0)
        print(f"{phase}: freed after at most {max(delays) * 1000:.0f} ms")


def test_a_half_written_body_and_a_goodbye_leave_nothing(served: Served) -> None:
    with served.connect() as peer:
        peer.sendall(served.compose("POST", "/v1/chat/completions", b'{"mod', {"Content-Length": "500"}))
    assert parse(served.raw(served.compose("GET", "/ready"))).status == 200
    assert served.service.active == 0


def test_ignored_fields_whose_names_no_header_holds_are_counted() -> None:
    long = {"x" * 50: 1}  # with its path more than is told of a name
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}, **long}}
    with serving(ScriptedEngine, unknown_parameters="ignore") as served:
        for fields, told in (
            ({"x" * 64: 1}, "x" * 64),
            ({"x" * 65: 1}, "1 more"),
            ({"response_format": form}, "1 more"),
            ({"größe": 1, "$schema": 1, "a\r\nset-cookie: b": 1, "frobnicate": 1}, "frobnicate, and 3 more"),
            ({"user": "u", "größe": 1, **{f"n{number}": 1 for number in range(40)}}, "and 10 more"),
        ):
            answer = served.chat(**fields)
            assert answer.status == 200, answer
            assert answer.headers["x-ocserve-ignored"].endswith(told), fields
            assert "set-cookie" not in answer.headers


def test_more_ignored_fields_than_a_header_holds_are_counted() -> None:
    with serving(ScriptedEngine) as served:
        metadata = [
            {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]} for _ in range(40)
        ]
        answer = served.chat(**{**CHAT, "messages": metadata})
        assert answer.headers["x-ocserve-ignored"].endswith("and 8 more")
