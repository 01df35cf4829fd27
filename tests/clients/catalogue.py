"""The clients that others make: which, and at what versions they are held (`locks/`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LOCKS = Path(__file__).parent / "locks"


@dataclass(frozen=True)
class Client:
    """One client; `package` is the one of its packages that gives it its version.

    A `large` one (hundreds of megabytes to fetch) is installed by `--full` only, and used wherever it is installed.
    """

    name: str
    registry: Literal["pypi", "npm"]
    package: str
    large: bool = False

    @property
    def lock(self) -> Path:
        """Every package that it needs at an exact version: a requirements file, or a `package-lock.json`."""
        return LOCKS / f"{self.name}.txt" if self.registry == "pypi" else LOCKS / self.name / "package-lock.json"

    @property
    def version(self) -> str:
        text = self.lock.read_text(encoding="utf-8")
        if self.registry == "pypi":
            return dict(line.split("==") for line in text.splitlines())[self.package]
        return str(json.loads(text)["packages"][f"node_modules/{self.package}"]["version"])


CLIENTS = {
    client.name: client
    for client in (
        Client("openai-node", "npm", "openai"),
        Client("vercel-ai", "npm", "ai"),
        Client("litellm", "pypi", "litellm", large=True),
        Client("langchain-openai", "pypi", "langchain-openai"),
        Client("llm", "pypi", "llm"),
        Client("codex", "npm", "@openai/codex"),
        Client("claude-code", "npm", "@anthropic-ai/claude-code", large=True),
        Client("gemini-cli", "npm", "@google/gemini-cli", large=True),
    )
}
