"""P32: a stream may be long, and silent for long: it is ordered, complete, counted to the token and kept alive."""

from __future__ import annotations

import asyncio
import json
import selectors
from collections.abc import AsyncIterator, MutableMapping
from itertools import pairwise
from typing import Any

from msgspec.structs import replace

from ocserve.api.dialect import Frame
from ocserve.http import sse
from tests.http.harness import MODEL, serving
from tests.scripted import Script, ScriptedEngine

TOKENS = 12_000


class VirtualTime(asyncio.SelectorEventLoop):
    """A loop in which waiting takes no time: whenever nothing else is to be done, its clock moves on."""

    def __init__(self) -> None:
        super().__init__(_NoWaiting(self))
        self.passed = 0.0

    def time(self) -> float:
        return self.passed


class _NoWaiting(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    def __init__(self, loop: VirtualTime) -> None:
        super().__init__()
        self._of = loop

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if not found and timeout:
            self._of.passed += timeout
        return found


def test_p32_an_hour_of_silence_is_bridged_by_comments() -> None:
    sent: list[tuple[float, bytes]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append((asyncio.get_running_loop().time(), message.get("body", b"")))

    async def batches() -> AsyncIterator[list[Frame]]:
        yield [Frame(data=b"first")]
        await asyncio.sleep(3600)
        yield [Frame(data=b"last")]

    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        runner.run(sse.respond(send, batches(), heartbeat_s=10.0))
    times, pieces = zip(*sent[1:], strict=True)
    comments = [piece for piece in pieces if piece.startswith(b":")]
    assert 355 <= len(comments) <= 360
    assert max(later - earlier for earlier, later in pairwise(times)) <= 10.1
    assert [piece for piece in pieces if piece.startswith(b"data")] == [b"data: first\n\n", b"data: last\n\n"]


def test_p32_twelve_thousand_tokens_arrive_in_order_and_are_counted() -> None:
    words = tuple(f"w{number} " for number in range(TOKENS))
    model = replace(MODEL, context_length=32_768, max_output_tokens=16_000)
    body = {"model": "tiny", "prompt": "x", "max_tokens": 16_000, "stream": True}
    with serving(lambda: ScriptedEngine(Script(tokens=words), context=32_768), model=model) as served:
        *chunks, last, done = served.request("POST", "/v1/completions", body, timeout=60).events
    assert done == "[DONE]"
    assert "".join(choice["text"] for chunk in chunks for choice in json.loads(chunk)["choices"]) == "".join(words)
    usage = json.loads(last)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (7, TOKENS)
