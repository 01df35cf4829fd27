"""The log says what happened and never what was said; nothing that is logged can forge a line."""

from __future__ import annotations

import ast
import asyncio
import io
import json
import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from ocserve import config
from ocserve.generation import RequestRecord, Usage
from ocserve.telemetry import logs

CANARY = "CANARY-7f3a"
PACKAGE = Path(logs.__file__).resolve().parent.parent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Logging belongs to the process; leave it as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def configured(level: str = "debug", fmt: str = "auto") -> io.StringIO:
    stream = io.StringIO()
    logs.configure(config.Log(level=level, format=fmt), stream)  # type: ignore[arg-type]
    return stream


RECORD = RequestRecord(
    request_id="req_1",
    route="/v1/chat/completions",
    key_id="anonymous",
    model="smollm2:135m",
    status=200,
    stream=True,
    usage=Usage(prompt_tokens=12, cached_tokens=4, completion_tokens=34),
    finish_reason="stop",
    error_code=None,
    queue_ms=1.26,
    ttft_ms=20.0,
    total_ms=300.04,
)


def test_a_request_is_one_line_with_its_numbers() -> None:
    stream = configured()
    logs.request_line(RECORD)
    (line,) = lines(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line.pop("timestamp"))
    assert line == {
        "v": 1,
        "level": "info",
        "event": "request",
        "request_id": "req_1",
        "route": "/v1/chat/completions",
        "key_id": "anonymous",
        "model": "smollm2:135m",
        "status": 200,
        "stream": True,
        "prompt_tokens": 12,
        "cached_tokens": 4,
        "completion_tokens": 34,
        "finish_reason": "stop",
        "queue_ms": 1.3,
        "ttft_ms": 20.0,
        "total_ms": 300.0,
    }


@pytest.mark.parametrize(
    ("status", "code", "level"),
    [
        (500, "internal_error", "error"),
        (500, "engine_crashed", "error"),
        (503, "engine_unavailable", "error"),
        (200, "engine_crashed", "error"),  # in a stream that had begun
        (200, "internal_error", "error"),
        (503, "not_ready", "warning"),
        (503, "shutting_down", "warning"),
        (429, "rate_limit_exceeded", "info"),
        (400, "invalid_value", "info"),
        (499, None, "info"),
    ],
)
def test_a_request_is_an_error_only_where_it_is_our_fault(status: int, code: str | None, level: str) -> None:
    stream = configured()
    logs.request_line(replace(RECORD, status=status, error_code=code))
    (line,) = lines(stream)
    assert line["level"] == level


@pytest.mark.parametrize("fmt", ["json", "text"])
def test_a_request_that_generated_nothing_has_no_token_counts(fmt: str) -> None:
    stream = configured(fmt=fmt)
    logs.request_line(replace(RECORD, route="/ready", usage=Usage()))
    assert "/ready" in stream.getvalue()
    assert "token" not in stream.getvalue()
    logs.request_line(replace(RECORD, usage=Usage(prompt_tokens=1)))  # began, and failed before its first token
    assert fmt == "text" or lines(stream)[-1]["completion_tokens"] == 0


def test_it_is_readable_on_a_terminal_and_json_elsewhere() -> None:
    terminal = Terminal()
    logs.configure(config.Log(), terminal)
    logs.event("ready", url="http://127.0.0.1:11711")
    assert "ready" in terminal.getvalue()
    assert not terminal.getvalue().lstrip().startswith("{")
    assert lines(configured(fmt="json")) == []
    text = configured(fmt="text")
    logs.event("ready", url="http://127.0.0.1:11711")
    assert text.getvalue().count("\n") == 1
    assert "\x1b" not in text.getvalue()


def test_levels_are_obeyed() -> None:
    stream = configured(level="warning")
    logs.event("ready")
    logs.event("engine_died", level="error")
    assert [line["event"] for line in lines(stream)] == ["engine_died"]


def test_nothing_is_written_before_logging_is_configured(capsys: pytest.CaptureFixture[str]) -> None:
    logs.event("ready")
    logs.request_line(RECORD)
    assert capsys.readouterr() == ("", "")


def test_a_field_that_is_not_on_the_list_is_withheld_and_named() -> None:
    stream = configured()
    logs.event("oops", prompt=CANARY, messages=[CANARY], status=200)
    assert CANARY not in stream.getvalue()
    (line,) = lines(stream)
    assert line["withheld"] == ["prompt", "messages"]
    assert line["status"] == 200


def test_objects_are_logged_by_type_only() -> None:
    stream = configured()
    logs.event("oops", reason=ValueError(CANARY), hint={CANARY: CANARY}, detail=CANARY.encode())
    assert CANARY not in stream.getvalue()
    (line,) = lines(stream)
    assert (line["reason"], line["hint"], line["detail"]) == ("ValueError", "dict", "bytes")


@pytest.mark.parametrize("fmt", ["json", "text"])
@given(text=st.text(max_size=1000))
def test_no_text_can_forge_a_line(fmt: str, text: str) -> None:
    stream = configured(fmt=fmt)
    logs.event("oops" + text, reason=text, path=text)
    written = stream.getvalue()
    assert written.endswith("\n")
    assert len(written.splitlines()) == 1
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e]", written)


@pytest.mark.parametrize("attack", ["\x1b[2J", '"}\n{"event":"request"', "\u2028", "\u202e", "\r", "\x00", "\x9b31m"])
def test_known_attacks_are_escaped(attack: str) -> None:
    stream = configured()
    logs.event("oops", reason=f"a{attack}b")
    (line,) = lines(stream)
    assert set(line) == {"v", "timestamp", "level", "event", "reason"}
    assert attack not in line["reason"]


def test_long_text_is_cut() -> None:
    stream = configured()
    logs.event("oops", reason="x" * 100_000)
    assert len(stream.getvalue()) < 700


def test_an_exception_is_its_type_and_places() -> None:
    stream = configured()
    try:
        json.loads(f"[{CANARY}")
    except ValueError as error:
        logs.failure("oops", error, request_id="req_1")
    assert CANARY not in stream.getvalue()
    (line,) = lines(stream)
    assert line["exception"] == "JSONDecodeError"
    assert re.fullmatch(r"telemetry/test_logs\.py:\d+", line["places"][0])


@pytest.mark.parametrize(
    "name", ["uvicorn.error", "uvicorn.access", "asyncio", "huggingface_hub.file_download", "httpx", "somebody.else"]
)
def test_other_libraries_are_logged_without_arguments(name: str) -> None:
    stream = configured()
    logger = logging.getLogger(name)
    logger.warning("fetched %s with %r", CANARY, {"prompt": CANARY})
    logger.error("Task failed\nfuture: <Task %s>", CANARY)
    try:
        raise RuntimeError(CANARY)
    except RuntimeError:
        logger.exception("Exception in ASGI application\n")
    assert CANARY not in stream.getvalue()
    for line in lines(stream):
        assert line["event"] == "library"
        assert line["logger"] == name
        assert "test_logs.py" in line["place"]


def test_an_untrusted_library_that_formats_its_own_message_leaks_nothing() -> None:
    stream = configured()
    logging.getLogger("somebody.else").warning(f"chunk: {CANARY}")
    assert CANARY not in stream.getvalue()
    assert len(lines(stream)) == 1


def test_an_exception_that_a_task_lost_is_logged_without_its_message() -> None:
    stream = configured()

    async def lose() -> None:
        loop = asyncio.get_running_loop()
        loop.call_exception_handler({"message": "Task exception was never retrieved", "exception": ValueError(CANARY)})

    asyncio.run(lose())
    assert CANARY not in stream.getvalue()
    assert lines(stream)[-1]["exception"] == "ValueError"


def test_warnings_are_logged_by_place_and_category() -> None:
    stream = configured()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn(CANARY, UserWarning, stacklevel=1)
    assert CANARY not in stream.getvalue()
    assert lines(stream)[-1]["exception"] == "UserWarning"


def test_uncaught_exceptions_are_logged_without_their_messages() -> None:
    stream = configured()
    logs.catch_uncaught()
    try:
        raise RuntimeError(CANARY)
    except RuntimeError as error:
        sys.excepthook(RuntimeError, error, error.__traceback__)
    thread = threading.Thread(target=lambda: int(CANARY), name="worker")
    thread.start()
    thread.join()
    assert CANARY not in stream.getvalue()
    assert [line["exception"] for line in lines(stream)] == ["RuntimeError", "ValueError"]


def test_a_log_that_cannot_be_written_fails_nothing() -> None:
    stream = configured()
    stream.close()
    logs.event("ready")


def test_request_ids_of_clients_are_taken_if_harmless() -> None:
    assert logs.request_id("My-id_1.2") == "My-id_1.2"
    for offered in (None, "", "a b", "a\n", "x" * 129, "é", '"', "\x1b[2J"):
        assert re.fullmatch(r"req_[0-9a-f]{32}", logs.request_id(offered))


def test_every_call_in_the_package_uses_fields_that_are_on_the_list() -> None:
    """A typo would otherwise cost the field silently in production."""
    unknown = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                ("logs.event", "on_event", "logs.failure")
            ):
                names = {keyword.arg for keyword in node.keywords if keyword.arg} - {"level"}
                unknown += [f"{path.name}:{node.lineno} {name}" for name in names - logs.FIELDS]
    assert unknown == []


def test_fields_never_name_content() -> None:
    words = re.compile(
        r"prompt(?!_tokens)|content|message|(?<!con)text|completion(?!_tokens)|credential|authorization|header|body"
    )
    assert [name for name in logs.FIELDS if words.search(name)] == []


@contextmanager
def into_file(folder: Path, **settings: Any) -> Iterator[Path]:
    file = folder / "ocserve.log"
    logs.configure(config.Log(file=file, **settings))
    yield file
    configured()  # closes it


def test_a_log_file_is_rotated_and_its_owners_alone(tmp_path: Path) -> None:
    with into_file(tmp_path, max_bytes=2000, backups=3) as file:
        for number in range(200):
            logs.event("notice", count=number, detail="100 %s")
    files = [file, *(tmp_path / f"ocserve.log.{number}" for number in (1, 2, 3))]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert {each.stat().st_mode & 0o777 for each in files} == {0o600}
    assert max(each.stat().st_size for each in files) <= 2000
    kept = [json.loads(line)["count"] for each in reversed(files) for line in each.read_text().splitlines()]
    assert kept == list(range(kept[0], 200)), "a line was lost or cut"


def test_a_log_file_that_was_moved_is_followed_by_a_new_one(tmp_path: Path) -> None:
    with into_file(tmp_path) as file:
        logs.event("notice", count=1)
        for number in (2, 3):
            file.rename(tmp_path / f"moved.{number - 1}")
            if number == 3:
                file.touch(0o640)  # what `create` has logrotate do
            logs.event("notice", count=number)
        file.unlink()
        logs.event("notice", count=4)
        written = [json.loads(each.read_text())["count"] for each in (*sorted(tmp_path.glob("moved.*")), file)]
    assert written == [1, 2, 4]


def test_a_log_file_that_was_moved_is_written_on_where_no_other_can_be(tmp_path: Path) -> None:
    with into_file(tmp_path) as file:
        logs.event("notice", count=1)
        file.rename(tmp_path / "moved")
        file.mkdir()
        logs.event("notice", count=2)
        assert [json.loads(each)["count"] for each in (tmp_path / "moved").read_text().splitlines()] == [1, 2]
        file.rmdir()
        logs.event("notice", count=3)
        assert json.loads(file.read_text())["count"] == 3


def test_a_log_file_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match=r"log\.file: cannot write .*No such file"):
        logs.configure(config.Log(file=tmp_path / "missing" / "log"))


def test_a_log_file_that_fails_later_fails_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    with into_file(folder, max_bytes=300) as file:
        file.unlink()
        folder.rmdir()
        for _ in range(10):
            logs.event("notice", detail=CANARY)
    assert capsys.readouterr() == ("", "")


SCHEMA = json.loads((PACKAGE.parent / "packaging" / "log-schema.json").read_text())


def test_the_schema_has_exactly_the_fields_and_events_that_there_are() -> None:
    head = {"v", "timestamp", "level", "event", "withheld"}
    assert set(SCHEMA["properties"]) == head | logs.FIELDS
    assert SCHEMA["properties"]["v"]["const"] == logs.SCHEMA_VERSION
    told = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and re.search(
                r"(logs\.event|logs\.failure|on_event|^event|^failure)$", ast.unparse(node.func)
            ):
                told |= {each.value for each in node.args[:1] if isinstance(each, ast.Constant)}
    assert told == set(SCHEMA["properties"]["event"]["enum"])


def test_lines_are_as_the_schema_says() -> None:
    stream = configured()
    logs.request_line(RECORD)
    logs.request_line(replace(RECORD, model=None, usage=Usage(), queue_ms=None, ttft_ms=None, error_code="not_found"))
    logs.event("engine_died", level="error", status=-11, reason="the process ended", detail="")
    logs.event("malformed_request", request_id="req_1", status=400, code="malformed_http")
    logs.event("notice", prompt=CANARY)
    logging.getLogger("somebody.else").error("x")
    try:
        raise RuntimeError(CANARY)
    except RuntimeError as error:
        logs.failure("internal_error", error, request_id="req_1")
    found = lines(stream)
    assert len(found) == 7
    for line in found:
        jsonschema.validate(line, SCHEMA, cls=jsonschema.Draft202012Validator)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**found[0], "prompt": "x"}, SCHEMA)
