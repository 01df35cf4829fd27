"""`ocserve tune`: a real child measures a tiny model; which policy is chosen and what is kept follows from timings."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from ocserve import app, config
from ocserve.catalog.pull import pull
from ocserve.cli import main, tune
from ocserve.engine import measure, profile
from ocserve.engine.costs import Timing
from ocserve.machine import usable_cores


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCSERVE_CONFIG", str(tmp_path / "config.toml"))
    (tmp_path / "config.toml").write_text("")
    monkeypatch.setenv("OCSERVE_STORE_DIRECTORY", str(tmp_path / "models"))
    monkeypatch.setenv("OCSERVE_CACHE_DIRECTORY", str(tmp_path / "cache"))
    monkeypatch.setenv("OCSERVE_ENGINE_BATCH_TOKENS", "64")
    monkeypatch.setenv("OCSERVE_ENGINE_PREFIX_CACHE", "false")  # ids for kept prefixes would make batches larger


def a_round(spins: int | None, factor: float = 1.0, spread: float = 0.01, others: float = 0.05) -> tune._Round:
    steps = {(1, 1, 1): 0.010, (2, 1, 1): 0.009, (1, 8, 36): 0.08, (2, 8, 36): 0.05, (1, 1, 1024): 0.02}
    return tune._Round(spins, {step: factor * seconds for step, seconds in steps.items()}, spread, others)


def test_a_tiny_model_is_tuned_and_an_engine_finds_the_profile(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = CliRunner().invoke(main, ["tune", str(tiny_model), "--quick", "--force", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["kept"]
    assert {timing["rows"] for timing in found["timings"]} == {1, 2, 4, 8, 16, 32, 64}
    assert {timing["threads"] for timing in found["timings"]} == set(range(1, min(8, usable_cores()) + 1))
    tree = config.load().config
    installed = pull(str(tiny_model), tree.store, lambda progress: None)
    spec = app.engine_spec(tree.engine, tree.cache, installed, app.plan_here(tree, installed))
    stored = profile.load(tmp_path / "cache", measure.profile_key(spec))
    assert stored is not None
    assert [*stored.timings] == msgspec.convert(found["timings"], list[Timing])
    assert profile.waiting_environment(tmp_path / "cache", usable_cores()) == {}, "a quick run compares no policies"


def test_all_policies_are_measured_in_turns(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_SPIN_COUNTS", (1000, 0))
    result = CliRunner().invoke(main, ["tune", str(tiny_model), "--force"])
    assert result.exit_code == 0, result.output
    assert "waiting policy       0 spins" in result.stdout
    assert "kept for `ocserve run`" in result.stdout
    variables = profile.waiting_environment(tmp_path / "cache", usable_cores())
    assert variables in ({"GOMP_SPINCOUNT": "1000"}, {"GOMP_SPINCOUNT": "0"})


def test_a_policy_that_is_clearly_faster_is_chosen() -> None:
    rounds = [a_round(1000), a_round(0, 1.4), a_round(300_000, 0.9)] * 2
    result = tune.judge("m", rounds, force=False)
    assert result.spin_count == 300_000
    assert result.relative == {1000: 1.0, 0: pytest.approx(1.4), 300_000: pytest.approx(0.9)}
    assert result.kept


def test_a_policy_that_is_hardly_faster_is_not() -> None:
    assert tune.judge("m", [a_round(1000), a_round(0, 0.98)], force=False).spin_count == 1000


def test_the_fastest_round_of_a_step_counts() -> None:
    result = tune.judge("m", [a_round(1000), a_round(1000, 1.1)], force=False)
    assert {(each.threads, each.rows, each.cells): each.seconds for each in result.timings} == a_round(1000).timings
    assert result.spread == pytest.approx(0.1)


@pytest.mark.parametrize(
    "rounds",
    [
        [a_round(1000), a_round(1000, 1.5)],
        [a_round(1000, spread=0.3), a_round(1000)],
        [a_round(1000), a_round(0, others=0.5)],
    ],
    ids=["rounds", "repeats", "others"],
)
def test_a_busy_machine_is_noticed(rounds: list[tune._Round]) -> None:
    assert not tune.judge("m", rounds, force=False).kept
    assert tune.judge("m", rounds, force=True).kept


def test_what_a_busy_machine_showed_is_not_kept(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "measure", lambda *_, **__: [a_round(1000), a_round(1000, 3.0)])
    result = CliRunner().invoke(main, ["tune", str(tiny_model)])
    assert result.exit_code == 1
    assert "this machine was busy" in result.stderr
    assert "200%" in result.stderr
    assert not (tmp_path / "cache").exists()


def test_a_model_that_does_not_load_is_said_so(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = config.load().config
    installed = pull(str(tiny_model), tree.store, lambda progress: None)
    spec = app.engine_spec(tree.engine, tree.cache, installed, app.plan_here(tree, installed))
    broken = msgspec.to_builtins(msgspec.structs.replace(spec, path="/nowhere.gguf"))
    with pytest.raises(tune.TuningFailed, match="could not load the model"):
        tune.measure(broken, tree, quick=True, on_progress=lambda share: None)


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("import os; os.abort()", "status -6"),
        ("print('no json')", "not a measurement"),
        ("import time; time.sleep(60)", "status"),
    ],
    ids=["crash", "babble", "hang"],
)
def test_a_child_that_fails_fails_the_command_only(program: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "ARGV", (sys.executable, "-c", program))
    with pytest.raises(tune.TuningFailed, match=says):
        tune._ask({}, None, 0.5, lambda share: None)


def test_the_policy_reaches_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import os; print('{\"spread\": %s}' % os.environ['GOMP_SPINCOUNT'])"
    monkeypatch.setattr(tune, "ARGV", (sys.executable, "-c", program))
    assert tune._ask({}, 30_000, 10, lambda share: None).spread == 30_000


def test_no_secret_reaches_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCSERVE_API_KEY", "k" * 32)
    program = "import os; print('{\"spread\": %d}' % ('k' * 32 in os.environ.values()))"
    monkeypatch.setattr(tune, "ARGV", (sys.executable, "-c", program))
    assert tune._ask({}, None, 10, lambda share: None).spread == 0
