"""Host memory in front of disk: which prefixes can be had, from where, and what moves up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ocserve.engine.tiers.disk import DiskTier
from ocserve.engine.tiers.host import HostTier
from ocserve.engine.tiers.tiers import Tiers

KEYS = [bytes([number]) * 32 for number in range(10)]
SIZE = 1000


def payload(key: bytes) -> bytes:
    return key[:1] * SIZE


@pytest.fixture
def disk(tmp_path: Path) -> DiskTier:
    return DiskTier(tmp_path / "prefixes", b"model", 1 << 20, pytest.fail)


@pytest.fixture
def tiers(disk: DiskTier) -> Iterator[Tiers]:
    """Two tiers, of which the host holds three buffers."""
    both = Tiers(HostTier(3 * SIZE), disk)
    yield both
    both.close()


def put(tiers: Tiers, *keys: bytes) -> None:
    for key in reversed(keys):
        tiers.put(key, payload(key))
    assert tiers.flush(10)


def test_leading_blocks_or_the_last_snapshot(tiers: Tiers) -> None:
    put(tiers, KEYS[0], KEYS[1], KEYS[3])
    assert tiers.longest(KEYS[:5], whole=False) == 2
    assert tiers.longest(KEYS[:5], whole=True) == 4
    assert tiers.longest(KEYS[5:], whole=False) == tiers.longest(KEYS[5:], whole=True) == 0
    assert tiers.longest([], whole=False) == tiers.longest([], whole=True) == 0


def test_a_hit_on_disk_moves_to_host_memory(tiers: Tiers) -> None:
    put(tiers, *KEYS[:6])
    assert tiers.stats().host.blocks == 3
    assert tiers.longest(KEYS, whole=False) == 6
    assert tiers.get(KEYS[5]) == (payload(KEYS[5]), "disk")
    assert tiers.get(KEYS[5]) == (payload(KEYS[5]), "host")
    assert tiers.get(KEYS[9]) is None
    assert (tiers.stats().host_hits, tiers.stats().disk_hits) == (1, 1)
    assert tiers.stats().host.bytes == 3 * SIZE


def test_the_next_run_finds_what_this_one_flushed(tiers: Tiers, tmp_path: Path) -> None:
    put(tiers, *KEYS)
    tiers.close()
    later = Tiers(HostTier(3 * SIZE), DiskTier(tmp_path / "prefixes", b"model", 1 << 20, pytest.fail))
    assert later.longest(KEYS, whole=False) == len(KEYS)
    for key in KEYS:
        assert later.get(key) == (payload(key), "disk")
    later.close()


def test_without_a_disk_there_is_only_host_memory() -> None:
    tiers = Tiers(HostTier(3 * SIZE), None)
    put(tiers, *KEYS[:4])
    assert tiers.longest(KEYS[:4], whole=False) == 3  # the end was put first and went
    tiers.prefetch(KEYS)
    assert tiers.get(KEYS[3]) is None
    assert tiers.stats().disk is None
    tiers.close()


def test_a_prefix_in_use_keeps_its_beginning(disk: DiskTier) -> None:
    tiers = Tiers(HostTier(3 * SIZE), None)
    put(tiers, *KEYS[:3])
    assert tiers.longest(KEYS[:3], whole=False) == 3
    put(tiers, KEYS[8])
    assert tiers.longest(KEYS[:3], whole=False) == 2
    tiers.close()
    disk.close()


def test_reads_ahead_do_not_make_the_caller_wait(tiers: Tiers, disk: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tiers, *KEYS[:6])
    go_on, reads = threading.Event(), []
    get = disk.get

    def slow(key: bytes) -> object:
        assert go_on.wait(10)
        reads.append(key)
        return get(key)

    monkeypatch.setattr(disk, "get", slow)
    tiers.prefetch(KEYS[3:6])
    assert not tiers.ready(KEYS[4])
    assert tiers.ready(KEYS[0])
    go_on.set()
    assert tiers.get(KEYS[3]) == (payload(KEYS[3]), "disk")
    assert tiers.get(KEYS[4]) == (payload(KEYS[4]), "disk")
    assert tiers.get(KEYS[5]) == (payload(KEYS[5]), "disk")
    assert sorted(reads) == KEYS[3:6]
    tiers.prefetch([KEYS[0]])
    tiers.prefetch([])
    assert not tiers.ready(KEYS[9])
