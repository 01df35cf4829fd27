"""What an engine process does, whichever kind of model it holds; `worker` gives it threads and the socket."""

from __future__ import annotations

from typing import Protocol

from ocserve.engine import wire
from ocserve.errors import ApiError, EngineFailed


class Duty(Protocol):
    """A loaded model at work. Each method has a thread of its own: `compute` the process's main one."""

    @property
    def facts(self) -> wire.EngineFacts:
        """What the front is told once the model is ready."""

    def handle(self, message: wire.FrontMessage) -> None:
        """Take a message; never waits. Raises `wire.FrameError` for one that has no place here."""

    def prepare(self) -> None:
        """Render and tokenise for ever, on a deep stack."""

    def compute(self) -> None:
        """Compute until `stop`. Raises `EngineBroken` where llama.cpp cannot go on."""

    def stop(self) -> None:
        """Let `compute` return soon: the front is gone."""

    def heartbeat(self) -> wire.Heartbeat:
        """How it stands."""


def cancelled() -> ApiError:
    """What is answered once nothing works any more on what nobody waits for."""
    return EngineFailed("The request was cancelled.")


class EngineBroken(Exception):
    """The context can no longer compute; the process must end."""
