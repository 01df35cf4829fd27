"""The disk tier: what was put comes back as it was or not at all, within its limit, and never as an exception."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ocserve.engine.tiers import folder, layout
from ocserve.engine.tiers.disk import DiskTier
from ocserve.engine.tiers.folder import Folder

KEYS = [bytes([number]) * 32 for number in range(1, 40)]
PAYLOAD = bytes(range(256)) * 16
FILE_BYTES = len(PAYLOAD) + layout.HEADER_BYTES
MIB = 1024 * 1024
Open = Callable[..., DiskTier]


@pytest.fixture
def reasons() -> list[str]:
    """Why a tier was turned off."""
    return []


@pytest.fixture
def opened(tmp_path: Path, reasons: list[str]) -> Iterator[Open]:
    """Opens tiers in one folder and closes them."""
    with ExitStack() as closing:

        def open_tier(identity: bytes = b"model", limit_bytes: int = 8 * MIB, **more: int) -> DiskTier:
            tier = DiskTier(tmp_path / "prefixes", identity, limit_bytes, reasons.append, **more)
            closing.callback(tier.close)
            return tier

        yield open_tier


def stored(tier: DiskTier, *keys: bytes) -> DiskTier:
    for key in keys:
        tier.put(key, PAYLOAD)
        assert tier.flush(10)
    return tier


def path(tmp_path: Path, key: bytes = KEYS[0], identity: bytes = b"model") -> Path:
    return Folder(tmp_path / "prefixes", identity).path(key)


def test_what_was_put_comes_back_in_another_run(opened: Open) -> None:
    stored(opened(), KEYS[0]).close()
    tier = opened()
    assert KEYS[0] in tier
    assert tier.get(KEYS[0]) == PAYLOAD
    assert tier.get(KEYS[1]) is None
    assert KEYS[1] not in tier


def test_what_waits_for_the_disk_can_be_read(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    write = Folder.write

    def slow(self: Folder, key: bytes, payload: bytes) -> None:
        go_on.wait(10)
        write(self, key, payload)

    monkeypatch.setattr(Folder, "write", slow)
    tier = opened()
    tier.put(KEYS[0], PAYLOAD)
    assert tier.get(KEYS[0]) is PAYLOAD
    assert not tier.flush(0.01)
    go_on.set()
    assert tier.flush(10)
    assert tier.get(KEYS[0]) == PAYLOAD


def test_a_full_queue_drops_the_oldest(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, writing = threading.Event(), threading.Event()
    write = Folder.write

    def slow(self: Folder, key: bytes, payload: bytes) -> None:
        writing.set()
        go_on.wait(10)
        write(self, key, payload)

    monkeypatch.setattr(Folder, "write", slow)
    tier = opened(queue_bytes=3 * len(PAYLOAD))
    tier.put(KEYS[0], PAYLOAD)
    assert writing.wait(10)
    for key in KEYS[1:5]:
        tier.put(key, PAYLOAD)
        assert tier.stats().queued_bytes <= 3 * len(PAYLOAD)
    assert [key in tier for key in KEYS[:5]] == [True, False, False, True, True]
    go_on.set()
    assert tier.flush(10)
    assert (tier.stats().written, tier.stats().dropped) == (3, 2)
    tier.put(KEYS[6], PAYLOAD * 4)  # larger than the queue, and nothing else waits
    assert tier.flush(10)
    assert tier.get(KEYS[6]) == PAYLOAD * 4


def test_only_this_user_can_read(opened: Open, tmp_path: Path) -> None:
    stored(opened(), KEYS[0])
    file = path(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.parent.parent.stat().st_mode) == 0o700


@given(place=st.integers(0, FILE_BYTES - 1), bit=st.integers(0, 7))
def test_every_flipped_bit_is_seen(place: int, bit: int) -> None:
    identity = layout.identity_hash(b"model")
    file = bytearray(layout.header(identity, KEYS[0], PAYLOAD) + PAYLOAD)
    assert bytes(layout.payload_of(memoryview(file), identity, KEYS[0]) or b"") == PAYLOAD
    file[place] ^= 1 << bit
    assert layout.payload_of(memoryview(file), identity, KEYS[0]) is None


@given(st.integers(0, FILE_BYTES - 1), st.booleans())
def test_every_torn_file_is_seen(length: int, zeroed: bool) -> None:
    identity = layout.identity_hash(b"model")
    whole = layout.header(identity, KEYS[0], PAYLOAD) + PAYLOAD
    torn = whole[:length] + bytes(len(whole) - length) * zeroed
    if torn != whole:
        assert layout.payload_of(memoryview(torn), identity, KEYS[0]) is None


def damage_cut(file: Path) -> None:
    os.truncate(file, FILE_BYTES - 1)


def damage_longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def damage_foreign(file: Path) -> None:
    identity = layout.identity_hash(b"another build")
    file.write_bytes(layout.header(identity, KEYS[0], PAYLOAD) + PAYLOAD)


def damage_renamed(file: Path) -> None:
    identity = layout.identity_hash(b"model")
    file.write_bytes(layout.header(identity, KEYS[1], PAYLOAD) + PAYLOAD)


def damage_huge(file: Path) -> None:
    os.truncate(file, 1 << 40)


def damage_link(file: Path) -> None:
    target = file.parent.parent.parent / "elsewhere"
    file.rename(target)
    file.symlink_to(target)


def damage_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    "damage",
    [damage_cut, damage_longer, damage_foreign, damage_renamed, damage_huge, damage_link, damage_pipe],
    ids=lambda damage: damage.__name__,
)
def test_what_is_not_as_it_was_put_is_a_miss_and_goes(
    opened: Open, tmp_path: Path, damage: Callable[[Path], None], reasons: list[str]
) -> None:
    tier = stored(opened(), KEYS[0])
    damage(path(tmp_path))
    assert tier.get(KEYS[0]) is None
    assert tier.stats().rejected == 1
    assert not os.path.lexists(path(tmp_path))
    assert tier.get(KEYS[0]) is None
    assert stored(tier, KEYS[0]).get(KEYS[0]) == PAYLOAD
    assert reasons == []


def test_another_identity_never_hits(opened: Open) -> None:
    stored(opened(b"one"), KEYS[0])
    assert KEYS[0] not in opened(b"two")
    assert opened(b"two").get(KEYS[0]) is None


def total_bytes(tmp_path: Path) -> int:
    return sum(file.stat().st_size for file in (tmp_path / "prefixes").rglob("*") if file.is_file())


def test_the_limit_holds_and_the_least_recently_used_goes(opened: Open, tmp_path: Path) -> None:
    tier = opened(limit_bytes=10 * FILE_BYTES)
    for key in KEYS:
        stored(tier, key)
        tier.touch([KEYS[0]])
        assert total_bytes(tmp_path) <= 10 * FILE_BYTES
    assert KEYS[0] in tier
    assert KEYS[1] not in tier
    assert KEYS[-1] in tier
    assert tier.stats().bytes == total_bytes(tmp_path)
    assert tier.stats().evicted == len(KEYS) - tier.stats().bytes // FILE_BYTES
    tier.put(b"\xff" * 32, bytes(10 * FILE_BYTES))
    assert tier.stats().dropped == 1


def test_the_end_of_a_prefix_goes_before_its_beginning(opened: Open) -> None:
    tier = stored(opened(limit_bytes=4 * FILE_BYTES), *KEYS[:3])
    tier.touch(KEYS[:3])
    stored(tier, *KEYS[10:12])
    assert [key in tier for key in KEYS[:3]] == [True, True, False]


def test_a_smaller_limit_is_met_at_the_next_start(opened: Open, tmp_path: Path) -> None:
    stored(opened(), *KEYS[:8]).close()
    tier = opened(limit_bytes=3 * FILE_BYTES)
    stored(tier, KEYS[9])
    assert total_bytes(tmp_path) <= 3 * FILE_BYTES


def test_files_of_old_builds_count_and_go_first(opened: Open, tmp_path: Path) -> None:
    stored(opened(b"old build"), *KEYS[:4])
    stored(opened(b"another model"), *KEYS[:2])
    tier = stored(opened(), KEYS[0])
    past = time.time() - folder.IDLE_IDENTITY_S - 60
    os.utime(path(tmp_path, identity=b"model"), (past, past))  # used before all others
    os.utime(path(tmp_path, identity=b"old build").parent, (past, past))
    tier.close()
    tier = stored(opened(limit_bytes=6 * FILE_BYTES), KEYS[1])
    assert KEYS[0] in tier
    assert len(list(path(tmp_path, identity=b"another model").parent.iterdir())) == 2
    assert total_bytes(tmp_path) <= 6 * FILE_BYTES
    stored(tier, *KEYS[2:4])
    assert not (tmp_path / "prefixes" / layout.identity_hash(b"old build").hex()).exists()
    assert KEYS[0] in tier


def test_garbage_is_left_alone_and_what_dead_writers_left_is_removed(
    opened: Open, tmp_path: Path, reasons: list[str]
) -> None:
    stored(opened(), KEYS[0]).close()
    own = path(tmp_path).parent
    abandoned, running = own / "aa.1.tmp", own / "bb.2.tmp"
    others = [own / "notes.txt", own.parent / "notes.kv", own.parent / ("z" * 64), own / "folder.kv" / "deep"]
    for file in (abandoned, running, *others):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"garbage")
    (own / "dangling.kv").symlink_to(tmp_path / "nowhere")
    past = time.time() - folder.ABANDONED_S - 60
    os.utime(abandoned, (past, past))
    tier = opened(limit_bytes=2 * FILE_BYTES)
    stored(tier, *KEYS[1:5])
    assert not abandoned.exists()
    assert all(file.exists() for file in others)
    assert tier.get(KEYS[4]) == PAYLOAD
    assert reasons == []


def test_files_may_vanish_at_any_time(opened: Open, tmp_path: Path, reasons: list[str]) -> None:
    tier = stored(opened(), *KEYS[:3])
    for file in path(tmp_path).parent.iterdir():
        file.unlink()
    path(tmp_path).parent.rmdir()
    (tmp_path / "prefixes").rmdir()
    assert tier.get(KEYS[0]) is None
    tier.touch(KEYS[:3])
    assert stored(tier, KEYS[0]).get(KEYS[0]) == PAYLOAD
    assert reasons == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_turns_the_tier_off(opened: Open, tmp_path: Path, reasons: list[str]) -> None:
    tmp_path.chmod(0o500)
    tier = opened()
    tmp_path.chmod(0o700)
    assert reasons == ["Permission denied"]
    assert tier.get(KEYS[0]) is None


@pytest.mark.parametrize("kind", ["open to others", "link", "file"])
def test_a_folder_that_is_not_ours_alone_turns_the_tier_off(
    opened: Open, tmp_path: Path, reasons: list[str], kind: str
) -> None:
    place = tmp_path / "prefixes"
    if kind == "open to others":
        place.mkdir()
        place.chmod(0o755)
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.write_bytes(b"")
    tier = opened()
    tier.put(KEYS[0], PAYLOAD)
    tier.touch([KEYS[0]])
    assert tier.flush(1)
    assert tier.get(KEYS[0]) is None
    assert KEYS[0] not in tier
    assert len(reasons) == 1
    assert tier.stats().disabled == reasons[0]
    assert tier.stats().dropped == 1


# A limit on the size of files makes the system refuse a write in the middle, as a full disk does.
_FULL = """
import resource, sys
from pathlib import Path
from ocserve.engine.tiers.disk import DiskTier
reasons = []
tier = DiskTier(Path(sys.argv[1]), b"model", 1 << 30, reasons.append)
tier.put(b"a" * 32, bytes(10_000))
assert tier.flush(10) and tier.get(b"a" * 32) == bytes(10_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for name in b"bcd":
    tier.put(bytes([name]) * 32, bytes(30_000))
assert tier.flush(10)
assert tier.get(b"b" * 32) is None and tier.get(b"a" * 32) is None
assert reasons == ["File too large"] and tier.stats().dropped == 3, (reasons, tier.stats())
tier.close()
"""


def test_a_full_disk_turns_the_tier_off_and_leaves_no_part(tmp_path: Path, opened: Open) -> None:
    subprocess.run([sys.executable, "-c", _FULL, tmp_path / "prefixes"], check=True)
    assert [file.name for file in path(tmp_path).parent.iterdir()] == [(b"a" * 32).hex() + ".kv"]
    assert opened().get(b"a" * 32) == bytes(10_000)


def test_two_processes_share_a_folder(opened: Open, tmp_path: Path, reasons: list[str]) -> None:
    limit = 20 * FILE_BYTES
    one, other = opened(limit_bytes=limit), opened(limit_bytes=limit)
    for turn in range(3):
        for index, key in enumerate(KEYS):
            (one if (index + turn) % 2 else other).put(key, PAYLOAD)
        assert one.flush(10)
        assert other.flush(10)
        for key in KEYS:
            for tier in (one, other):
                assert tier.get(key) in (None, PAYLOAD)
        assert total_bytes(tmp_path) <= limit * (1 + 2 / 16)
    stored(one, KEYS[0])
    assert other.get(KEYS[0]) == PAYLOAD
    assert reasons == []
    assert one.stats().rejected == other.stats().rejected == 0


def test_no_descriptor_is_left_open(opened: Open, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    tier = stored(opened(), *KEYS[:5])
    for key in KEYS[:8]:
        tier.get(key)
    damage_cut(path(tmp_path))
    tier.get(KEYS[0])
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    assert after == before
