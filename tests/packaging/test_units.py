"""The service unit and the container file name settings that exist, and leave time for what the server promises."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ocserve import config

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"
VARIABLES = {setting.variable for setting in config.catalogue().values()} | {"OCSERVE_CONFIG", "OCSERVE_API_KEY"}
UNIT = PACKAGING / "ocserve.service"


@pytest.mark.parametrize("file", [UNIT, PACKAGING / "Containerfile"], ids=lambda file: file.name)
def test_variables_are_settings(file: Path) -> None:
    named = set(re.findall(r"\bOCSERVE_\w+", file.read_text()))
    assert len(named) >= 3
    assert named <= VARIABLES


@pytest.mark.parametrize("file", sorted(PACKAGING.iterdir()), ids=lambda file: file.name)
def test_dotted_settings_that_are_named_exist(file: Path) -> None:
    sections = {name.split(".")[0] for name in config.catalogue()}
    found = re.findall(rf"(?<![\w./-])((?:{'|'.join(sections)})\.[a-z_]+)\b(?!\.[a-z])", file.read_text())
    known = set(config.catalogue())
    # Words of other programs: nginx's and Caddy's files, a label of Prometheus.
    assert {
        name for name in found if name not in known and name not in {"log.error", "model.name", "server.log"}
    } == set()


def test_the_unit_waits_for_the_drain() -> None:
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    assert int(stop) > config.Server().drain_s + 5
    assert (
        "KillMode=mixed" in UNIT.read_text()
    )  # the front alone gets SIGTERM: its engine must finish what was accepted


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "ocserve.service"
    unit.write_text(UNIT.read_text().replace("/opt/ocserve/bin/ocserve", "/bin/true").replace("=ocserve\n", "=root\n"))
    checked = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
