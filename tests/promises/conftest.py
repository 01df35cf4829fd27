"""One real server on a tiny model, set up as a provider's, for the proofs that only ask it questions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.daemon import RunningDaemon, daemon

KEY = "canary-key-5e1c77ab90f2d344"


@dataclass(frozen=True)
class Provider:
    """The server, and the folder with its ledger and its log; all that it writes to disk is in there."""

    server: RunningDaemon
    folder: Path

    @property
    def port(self) -> int:
        return int(self.server.root.rpartition(":")[2])

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.db"


@pytest.fixture(scope="session")
def provider(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Provider]:
    folder = tmp_path_factory.mktemp("provider")
    key_file = tmp_path_factory.mktemp("key") / "key"
    key_file.touch(mode=0o600)
    key_file.write_text(KEY)
    environment = {
        "OCSERVE_AUTH_KEY_FILE": str(key_file),
        "OCSERVE_LEDGER_DIRECTORY": str(folder),
        "OCSERVE_LOG_FILE": str(folder / "server.log"),
        "OCSERVE_LOG_LEVEL": "debug",
        "OCSERVE_LOG_FORMAT": "json",
        "PYTHONASYNCIODEBUG": "1",
        "TMPDIR": str(folder),
        "HOME": str(folder),
        "XDG_DATA_HOME": str(folder),
        "XDG_STATE_HOME": str(folder),
    }
    with daemon(str(tiny_model), env=environment) as server:
        yield Provider(server, folder)
