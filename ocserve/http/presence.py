"""Work that is worth doing only while somebody waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from starlette.types import Receive

from ocserve.http.exchange import ClientGone


async def unless_gone(gone: Coroutine[None, None, None], answer: Coroutine[None, None, None]) -> None:
    """Run `answer` to its end, or cancel it the moment the client is gone, which is when `gone` returns."""
    work = asyncio.create_task(answer)
    watch = asyncio.create_task(gone)
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watch.cancel()
        left = not work.done()
        if left:
            work.cancel()
            await asyncio.wait({work})  # settling is part of the work
    if left and (work.cancelled() or work.exception() is None):
        raise ClientGone
    work.result()


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone. The body was read before, so nothing else arrives."""
    while (await receive())["type"] != "http.disconnect":
        pass
