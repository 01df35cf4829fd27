"""Administration on the wire: what its requests may have, and how its answers are written.

Nothing here is ignored: a parameter that nobody knows is refused whatever the settings say.
"""

from __future__ import annotations

import datetime

import msgspec

from ocserve.api import fields, json_body
from ocserve.api.fields import Field, Reader, Values
from ocserve.api.operation import Operation, get, reads
from ocserve.errors import InvalidRequest

LONGEST_MESSAGE = 500
_LONGEST_REFERENCE = 4096  # a path
_LONGEST_WAIT_S = 3600.0
_LONGEST_DRAIN_S = 24 * 3600.0


def _moment(value: object, where: str) -> datetime.datetime:
    if not isinstance(value, str):
        raise fields.wrong_type(where, "a string", value)
    try:
        found = msgspec.convert(value, datetime.datetime)
    except msgspec.ValidationError:
        found = datetime.datetime.min
    if found.tzinfo is None:
        raise InvalidRequest(
            f"Invalid '{where}': expected a moment with its offset, such as 2026-12-01T02:00:00Z.", param=where
        )
    return found


_MODEL = Field("model", "effective", fields.string(_LONGEST_REFERENCE, empty=False), required=True)
_MOMENT = Reader(_moment, {"type": "string", "format": "date-time"})
LOAD = reads(_MODEL, Field("pull", "effective", fields.boolean()))
UNLOAD = reads(
    _MODEL,
    Field("wait_s", "effective", fields.number(0, _LONGEST_WAIT_S)),
    Field("forget", "effective", fields.boolean()),
)
DRAIN = reads(Field("deadline_s", "effective", fields.number(0, _LONGEST_DRAIN_S)))
NOTHING = reads()
MAINTENANCE = reads(
    Field("starts", "effective", _MOMENT, required=True),
    Field("ends", "effective", _MOMENT, required=True),
    Field("message", "effective", fields.string(LONGEST_MESSAGE)),
)


class Load(msgspec.Struct, frozen=True):
    """Which model to load: a name, a reference or a path. `pull`: bring it here if it is not."""

    model: str
    pull: bool


class Unload(msgspec.Struct, frozen=True):
    """Which model to unload, and how long it may take until nobody uses it. `forget`: serve it no more."""

    model: str
    wait_s: float
    forget: bool


class Announcement(msgspec.Struct, frozen=True, kw_only=True):
    """Maintenance, as it is asked for and as it is told."""

    starts: datetime.datetime
    ends: datetime.datetime
    message: str


class ModelState(msgspec.Struct, frozen=True, kw_only=True):
    """One model. `need_bytes` is what it takes by plan in main memory and on each GPU, `owed` answers that are being
    generated or waited for, `unload_at` when it goes if nobody uses it."""

    default: bool
    state: str
    leases: int
    owed: int
    restarts: int
    need_bytes: tuple[int, ...]
    resident_bytes: int | None
    context: int
    parallel: int
    last_used: datetime.datetime | None
    unload_at: datetime.datetime | None


class State(msgspec.Struct, frozen=True, kw_only=True):
    """The server. `settings` are those that are not as by default, secrets masked."""

    version: str
    started: datetime.datetime
    uptime_s: float
    ready: bool
    draining: bool
    stopping: bool
    active: int
    ledger: str
    maintenance: Announcement | None
    settings: dict[str, object]
    models: dict[str, ModelState]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What everybody is told, and callers the models that they may use.

    `availability` is the share of requests since the start that the server did not fail.
    """

    ready: bool
    models: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    uptime_s: float
    availability: float | None
    maintenance: Announcement | None


class Moved(msgspec.Struct, frozen=True):
    """Where a model is now."""

    model: str
    state: str


class DoorState(msgspec.Struct, frozen=True, kw_only=True):
    """Whether requests are taken, and how many run."""

    draining: bool
    stopping: bool
    active: int


class Change(msgspec.Struct, frozen=True):
    """A setting before and after, a secret masked."""

    before: object
    after: object


class Listed(msgspec.Struct, frozen=True, kw_only=True, rename={"since": "from"}):
    """Listed prices in US dollars by kind: from a day on, None being always, for a key that has used so many tokens."""

    since: datetime.date | None
    above: int
    prices: dict[str, str]


class Reloaded(msgspec.Struct, frozen=True):
    """The settings that have changed, by name, and the models whose prices have, with lists of `Listed`.

    Of many models the first are listed, and `more_prices` says of how many more they have. `notices` say what in the
    settings, as they are now, does nothing or misses something.
    """

    changed: dict[str, Change]
    prices: dict[str, Change]
    more_prices: int
    notices: tuple[str, ...]


def load(body: bytes) -> Load:
    """The load that `body` asks for; like the others raises `InvalidRequest`."""
    values = _read(body, LOAD)
    return Load(values.get("model", str) or "", values.get("pull", bool) or False)


def unload(body: bytes) -> Unload:
    """The unload that `body` asks for."""
    values = _read(body, UNLOAD)
    return Unload(
        values.get("model", str) or "", values.get("wait_s", float) or 0.0, values.get("forget", bool) or False
    )


def deadline_s(body: bytes) -> float | None:
    """How long what runs may go on, if `body` says so."""
    return _read(body, DRAIN).get("deadline_s", float)


def maintenance(body: bytes) -> Announcement:
    """The maintenance that `body` announces."""
    values = _read(body, MAINTENANCE)
    starts, ends = values.made("starts", _MOMENT), values.made("ends", _MOMENT)
    assert starts is not None
    assert ends is not None
    return Announcement(starts=starts, ends=ends, message=values.get("message", str) or "")


def nothing(body: bytes) -> None:
    """For what needs no parameters: there may be none."""
    _read(body, NOTHING)


def _read(body: bytes, declared: dict[str, Field]) -> Values:
    return fields.read(json_body.decode(body or b"{}"), declared, refuse_unknown=True)


def _post(
    path: str, answer: str, summary: str, table: dict[str, Field], *, method: str = "POST", status: int = 200
) -> Operation:
    return Operation(
        method=method, path=path, tag="Administration", summary=summary, answer=answer, reads=table, status=status
    )


OPERATIONS: tuple[Operation, ...] = (
    get("/admin/state", "Administration", "AdminState", "How the server and its models are."),
    _post("/admin/models/load", "AdminMoved", "Load a model now; answers when it is in memory.", LOAD),
    _post("/admin/models/unload", "AdminMoved", "Unload a model that nobody uses.", UNLOAD),
    _post("/admin/drain", "AdminDoors", "Take nothing more; answers when what ran has ended.", DRAIN),
    _post("/admin/resume", "AdminDoors", "Take requests again.", NOTHING),
    _post("/admin/stop", "AdminDoors", "Drain, and end the server.", DRAIN, status=202),
    _post("/admin/maintenance", "Maintenance", "Announce maintenance.", MAINTENANCE, method="PUT"),
    Operation(
        method="DELETE",
        path="/admin/maintenance",
        tag="Administration",
        summary="Take back the announcement.",
        answer="AdminDoors",
    ),
    _post("/admin/reload", "AdminReloaded", "Read the settings anew and apply what can change.", NOTHING),
)
