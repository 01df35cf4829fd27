"""When requests are taken: drains, the end, and maintenance that begins and ends by the clock."""

from __future__ import annotations

import datetime
import stat
from pathlib import Path

import pytest

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
