"""Keys as an operator uses them: the commands in one process, the server in another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from openai import AuthenticationError, OpenAI, RateLimitError

from tests.e2e.daemon import daemon


def test_a_running_server_obeys_the_commands_at_once(tiny_model: Path, tmp_path: Path) -> None:
    env = {"OCSERVE_AUTH_KEYS_FILE": str(tmp_path / "keys.json"), "OCSERVE_AUTH_ANONYMOUS": "false"}

    def keys(*arguments: str) -> Any:
        command = [sys.executable, "-m", "ocserve", "keys", *arguments, "--json"]
        return json.loads(subprocess.run(command, env={**os.environ, **env}, capture_output=True, check=True).stdout)

    with daemon(str(tiny_model), env=env) as server:

        def ask(key: str) -> bool:
            with OpenAI(base_url=server.base_url, api_key=key, max_retries=0) as client:
                answer = client.completions.create(model="default", prompt=[40, 41], max_tokens=3)
            assert answer.usage is not None
            return 2 < answer.usage.total_tokens <= 5

        assert ask("anything")  # there is no key yet
        key = keys("create", "--name", "acme", "--rpm", "2")["key"]
        with pytest.raises(AuthenticationError):
            ask("anything")
        assert ask(key)
        assert ask(key)
        with pytest.raises(RateLimitError):
            ask(key)
        keys("limits", "acme", "--rpm", "0")
        assert ask(key)
        keys("revoke", "acme")
        with pytest.raises(AuthenticationError, match="revoked"):
            ask(key)
        log = server.log.read_text()
    assert key[4:20] not in log
