"""SIGTERM under real streams: what was accepted finishes, nothing new is taken, no process is left."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import openai
import psutil

from tests.e2e.daemon import daemon


async def one(client: openai.AsyncOpenAI, index: int, begun: asyncio.Event) -> tuple[str, int]:
    """How a stream ended: its finish reason and its usage's completion tokens."""
    finish, completion = "none", 0
    stream = await client.completions.create(
        model="default",
        prompt=f"{index}: once upon a time",
        max_tokens=80,
        stream=True,
        extra_body={"logit_bias": {"0": -100, "2": -100}},
    )
    async for chunk in stream:
        begun.set()
        if chunk.choices and chunk.choices[0].finish_reason:
            finish = chunk.choices[0].finish_reason
        if chunk.usage:
            completion = chunk.usage.completion_tokens
    return finish, completion


def test_accepted_streams_finish_and_new_requests_are_refused(smollm2: Path, model_cache: Path) -> None:
    async def drained(url: str, pid: int) -> tuple[list[tuple[str, int]], str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
            begun = [asyncio.Event() for _ in range(6)]
            streams = [asyncio.create_task(one(client, index, each)) for index, each in enumerate(begun)]
            await asyncio.gather(*(each.wait() for each in begun))
            os.kill(pid, signal.SIGTERM)
            late = "taken"
            while late == "taken":  # at most until the signal has been heard
                try:
                    await client.completions.create(model="default", prompt="late", max_tokens=1)
                except openai.InternalServerError as refusal:
                    late = str(refusal.code)
            return list(await asyncio.gather(*streams)), late

    # On a busy machine the streams may take longer than a server waits by default.
    with daemon("smollm2:135m", store=model_cache, env={"OCSERVE_SERVER_DRAIN_S": "200"}) as server:
        engine = server.engine_pid()
        streams, late = asyncio.run(drained(server.base_url, server.process.pid))
        assert streams == [("length", 80)] * 6
        assert late == "shutting_down"
        assert server.process.wait(10) == 0
        assert not psutil.pid_exists(engine)


def test_at_the_deadline_streams_end_with_an_error_event_and_the_process_ends(tiny_model: Path) -> None:
    async def cut_off(url: str, pid: int) -> str:
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
            stream = await client.completions.create(
                model="default",
                prompt=[40],
                max_tokens=500,
                stream=True,
                extra_body={"logit_bias": {"0": -100, "2": -100}},
            )
            await anext(aiter(stream))
            os.kill(pid, signal.SIGTERM)
            try:
                async for _ in stream:
                    await asyncio.sleep(0)
            except openai.APIError as error:
                return str(error.body["code"]) if isinstance(error.body, dict) else "broken"
            return "finished"

    with daemon(str(tiny_model), env={"OCSERVE_SERVER_DRAIN_S": "0.05"}) as server:
        ending = asyncio.run(cut_off(server.base_url, server.process.pid))
        begun = time.monotonic()
        assert ending in ("shutting_down", "finished")
        server.process.wait(10)
        assert time.monotonic() - begun < 8  # of the 30 s that it would have by default
