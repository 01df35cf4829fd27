"""Must-show: the engine may die or hang in any way under streams, and every client is told within the limit."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from tests.e2e.daemon import RunningDaemon, daemon

STREAMS = 6
_ROUNDS_SHORT, _ROUNDS_FULL = 1, 20


async def one_stream(client: openai.AsyncOpenAI, salt: str) -> str:
    """Returns how the stream ended: the error's code, or `done`. Anything unstructured raises."""
    try:
        stream = await client.completions.create(
            model="default",
            prompt=f"{salt} The sea was calm and",
            max_tokens=400,
            stream=True,
            extra_body={"logit_bias": {"0": -100, "2": -100}},
        )
        async for _ in stream:
            pass
    except openai.APIStatusError as error:
        return str(error.code)
    except openai.APIError as error:
        return str(error.body["code"]) if isinstance(error.body, dict) else "broken without an error event"
    return "done"


async def kill_under_streams(server: RunningDaemon, number: int, limit_s: float) -> None:
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key="x", max_retries=0) as client:
        salt = f"{random.random()}"
        streams = [asyncio.create_task(one_stream(client, f"{salt} {index}")) for index in range(STREAMS)]
        # Those that arrive only after the kill wait for the next engine, and are answered.
        while (await asyncio.to_thread(server.health))["active"] < STREAMS:
            await asyncio.sleep(0.02)
        await asyncio.sleep(random.uniform(0.0, 0.8))
        engine = server.engine_pid()
        os.kill(engine, number)
        killed = time.monotonic()
        assert set(await asyncio.gather(*streams)) == {"engine_crashed"}
        assert time.monotonic() - killed < limit_s
        answer = await client.completions.create(model="default", prompt=f"{salt} next", max_tokens=2)
        assert answer.usage is not None
        assert not psutil.pid_exists(engine)


@pytest.fixture(scope="module")
def killed(smollm2: Path) -> Iterator[RunningDaemon]:
    """One front for all that is done to its engines."""
    with daemon(str(smollm2), env={"OCSERVE_ENGINE_HEARTBEAT_TIMEOUT_S": "3"}) as server:
        front = psutil.Process(server.process.pid)
        yield server
    assert not front.is_running()


@pytest.mark.parametrize(
    ("number", "limit_s"),
    [(signal.SIGSEGV, 2.0), (signal.SIGABRT, 2.0), (signal.SIGKILL, 2.0), (signal.SIGSTOP, 4.0)],
    ids=["SEGV", "ABRT", "KILL", "STOP"],
)
def test_clients_get_a_structured_error_and_the_next_request_succeeds(
    killed: RunningDaemon, full: bool, number: int, limit_s: float
) -> None:
    """A crash is answered within 2 s, a hang within the heartbeat limit (3 s here) and a second."""
    rounds = _ROUNDS_FULL if full else _ROUNDS_SHORT
    limit_s *= 1 if full else 2  # other work on the machine
    before = killed.health()["restarts"]
    for _ in range(rounds):
        asyncio.run(kill_under_streams(killed, number, limit_s))
    assert killed.health()["restarts"] == before + rounds
    assert len(psutil.Process(killed.process.pid).children(recursive=True)) == 1
    assert killed.process.poll() is None


def test_no_engine_outlives_a_killed_front(tiny_model: Path) -> None:
    with daemon(str(tiny_model)) as server:
        engine = server.engine_pid()
        server.process.kill()
        deadline = time.monotonic() + 5
        while psutil.pid_exists(engine):
            assert time.monotonic() < deadline
            time.sleep(0.02)
