"""`ocserve run`: its flags are settings, and what cannot fit is refused before anything is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from ocserve import app, config
from ocserve.catalog import pull
from ocserve.catalog.progress import OnProgress, Progress, notice
from ocserve.catalog.store import Installed
from ocserve.cli import main
from tests import tiny


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[config.Config]:
    """The settings that a server would run with; nothing is served."""
    seen: list[config.Config] = []

    async def serve(
        settings: config.Settings,
        models: Sequence[Installed],
        on_ready: object,
        spare: object,
        *,
        reread: Callable[[], config.Settings],
    ) -> None:
        assert reread() == settings  # a reload starts from the same flags
        seen.append(settings.config)

    monkeypatch.setattr(app, "serve", serve)
    monkeypatch.setenv("OCSERVE_STORE_DIRECTORY", str(tmp_path / "models"))
    monkeypatch.setenv("OCSERVE_CONFIG", str(tmp_path / "config.toml"))
    (tmp_path / "config.toml").write_text("")
    return seen


@pytest.mark.parametrize(
    ("flags", "setting", "value"),
    [
        (["--ctx", "2048"], "context", 2048),
        (["--pool", "4096"], "pool_tokens", 4096),
        (["--parallel", "3"], "parallel", 3),
        (["--gpu-layers", "0"], "gpu_layers", 0),
        (["--kv-type", "q8_0"], "kv_type", "q8_0"),
        (["--prefill-order", "joint"], "prefill_order", "joint"),
        (["--no-prefix-cache"], "prefix_cache", False),
        ([], "prefix_cache", True),
        (["--no-speculation"], "speculation", "off"),
        (["--speculation"], "speculation", "auto"),
        (["--require-gpu"], "require_gpu", True),
        ([], "require_gpu", False),
        (["--threads", "2"], "threads_decode", 2),
    ],
)
def test_flags_are_settings(
    served: list[config.Config], tmp_path: Path, flags: list[str], setting: str, value: object
) -> None:
    result = CliRunner().invoke(main, ["run", str(tiny.write(tmp_path / "tiny.gguf")), *flags])
    assert result.exit_code == 0, result.output
    assert getattr(served[0].engine, setting) == value


def test_a_flag_wins_over_a_variable_and_silence_does_not(
    served: list[config.Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(tiny.write(tmp_path / "tiny.gguf"))
    monkeypatch.setenv("OCSERVE_ENGINE_SPECULATION", "off")
    assert CliRunner().invoke(main, ["run", model]).exit_code == 0
    assert CliRunner().invoke(main, ["run", model, "--speculation"]).exit_code == 0
    assert [each.engine.speculation for each in served] == ["off", "auto"]


def test_no_engine_process_is_left_of_a_run_that_came_to_nothing(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["run", str(tmp_path / "none.gguf")])
    assert result.exit_code == 1
    assert not psutil.Process().children()


@pytest.mark.parametrize("flags", [[], ["--quiet"]])
def test_where_stderr_is_no_terminal_a_download_is_told_in_the_form_of_the_log(
    served: list[config.Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    model = str(tiny.write(tmp_path / "tiny.gguf"))

    def told(reference: str, store: config.Store, say: OnProgress) -> Installed:
        say(notice("Another source is taken."))
        say(Progress(phase="downloading", file="tiny.gguf", done_bytes=5_000_000, total_bytes=9_000_000))
        say(Progress(phase="downloading", file="tiny.gguf", done_bytes=6_000_000, total_bytes=9_000_000))
        return here(reference, store, say)

    here = pull.pull
    monkeypatch.setattr(pull, "pull", told)
    result = CliRunner().invoke(main, ["run", model, *flags])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert all(line["v"] and line["timestamp"] and line["event"] == "notice" for line in lines)
    said = ["Another source is taken.", "tiny.gguf: downloading, 5 of 9 MB"]
    assert [line["detail"] for line in lines][:2] == (said[:1] if flags else said)
    assert len(lines) == (1 if flags else 3)  # the last names the model


def test_quiet_says_only_what_matters(served: list[config.Config], tmp_path: Path) -> None:
    model = str(tiny.write(tmp_path / "tiny.gguf"))
    assert "tiny" in CliRunner().invoke(main, ["run", model]).stderr
    assert CliRunner().invoke(main, ["run", model, "--quiet"]).stderr == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-type", "q8_0"], "a cache of q8_0 stores 32 numbers together"),
        (["--ctx", "512", "--pool", "2000000000"], "the model needs"),
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_loaded(tmp_path: Path, flags: list[str], message: str) -> None:
    model = str(tiny.write(tmp_path / "tiny.gguf"))
    environment = {**os.environ, "HOME": str(tmp_path), "OCSERVE_STORE_DIRECTORY": str(tmp_path / "models")}
    finished = subprocess.run(
        [sys.executable, "-m", "ocserve", "run", model, "--port", "0", *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 1
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "hint: " in finished.stderr
    assert finished.stdout == ""


def test_a_draft_model_is_fetched_like_any_other_and_passed_on_as_its_file(
    served: list[config.Config], tmp_path: Path
) -> None:
    model, draft = tiny.write(tmp_path / "tiny.gguf"), tiny.write(tmp_path / "draft.gguf", seed=2)
    result = CliRunner().invoke(main, ["run", str(model), "--draft-model", str(draft)])
    assert result.exit_code == 0, result.output
    assert served[0].engine.draft_model == str(draft)


def test_keys_that_cannot_be_read_refuse_the_start_beside_a_key_of_the_settings(
    served: list[config.Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCSERVE_AUTH_KEYS_FILE", str(tmp_path / "keys.json"))
    monkeypatch.setenv("OCSERVE_API_KEY", "of-the-settings-alone")
    (tmp_path / "keys.json").write_text("{")
    result = CliRunner().invoke(main, ["run", str(tiny.write(tmp_path / "tiny.gguf"))])
    assert (result.exit_code, served) == (78, [])
    assert "keys.json" in result.stderr
