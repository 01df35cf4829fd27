"""When requests are taken: drains, the end, and maintenance that begins and ends by the clock."""

from __future__ import annotations

import datetime
import stat
import threading
from pathlib import Path

import msgspec
import pytest

from ocserve import doors as module
from ocserve.doors import CannotKeep, Doors, Maintenance
from ocserve.errors import ApiError, InvalidRequest

NOON = datetime.datetime(2026, 12, 1, 12, tzinfo=datetime.UTC)
HOUR = datetime.timedelta(hours=1)
WINDOW = Maintenance(starts=NOON + HOUR, ends=NOON + 2 * HOUR, message="New disks.")


class Clock:
    def __init__(self) -> None:
        self.at = NOON

    def __call__(self) -> datetime.datetime:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refusal(doors: Doors) -> ApiError:
    assert not doors.open
    with pytest.raises(ApiError) as refused:
        doors.check()
    return refused.value


def test_a_drain_ends_when_it_is_told_to_and_a_stop_does_not() -> None:
    doors = Doors()
    doors.check()
    doors.drain()
    error = refusal(doors)
    assert (error.status, error.code) == (503, "draining")
    assert error.retry_after_s
    doors.resume()
    doors.check()
    doors.stop()
    doors.resume()
    assert refusal(doors).code == "shutting_down"


def test_maintenance_shuts_the_doors_from_its_start_to_its_end(clock: Clock) -> None:
    doors = Doors(now=clock)
    doors.announce(WINDOW)
    assert doors.open
    assert doors.announced is not None
    assert doors.announced.window == "2026-12-01T13:00:00Z/2026-12-01T14:00:00Z"
    clock.at = WINDOW.starts
    error = refusal(doors)
    assert (error.status, error.code, error.retry_after_s) == (503, "maintenance", 3600)
    clock.at = WINDOW.ends - datetime.timedelta(seconds=90)
    assert refusal(doors).retry_after_s == 90
    clock.at = WINDOW.ends
    assert doors.open
    assert doors.announced is None


def test_what_is_announced_outlives_the_process_and_is_its_owners_alone(clock: Clock, tmp_path: Path) -> None:
    file = tmp_path / "new" / "maintenance.json"
    Doors(file, clock).announce(WINDOW)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = Doors(file, clock)
    assert again.announced == WINDOW
    again.take_back()
    assert again.announced is Doors(file, clock).announced is None
    again.take_back()
    assert [path.name for path in file.parent.iterdir()] == []


def test_a_window_that_is_none_is_refused_and_changes_nothing(clock: Clock) -> None:
    doors = Doors(now=clock)
    doors.announce(WINDOW)
    for starts, ends in ((WINDOW.ends, WINDOW.starts), (WINDOW.starts, WINDOW.starts), (NOON - 2 * HOUR, NOON)):
        with pytest.raises(InvalidRequest):
            doors.announce(Maintenance(starts=starts, ends=ends))
    assert doors.announced == WINDOW


def test_moments_that_utc_does_not_have_are_refused_and_kept_by_no_file(clock: Clock, tmp_path: Path) -> None:
    file = tmp_path / "maintenance.json"
    doors = Doors(file, clock)
    for starts, ends in (
        ("2030-01-01T00:00:00Z", "9999-12-31T23:59:59-14:00"),
        ("0001-01-01T00:00:00+14:00", "2030-01-01T00:00:00Z"),
    ):
        given = {"starts": starts, "ends": ends}
        with pytest.raises(InvalidRequest):
            doors.announce(msgspec.convert(given, Maintenance))
        assert not file.exists()
        file.write_bytes(msgspec.json.encode(given))
        with pytest.raises(CannotKeep):
            Doors(file, clock)
        file.unlink()
    assert doors.announced is None


def test_of_two_announcements_at_once_the_file_holds_the_one_that_is_gone_by(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, begun, go_on = module._write, threading.Event(), threading.Event()

    def slow_the_first_time(file: Path, content: bytes) -> None:
        write(file, content)
        if not begun.is_set():
            begun.set()
            go_on.wait(0.3)  # the other cannot come in between, however long it is waited for

    monkeypatch.setattr(module, "_write", slow_the_first_time)
    doors = Doors(tmp_path / "maintenance.json", clock)
    first = threading.Thread(target=doors.announce, args=(WINDOW,))
    first.start()
    assert begun.wait(5)
    doors.announce(msgspec.structs.replace(WINDOW, message="Later."))
    go_on.set()
    first.join()
    assert doors.announced == Doors(tmp_path / "maintenance.json", clock).announced


def test_a_file_that_cannot_be_understood_is_refused_rather_than_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "maintenance.json"
    file.write_text('{"starts": "soon"}')
    with pytest.raises(CannotKeep, match="announces no maintenance"):
        Doors(file)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CannotKeep):
        Doors(tmp_path / "file" / "maintenance.json").announce(
            Maintenance(starts=NOON + HOUR * 10**6, ends=NOON + 2 * HOUR * 10**6)
        )
