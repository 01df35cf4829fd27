"""Stored profiles come back as they were, and nothing else comes back."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from ocserve.engine import profile
from ocserve.engine.costs import Timing
from ocserve.engine.profile import Profile, ProfileKey, Waiting

KEY = ProfileKey(
    model_digest="abc",
    llama_cpp="b1",
    processor="a processor",
    cores=2,
    gpu_layers=-1,
    flash_attention=True,
    kv_type="f16",
    batch_tokens=256,
    parallel=8,
)
PROFILE = Profile(key=KEY, timings=(Timing(1, 1, 1, 0.01), Timing(2, 8, 36, 0.05)), spread=0.02)

# What each field could be instead: a profile of one key must not serve another.
OTHERS = {
    "model_digest": "abd",
    "llama_cpp": "b2",
    "processor": "another",
    "cores": 4,
    "gpu_layers": 0,
    "kv_type": "q8_0",
    "flash_attention": False,
    "batch_tokens": 512,
    "parallel": 4,
}


def file_of(directory: Path) -> Path:
    (path,) = (directory / profile.FOLDER).iterdir()
    return path


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    assert profile.load(tmp_path, KEY) is None
    profile.save(tmp_path, PROFILE)
    assert profile.load(tmp_path, KEY) == PROFILE
    profile.save(tmp_path, replace(PROFILE, spread=0.03))
    assert profile.load(tmp_path, KEY) == replace(PROFILE, spread=0.03)
    assert file_of(tmp_path).stat().st_mode & 0o777 == 0o600 or os.name != "posix"


@pytest.mark.parametrize("field", ProfileKey.__struct_fields__)
def test_every_part_of_the_key_counts(tmp_path: Path, field: str) -> None:
    profile.save(tmp_path, PROFILE)
    other = replace(KEY, **{field: OTHERS[field]})
    assert profile.load(tmp_path, other) is None
    stored = file_of(tmp_path)
    profile.save(tmp_path, replace(PROFILE, key=other))
    names = set((tmp_path / profile.FOLDER).iterdir()) - {stored}
    os.replace(stored, names.pop())  # the right name, another key inside
    assert profile.load(tmp_path, other) is None


@pytest.mark.parametrize(
    "timing",
    [Timing(0, 1, 1, 0.1), Timing(1, 0, 1, 0.1), Timing(1, 1, -1, 0.1), Timing(1, 1, 1, 0.0), Timing(1, 1, 1, 1e9)],
)
def test_impossible_timings_are_not_believed(tmp_path: Path, timing: Timing) -> None:
    profile.save(tmp_path, replace(PROFILE, timings=(timing,)))
    assert profile.load(tmp_path, KEY) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b"\xff\xfe", b"[" * 300_000, b'{"x":' + b"[" * 200_000])
def test_damaged_files_count_as_absent(tmp_path: Path, content: bytes) -> None:
    profile.save(tmp_path, PROFILE)
    file_of(tmp_path).write_bytes(content)
    assert profile.load(tmp_path, KEY) is None


def test_another_version_counts_as_absent(tmp_path: Path) -> None:
    profile.save(tmp_path, replace(PROFILE, version=profile.VERSION + 1))
    assert profile.load(tmp_path, KEY) is None


@given(st.data())
def test_a_file_cut_or_changed_anywhere_never_raises(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("profiles")
    profile.save(directory, PROFILE)
    path = file_of(directory)
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[position:]
    else:
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    found = profile.load(directory, KEY)
    assert found is None or (found.key == KEY and all(timing.seconds > 0 for timing in found.timings))


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_a_file_that_others_may_read_or_write_is_not_trusted(tmp_path: Path) -> None:
    profile.save(tmp_path, PROFILE)
    path = file_of(tmp_path)
    path.chmod(0o620)
    assert profile.load(tmp_path, KEY) is None
    path.chmod(0o600)
    moved = path.rename(tmp_path / "elsewhere")
    path.symlink_to(moved)
    assert profile.load(tmp_path, KEY) is None
    path.unlink()
    os.mkfifo(path, 0o600)
    assert profile.load(tmp_path, KEY) is None  # and does not wait for a writer


def test_thread_counts_that_were_not_measured_are_known() -> None:
    assert PROFILE.covers({1, 2})
    assert PROFILE.covers(set())
    assert not PROFILE.covers({3})


def test_a_save_that_fails_leaves_the_old_profile_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile.save(tmp_path, PROFILE)

    def full(descriptor: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        profile.save(tmp_path, replace(PROFILE, spread=0.5))
    assert profile.load(tmp_path, KEY) == PROFILE
    assert file_of(tmp_path)


def test_the_waiting_policy_reaches_the_environment_of_this_machine_only(tmp_path: Path) -> None:
    assert profile.waiting_environment(tmp_path, 2) == {}
    profile.save_waiting(tmp_path, Waiting(processor=profile.processor(), cores=2, spin_count=30_000))
    assert profile.waiting_environment(tmp_path, 2) == {"GOMP_SPINCOUNT": "30000"}
    assert profile.waiting_environment(tmp_path, 4) == {}
    profile.save_waiting(tmp_path, Waiting(processor="another", cores=2, spin_count=30_000))
    assert profile.waiting_environment(tmp_path, 2) == {}
    path = file_of(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"30000", b"-1"))
    assert profile.waiting_environment(tmp_path, 2) == {}
    assert msgspec.json.decode(path.read_bytes())["spin_count"] == -1
