"""A key's share of the slots: what is beyond it waits in its order, and nothing is lost, whoever leaves and when."""

from __future__ import annotations

import asyncio
import random

import pytest

from ocserve.engine.shares import Shares
from ocserve.errors import EngineUnavailable, Overloaded


async def hold(shares: Shares, key: str, slots: int, most: int, done: asyncio.Event, log: list[int], name: int) -> None:
    async with shares.share(key, slots, most, 60):
        log.append(name)
        await done.wait()


async def test_beyond_its_share_a_key_waits_in_its_order_and_others_do_not() -> None:
    shares, done, log = Shares(), [asyncio.Event() for _ in range(6)], list[int]()
    tasks = [asyncio.create_task(hold(shares, "a", 1, 2, done[number], log, number)) for number in range(5)]
    tasks.append(asyncio.create_task(hold(shares, "b", 9, 2, done[5], log, 5)))
    await asyncio.sleep(0)
    assert log == [0, 1, 5]
    done[1].set()
    await asyncio.sleep(0.001)
    assert log == [0, 1, 5, 2]
    tasks[3].cancel()
    done[0].set()
    await asyncio.sleep(0.001)
    assert log == [0, 1, 5, 2, 4]
    for each in done:
        each.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not shares._held
    assert not shares._waiting


async def test_those_who_wait_can_be_refused() -> None:
    shares, done, log = Shares(), asyncio.Event(), list[int]()
    tasks = [asyncio.create_task(hold(shares, "a", 1, 1, done, log, number)) for number in range(3)]
    await asyncio.sleep(0)
    shares.refuse_waiting(EngineUnavailable("over"))
    done.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in results] == [type(None), EngineUnavailable, EngineUnavailable]
    assert not shares._held
    assert not shares._waiting


@pytest.mark.parametrize("seed", range(20))
async def test_no_share_is_lost_or_exceeded_whoever_leaves(seed: int) -> None:
    source, shares, running = random.Random(seed), Shares(), [0]

    async def one(slots: int) -> None:
        async with shares.share("a", slots, 4, 60):
            running[0] += slots
            assert running[0] <= 4
            try:
                await asyncio.sleep(source.choice([0, 0, 0.001]))
            finally:
                running[0] -= slots

    tasks = []
    for _ in range(60):
        tasks.append(asyncio.create_task(one(source.randint(1, 4))))
        if source.random() < 0.5:
            source.choice(tasks).cancel()
        await asyncio.sleep(source.choice([0, 0, 0.001]))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert not [each for each in results if each is not None and not isinstance(each, asyncio.CancelledError)]
    assert not shares._waiting
    assert not +shares._held


async def test_nobody_waits_longer_than_a_request_may_take() -> None:
    shares = Shares()
    async with shares.share("a", 1, 1, 60):
        with pytest.raises(Overloaded):
            async with shares.share("a", 1, 1, 0.01):
                pytest.fail("there is no slot")
    assert not shares._held
    assert not shares._waiting
