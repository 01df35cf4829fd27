"""A server over a scripted engine as a process of its own: `python -m tests.http.serve_scripted '<json>'`.

Prints its port. The JSON may have `server` and `limits` settings, `script` and `model` fields, `key`, `keys_file`, and
`ledger`: the file of one, with which the model has prices.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from msgspec import convert, to_builtins
from msgspec.structs import replace

from ocserve import config
from ocserve.accounts.billing import Billing
from ocserve.accounts.keys import KeyRing
from ocserve.accounts.keystore import KeyStore
from ocserve.accounts.ledger import Ledger
from ocserve.http.application import build
from ocserve.http.server import serve
from ocserve.modelcard import ServedModel
from ocserve.telemetry import logs
from tests.accounts.books import priced
from tests.http.harness import MODEL
from tests.scripted import Script, ScriptedEngine, alone


async def main(options: dict[str, Any]) -> None:
    script = options.get("script", {})
    engine = ScriptedEngine(Script(**{**script, "tokens": tuple(script.get("tokens", ["Hello", "!"]))}))
    limits = config.Limits(**options.get("limits", {}))
    model = convert({**to_builtins(MODEL), **options.get("model", {})}, ServedModel)
    billing = None
    if "ledger" in options:
        ledger = Ledger(Path(options["ledger"]), retention_days=30)
        billing = Billing(config.Billing(), priced(model.id), ledger)
    service = alone(engine, model, limits, billing)
    settings = replace(config.Server(), **{"port": 0, **options.get("server", {})})
    store = KeyStore(Path(options["keys_file"])) if "keys_file" in options else None
    app = build(service, KeyRing(options.get("key"), config.Auth(), store=store), settings)
    await serve(app, settings, lambda url: print(url.rpartition(":")[2], flush=True), service.drain)


if __name__ == "__main__":
    logs.configure(config.Log(level="debug", format="json"))
    asyncio.run(main(json.loads(sys.argv[1])))
