"""A server over a scripted engine as a process of its own: `python -m tests.http.serve_scripted '<json>'`.

Prints its port. The JSON may have `server` settings, `limits`, `model` fields, `key`, `keys_file`, `ledger` (the file
of one, with which the model has prices), `script`, `scripts` for requests with that many `max_tokens`, and `slots`.
With `worker` the engine is a process behind the real `EngineHandle` that does what prompts say, see
`tests.engine.scripted_worker`, and may be silent for so many seconds. With `strict` a call of ours that blocks the
event loop raises.
`send_buffer` is how many bytes the system takes for a client that does not read.

At SIGUSR1 it prints a line that says what its event loop has to do and how late that was since it was last asked.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from blockbuster import blockbuster_ctx
from msgspec import convert, to_builtins
from msgspec.structs import replace

from ocserve import config
from ocserve.accounts.billing import Billing
from ocserve.accounts.keys import KeyRing
from ocserve.accounts.keystore import KeyStore
from ocserve.accounts.ledger import Ledger
from ocserve.engine.handle import EngineHandle, Supervision
from ocserve.http.application import build
from ocserve.http.edge.current import Edge
from ocserve.http.server import bind, serve
from ocserve.modelcard import ServedModel
from ocserve.pages.publication import Published
from ocserve.telemetry import logs
from tests.accounts.books import priced
from tests.http.harness import MODEL, Control
from tests.scripted import SCRIPT, SPEC, Script, ScriptedEngine, alone

_LOOK_S = 0.005


class Watch:
    """How late the event loop comes to what is due, and how much of that it has itself computed.

    Counted in milliseconds, so that it takes no more memory the longer it looks.
    """

    def __init__(self) -> None:
        self.late: Counter[int] = Counter()
        self.computed: Counter[int] = Counter()

    async def look(self) -> None:
        while True:
            due, computed = time.monotonic() + _LOOK_S, time.thread_time()
            await asyncio.sleep(_LOOK_S)
            self.late[int(1000 * (time.monotonic() - due))] += 1
            self.computed[int(1000 * (time.thread_time() - computed))] += 1

    def told(self) -> dict[str, int]:
        """Of both, the 99.9th percentile and the most; and how many tasks there are."""
        found = {"tasks": len(asyncio.all_tasks()), "looks": self.late.total()}
        for name, counts in (("late", self.late), ("computed", self.computed)):
            values = sorted(counts.elements()) or [0]
            found |= {f"{name}_ms": values[int(0.999 * (len(values) - 1))], f"most_{name}_ms": values[-1]}
            counts.clear()
        return found


def scripted(options: dict[str, Any]) -> ScriptedEngine | EngineHandle:
    if "worker" in options:
        limits = Supervision(heartbeat_timeout_s=options["worker"], on_event=logs.event)
        return EngineHandle(SPEC, dict(os.environ), limits, SCRIPT)
    usual = script(options.get("script", {}))
    others = {int(most): script(said) for most, said in options.get("scripts", {}).items()}
    return ScriptedEngine(lambda request: others.get(request.max_tokens, usual), parallel=options.get("slots", 8))


def script(said: dict[str, Any]) -> Script:
    """`tokens` is a list, or a token and how often it is said."""
    token, times = said.get("repeat", ("", 0))
    return Script(
        **{name: value for name, value in said.items() if name != "repeat"}
        | {"tokens": (token,) * times or tuple(said.get("tokens", ("Hello", "!")))}
    )


async def main(options: dict[str, Any], say: Callable[[str], None]) -> None:
    engine = scripted(options)
    limits = convert(options.get("limits", {}), config.Limits)
    model = convert({**to_builtins(MODEL), **options.get("model", {})}, ServedModel)
    ledger = Ledger(Path(options["ledger"]), retention_days=30) if "ledger" in options else None
    billing = Billing(config.Billing(), priced(model.id), ledger) if ledger else None
    settings = replace(config.Server(), **{"port": 0, **options.get("server", {})})
    edge = Edge(settings)
    store = KeyStore(Path(options["keys_file"])) if "keys_file" in options else None
    keys = KeyRing(options.get("key"), config.Auth(), store=store)
    service = alone(engine, model, limits, billing, keys=keys)
    app = build(service, keys, edge, Control(), Published())
    watch = Watch()
    looking = asyncio.create_task(watch.look())
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, lambda: say(json.dumps(watch.told())))
    strict = blockbuster_ctx("ocserve") if options.get("strict") else nullcontext()
    try:
        if "worker" in options:
            await service.fleet.open(model.id)
        with strict:
            bound = bind(settings.host, settings.port)
            if "send_buffer" in options:
                bound[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, options["send_buffer"])
            await serve(app, edge, lambda url: say(url.rpartition(":")[2]), service.stop, sockets=bound)
    finally:
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking
        await service.fleet.close()
        if ledger is not None:
            ledger.close()


def run(options: dict[str, Any], say: Callable[[str], None]) -> None:
    """Serve until a signal ends it; `say` gets the port, and then what is asked for."""
    logs.configure(config.Log(level="debug", format="json"))
    asyncio.run(main(options, say))


if __name__ == "__main__":
    run(json.loads(sys.argv[1]), lambda line: print(line, flush=True))
