"""P1 and P4 with whole servers: what clients were told they used is in the ledger, once and to the token."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ocserve.accounts import balances
from ocserve.accounts.ledger import Ledger
from ocserve.accounts.pricing import PICODOLLARS
from tests.accounts.books import rows
from tests.http.harness import CHAT, parse, read_all

CLIENTS = 6


@dataclass
class Clients:
    """Threads that ask until their server is gone; what each finished request was told it had used."""

    port: int
    run: int
    told: dict[str, dict[str, Any]] = field(default_factory=dict)

    def ask(self, client: int) -> None:
        for number in range(100_000):
            request_id = f"run{self.run}-{client}-{number}"
            stream = random.random() < 0.5
            body = json.dumps({**CHAT, "stream": stream, "max_tokens": random.randrange(1, 9)}).encode()
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                f"X-Request-Id: {request_id}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            try:
                with socket.create_connection(("127.0.0.1", self.port), 5) as peer:
                    peer.sendall(head.encode() + body)
                    raw = read_all(peer)
            except OSError:
                return
            with suppress(ValueError, IndexError, KeyError):  # cut off by the kill: nobody was told anything
                answer = parse(raw)
                assert answer.status == 200
                whole = stream is False or answer.events[-1] == "[DONE]"
                usage = json.loads(answer.events[-2])["usage"] if stream else answer.json["usage"]
                if whole:
                    self.told[request_id] = usage


def kill_one(file: Path, run: int, after_s: float) -> dict[str, dict[str, Any]]:
    """Serve, kill the server in the middle, and return what its clients were told."""
    options = {"ledger": str(file), "script": {"tokens": list("abcdefgh"), "step_s": 0.002, "cached_tokens": 2}}
    command = [sys.executable, "-m", "tests.http.serve_scripted", json.dumps(options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        assert server.stdout is not None
        clients = Clients(int(server.stdout.readline()), run)
        threads = [threading.Thread(target=clients.ask, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        time.sleep(after_s)
        server.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
    return clients.told


def test_p1_p4_what_clients_were_told_is_in_the_ledger_when_the_server_is_killed(tmp_path: Path, full: bool) -> None:
    kills = 100 if full else 2
    file = tmp_path / "ledger.db"
    told: dict[str, dict[str, Any]] = {}
    for run in range(kills):
        told |= kill_one(file, run, random.uniform(0.05, 0.5))
    Ledger(file, retention_days=30).close()  # the next start
    found = rows(file)
    by_id = {row.request_id: row for row in found}
    assert len(by_id) == len(found), "a request is there twice"
    assert {row.outcome for row in found} <= {"completed", "lost", "cancelled"}
    for request_id, usage in told.items():
        row = by_id[request_id]
        assert (row.outcome, row.cost / PICODOLLARS) == ("completed", usage["cost"])
        assert (row.prompt_tokens, row.completion_tokens) == (usage["prompt_tokens"], usage["completion_tokens"])
    untold = [row for row in found if row.request_id not in told]
    assert len(untold) <= kills * CLIENTS, "only what was in flight at a kill may be unknown to its client"
    assert sum(row.cost for row in found) == sum(round(usage["cost"] * PICODOLLARS) for usage in told.values()) + sum(
        row.cost for row in untold
    )
    assert not any(row.cost for row in found if row.outcome == "lost")
    [account] = balances.standings(file).values()
    assert (account.charged, account.held) == (sum(row.cost for row in found), 0)
    print(f"P1, P4: {kills} kills of the server, {len(told)} answers acknowledged, 0 lost, 0 doubled")
    assert len(told) > kills
