"""What is stored is bounded, expires, and is its owner's alone."""

from __future__ import annotations

import asyncio
import random

from ocserve.api.openai_responses import StoredResponse
from ocserve.api.openai_responses_items import Item
from ocserve.generation import Message
from ocserve.http.response_store import ResponseStore


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def item(name: str, size: int = 10) -> Item:
    return Item(id=name, wire=b"x" * size, piece=Message(role="user", content="x"))


def stored(name: str, *, size: int = 100, before: tuple[Item, ...] = ()) -> StoredResponse:
    return StoredResponse(
        id=name, body=b"x" * size, before=before, input=(item(f"{name}-in"),), output=(item(f"{name}-out"),)
    )


def store(
    *, most: int = 100, max_bytes: int = 10**6, lifetime_s: float = 60.0, clock: Clock | None = None
) -> ResponseStore:
    return ResponseStore(most=most, max_bytes=max_bytes, lifetime_s=lifetime_s, clock=clock or Clock())


async def test_what_is_kept_is_found_by_its_owner_alone() -> None:
    held = store()
    mine, theirs = held.shelf("mine"), held.shelf("theirs")
    assert mine.keep(stored("a"), lasting=True)
    assert mine.response("a") == stored("a")
    assert mine.item("a-out") == item("a-out")
    assert theirs.response("a") is None
    assert theirs.item("a-out") is None
    assert not theirs.remove("a")
    assert mine.remove("a")
    assert not mine.remove("a")
    assert (mine.response("a"), mine.item("a-out"), held.count, held.size_bytes) == (None, None, 0, 0)


async def test_two_owners_may_have_one_id() -> None:
    held = store()
    held.shelf("mine").keep(stored("a", size=10), lasting=True)
    held.shelf("theirs").keep(stored("a", size=20), lasting=True)
    assert held.shelf("mine").remove("a")
    found = held.shelf("theirs").response("a")
    assert found is not None
    assert len(found.body) == 20


async def test_the_oldest_makes_room_in_number() -> None:
    held = store(most=3)
    shelf = held.shelf("mine")
    for name in "abcd":
        assert shelf.keep(stored(name), lasting=True)
    assert [name for name in "abcd" if shelf.response(name)] == ["b", "c", "d"]
    assert shelf.item("a-in") is None


async def test_the_oldest_makes_room_in_bytes() -> None:
    held = store(max_bytes=10_000)
    shelf = held.shelf("mine")
    for number in range(50):
        assert shelf.keep(stored(f"r{number}", size=1_000), lasting=True)
        assert held.size_bytes <= 10_000
    assert shelf.response("r49") is not None
    assert shelf.response("r0") is None


async def test_a_conversation_counts_with_all_its_items() -> None:
    held = store(max_bytes=20_000)
    long = tuple(item(f"i{number}", 1_000) for number in range(20))
    assert not held.shelf("mine").keep(stored("a", before=long), lasting=True)
    assert held.count == 0


async def test_nobody_can_empty_anothers_place() -> None:
    held = store(most=10)
    held.shelf("mine").keep(stored("a"), lasting=True)
    for number in range(100):
        held.shelf("theirs").keep(stored(f"r{number}"), lasting=True)
    assert held.shelf("mine").response("a") is not None
    assert held.count == 10


async def test_what_has_been_here_for_its_time_is_forgotten() -> None:
    clock = Clock()
    held = store(lifetime_s=60, clock=clock)
    shelf = held.shelf("mine")
    shelf.keep(stored("a"), lasting=True)
    clock.now += 30
    shelf.keep(stored("b"), lasting=True)
    clock.now += 29
    assert shelf.response("a") is not None
    clock.now += 1
    assert shelf.response("a") is None
    assert shelf.item("a-in") is None
    assert shelf.response("b") is not None


async def test_it_is_forgotten_although_nobody_asks() -> None:
    held = ResponseStore(most=5, max_bytes=10**6, lifetime_s=0.05)
    held.shelf("mine").keep(stored("a"), lasting=True)
    held.shelf("theirs").keep(stored("b"), lasting=True)
    assert held.count == 2
    async with asyncio.timeout(5):
        while held.count:
            await asyncio.sleep(0.01)
    held.shelf("mine").keep(stored("c"), lasting=True)  # the timer is set again
    async with asyncio.timeout(5):
        while held.count:
            await asyncio.sleep(0.01)


async def test_nothing_is_kept_where_nothing_may_be() -> None:
    for held in (store(most=0), store(max_bytes=0)):
        assert not held.keeps
        assert not held.shelf("mine").keep(stored("a"), lasting=True)
        assert held.count == 0


async def test_an_id_that_a_client_gave_twice_outlives_the_first() -> None:
    held = store(most=2)
    shelf = held.shelf("mine")
    again = item("shared")
    shelf.keep(StoredResponse(id="a", body=b"", before=(), input=(item("shared"),), output=()), lasting=True)
    shelf.keep(StoredResponse(id="b", body=b"", before=(), input=(again,), output=()), lasting=True)
    shelf.remove("a")
    assert shelf.item("shared") is again


async def test_an_item_that_two_responses_share_goes_with_the_last() -> None:
    shelf = store().shelf("mine")
    shared = item("shared")
    for name in "ab":
        shelf.keep(StoredResponse(id=name, body=b"", before=(), input=(shared, shared), output=()), lasting=True)
    shelf.remove("a")
    assert shelf.item("shared") is shared
    shelf.remove("b")
    assert shelf.item("shared") is None


async def test_bounds_hold_whatever_happens() -> None:
    random_source, clock = random.Random(3), Clock()
    held = store(most=20, max_bytes=30_000, lifetime_s=50, clock=clock)
    for number in range(3_000):
        shelf = held.shelf(random_source.choice("abc"))
        action = random_source.random()
        if action < 0.7:
            shelf.keep(stored(f"r{number}", size=random_source.randrange(4_000)), lasting=True)
        elif action < 0.9:
            shelf.remove(f"r{random_source.randrange(max(0, number - 30), number + 1)}")
        else:
            clock.now += random_source.random() * 20
        assert held.count <= 20
        assert 0 <= held.size_bytes <= 30_000
    clock.now += 100
    held.forget_expired()
    assert (held.count, held.size_bytes) == (0, 0)


async def test_what_is_not_to_last_is_recalled_on_its_connection_only_and_until_the_next() -> None:
    held = store()
    here, there, anywhere = held.shelf("mine", "1"), held.shelf("mine", "2"), held.shelf("mine")
    assert not here.keep(stored("a"), lasting=False)
    assert here.response("a") is not None
    assert there.response("a") is anywhere.response("a") is None
    assert not anywhere.remove("a")
    assert anywhere.item("a-out") is here.item("a-out") is None
    assert not there.keep(stored("b"), lasting=False)
    assert not here.keep(stored("c"), lasting=False)
    assert (here.response("a"), here.response("c") is not None, there.response("b") is not None) == (None, True, True)
    assert here.keep(stored("d"), lasting=True)
    assert here.response("c") is not None
    assert anywhere.response("d") is not None
    here.forget()
    here.forget()
    there.forget()
    assert held.count == 1
    assert not held.shelf("mine").keep(stored("e"), lasting=False)
    assert held.count == 1
