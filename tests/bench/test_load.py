"""What is measured over real HTTP is what the server did: known delays, known failures, known arrivals."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ocserve.bench import load, measures, scenario, session
from ocserve.bench.arrivals import Arrival
from ocserve.bench.client import Sample, Target
from ocserve.bench.measures import Objective
from ocserve.bench.session import Contender
from ocserve.bench.text import Scale, Texts
from ocserve.errors import RateLimited
from ocserve.generation import ChatPrompt, GenerateRequest, Message
from tests.http.harness import MODEL, serving
from tests.scripted import Script, ScriptedEngine

WORDS = ("one ", "two ", "three ", "four ", "five ")


def script(**fields: object) -> Script:
    return Script(**{"tokens": WORDS, "prefill_s": 0.1, "step_s": 0.02, **fields})  # type: ignore[arg-type]


def messages_of(request: GenerateRequest) -> tuple[Message, ...]:
    assert isinstance(request.prompt, ChatPrompt)
    return request.prompt.messages


def target(url: str) -> Target:
    return Target("A", f"{url}/v1", MODEL.id, timeout_s=10)


def play(to: Target, text: str) -> list[Sample]:
    parsed = scenario.parse("test", 'about = ""\n' + text)
    player = load.Load(to, Texts("s", Scale()), time.perf_counter(), lambda: None, lambda sample: None)
    return list(asyncio.run(player.scenario(parsed)))


def test_latencies_and_usage_are_what_the_engine_did() -> None:
    with serving(lambda: ScriptedEngine(script(prompt_tokens=50, cached_tokens=30))) as served:
        samples = play(target(served.url), 'phases=[{name="p",groups=[{name="g",conversations=6,concurrency=2}]}]')
    found = measures.summary([samples], "p", "g", objective=Objective())
    assert found.errors == {}
    assert found.ttft_p50 is not None
    assert found.itl_p50 is not None
    assert 0.12 <= found.ttft_p50 < 0.3  # the prefill and a step
    assert 0.02 <= found.itl_p50 < 0.06
    assert found.e2e_p50 is not None
    assert found.e2e_p50 >= 0.2
    assert found.output_tokens == 30
    assert (found.prompt_tokens, found.cached_tokens, found.prefill_tokens) == (300, 180, 120)
    assert found.uncounted == 0


def test_new_tokens_leave_out_what_earlier_turns_of_the_conversation_were() -> None:
    with serving(lambda: ScriptedEngine(script(prompt_tokens=50, cached_tokens=30))) as served:
        samples = play(target(served.url), 'phases=[{name="p",groups=[{name="g",conversations=2,turns=3}]}]')
    found = measures.summary([samples], "p", "g", objective=Objective())
    assert [sample.known_tokens for sample in samples].count(0) == 2  # the first turns
    assert found.new_tokens == 2 * 50  # of the later prompts everything is known: the script's prompts do not grow


def test_cached_tokens_that_were_not_reported_are_not_taken_for_none() -> None:
    sample = Sample(phase="p", group="g", began_s=0.0, ended_s=1.0, prompt_tokens=9, cached_tokens=None)
    found = measures.summary([[sample]], "p", "g", objective=Objective())
    assert (found.cached_tokens, found.prefill_tokens, found.cached_share) == (None, None, None)


def most_at_once(samples: list[Sample]) -> int:
    begins = [(sample.began_s, 1) for sample in samples]
    ends = [(sample.began_s + sample.ended_s, -1) for sample in samples]
    running = most = 0
    for _, change in sorted(begins + ends):
        running += change
        most = max(most, running)
    return most


def test_a_closed_loop_keeps_its_concurrency_and_a_burst_begins_together() -> None:
    with serving(lambda: ScriptedEngine(script(prefill_s=0.0, step_s=0.005))) as served:
        closed = play(target(served.url), 'phases=[{name="p",groups=[{name="g",conversations=9,concurrency=3}]}]')
        burst = play(target(served.url), 'phases=[{name="p",groups=[{name="g",conversations=8}]}]')
    assert most_at_once(closed) == 3
    assert most_at_once(burst) == 8
    assert max(each.began_s for each in burst) - min(each.began_s for each in burst) < 0.05


def test_a_trace_is_replayed_at_its_offsets_whatever_the_server_does() -> None:
    offsets = (0.0, 0.05, 0.06, 0.2, 0.3)
    trace = [Arrival(offset, 5, 3) for offset in offsets]
    with serving(lambda: ScriptedEngine(script())) as served:
        player = load.Load(target(served.url), Texts("s"), time.perf_counter(), lambda: None, lambda sample: None)
        samples = asyncio.run(player.trace(trace))
    began = sorted(sample.began_s for sample in samples)
    assert [at - began[0] for at in began] == pytest.approx(offsets, abs=1e-6)  # what they are timed from
    assert all(sample.completion_tokens == 3 for sample in samples)
    assert most_at_once(list(samples)) >= 3


def test_a_conversation_grows_by_its_answers_and_goes_on_in_a_later_phase() -> None:
    seen: list[list[str]] = []

    def remember(request: GenerateRequest) -> Script:
        seen.append([message.role for message in messages_of(request)])
        return script(prefill_s=0.0, step_s=0.0)

    with serving(lambda: ScriptedEngine(remember)) as served:
        play(
            target(served.url),
            'phases=[{name="p",groups=[{name="g",turns=2,shared_tokens=9}]},'
            '{name="q",groups=[{name="h",continues="g"}]}]',
        )
    pair = ["user", "assistant"]
    assert seen == [["system", "user"], ["system", *pair, "user"], ["system", *pair, *pair, "user"]]


@contextmanager
def raw_server(answer: bytes) -> Iterator[str]:
    """Answers every connection with the same bytes and closes it."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                received = b""
                while not received.endswith(b"}}"):  # all of it, or closing would reset the connection
                    received += peer.recv(65536)
                peer.sendall(answer)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
CHUNK = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (HEAD + CHUNK, "cut off"),
        (HEAD + b"data: [DONE]\n\n", "cut off"),
        (HEAD + b"data: nonsense\n\n", "not a chat completion stream"),
        (b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nbusy", "status 503"),
        (b"", "broken connection (RemoteProtocolError)"),
    ],
)
def test_broken_answers_are_errors_by_kind(answer: bytes, error: str) -> None:
    with raw_server(answer) as url:
        (sample,) = play(target(url), 'phases=[{name="p",groups=[{name="g"}]}]')
    assert sample.error == error


def test_refusals_crashes_and_absent_servers_are_counted_and_later_turns_are_not_dropped() -> None:
    one = 'phases=[{name="p",groups=[{name="g",turns=3}]}]'
    with serving(lambda: ScriptedEngine(script(crash_at=2))) as served:
        crashed = play(target(served.url), one)
        gone = target(served.url)
    with serving(lambda: ScriptedEngine(script(refuse=RateLimited("later", retry_after_s=1)))) as served:
        refused = play(target(served.url), one)
    absent = play(gone, one)
    assert crashed[0].error is not None
    assert crashed[0].error.startswith("stream: ")
    assert refused[0].error is not None
    assert refused[0].error.startswith("status 429 ")
    assert absent[0].error == "cannot connect"
    for samples in (crashed, refused, absent):
        assert [sample.error for sample in samples[1:]] == ["not sent: an earlier turn failed"] * 2


@pytest.mark.parametrize("url", ["localhost:8000/v1", "http://", "http://a:99999/v1", "ftp://a/v1", "http://ä/v1"])
def test_what_is_no_address_is_said_to_be_none(url: str) -> None:
    with pytest.raises(load.TargetUnusable, match="not an HTTP address"):
        asyncio.run(load.calibrate(target(url), "s"))


def test_connections_are_kept_until_the_server_says_that_it_closes_them() -> None:
    accepted: list[socket.socket] = []
    done = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(CHUNK + done)}\r\n".encode()

    def serve(listener: socket.socket) -> None:
        for answers in (2, 1):
            connection, _ = listener.accept()
            accepted.append(connection)
            for left in range(answers, 0, -1):
                while b'"stream"' not in (data := connection.recv(65536)):
                    if not data:
                        return
                last = b"connection: close\r\n" if left == 1 else b""
                connection.sendall(head + last + b"\r\n" + CHUNK + done)
            connection.shutdown(socket.SHUT_RDWR)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        samples = play(target(url), 'phases=[{name="p",groups=[{name="g",turns=3,turn_tokens=1}]}]')
        thread.join(10)
    assert [sample.error for sample in samples] == [None] * 3
    assert len(accepted) == 2
    for each in accepted:
        each.close()


def test_answers_without_usage_are_counted_by_delta_and_said_so() -> None:
    done = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    with raw_server(HEAD + CHUNK * 3 + done) as url:
        (sample,) = play(target(url), 'phases=[{name="p",groups=[{name="g"}]}]')
    assert (sample.error, sample.counted, sample.completion_tokens) == (None, False, 3)


def counting(**fields: object) -> ScriptedEngine:
    """An engine whose prompts have two tokens a word."""

    def of(request: GenerateRequest) -> Script:
        words = sum(len(str(message.content).split()) for message in messages_of(request))
        return script(prompt_tokens=2 * words + 7, **fields)

    return ScriptedEngine(of)


def test_two_servers_alternate_and_the_ratio_is_that_of_their_delays() -> None:
    work = session.Work(
        scenario.parse("t", 'about=""\nphases=[{name="p",groups=[{name="g",conversations=2,prompt_tokens=100}]}]')
    )
    heard: list[Sample] = []
    with (
        serving(lambda: counting(prefill_s=0.1, step_s=0.01)) as slow,
        serving(lambda: counting(prefill_s=0.4, step_s=0.01)) as slower,
    ):
        contenders = [
            Contender(target(slow.url), "slow", lambda: None),
            Contender(Target("B", f"{slower.url}/v1", MODEL.id), "slower", lambda: None),
        ]
        report = session.run(
            work, contenders, rounds=4, seed=None, objective=Objective(ttft_s=0.3), on_sample=heard.append
        )
    ours, theirs = report.cells
    assert ours.summary.good_share == 1.0
    assert theirs.summary.good_share == 0.0
    assert ours.summary.prompt_tokens / 8 == pytest.approx(100, abs=20)  # calibrated, and the message's template
    ratio = next(each for each in report.ratios if each.measure == "ttft_p50")
    assert len(ratio.rounds) == 4
    assert 0.2 < ratio.median < 0.45  # 0.11 / 0.41 of engine time
    assert ratio.low is not None
    assert ratio.high is not None
    assert ratio.low <= ratio.median <= ratio.high
    assert report.same_answers == (8, 8)
    assert len(heard) == 16
    fast = [sample.ttft_s is not None and sample.ttft_s < 0.3 for sample in heard]
    assert fast == [True, True, False, False, False, False, True, True] * 2  # A B, B A, A B, B A


def test_a_server_whose_usage_says_nothing_is_refused() -> None:
    with serving(lambda: ScriptedEngine(script())) as served, pytest.raises(load.TargetUnusable, match="more words"):
        asyncio.run(load.calibrate(target(served.url), "s"))


def test_the_first_listed_model_is_the_default() -> None:
    with serving() as served:
        assert asyncio.run(load.first_model(f"{served.url}/v1", None)) == MODEL.id
    with pytest.raises(load.TargetUnusable):
        asyncio.run(load.first_model("http://127.0.0.1:9/v1", None))


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_the_load_generator_gives_way_and_nobody_else_does() -> None:
    async def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert load.run(priority()) >= min(before + 10, 19)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
