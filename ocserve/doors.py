"""Whether the server takes requests: its doors are shut while it drains or stops, and for announced maintenance.

Maintenance is announced ahead and begins and ends by the clock. The announcement lies in a file of its own, so that a
restart neither forgets it nor opens the doors early. Knows nothing of what a request is.
"""

from __future__ import annotations

import datetime
import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from ocserve.decoding import resolved
from ocserve.errors import ApiError, EngineUnavailable, InvalidRequest, UnderMaintenance

_RETRY_S = 5.0  # of one that drains: nobody knows when it will be opened
LONGEST_MESSAGE = 500
_LARGEST_FILE = 8192

Moment = Annotated[datetime.datetime, Meta(tz=True)]


@resolved
class Maintenance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A window in which nothing is taken on, and what is said of it. `ends` is the first moment after it."""

    starts: Moment
    ends: Moment
    message: Annotated[str, Meta(max_length=LONGEST_MESSAGE)] = ""

    @property
    def window(self) -> str:
        """Both moments in UTC, as `2026-12-01T02:00:00Z/2026-12-01T03:00:00Z`."""
        return f"{_utc(self.starts)}/{_utc(self.ends)}"


class CannotKeep(Exception):
    """The announcement cannot be read or written; the text says why."""


class Doors:
    """Open until they are shut. `file` keeps the announcement; without one it lasts as long as this process."""

    def __init__(
        self,
        file: Path | None = None,
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        """Raises `CannotKeep` for a file that holds no announcement: the doors might have to be shut."""
        self._file = file
        self._now = now
        self._announced = None if file is None else _read(file)
        self._changing = threading.Lock()  # the file and what is known of it: two may announce at once
        self._drains = 0
        self.draining = False
        self.stopping = False

    @property
    def open(self) -> bool:
        """Whether a request that comes now would be taken."""
        return self._refusal() is None

    @property
    def announced(self) -> Maintenance | None:
        """The maintenance that is to come or under way."""
        found = self._announced
        return found if found is not None and self._now() < found.ends else None

    @property
    def closed_for_maintenance(self) -> bool:
        """Whether maintenance is under way."""
        found = self.announced
        return found is not None and found.starts <= self._now()

    def check(self) -> None:
        """Raise what a request that comes now is told, if it is not taken."""
        if (refusal := self._refusal()) is not None:
            raise refusal

    def drain(self) -> int:
        """Take nothing more until `resume`; the drain's number."""
        self._drains += 1
        self.draining = True
        return self._drains

    def drained_by(self, number: int) -> bool:
        """Whether that drain is under way still: nobody has opened the doors since, or begun another."""
        return self.draining and number == self._drains

    def resume(self) -> None:
        """Take requests again; a server that stops does not."""
        self.draining = self.stopping

    def stop(self) -> None:
        """Take nothing more, for good."""
        self.draining = self.stopping = True

    def announce(self, maintenance: Maintenance) -> None:
        """Shut from `starts` to `ends`, instead of any time before. Raises `InvalidRequest` and `CannotKeep`."""
        try:
            maintenance = _in_utc(maintenance)
        except OverflowError:
            raise InvalidRequest("'starts' and 'ends' must lie in the years 1 to 9999 of UTC.", param="ends") from None
        if maintenance.ends <= maintenance.starts:
            raise InvalidRequest("'ends' must be later than 'starts'.", param="ends")
        if maintenance.ends <= self._now():
            raise InvalidRequest("'ends' is over already.", param="ends")
        with self._changing:
            if self._file is not None:
                _write(self._file, msgspec.json.encode(maintenance))
            self._announced = maintenance

    def take_back(self) -> None:
        """Announce nothing, and open if only that kept the doors shut. Raises `CannotKeep`."""
        with self._changing:
            if self._file is not None:
                try:
                    self._file.unlink(missing_ok=True)
                except OSError as error:
                    raise CannotKeep(f"{self._file} cannot be removed: {error.strerror}") from None
            self._announced = None

    def _refusal(self) -> ApiError | None:
        if self.stopping:
            return shutting_down()
        if self.draining:
            return drained()
        found = self.announced
        if found is None or not self.closed_for_maintenance:
            return None
        return UnderMaintenance(
            f"The server is under maintenance until {_utc(found.ends)}.",
            retry_after_s=(found.ends - self._now()).total_seconds(),
        )


def shutting_down() -> EngineUnavailable:
    """What is said by a server that stops."""
    return EngineUnavailable("The server is shutting down.", code="shutting_down", retry_after_s=_RETRY_S)


def drained() -> EngineUnavailable:
    """What is said by a server that is drained."""
    return EngineUnavailable(
        "The server takes no requests at present: its operator drains it.", code="draining", retry_after_s=_RETRY_S
    )


def _in_utc(found: Maintenance) -> Maintenance:
    """The same window; raises `OverflowError` where UTC has no such moment."""
    utc = datetime.UTC
    return replace(found, starts=found.starts.astimezone(utc), ends=found.ends.astimezone(utc))


def _utc(moment: datetime.datetime) -> str:
    return moment.astimezone(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _read(file: Path) -> Maintenance | None:
    try:
        with file.open("rb") as source:
            return _in_utc(msgspec.json.decode(source.read(_LARGEST_FILE), type=Maintenance))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CannotKeep(f"{file} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, OverflowError) as error:
        raise CannotKeep(f"{file} announces no maintenance: {error}") from None


def _write(file: Path, content: bytes) -> None:
    """Put `content` in place of the file, whole or not at all, for this user only."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.")  # of mode 0600
        try:
            with open(descriptor, "wb") as output:
                output.write(content)
                output.flush()
                os.fsync(output.fileno())
            os.replace(temporary, file)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise CannotKeep(f"{file} cannot be written: {error.strerror}") from None
