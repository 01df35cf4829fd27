"""Whether something could be made is tried, and nothing is left of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ocserve.folders import obstacle_in, obstacle_to


@pytest.mark.parametrize("unnamed", [True, False], ids=["unnamed files", "named ones"])
def test_what_can_be_made_is_not(tmp_path: Path, unnamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not unnamed:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    assert obstacle_in(tmp_path / "a" / "b") is None
    assert obstacle_to(tmp_path / "a" / "b") is None
    assert obstacle_in(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_made_or_written_is_said(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    assert obstacle_to(file) is None
    assert file.read_bytes() == b"content"
    assert obstacle_to(file / "a" / "b") == obstacle_in(file) == f"{file} is not a folder"
    assert obstacle_to(tmp_path) == f"{tmp_path} cannot be written: Is a directory"
    assert not Path("/proc/self").exists() or obstacle_to(Path("/proc/foo/ledger.db"))
