"""What `ocserve run` does first: it starts an engine process, and both processes read their code side by side.

It imports little, for the same reason.
"""

from __future__ import annotations

from ocserve import config
from ocserve.engine import profile
from ocserve.engine.process import Spare as Spare  # whom the command line tells what it started
from ocserve.machine import usable_cores


def environment(tree: config.Config) -> dict[str, str]:
    """The environment of engine processes: ours without the secrets, and the waiting policy that was tuned here."""
    waiting = profile.waiting_environment(config.cache_directory(tree.cache), usable_cores())
    return {**waiting, **config.engine_environment()}


async def start(tree: config.Config) -> Spare:
    """An engine process for the first model; whoever starts it closes it too."""
    return await Spare.start(environment(tree))
