"""The host tier against a list that is searched."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ocserve.engine.tiers.host import HostTier, size_bytes

LIMIT = 100
KEYS = st.integers(0, 9).map(lambda number: bytes([number]))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, st.integers(0, LIMIT + 10)),
        st.tuples(st.just("get"), KEYS, st.just(0)),
        st.tuples(st.just("remove"), KEYS, st.just(0)),
    ),
    max_size=60,
)


@given(STEPS)
def test_the_tier_is_the_most_recently_used_that_fits(steps: list[tuple[str, bytes, int]]) -> None:
    tier = HostTier(LIMIT)
    model: list[tuple[bytes, bytes]] = []  # least recently used first
    for step, key, size in steps:
        held = next((buffer for other, buffer in model if other == key), None)
        model = [item for item in model if item[0] != key]
        if step == "put":
            assert tier.put(key, bytes(size)) == (size <= LIMIT)
            if size <= LIMIT:
                model.append((key, bytes(size)))
            while sum(len(buffer) for _, buffer in model) > LIMIT:
                model.pop(0)
        elif step == "get":
            assert tier.get(key) == held
            model += [(key, held)] if held is not None else []
        else:
            tier.remove(key)
        assert tier.stats().bytes == sum(len(buffer) for _, buffer in model) <= LIMIT
        assert tier.stats().blocks == len(model)
        assert {bytes([number]) for number in range(10) if bytes([number]) in tier} == {key for key, _ in model}


def test_the_end_of_a_prefix_goes_before_its_beginning() -> None:
    tier = HostTier(30)
    prefix = [b"first", b"second", b"third"]
    for key in prefix:
        tier.put(key, bytes(10))
    tier.touch(reversed(prefix))
    tier.put(b"other", bytes(10))
    assert [key in tier for key in prefix] == [True, True, False]
    assert tier.stats().evicted == 1


def test_a_buffer_too_large_displaces_only_its_own_key() -> None:
    tier = HostTier(10)
    tier.put(b"a", bytes(5))
    tier.put(b"b", bytes(5))
    assert not tier.put(b"b", bytes(11))
    assert tier.get(b"a") == bytes(5)
    assert tier.get(b"b") is None
    assert not HostTier(0).put(b"a", b"1")


def test_sizes_are_bytes_whatever_the_items() -> None:
    assert size_bytes(memoryview(bytes(16)).cast("Q")) == 16
