"""Client libraries, unmodified, with only a base URL: a tool loop with a scripted engine, an answer of a real model.

OpenAI's, Anthropic's, Google's and Ollama's Python clients are used all over `tests/http` and `tests/e2e`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ocserve.generation import ChatPrompt, GenerateRequest, ToolCallDelta
from tests.clients.catalogue import CLIENTS
from tests.clients.installing import python
from tests.e2e.daemon import RunningDaemon
from tests.http.harness import Served, serving
from tests.scripted import Script, ScriptedEngine

pytestmark = pytest.mark.timeout(600)  # the first run installs

DRIVERS = Path(__file__).parent / "drivers"
CALLS = Script(
    tokens=(
        ToolCallDelta(call=0, name="weather", tokens=1),
        ToolCallDelta(call=0, arguments='{"city": ', tokens=1),
        ToolCallDelta(call=0, arguments='"Bern"}', tokens=1),
        ToolCallDelta(call=1, name="weather", arguments='{"city": "Rome"}', tokens=3),
    ),
    reason="tool_calls",
    prompt_tokens=20,
)


def weather(request: GenerateRequest) -> Script:
    """A model that asks for two cities' weather and repeats what it is told."""
    assert isinstance(request.prompt, ChatPrompt)
    told = [message.content for message in request.prompt.messages if message.role == "tool"]
    return Script(tokens=("It is ", ", ".join(told), "."), prompt_tokens=30) if told else CALLS


def drive(name: str, home: Path, folder: Path, *given: str) -> list[dict[str, Any]]:
    """What a driver answers to each of `given`: servers' addresses and tasks, in turn. It sees no other settings."""
    if CLIENTS[name].registry == "npm":
        (folder / "node_modules").symlink_to(home / "node_modules")  # Node looks beside the program
        program = [str(shutil.which("node")), shutil.copy(DRIVERS / f"{name}.mjs", folder)]
    else:
        program = [python(home), "-I", str(DRIVERS / f"{name}.py")]
    environment = {"PATH": os.defpath, "HOME": str(folder)}
    done = subprocess.run([*program, *given], cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_tool_loop(answer: dict[str, Any], requests: list[GenerateRequest]) -> None:
    """Both calls were made, answered by their ids and paid for; the text came in pieces."""
    assert answer["text"] == "It is sunny in Bern, sunny in Rome."
    assert answer["pieces"] == ["It is ", "sunny in Bern, sunny in Rome", "."]
    assert answer["usage"] == [50, 7]
    asked, told = requests
    assert isinstance(asked.prompt, ChatPrompt)
    assert isinstance(told.prompt, ChatPrompt)
    (tool,) = asked.prompt.tools
    assert tool.name == "weather"
    assert json.loads(tool.parameters or "")["required"] == ["city"]
    _, called, *results = told.prompt.messages
    assert [json.loads(call.arguments) for call in called.tool_calls] == [{"city": "Bern"}, {"city": "Rome"}]
    assert [result.tool_call_id for result in results] == [call.id for call in called.tool_calls]


def requests_of(served: Served) -> list[GenerateRequest]:
    return [run.request for run in served.engine.runs.values()]


@pytest.mark.parametrize(
    ("name", "dialects"),
    [
        ("openai-node", ("chat", "responses")),
        ("vercel-ai", ("chat", "responses")),
        ("langchain-openai", ("chat", "responses")),
        ("llm", ("chat", "responses")),
        ("litellm", ("chat",)),
    ],
)
def test_a_library(
    name: str,
    dialects: tuple[str, ...],
    installed: Callable[[str], Path],
    real: RunningDaemon,
    tmp_path: Path,
) -> None:
    home = installed(name)
    with serving(lambda: ScriptedEngine(weather)) as served:
        given = [part for dialect in dialects for part in (served.url, dialect)]
        *loops, plain = drive(name, home, tmp_path, *given, real.root, "plain")
        requests = requests_of(served)
    assert len(loops) == len(dialects)
    for number, answer in enumerate(loops):
        check_tool_loop(answer, requests[2 * number : 2 * number + 2])
    assert len(plain["pieces"]) > 3
    assert "".join(plain["pieces"]) == plain["text"]
    assert re.search(r"[A-Za-z]{3}", plain["text"])
    prompt, completion = plain["usage"]
    assert prompt > 5
    assert 3 < completion <= 24
