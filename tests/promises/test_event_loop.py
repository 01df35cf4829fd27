"""P30: the event loop of the front process waits for no disk, lock or child, and is never late for long."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from blockbuster import BlockingError, blockbuster_ctx

from tests.promises.conftest import KEY
from tests.promises.servers import server
from tests.promises.streams import ask
from tests.promises.test_secrets import Canaries, sweep

MOST_MS = 100


def test_p30_no_request_has_the_loop_wait(tmp_path: Path) -> None:
    """Every dialect, right and wrong: what blocks raises, and would be a 500 and a line in the log."""
    log = tmp_path / "log"
    with server(log=log, strict=True, key=KEY, ledger=str(tmp_path / "ledger.db")) as served:
        statuses, _, ids = sweep(served.port, Canaries())
        looked = served.report()
    written = log.read_text()
    assert "BlockingError" not in written, written[written.index("BlockingError") - 2000 :][:4000]
    assert max(statuses) < 500
    assert written.count(ids[-1]) >= 1
    print(f"P30: {len(ids)} requests, no blocking call; longest computation {looked['most_computed_ms']} ms")
    assert looked["computed_ms"] < MOST_MS


async def test_p30_a_call_that_blocks_would_be_found() -> None:
    with blockbuster_ctx(), pytest.raises(BlockingError):
        time.sleep(0.001)


def test_p30_the_loop_is_not_late_under_streams(full: bool) -> None:
    """64 streams at 20 tokens a second for 2 s, and for 60 s in the full form."""
    tokens = 1200 if full else 20

    async def streams(port: int) -> None:
        asked = [ask(port, f"emit {tokens} every 0.05", f"r{index}") for index in range(64)]
        assert all(ending.deltas == tokens for ending in await asyncio.gather(*asked))

    with server(worker=10.0) as served:
        served.report()
        asyncio.run(streams(served.port))
        looked = served.report()
    print(f"P30: {looked}")
    assert looked["computed_ms"] < MOST_MS
    assert looked["late_ms"] < MOST_MS * (1 if full else 5)  # other work on the machine
