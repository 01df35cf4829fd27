"""Coding agents, unmodified and headless: each runs a command that a scripted engine asks for; a real model answers.

Every agent has an empty home, and no setting but the server's address, a key that nobody checks, and the model's name.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec.structs import replace

from ocserve.generation import ChatPrompt, GenerateRequest, ToolCallDelta
from tests.e2e.daemon import RunningDaemon
from tests.http.harness import MODEL, Served, serving
from tests.scripted import Script, ScriptedEngine

pytestmark = pytest.mark.timeout(600)  # the first run installs

NODE = shutil.which("node") or "node"
COMMAND = "cat note.txt | tee copy.txt"
LARGE = replace(MODEL, context_length=200_000, max_output_tokens=64_000, capabilities=("chat", "tools", "reasoning"))


@dataclass(frozen=True)
class Session:
    """Where an agent runs: its installation, its own home, the folder it works in, and the server."""

    client: Path
    home: Path
    folder: Path
    url: str
    model: str

    def run(self, program: list[str], **settings: str) -> str:
        """What the agent printed."""
        path = f"{Path(NODE).parent}:{os.defpath}"
        environment = {"PATH": path, "HOME": str(self.home), "LANG": "C.UTF-8", **settings}
        done = subprocess.run(
            program,
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout


@dataclass(frozen=True)
class Said:
    """An agent's last words, and the tokens that it counted."""

    text: str
    prompt: int
    completion: int


def codex(session: Session, prompt: str, *, acts: bool) -> Said:
    """OpenAI's agent, over responses. A small model that is to answer gets no tools that it could call instead."""
    settings = session.home / ".codex"
    settings.mkdir()
    lines = [f'model = "{session.model}"', 'model_provider = "here"']
    if not acts:
        (settings / "instructions.md").write_text("Answer in one word.")
        lines.append(f'model_instructions_file = "{settings / "instructions.md"}"')
        lines += [f"features.{tool} = false" for tool in ("shell_tool", "unified_exec", "view_image", "goals")]
    provider = f'name = "here", base_url = "{session.url}/v1", wire_api = "responses"'
    lines.append(f"model_providers.here = {{ {provider} }}")
    (settings / "config.toml").write_text("\n".join(lines))
    allowed = ["--dangerously-bypass-approvals-and-sandbox"] if acts else ["--sandbox", "read-only"]
    program = str(session.client / "node_modules/@openai/codex/bin/codex.js")
    printed = session.run([NODE, program, "exec", "--json", "--skip-git-repo-check", *allowed, prompt])
    events = [json.loads(line) for line in printed.splitlines()]
    said = [event["item"] for event in events if event["type"] == "item.completed"]
    (turn,) = [event for event in events if event["type"] == "turn.completed"]
    usage = turn["usage"]
    return Said(
        [item["text"] for item in said if item["type"] == "agent_message"][-1],
        usage["input_tokens"],
        usage["output_tokens"],
    )


def claude_code(session: Session, prompt: str, *, acts: bool) -> Said:
    """Anthropic's agent, over messages. Its own instructions and tools would fill a small model's context."""
    program = str(session.client / "node_modules/@anthropic-ai/claude-code/cli-wrapper.cjs")
    arguments = ["-p", prompt, "--model", session.model, "--output-format", "json"]
    arguments += ["--allowedTools", "Bash"] if acts else ["--system-prompt", "Answer in one word.", "--tools", ""]
    printed = session.run(
        [NODE, program, *arguments],
        ANTHROPIC_BASE_URL=session.url,
        ANTHROPIC_API_KEY="any",
        CLAUDE_CODE_MAX_OUTPUT_TOKENS="256",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
    )
    result = json.loads(printed)
    usage = result["usage"]
    cached = usage["cache_read_input_tokens"]
    return Said(result["result"], usage["input_tokens"] + cached, usage["output_tokens"])


def gemini_cli(session: Session, prompt: str, *, acts: bool) -> Said:
    """Google's agent, over generateContent."""
    settings = session.home / ".gemini"
    settings.mkdir()
    (settings / "settings.json").write_text('{"security": {"auth": {"selectedType": "gemini-api-key"}}}')
    program = str(session.client / "node_modules/@google/gemini-cli/bundle/gemini.js")
    arguments = ["-p", prompt, "--model", session.model, "--output-format", "json", "--skip-trust"]
    printed = session.run(
        [NODE, program, *arguments, *(["--yolo"] if acts else [])],
        GEMINI_API_KEY="any",
        GOOGLE_GEMINI_BASE_URL=session.url,
    )
    result = json.loads(printed)
    (model,) = result["stats"]["models"].values()
    return Said(result["response"], model["tokens"]["prompt"], model["tokens"]["candidates"])


@dataclass(frozen=True)
class Agent:
    """How an agent is started, and the call that makes it run a command."""

    start: Callable[..., Said]
    tool: str
    arguments: dict[str, str]

    def script(self, request: GenerateRequest) -> Script:
        """A model that has the note read, and repeats what it is told."""
        assert isinstance(request.prompt, ChatPrompt)
        told = [message.content for message in request.prompt.messages if message.role == "tool"]
        if told:
            return Script(tokens=("It says: ", told[-1]), prompt_tokens=30)
        call = ToolCallDelta(call=0, name=self.tool)
        arguments = ToolCallDelta(call=0, arguments=json.dumps(self.arguments))
        return Script(tokens=("Let me look.", call, arguments), reason="tool_calls", prompt_tokens=20)


AGENTS = {
    "codex": Agent(codex, "exec_command", {"cmd": COMMAND}),
    "claude-code": Agent(claude_code, "Bash", {"command": COMMAND, "description": "Read the note"}),
    "gemini-cli": Agent(gemini_cli, "run_shell_command", {"command": COMMAND, "description": "Read it"}),
}


def session(client: Path, empty: Path, url: str, model: str) -> Session:
    """A session with a server, in a home and a folder that are made in `empty`."""
    made = Session(client, empty / "home", empty / "work", url, model)
    made.home.mkdir()
    made.folder.mkdir()
    return made


def prompts(served: Served) -> list[ChatPrompt]:
    found = [run.request.prompt for run in served.engine.runs.values()]
    return [prompt for prompt in found if isinstance(prompt, ChatPrompt)]


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_runs_a_command(name: str, installed: Callable[[str], Path], tmp_path: Path) -> None:
    agent, client = AGENTS[name], installed(name)
    note = secrets.token_hex(8)
    engine = lambda: ScriptedEngine(agent.script, context=LARGE.context_length)  # noqa: E731
    with serving(engine, model=LARGE) as served:
        at = session(client, tmp_path, served.url, "tiny")
        (at.folder / "note.txt").write_text(note)
        said = agent.start(at, "What does the note say?", acts=True)
        asked, told = prompts(served)
    assert (at.folder / "copy.txt").read_text() == note
    assert said.text.startswith("It says: ")
    assert note in said.text
    assert (said.prompt, said.completion) == (50, 5)  # a script counts its steps
    assert agent.tool in {tool.name for tool in asked.tools}
    (result,) = [message for message in told.messages if message.role == "tool"]
    assert note in result.content
    (call,) = [call for message in told.messages for call in message.tool_calls]
    assert json.loads(call.arguments) == agent.arguments
    assert result.tool_call_id == call.id


# Gemini CLI's instructions and tools do not fit into this model's context.
@pytest.mark.parametrize("name", ["codex", "claude-code"])
def test_an_agent_gets_an_answer_of_the_real_model(
    name: str, installed: Callable[[str], Path], tmp_path: Path, real: RunningDaemon
) -> None:
    """A small model may go on until it is cut, which agents take for an error: one of three questions is answered."""
    questions = ("What is the capital of France?", "What is the colour of the sky?", "How many legs has a dog?")
    for number, question in enumerate(questions):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            said = AGENTS[name].start(session(installed(name), folder, real.root, "smollm2:135m"), question, acts=False)
            break
        except AssertionError:
            if number == len(questions) - 1:
                raise
    assert any(letter.isalpha() for letter in said.text)
    assert said.prompt > 20
    assert said.completion > 0
