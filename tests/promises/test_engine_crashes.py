"""P15 and P16: an engine may die or hang in any way; clients are told, the ledger is exact, the front goes on."""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
import time
from pathlib import Path

import openai
import psutil
import pytest

from ocserve.accounts.keystore import KeyStore
from ocserve.accounts.ledger import Row
from tests.accounts.books import COMPLETION, PROMPT, REQUEST, rows
from tests.promises.servers import Server, server
from tests.promises.streams import Ending, ask

STREAMS = 64
HEARTBEAT_S = 2.0
LIMITS = {signal.SIGSEGV: 2.0, signal.SIGABRT: 2.0, signal.SIGKILL: 2.0, signal.SIGSTOP: HEARTBEAT_S + 2.0}


async def kill_under_streams(
    served: Server, run: int, number: signal.Signals, chance: random.Random
) -> tuple[list[Ending], float]:
    """All streams are running, some close to their end, when the engine is hit; the next request succeeds.

    Returns the endings, and how many seconds after the hit the last of those that were cut was told.
    """
    # Each prompt is one of its own: what was in flight at two crashes would be refused.
    prompts = [f"emit {chance.choice((5, 20, 100))} every 0.02 {run}-{index}" for index in range(STREAMS)]
    asked = [asyncio.create_task(ask(served.port, prompt, f"run{run}-{index}")) for index, prompt in enumerate(prompts)]
    await asyncio.sleep(chance.uniform(0.02, 0.5))
    engine = served.engine()
    engine.send_signal(number)
    hit = time.monotonic()
    endings = list(await asyncio.gather(*asked))
    # Who came only after the hit waited for the next engine, and was answered.
    told = max((ending.ended - hit for ending in endings if ending.error), default=0.0)
    following = await ask(served.port, "emit 2", f"run{run}-next")
    assert following.structured
    assert following.error is None
    assert not engine.is_running()
    return [*endings, following], told


def check_row(row: Row, ending: Ending) -> None:
    """What a client was told is what was written down of its request."""
    if ending.error is None:
        assert ending.usage is not None
        assert (row.prompt_tokens, row.completion_tokens) == (ending.usage["prompt_tokens"], ending.deltas)
        assert row.completion_tokens == ending.usage["completion_tokens"]
        assert row.cost == row.prompt_tokens * PROMPT + row.completion_tokens * COMPLETION + REQUEST
        assert row.outcome == "completed"
    else:
        assert (row.outcome, row.cost) == ("failed", 0)
        assert row.completion_tokens == ending.deltas, "what was delivered is counted, and nothing is charged"


@pytest.mark.parametrize("number", LIMITS, ids=lambda number: number.name)
def test_p15_every_client_is_told_and_every_row_is_exact(tmp_path: Path, full: bool, number: signal.Signals) -> None:
    """75 kills of each kind; one in the short form."""
    if not full and number is not signal.SIGSEGV:
        pytest.skip("seconds; with --full")
    kills = 75 if full else 1
    chance = random.Random(15)
    endings: list[Ending] = []
    delays: list[float] = []
    file = tmp_path / "ledger.db"
    with server(worker=HEARTBEAT_S, ledger=str(file)) as served:
        front = psutil.Process(served.pid)
        for run in range(kills):
            found, told = asyncio.run(kill_under_streams(served, run, number, chance))
            endings += found
            delays.append(told)
        assert front.is_running()
        assert len(front.children(recursive=True)) == 1
        served.signal(signal.SIGTERM)
        served.process.join(10)
    assert all(ending.structured for ending in endings)
    failed = [ending for ending in endings if ending.error]
    assert {ending.error for ending in failed} == {"engine_crashed"}
    by_id = {row.request_id: row for row in rows(file)}
    admitted = [ending for ending in endings if ending.status == 200 or ending.request_id in by_id]
    assert len(by_id) == len(rows(file)) == len(admitted)
    for ending in admitted:
        check_row(by_id[ending.request_id], ending)
    assert len(failed) > kills * STREAMS / 4
    print(
        f"P15: {kills} {number.name} under {STREAMS} streams, {len(failed)} of {len(endings)} requests cut and told "
        f"after p50 {statistics.median(delays):.2f} s, at most {max(delays):.2f} s; {len(by_id)} rows, all exact"
    )
    assert max(delays) < LIMITS[number]


def test_p16_a_poison_request_crashes_the_engine_at_most_twice() -> None:
    with server(worker=HEARTBEAT_S, script={}) as served:
        url = f"http://127.0.0.1:{served.port}/v1"
        engines = set()
        with openai.OpenAI(base_url=url, api_key="one", max_retries=5) as client:
            with pytest.raises(openai.BadRequestError) as refusal:
                client.completions.create(model="tiny", prompt="emit 3 crash")
            assert refusal.value.code == "request_quarantined"
            engines.add(served.engine().pid)
            for stream in (False, True):
                with pytest.raises(openai.BadRequestError):
                    client.completions.create(model="tiny", prompt="emit 3 crash", stream=stream)
            assert client.completions.create(model="tiny", prompt="emit 3").choices[0].text == "word word word "
        with openai.OpenAI(base_url=url, api_key="two", max_retries=0) as other:
            assert other.completions.create(model="tiny", prompt="emit 3").choices[0].text == "word word word "
        engines.add(served.engine().pid)
        assert len(engines) == 1, "it crashed no more"
        health = openai.OpenAI(base_url=url.removesuffix("/v1"), api_key="x").get("/health", cast_to=object)
        assert isinstance(health, dict)
        assert health["restarts"] == 2


def test_p16_whoever_runs_beside_a_poison_is_served_and_never_refused(tmp_path: Path) -> None:
    """A key's client tries a poison again and again, beside its own other requests and another key's."""
    store = KeyStore(tmp_path / "keys.json")
    one, two = (store.create(name)[1] for name in ("one", "two"))
    with server(worker=HEARTBEAT_S, keys_file=str(store.path)) as served:
        url = f"http://127.0.0.1:{served.port}/v1"

        async def asked(client: openai.AsyncOpenAI, number: int) -> list[str]:
            """Two answers, one after the other; each takes longer than the poison, so that crashes meet them."""
            answers = []
            for turn in range(2):
                answer = await client.completions.create(model="tiny", prompt=f"emit 40 every 0.01 {number}-{turn}")
                answers.append(answer.choices[0].text)
            return answers

        async def all_at_once() -> list[list[str]]:
            async with (
                openai.AsyncOpenAI(base_url=url, api_key=one, max_retries=5) as attacker,
                openai.AsyncOpenAI(base_url=url, api_key=two, max_retries=5) as other,
            ):
                others = [
                    asyncio.create_task(asked(client, number)) for client in (attacker, other) for number in (1, 2)
                ]
                await asyncio.sleep(0.2)
                with pytest.raises(openai.BadRequestError) as refusal:
                    await attacker.completions.create(model="tiny", prompt="emit 10 every 0.01 crash")
                assert refusal.value.code == "request_quarantined"
                return await asyncio.gather(*others)

        answers = asyncio.run(all_at_once())
        assert answers == [["word " * 40] * 2] * 4
        health = openai.OpenAI(base_url=url.removesuffix("/v1"), api_key=one).get("/health", cast_to=object)
        assert isinstance(health, dict)
        assert health["restarts"] == 2
