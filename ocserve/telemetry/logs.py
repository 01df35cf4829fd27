"""Logging to stderr or a file: one line per event, JSON or readable, and never content.

Nothing is kept out of the log by care at the call. Only fields on a list are written, text is cut and made harmless
so that it cannot forge a line, and an exception is its type and the places it passed, without message or locals. What
other libraries log goes the same way: of their messages only the constant part is written.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import traceback
import uuid
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import msgspec
import structlog

from ocserve import config
from ocserve.files import only_regular
from ocserve.generation import RequestRecord

# Of JSON lines, which packaging/log-schema.json describes; it rises when a field's meaning changes or one goes.
SCHEMA_VERSION = 1
# Every field that a line may have. Text under these names is a name, a place or a state, never content.
FIELDS = frozenset(
    """
    request_id route method status stream key_id model finish_reason error_code code retry_after_s
    prompt_tokens cached_tokens completion_tokens reasoning_tokens queue_ms ttft_ms total_ms
    url host port version pid exit_code signal reason detail state attempt count steps
    wait_s retry_s duration_s load_s deadline_s active waiting draining
    quantisation source path sha256 size_bytes memory_bytes needed_bytes device devices gpu_layers
    context parallel pool_tokens threads_decode threads_prefill hint setting origin
    exception places where logger place thread
    """.split()  # noqa: SIM905 - a table is easier to read
)

_LONGEST_TEXT = 500
_MOST_ITEMS = 32
_MOST_PLACES = 12
# Controls, line and paragraph separators, and what reorders or hides text on a terminal.
_UNSAFE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

# Libraries whose messages may be written (the constant part); of others only the place is.
_TRUSTED_LOGGERS = ("uvicorn.error", "asyncio", "huggingface_hub", "concurrent")
# These log requests and their content, and we have a line of our own for that.
_SILENT_LOGGERS = ("uvicorn.access", "httpcore", "httpx", "httpx2", "h11", "urllib3")


def configure(settings: config.Log, stream: TextIO | None = None) -> None:
    """Direct all logging of this process, ours and libraries', to `stream` (the settings' file, or stderr).

    May be called again. Raises `ConfigError` for a file that cannot be written.
    """
    before = structlog.get_config()["logger_factory"]()
    if isinstance(before, _File):
        before.close()
    lines = _File(settings) if settings.file is not None and stream is None else _Lines(stream or sys.stderr)
    on_terminal = isinstance(lines, _Lines) and lines.stream.isatty()
    readable = settings.format == "text" or (settings.format == "auto" and on_terminal)
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    structlog.configure(
        processors=[
            _allowed,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(*(("%H:%M:%S", False) if readable else ("iso", True))),
            _for_people if readable else _as_json,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: lines,
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers[:] = [_FromLibraries()]
    # Libraries' debug and info lines are about their own workings.
    root.setLevel(level if settings.level == "debug" else max(level, logging.WARNING))
    logging.captureWarnings(True)
    for name in _SILENT_LOGGERS:
        logging.getLogger(name).disabled = True


def catch_uncaught() -> None:
    """Have exceptions that nothing catches logged like others, instead of printed with their messages."""
    sys.excepthook = lambda kind, error, trace: _uncaught(kind, trace)
    threading.excepthook = lambda args: _uncaught(args.exc_type, args.exc_traceback)
    sys.unraisablehook = lambda args: _uncaught(args.exc_type, args.exc_traceback)


def event(name: str, /, *, level: str = "info", **facts: object) -> None:
    """Log a fact of the server's life. Fields that are not in `FIELDS` are withheld. Silent before `configure`."""
    if structlog.is_configured():
        getattr(structlog.get_logger(), level)(name, **facts)


def failure(name: str, error: BaseException, /, **facts: object) -> None:
    """Log an exception that was a surprise: its type and places, and facts around it."""
    event(name, level="error", **facts, **_described(type(error), error.__traceback__))


def request_line(record: RequestRecord) -> None:
    """Log one request, once, when it has ended. Token counts are those of a generation that began."""
    usage = record.usage if record.usage.prompt_tokens else None
    event(
        "request",
        level=_level(record),
        request_id=record.request_id,
        route=record.route,
        key_id=record.key_id,
        model=record.model,
        status=record.status,
        stream=record.stream,
        prompt_tokens=usage and usage.prompt_tokens,
        cached_tokens=usage and usage.cached_tokens,
        completion_tokens=usage and usage.completion_tokens,
        finish_reason=record.finish_reason,
        error_code=record.error_code,
        queue_ms=_tenths(record.queue_ms),
        ttft_ms=_tenths(record.ttft_ms),
        total_ms=_tenths(record.total_ms),
    )


def _level(record: RequestRecord) -> str:
    """An error is a failure of ours, in a stream that began with 200 as well; not being ready is a state."""
    code = record.error_code or ""
    if record.status == 500 or code == "internal_error" or code.startswith("engine_"):
        return "error"
    return "warning" if record.status > 500 else "info"


def request_id(offered: str | None) -> str:
    """The client's id for its request if it is harmless, else one of ours."""
    if offered is not None and _REQUEST_ID.fullmatch(offered):
        return offered
    return f"req_{uuid.uuid4().hex}"


def harmless(text: str) -> str:
    """`text` on one line without anything that acts on a terminal or a log reader, cut to a bearable length."""
    cut = text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "…"
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", cut)


class _Lines:
    """The end of the pipe. A log that cannot be written must not fail what it reports."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def _write(self, line: str) -> None:
        with suppress(OSError, ValueError):  # the reader is gone, or the stream is closed
            self.stream.write(line + "\n")
            self.stream.flush()

    debug = info = warning = error = critical = _write


class _File:
    """The same into a file that only its owner may read, and that is set aside when it is large."""

    def __init__(self, settings: config.Log) -> None:
        assert settings.file is not None
        try:
            self._handler = _Rotating(settings.file, settings.max_bytes, settings.backups)
        except OSError as error:
            raise config.ConfigError(f"log.file: cannot write {settings.file}: {error.strerror}") from None

    def _write(self, line: str) -> None:
        self._handler.handle(logging.makeLogRecord({"msg": line}))

    def close(self) -> None:
        self._handler.close()

    debug = info = warning = error = critical = _write


class _Rotating(RotatingFileHandler):
    """The library's rotation, with files of mode 0600 and without its report of failures, which repeats the line.

    A file that others move or delete, as logrotate does, is left at the next line for a new one at the path.
    """

    def __init__(self, file: Path, max_bytes: int, backups: int) -> None:
        super().__init__(file, maxBytes=max_bytes, backupCount=backups, encoding="utf-8")

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", opener=only_regular)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, into the file that is at the path now; the one before where no other can be opened."""
        with suppress(OSError):
            if self.stream is not None and not self._is_at_path(self.stream):
                before, self.stream = self.stream, self._open()
                before.close()
        super().emit(record)

    def _is_at_path(self, stream: TextIOWrapper) -> bool:
        try:
            return os.path.samestat(os.stat(self.baseFilename), os.fstat(stream.fileno()))
        except FileNotFoundError:
            return False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        """A log that cannot be written must not fail what it reports."""


class _FromLibraries(logging.Handler):
    """Standard-library logging, as events."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "error" if record.levelno >= logging.ERROR else record.levelname.lower()
        facts: dict[str, object] = {"logger": record.name, "place": _place(record.pathname, record.lineno)}
        if record.name == "py.warnings":
            facts["place"], facts["exception"] = _warning(record)
        elif record.exc_info and record.exc_info[0] is not None:
            facts |= _described(record.exc_info[0], record.exc_info[2])
        elif record.name.startswith(_TRUSTED_LOGGERS):
            # Without its arguments, and without further lines: asyncio puts the repr of objects there.
            facts["reason"] = str(record.msg).split("\n", 1)[0]
        event("library", level=level if level in {"debug", "info", "warning"} else "error", **facts)


def _allowed(_: Any, __: str, facts: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Keep what is on the list, harmless; name the rest."""
    written: dict[str, Any] = {"event": harmless(str(facts.pop("event")))}
    written |= {name: _value(value) for name, value in facts.items() if name in FIELDS and value is not None}
    if withheld := [harmless(name) for name in facts if name not in FIELDS]:
        written["withheld"] = withheld
    return written


def _value(value: object) -> object:
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, str):
        return harmless(value)
    if isinstance(value, Path):
        return harmless(str(value))
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_value(item) for item in value[:_MOST_ITEMS]]
    return type(value).__name__


def _for_people(_: Any, __: str, facts: Mapping[str, Any]) -> str:
    """One short line: time, what, and for a request what it cost; level only where it matters."""
    rest = dict(facts)
    head = [rest.pop("timestamp")]
    level, event_name = rest.pop("level"), rest.pop("event")
    if level in ("warning", "error", "critical"):
        head.append(level.upper())
    if event_name == "request":
        head += _request_for_people(rest)
    else:
        head.append(event_name)
    return " ".join([*map(str, head), *(f"{name}={value}" for name, value in rest.items())])


def _request_for_people(rest: dict[str, Any]) -> list[object]:
    """Takes from `rest` what every request has; times of whole milliseconds."""
    for name in ("stream", "queue_ms", "key_id"):
        rest.pop(name, None)
    prompt, cached, completion = (rest.pop(f"{kind}_tokens", None) for kind in ("prompt", "cached", "completion"))
    line = [rest.pop("status"), rest.pop("route"), rest.pop("model", "")]
    if prompt:
        line.append(f"{prompt}{f' ({cached} cached)' if cached else ''}+{completion} tokens")
    if (first := rest.pop("ttft_ms", None)) is not None:
        line.append(f"first {first:.0f} ms")
    line.append(f"total {rest.pop('total_ms'):.0f} ms")
    return [word for word in line if word != ""]


def _as_json(_: Any, __: str, facts: Mapping[str, Any]) -> str:
    head = {"v": SCHEMA_VERSION} | {name: facts[name] for name in ("timestamp", "level", "event")}
    return msgspec.json.encode(head | dict(facts)).decode()


def _uncaught(kind: type[BaseException] | None, trace: TracebackType | None) -> None:
    if kind is not None and not issubclass(kind, KeyboardInterrupt):
        event("uncaught", level="error", thread=threading.current_thread().name, **_described(kind, trace))


def _described(kind: type[BaseException], trace: TracebackType | None) -> dict[str, object]:
    frames = traceback.extract_tb(trace, limit=-_MOST_PLACES)
    return {"exception": kind.__name__, "places": [_place(frame.filename, frame.lineno) for frame in frames]}


def _place(file: str, line: int | None) -> str:
    return f"{'/'.join(Path(file).parts[-2:])}:{line}"


def _warning(record: logging.LogRecord) -> tuple[str, str]:
    """(place, category) of a warning, whose text is `file:line: category: message`."""
    match = re.match(r"(.*?):(\d+): (\w+)", record.getMessage())
    return (_place(match[1], int(match[2])), match[3]) if match else ("", "Warning")


def _tenths(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else round(milliseconds, 1)
