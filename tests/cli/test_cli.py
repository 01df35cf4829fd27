"""The command line answers at once, names what was meant, and shows refusals as two lines."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from ocserve import __version__, cli
from ocserve.config import ConfigError

HEAVY = (
    *("asyncio", "starlette", "uvicorn", "huggingface_hub", "httpx2", "jinja2", "structlog", "platformdirs", "msgspec"),
    *("numpy", "psutil", "llama_cpp", "importlib.metadata", "ocserve.config"),
)


def ocserve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ocserve", *arguments], capture_output=True, text=True, check=False)


def test_help_is_fast() -> None:
    ocserve("--help")  # the first run compiles
    started = time.perf_counter()
    finished = ocserve("--help")
    assert time.perf_counter() - started < 2.0  # 0.1 s on an idle machine
    assert finished.returncode == 0
    assert finished.stderr == ""


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, json\nfrom ocserve.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit: pass\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(finished.stdout.splitlines()[-1]) == []


def test_help_lists_every_command_with_a_line() -> None:
    text = CliRunner().invoke(cli.main, ["--help"]).output
    for name, line in cli.COMMANDS.items():
        assert f"  {name} " in text
        assert line in text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_loads_and_has_help(name: str) -> None:
    result = CliRunner().invoke(cli.main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Usage: ")
    command = cli.main.get_command(click.Context(cli.main), name)
    assert command is not None
    assert command.name == name
    assert command.help


def test_every_file_of_the_folder_is_a_command_or_is_imported_by_one() -> None:
    modules = {path.stem for path in Path(cli.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(cli.COMMANDS) <= modules


def test_version() -> None:
    assert CliRunner().invoke(cli.main, ["--version"]).output == f"ocserve {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("rnu", "`ocserve run`"), ("lsit", "`ocserve list`"), ("docter", "`ocserve doctor`"), ("xyzzy", "--help")],
)
def test_a_near_miss_names_what_was_meant(typed: str, hint: str) -> None:
    result = CliRunner().invoke(cli.main, [typed])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: there is no command `{typed}`\nhint: ")
    assert hint in result.stderr


def test_an_unknown_option_is_a_usage_error() -> None:
    assert CliRunner().invoke(cli.main, ["--nonsense"]).exit_code == 2


def refusing(error: Exception) -> cli.Commands:
    group = cli.Commands("ocserve")

    @group.command("refuse")
    def refuse() -> None:
        raise error

    group.get_command = lambda ctx, name: refuse  # type: ignore[method-assign]
    return group


def test_wrong_settings_end_with_78_and_a_hint() -> None:
    result = CliRunner().invoke(refusing(ConfigError("server.port is wrong", "try another")), ["run"])
    assert result.exit_code == 78
    assert result.stderr == "error: server.port is wrong\nhint: try another\n"


def test_refusals_of_the_catalogue_end_with_1() -> None:
    from ocserve.catalog.errors import NotInstalled

    result = CliRunner().invoke(refusing(NotInstalled("it is not here")), ["run"])
    assert result.exit_code == 1
    assert result.stderr == "error: it is not here\n"


def test_mistakes_of_ours_are_not_dressed_up() -> None:
    result = CliRunner().invoke(refusing(ZeroDivisionError("ours")), ["run"])
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    piped = f"{sys.executable} -m ocserve config show | head -n 1"
    finished = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, check=True)
    assert finished.stderr == ""
